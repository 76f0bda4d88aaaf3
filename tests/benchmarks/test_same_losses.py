"""The script that compares the losses of backends of HSTU attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.train import backends
from gr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_backends_that_are_right_have_the_same_losses_and_a_limit_can_be_missed(tmp_path, monkeypatch):
    out = tmp_path / "losses.md"
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.num_users", "200", "--steps", "3"]
    words += ["--cache", str(tmp_path), "--backends", "reference", "--out", str(out)]
    assert backends.main(words) == 0
    assert "| reference | " in out.read_text() and "| within |" in out.read_text()
    monkeypatch.setattr(backends, "LIMIT", -1.0)
    assert backends.main(words) == 1 and "| BEYOND |" in out.read_text()


def test_no_steps_are_one_sentence():
    with pytest.raises(UserError, match="^--steps must be at least 1, got 0"):
        backends.main(["--steps", "0"])
