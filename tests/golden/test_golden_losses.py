"""Numbers do not drift: the first 50 losses are those that were committed."""

from __future__ import annotations

import numpy as np
import pytest

from golden_cases import CASES, FOLDER, STEPS, losses, machine, read


@pytest.mark.parametrize("case", CASES)
def test_first_losses_are_the_golden_ones(case):
    """Bit for bit on the machine kind that wrote them, to 1e-4 elsewhere."""
    where, golden = read(case)
    got = losses(case)
    assert len(golden) == STEPS
    if where == machine():
        assert got == golden
    else:
        np.testing.assert_allclose(got, golden, rtol=1e-4)


def test_compiled_operators_give_the_golden_losses_to_rounding():
    np.testing.assert_allclose(losses("hstu_paper", native=True), read("hstu_paper")[1], rtol=1e-4)


def test_every_golden_file_has_its_case_and_falls():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)
    for case in CASES:
        golden = read(case)[1]
        assert np.mean(golden[-10:]) < np.mean(golden[:10]), case
