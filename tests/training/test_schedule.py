"""The learning rate at the edges: first step, end of warm-up, start of decay, last step, beyond."""

from __future__ import annotations

import pytest

from gr.training.config import ScheduleConfig
from gr.training.schedule import lr_factor

KINDS = ["constant", "linear", "cosine", "wsd"]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_to_one_and_the_end_is_the_final_ratio(kind):
    cfg = ScheduleConfig(kind=kind, warmup_steps=4, final_ratio=0.1)
    factors = [lr_factor(step, 20, cfg) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    end = 1.0 if kind == "constant" else 0.1
    assert factors[19:] == pytest.approx([end] * 6)
    assert all(a >= b - 1e-12 for a, b in zip(factors[4:], factors[5:], strict=False))


def test_shapes_half_way():
    assert lr_factor(10, 21, ScheduleConfig("linear")) == pytest.approx(0.5)
    assert lr_factor(5, 21, ScheduleConfig("cosine")) == pytest.approx(0.5 * (1 + 2**-0.5))
    wsd = ScheduleConfig("wsd", decay_fraction=0.2)
    assert [lr_factor(step, 20, wsd) for step in range(14, 20)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_short_training_never_leaves_the_range(kind, total, warmup, fraction):
    if warmup >= total:
        warmup = total - 1
    cfg = ScheduleConfig(kind, warmup, 0.2, fraction)
    factors = [lr_factor(step, total, cfg) for step in range(total + 2)]
    assert all(0.2 - 1e-12 <= f <= 1.0 for f in factors)
    assert factors[-1] == factors[total - 1]
