"""Ahead-of-time compilation: what is read from machine code, on a small kernel whose counts are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernels import compile as compiling
from benchmarks.kernels import compiled, older_triton, sass
from gr.errors import UserError

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
    assert found.instructions["MUFU.EX2"] == found.instructions["MUFU.RCP"] == 1
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


def row(**changed) -> compiled.Row:
    """A right row of a 16-bit forward kernel, but for what is changed."""
    right = dict(
        architecture=80, kernel="forward", dtype="bfloat16", dim=64, bias="", composed=False, deterministic=False,
        block_m=64, block_n=64, num_warps=4, num_stages=2, registers=200, stack=0, spills=0, shared=1 << 15, hgmma=0,
        hmma=64, scored=1.0, reciprocals=0.0, failure="", source="s", triton="3.7.1",
    )  # fmt: skip
    return compiled.Row(**right | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"stack": 8}, ["spills: 8 bytes"]),
        ({"spills": 2}, ["2 LDL and STL"]),
        ({"shared": 164 * 1024}, ["164 KiB of shared memory of 163"]),
        ({"hmma": 0}, ["no tensor-core"]),
        ({"scored": 2.0}, ["2 tanh or exp a score, by design 1 to 1"]),
        ({"scored": 0.5}, ["0.5 tanh or exp"]),
        ({"scored": None}, ["no loop of scores"]),
        ({"reciprocals": 0.5}, ["0.50 reciprocals a score of 0.00"]),
        ({"failure": "ptxas said no", "hmma": 0}, ["does not compile: ptxas said no"]),
        # What divides by each query's divisor has reciprocals; exact scores have one of their own.
        ({"kernel": "backward", "composed": True, "reciprocals": 0.5}, []),
        ({"kernel": "backward", "composed": True, "reciprocals": 0.6}, ["0.60 reciprocals a score of 0.53"]),
        ({"dtype": "float32", "hmma": 0, "reciprocals": 1.0}, []),
        ({"dtype": "float32", "hmma": 0, "reciprocals": 1.5}, ["1.50 reciprocals"]),
        # By design up to four warps make each score.
        ({"kernel": "backward", "dim": 256, "bias": "wide", "scored": 4.0}, []),
        (
            {"kernel": "backward", "dim": 256, "bias": "wide", "scored": 4.5},
            ["4.5 tanh or exp a score, by design 1 to 4"],
        ),
    ],
)
def test_a_kernel_is_judged_by_spills_memory_tensor_cores_and_special_functions(changed, words):
    found = compiled.wrong(row(**changed))
    assert len(found) == len(words) and all(word in each for word, each in zip(words, found, strict=True))


def test_tiles_whose_scores_are_made_more_than_once_are_shipped_ones():
    shipped = {(k.architecture, k.kernel, k.half, k.dim, k.bias) for k in compiling.triton_tiles.shipped()}
    assert set(compiled.AGAIN) <= shipped


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
def test_the_backward_kernel_is_compiled_with_and_without_dq_wherever_both_are_launched(architecture):
    found, tiles = compiling.variants(architecture), compiling.triton_tiles
    for key in (key for key in tiles.shipped() if key.kernel == "backward" and key.architecture == architecture):
        call = {"architecture": architecture, "half": key.half, "dim": key.dim, "bias": key.bias}
        long, short = (tiles.keys_of("backward", max_seq_len=n, **call) for n in (compiling.LONGEST, 512))
        assert len(short) == 2
        dtype, both = "bfloat16" if key.half else "float32", len(long) == 1
        wanted = {(False, False, False), (True, False, False)}
        wanted |= {(False, False, True), (True, False, True)} if both else set()
        wanted |= {(True, True, False)} if key.bias else set()
        own = [(v.composed, v.deterministic, v.short) for v in found if v.key == key and v.dtype == dtype]
        assert set(own) == wanted and len(own) == len(wanted)


def test_an_interrupted_table_is_made_to_its_end_without_what_was_made(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = []

    def counted(variant, **changed):
        made.append(variant)
        tile = compiling.triton_tiles.choose(variant.key)
        return compiling._row(variant, tile, hmma=1, scored=1.0, reciprocals=0.0, **changed)

    monkeypatch.setattr(compiling, "row", counted)
    out = tmp_path / "table.md"
    words = ["--arch", "80", "--kernels", "forward", "--dims", "64", "128", "--dtypes", "bfloat16", "--out", str(out)]
    assert compiling.main([*words, "--minutes", "0"]) == 1 and not made  # nothing was reached
    assert compiling.main(words) == 0 and len(made) == 12
    rows = out.with_suffix(".jsonl")
    assert len(compiled.read(rows)) == 12 and out.read_text().count("| right |") == 12
    rows.write_text(rows.read_text()[:-20])  # the last line was cut off
    assert compiling.main(words) == 0 and len(made) == 13
    words[1] = "90"
    assert compiling.main(words) == 0 and len(made) == 25 and out.read_text().count("| right |") == 24
    monkeypatch.setattr(compiling, "source", lambda: "another")
    monkeypatch.setattr(compiling, "row", lambda variant: counted(variant, stack=8))
    assert compiling.main(words) == 1 and len(made) == 37 and len(compiled.read(rows)) == 12
    assert "12 of 12 kernels, 12 of them wrong" in capsys.readouterr().out


def test_an_older_triton_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    def no_pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for triton==0.0.1")

    monkeypatch.setattr(older_triton.subprocess, "run", no_pip)
    with pytest.raises(UserError, match="^--version: pip cannot install triton 0.0.1 and numpy<2.4: ERROR: No"):
        older_triton.make(tmp_path / "old", "0.0.1")
