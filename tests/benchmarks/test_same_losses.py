"""The script that compares the losses of backends of HSTU attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.train import backends
from gr.errors import UserError
from gr.kernels.hstu_attention import native

ROOT = Path(__file__).resolve().parents[2]


def test_a_right_backend_has_the_same_losses(tmp_path):
    out = tmp_path / "losses.md"
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.num_users", "200", "--steps", "3"]
    words += ["--cache", str(tmp_path), "--backends", "native", "--out", str(out)]
    if native.library() is None:
        words[words.index("native")] = "reference"
    assert backends.main(words) == 0
    assert "| reference | " in out.read_text() and "BEYOND" not in out.read_text()


def test_a_wrong_backend_is_told_by_twice_the_definitions_own_drift():
    cpu = np.full(50, 5.0)
    found = {"cpu": cpu, "reference": cpu * (1 + np.linspace(0, 1e-3, 50))}
    text, right = backends.judge(found | {"triton": cpu * (1 - np.linspace(0, 1.9e-3, 50))})
    assert right and "| triton | 5.000000 | 4.990500 |" in text and "0.95 | within |" in text
    assert not backends.judge(found | {"triton": cpu * (1 - np.linspace(0, 2.1e-3, 50))})[1]
    assert not backends.judge(found | {"triton": cpu + np.where(np.arange(50) == 0, 1e-4, 0)})[1]
    assert not backends.judge(found | {"triton": cpu * np.nan})[1]


def test_no_steps_are_one_sentence():
    with pytest.raises(UserError, match="^--steps must be at least 1, got 0"):
        backends.main(["--steps", "0"])
