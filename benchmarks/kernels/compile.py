"""Compiles every shipped tile of HSTU attention ahead of time and looks at the machine code: no GPU, no driver.

    python -m benchmarks.kernels.compile [--arch 80 90] [--kernels forward ...] [--dims 64 128 ...]
        [--dtypes bfloat16 ...] [--out FOLDER/NAME.md]

For each tile of ``triton_tiles.shipped()`` the backend's own launcher is called with a stand-in driver, and triton
compiles what it would launch: in bfloat16 causal and with a composed mask, targets' ids for positions, float64 or
(deterministic) integer sums of the tables; in float16 at one width; in float32 causal. A row holds

- registers, stack, spills (LDL and STL), shared memory beside what the architecture has;
- tensor-core instructions (HGMMA of a warp group on sm_90, HMMA of a warp), which every 16-bit kernel must have;
- MUFU (exp, tanh, reciprocal) a score, of the loop over whole tiles or of a packed kernel: by design one in 16-bit
  kernels, and a fraction for the reciprocals of divisors. Two say that two groups of warps compute the same scores.

Exit status 1 if a kernel spills, needs more shared memory than there is, or lacks tensor cores. ``--out`` writes the
table, and the rows beside it as JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels import sass
from benchmarks.kernels.aot import Compiled, recording
from gr.errors import Parser, UserError, run_cli
from gr.kernels.hstu_attention import triton_tiles
from gr.kernels.hstu_attention.triton_tiles import Key, Tile
from gr.kernels.hstu_attention.types import Arguments, Mask, RelativeBias

SHARED_KIB = {80: 163, 90: 227}
"""Shared memory that one program may have (CUDA C++ Programming Guide, technical specifications)."""
FUNCTIONS = {
    "forward": "query_kernel",
    "backward_query": "query_kernel",
    "backward": "key_kernel",
    "forward_packed": "packed_kernel",
    "backward_packed": "packed_kernel",
}
LONGEST, LENGTHS, HEADS, THREADS = 4096, (300, 1, 77), 4, 32


@dataclass(frozen=True)
class Variant:
    """A key and what it leaves open. ``composed``: window, contextual tokens and targets at once, with a divisor a
    query and the targets' ids; else causal, with a number.
    """

    key: Key
    dtype: str
    composed: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Row:
    """One kernel as compiled; ``mufu`` is a score's, None where the loop was not found."""

    architecture: int
    kernel: str
    dtype: str
    dim: int
    bias: bool
    composed: bool
    deterministic: bool
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    mufu: float | None
    seconds: float
    wrong: tuple[str, ...]


def variants(architecture: int) -> list[Variant]:
    """Every shipped tile in the forms that matter."""
    found = []
    for key in triton_tiles.shipped():
        if key.architecture != architecture:
            continue
        if not key.half:
            found.append(Variant(key, "float32"))
            continue
        found += [Variant(key, "bfloat16", composed) for composed in (False, True)]
        if key.dim == 64:
            found.append(Variant(key, "float16"))
        if key.bias and key.kernel in ("backward", "backward_packed"):
            found.append(Variant(key, "bfloat16", True, True))
    return found


def check(key: Key, tile: Tile) -> list[str]:
    """What is wrong with a tile for the plain causal call of a key; triton keeps the machine code for the launch."""
    with triton_tiles.forced(key.kernel, tile):
        return list(row(Variant(key, "bfloat16" if key.half else "float32")).wrong)


def row(variant: Variant) -> Row:
    """Compiles one variant; a compiler's refusal is a wrong row."""
    key, tile, failure, found = variant.key, triton_tiles.choose(variant.key), "", []
    try:
        with (
            mock.patch.object(triton_tiles, "architecture", lambda device: key.architecture),
            recording(key.architecture) as found,
        ):
            launch(variant)
    except Exception as error:  # triton and ptxas refuse in many classes of exceptions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        failure = f"does not compile: {type(error).__name__}: {lines[-1][:200] if lines else ''}"
    compiled = [each for each in found if each.name == FUNCTIONS[key.kernel]]
    if failure:
        return _row(variant, tile, 0.0, (failure,))
    assert len(compiled) == 1, f"{variant} launched {[each.name for each in found]}"
    return _told(variant, tile, compiled[0])


def _told(variant: Variant, tile: Tile, compiled: Compiled) -> Row:
    key, usage = variant.key, sass.read(compiled.cubin, compiled.num_warps)
    # Two loops: over whole tiles, and over those that the mask cuts; the first has fewer instructions.
    whole = min((loop.instructions for loop in usage.loops), key=lambda each: each.total(), default=None)
    if key.kernel.endswith("_packed"):
        whole = usage.instructions
    mufu = None
    if whole is not None:
        mufu = whole["MUFU"] * THREADS * compiled.num_warps / (tile.block_m * tile.block_n)
    wrong = []
    if usage.stack or usage.spills:
        wrong.append(f"spills: {usage.stack} bytes of stack, {usage.spills} LDL and STL")
    if compiled.shared > SHARED_KIB[key.architecture] * 1024:
        wrong.append(f"{compiled.shared / 1024:.0f} KiB of shared memory of {SHARED_KIB[key.architecture]}")
    if key.half and not usage.tensor:
        wrong.append("no tensor-core instruction")
    return _row(variant, tile, compiled.seconds, tuple(wrong), usage, compiled.shared, mufu)


def _row(
    variant: Variant, tile: Tile, seconds: float, wrong: tuple[str, ...],
    usage: sass.Usage | None = None, shared: int = 0, mufu: float | None = None,
) -> Row:  # fmt: skip
    key = variant.key
    counts = usage.instructions if usage else {}
    return Row(
        architecture=key.architecture, kernel=key.kernel, dtype=variant.dtype, dim=key.dim, bias=key.bias,
        composed=variant.composed, deterministic=variant.deterministic, **asdict(tile),
        registers=usage.registers if usage else 0, stack=usage.stack if usage else 0,
        spills=usage.spills if usage else 0, shared=shared, hgmma=counts.get("HGMMA", 0), hmma=counts.get("HMMA", 0),
        mufu=mufu, seconds=round(seconds, 2), wrong=wrong,
    )  # fmt: skip


def launch(variant: Variant) -> None:
    """Calls the launcher such that the variant's kernel is among those that it launches, and no other is compiled."""
    from gr.kernels.hstu_attention import triton_launch

    key = variant.key
    longest = min(key.length or LONGEST, LONGEST)
    if key.kernel.endswith("_packed"):
        longest = min(longest, triton_tiles.choose(key).block_m)
    lengths = [min(n, longest) for n in LENGTHS]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens, table = int(offsets[-1]), None
    q, k, v, grad = (torch.zeros(tokens, HEADS, key.dim, dtype=getattr(torch, variant.dtype)) for _ in range(4))
    if key.bias:
        times = torch.arange(tokens)
        table = RelativeBias(
            position_table=torch.zeros(2 * longest - 1), time_table=torch.zeros(129), key_times=times,
            query_times=times, position_ids="target_clamped" if variant.composed else "index",
        )  # fmt: skip
    mask, divisor = Mask(), 8.0
    if variant.composed:
        counts = {"num_contextual": torch.tensor([1, 0, 1]), "num_targets": torch.tensor([1, 0, 1])}
        mask, divisor = Mask(window=512, full_tail=128, **counts), torch.ones(tokens, 1)
    arguments = Arguments(
        q=q, k=k, v=v, q_offsets=offsets, max_seq_len=longest, divisor=divisor, alpha=0.125, mask=mask, bias=table,
        deterministic=variant.deterministic,
    )  # fmt: skip
    if key.kernel.startswith("forward"):
        triton_launch.forward(arguments)
        return
    direct = triton_tiles.keys_of

    def keys_of(*args: Any, **options: Any) -> tuple[Key, ...]:
        if key.kernel == "backward_query":
            options["deterministic"] = True
        found = direct(*args, **options)
        return tuple(each for each in found if each.kernel == key.kernel)

    with mock.patch.object(triton_tiles, "keys_of", keys_of):
        triton_launch.backward(grad, arguments)


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    columns = (
        "sm", "kernel", "dtype", "dim", "bias", "mask", "sums", "tile", "warps", "stages", "registers", "stack",
        "LDL+STL", "shared KiB", "HGMMA", "HMMA", "MUFU a score", "verdict",
    )  # fmt: skip
    text = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    for each in found:
        cells = (
            each.architecture, each.kernel, each.dtype, each.dim, "yes" if each.bias else "",
            "composed" if each.composed else "causal", "integers" if each.deterministic else "",
            f"{each.block_m}x{each.block_n}", each.num_warps, each.num_stages, each.registers, each.stack, each.spills,
            f"{each.shared / 1024:.0f}", each.hgmma, each.hmma, "" if each.mufu is None else f"{each.mufu:.2f}",
            "; ".join(each.wrong) or "right",
        )  # fmt: skip
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks.kernels.compile",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=list(SHARED_KIB))
    parser.add_argument("--kernels", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--dims", type=int, nargs="+", choices=triton_tiles.DIMS, default=list(triton_tiles.DIMS))
    words = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", nargs="+", choices=words, default=list(words))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set; unset it, for an interpreted kernel cannot be compiled")
    if options.out and not options.out.resolve().parent.is_dir():
        raise UserError(f"--out: there is no folder for {options.out}")
    from gr.training.environment import describe

    environment = describe(["benchmarks.kernels.compile", *argv])
    some = [each for arch in options.arch for each in variants(arch)]
    some = [each for each in some if each.key.kernel in options.kernels and each.key.dim in options.dims]
    some = [each for each in some if each.dtype in options.dtypes]
    found = []
    for number, variant in enumerate(some):
        found.append(each := row(variant))
        print(f"{number + 1}/{len(some)} {table([each]).splitlines()[-1]}", flush=True)
    bad = sum(1 for each in found if each.wrong)
    if options.out:
        heading = (
            f"# HSTU attention compiled ahead of time\n\n`{environment['command']}`  \ncommit "
            f"{environment.get('git_commit', 'unknown')}, triton {environment.get('triton')}, torch "
            f"{environment['torch']}. {len(found)} kernels, {bad} of them wrong. Counts of machine code, nothing was "
            "run.\n\n"
        )
        options.out.write_text(heading + table(found), encoding="utf-8")
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in found)
        options.out.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(found)} kernels, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
