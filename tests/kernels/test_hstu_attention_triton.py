"""Triton kernels of HSTU attention: right in the interpreter, and compiled without spills; each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gr.kernels.hstu_attention import RelativeBias, choose_backend, hstu_attention, op, triton_tiles
from gr.kernels.hstu_attention.triton_tiles import Tile
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


def interpreted(*options: str) -> str:
    """Pytest's words on hstu_triton_interpreted.py."""
    file = str(HERE / "hstu_triton_interpreted.py")
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file, TRITON_INTERPRET="1")


@pytest.mark.timeout(900)
def test_interpreted_kernels_are_the_definition():
    told = interpreted()
    assert " passed" in told and "failed" not in told


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_interpreted_kernels_are_the_definition_for_every_mask_with_every_bias():
    told = interpreted("-m", "slow", "--timeout", "3600")
    assert " passed" in told and "failed" not in told


CHECK = """
from benchmarks.kernels.compile import check
from gr.kernels.hstu_attention.triton_tiles import Key, Tile, choose
for architecture, kernel, dim, bias in (
    (90, "forward", 128, ""),
    (80, "forward", 64, "narrow"),
    (90, "backward", 64, ""),
    (80, "backward_packed", 64, ""),
):
    key = Key(architecture, kernel, True, dim, bias)
    print(check(key, choose(key)))
print(check(Key(90, "backward", True, 128, ""), Tile(128, 128, 4, 1)))
"""


def test_compiled_kernels_use_matrix_units_and_spill_nothing(tmp_path):
    *right, wrong = run("-c", CHECK, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert right == ["[]"] * 4
    assert "spills" in wrong


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


def test_deterministic_is_granted_on_a_gpu_and_refused_of_the_reference():
    with FakeTensorMode():
        q, k, v = (torch.empty(6, 2, 16, device="cuda") for _ in range(3))
        offsets, table = torch.tensor([0, 2, 6], device="cuda"), torch.empty(15, device="cuda")
        call = {"max_seq_len": 8, "divisor": 1.0, "alpha": 1.0, "deterministic": True}
        call["bias"] = RelativeBias(position_table=table)
        assert hstu_attention(q, k, v, offsets, **call, backend="triton").shape == v.shape
        with pytest.raises(ValueError, match="^deterministic must be False off the CPU for the reference"):
            hstu_attention(q, k, v, offsets, **call, backend="reference")


def test_a_users_tiles_are_looked_at_first_and_kept(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(triton_tiles.FILE_VARIABLE, str(path))
    triton_tiles._user_table.cache_clear()
    call = {"architecture": 90, "half": True, "dim": 50, "bias": "", "max_seq_len": 4000}
    (key,) = triton_tiles.keys_of("forward", **call)
    assert triton_tiles.choose(key) == triton_tiles.shipped()[replace(key, length=0)]
    other = replace(key, kernel="backward")
    triton_tiles.write({key: Tile(32, 64, 4, 1)}, path)
    triton_tiles.write({other: Tile(16, 16, 4, 1)}, path)
    assert triton_tiles.choose(key) == Tile(32, 64, 4, 1) and triton_tiles.choose(other) == Tile(16, 16, 4, 1)
    assert triton_tiles.choose(replace(key, length=512)) == triton_tiles.shipped()[replace(key, length=0)]
    path.write_text(path.read_text().replace("32", "33"))
    with pytest.raises(ValueError, match="tiles.json must hold blocks of 16, 32, 64 or 128"):
        triton_tiles.read(path)
    triton_tiles._user_table.cache_clear()


def test_a_call_launches_what_its_length_and_form_ask_for():
    def kernels(direction: str, max_seq_len: int, **more: bool) -> list[str]:
        call = {"architecture": 100, "half": True, "dim": 64, "bias": "", "max_seq_len": max_seq_len} | more
        found = triton_tiles.keys_of(direction, **call)
        assert all(key.architecture == 90 for key in found)
        return [key.kernel for key in found]

    assert kernels("forward", 16) == ["forward_packed"] and kernels("backward", 16) == ["backward_packed"]
    assert kernels("forward", 16, delta=True) == ["forward"]
    assert kernels("backward", 16, delta=True) == kernels("backward", 512) == ["backward", "backward_query"]
    assert kernels("backward", 4096) == kernels("backward", 4096, half=False) == ["backward"]
    assert kernels("backward", 4096, deterministic=True) == ["backward", "backward_query"]
    # Small blocks of keys would add dQ too often.
    assert kernels("backward", 4096, bias="wide") == ["backward", "backward_query"]


def test_times_of_32_bits_have_tiles_of_their_own_in_16_bits_alone():
    def bias(given: str, half: bool) -> str:
        call = {"architecture": 90, "half": half, "dim": 64, "bias": given, "max_seq_len": 4096}
        return triton_tiles.keys_of("forward", **call)[0].bias

    assert [bias(each, True) for each in triton_tiles.BIASES] == ["", "narrow", "wide"]
    assert [bias(each, False) for each in triton_tiles.BIASES] == ["", "wide", "wide"]
