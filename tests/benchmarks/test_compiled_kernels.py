"""Ahead-of-time compilation: what is read from machine code, on a small kernel whose counts are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernels import sass

ROOT = Path(__file__).resolve().parents[2]
USAGE = " Function f:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
CODE = """
        code for sm_90a
        /*0000*/                   MUFU.EX2 R1, R2 ;                    /* 0x1 */
                                                                        /* 0x2 */
        /*0010*/                   FADD R1, R1, R2 ;                    /* 0x1 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R4 ;   /* 0x1 */
        /*0030*/              @!P0 MUFU.RCP R1, R2 ;                    /* 0x1 */
        /*0040*/                   FMUL R1, R1, R2 ;                    /* 0x1 */
        /*0050*/               @P1 BRA 0x40 ;                           /* 0x1 */
        /*0060*/             @!UP0 STL [R1], R2 ;                       /* 0x1 */
        /*0070*/              @!P0 BRA 0x10 ;                           /* 0x1 */
        /*0080*/                   EXIT ;                               /* 0x1 */
        /*0090*/                   BRA 0x90;                            /* 0x1 */
"""


def test_registers_spills_and_the_loop_that_multiplies_matrices_are_read_from_disassembly():
    found = sass.parse(USAGE, CODE, num_warps=8)
    assert (found.registers, found.stack, found.spills, found.tensor) == (40, 8, 1, 1)
    assert found.instructions["MUFU"] == 2 and found.instructions["BRA"] == 3
    # The loop at 0x40 multiplies no matrices: it belongs to the one around it.
    (loop,) = found.loops
    assert loop.total() == 7 and loop.instructions["MUFU"] == 1 and loop.instructions["FADD"] == 1
    assert loop.multiply_adds == 2 * 64 * 128 * 16


def test_a_loop_around_two_products_loops_is_not_one_of_them():
    inner = (
        "        /*0010*/                   HMMA.16816.F32.BF16 R24, R4 ;\n"
        "        /*0020*/              @!P0 BRA 0x10 ;\n"
        "        /*0030*/                   HMMA.1688.F32.TF32 R24, R4 ;\n"
        "        /*0040*/              @!P0 BRA 0x30 ;\n"
        "        /*0050*/              @!P0 BRA 0x0 ;\n"
    )
    found = sass.parse(USAGE, "        /*0000*/                   FADD R1, R1, R2 ;\n" + inner, num_warps=4)
    assert [loop.multiply_adds for loop in found.loops] == [4 * 16 * 8 * 16, 4 * 16 * 8 * 8]
    assert [loop.instructions for loop in found.loops] == [Counter(HMMA=1, BRA=1)] * 2


KERNEL = """
import sys
import torch, triton, triton.language as tl
from benchmarks.kernels.aot import recording
from benchmarks.kernels.sass import read

@triton.jit
def product(a, b, c, rounds, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], dtype=tl.float32)
    for step in range(rounds):
        left = tl.load(a + step * M * K + m[:, None] * K + k[None, :])
        right = tl.load(b + step * K * N + k[:, None] * N + n[None, :])
        total += tl.exp2(tl.dot(left, right))
    tl.store(c + m[:, None] * N + n[None, :], total)

x = torch.zeros(1 << 16, dtype=torch.bfloat16)
for arch in (80, 90):
    with recording(arch) as found:
        product[(1,)](x, x, x.float(), 3, 64, 64, 64, num_warps=4)
        product[(1,)](x, x, x.float(), 3, 64, 128, 64, num_warps=1)
    for each in found:
        usage = read(each.cubin, each.num_warps)
        (loop,) = usage.loops
        scores = each.constants["M"] * each.constants["N"]
        print(arch, each.name, each.constants["N"], usage.stack + usage.spills > 0, usage.instructions["HGMMA"] > 0,
              loop.multiply_adds // scores, loop.instructions["MUFU"] * 32 * each.num_warps // scores, x[0].item())
try:
    product[(1,)](x, x, x, 3, 64, 64, 64)
except RuntimeError as error:
    print("no driver again:", "active drivers" in str(error))
"""


def compile_in_a_process(words: list[str], tmp_path: Path, timeout: int = 250) -> subprocess.CompletedProcess[str]:
    """Compilation needs a process that does not interpret, and a cache that does not remember."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_launches_compile_for_a_gpu_that_is_not_there_and_spills_are_seen(tmp_path):
    pytest.importorskip("triton", reason="needs triton")
    (tmp_path / "kernel.py").write_text(KERNEL)
    done = compile_in_a_process([str(tmp_path / "kernel.py")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # Architecture, name, N, spilled, HGMMA, multiply-adds a score (K), MUFU a score, the input is untouched.
    assert done.stdout.splitlines() == [
        "80 product 64 False False 64 1 0.0",
        "80 product 128 True False 64 1 0.0",
        "90 product 64 False True 64 1 0.0",
        "90 product 128 True False 64 1 0.0",
        "no driver again: True",
    ]
