"""Triton kernels of HSTU attention: right in the interpreter, and compiled without spills; each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gr.kernels.hstu_attention import RelativeBias, choose_backend, hstu_attention, op
from hstu_cases import plain

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run(*command: str, **environment: str) -> str:
    """Output of Python in a process of its own, TRITON_INTERPRET unset unless given."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE))), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_interpreted_kernels_are_the_definition():
    file = str(HERE / "hstu_triton_interpreted.py")
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert " passed" in told and "skipped" not in told


def test_compiled_kernels_use_matrix_units_and_spill_nothing():
    found = [json.loads(line) for line in run(str(HERE / "hstu_triton_compiled.py")).splitlines()]
    assert len(found) == 24
    for each in found:
        assert each["stack"] == 0 and each["spills"] == 0 and each["products"] > 0, each
        assert each["shared"] <= 163 * 1024, each


def test_triton_is_taken_by_name_alone_and_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("GR_HSTU_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("triton", "cuda", torch.bfloat16) == "triton"
    assert choose_backend(device="cuda", dtype=torch.bfloat16) == choose_backend(device="meta") == "reference"
    assert choose_backend() != "triton"
    with pytest.raises(ValueError, match="^backend must be another than 'triton' on a CPU, unless TRITON_INTERPRET=1"):
        hstu_attention(**plain(dtype=torch.float32), backend="triton")
    with pytest.raises(ValueError, match="^backend must be auto, cpu or reference for float64, got 'triton'"):
        hstu_attention(**plain(), backend="triton")
    monkeypatch.setattr(op, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="^backend must be auto or reference where triton is not installed"):
        choose_backend("triton", "cuda")


def test_deterministic_is_granted_on_a_gpu_without_a_bias_and_refused_with_one():
    with FakeTensorMode():
        q, k, v = (torch.empty(6, 2, 16, device="cuda") for _ in range(3))
        offsets, table = torch.tensor([0, 2, 6], device="cuda"), torch.empty(15, device="cuda")
        plain_call = {"max_seq_len": 8, "divisor": 1.0, "alpha": 1.0, "deterministic": True, "backend": "triton"}
        assert hstu_attention(q, k, v, offsets, **plain_call).shape == v.shape
        with pytest.raises(ValueError, match="^deterministic must be False off the CPU with a bias"):
            hstu_attention(q, k, v, offsets, **plain_call, bias=RelativeBias(position_table=table))
        with pytest.raises(ValueError, match="^deterministic must be False off the CPU for the reference"):
            hstu_attention(q, k, v, offsets, **plain_call | {"backend": "reference"})
