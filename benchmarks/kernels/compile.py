"""Compiles every shipped tile of HSTU attention ahead of time and looks at the machine code: no GPU, no driver.

    python -m benchmarks.kernels.compile [--arch 80 90] [--kernels forward ...] [--dims 64 128 ...]
        [--dtypes bfloat16 ...] [--out FOLDER/NAME.md] [--minutes 20]

For each tile of ``triton_tiles.shipped()`` the backend's own launcher is called with a stand-in driver, and triton
compiles what it would launch: in bfloat16 causal and with a composed mask, targets' ids for positions, float64 or
(deterministic) integer sums of the tables; in float16 at one width, causal; in float32 the same as in bfloat16. Where
long rows add dQ the backward kernel is compiled without it, too, as short rows launch it. A row holds

- registers, stack, spills (LDL and STL), shared memory beside what the architecture has;
- tensor-core instructions (HGMMA of a warp group on sm_90, HMMA of a warp), which every 16-bit kernel must have;
- special-function instructions a score, of the loop over whole tiles or of a packed kernel: tanh (float32: exp), and
  reciprocals, beside what they are by design (:func:`benchmarks.kernels.compiled.designed`).

Exit status 1 if a kernel spills, needs more shared memory than there is, lacks tensor cores, has other counts of
special-function instructions than designed, or was not reached in ``--minutes``. ``--out`` writes the table, and beside
it each row as soon as it is made, as JSON lines. Another run with the same ``--out`` makes what is missing and keeps
the rows of other choices of options, as long as the kernels' source, the tile and triton are the same. The source is
that of the kernels and of what they call (``SOURCES``), not the launcher, which decides what arguments a kernel gets:
who changes that removes the rows.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.command import check_folder, parser_of
from benchmarks.kernels import compiled, sass
from benchmarks.kernels.aot import Compiled, recording
from benchmarks.kernels.compiled import Row
from benchmarks.written import append_row
from gr.errors import UserError, run_cli
from gr.kernels.hstu_attention import triton_tiles
from gr.kernels.hstu_attention.triton_tiles import ARCHITECTURES, Key, Tile
from gr.kernels.hstu_attention.types import Arguments, Mask, RelativeBias

FUNCTIONS = {
    "forward": "query_kernel",
    "backward_query": "query_kernel",
    "backward": "key_kernel",
    "forward_packed": "packed_kernel",
    "backward_packed": "packed_kernel",
}
LONGEST, LENGTHS, HEADS = 4096, (300, 1, 77), 4
REQUIRED = (
    "Required of each: no stack, no local loads or stores, shared memory within the architecture's, instructions of "
    "the special-function unit as designed; of 16-bit kernels also tensor-core instructions. float32 kernels multiply "
    'in float32 (`torch.get_float32_matmul_precision()` "highest", the default), which tensor cores do not; with TF32 '
    'products ("high") they are not compiled. Biases are a position and a time table: times of 64 bits are "wide", of '
    '32 bits "narrow". Rows that are "short" take the backward kernel without dQ where long ones would add it; '
    "with integer sums it goes without in any row."
)
SOURCES = ("triton_kernels.py", "triton_packed.py", "triton_scores.py")


@dataclass(frozen=True)
class Variant:
    """A key and what it leaves open. ``composed``: window, contextual tokens and targets at once, with a divisor a
    query and the targets' ids; else causal, with a number. ``short``: the backward kernel without dQ of a key whose
    long rows add dQ; the deterministic form goes without it anyway.
    """

    key: Key
    dtype: str
    composed: bool = False
    deterministic: bool = False
    short: bool = False


def variants(architecture: int) -> list[Variant]:
    """Every shipped tile in the forms that matter.

    Without dQ both masks are needed: where ptxas keeps to half of the registers, a tile may spill in the causal form
    alone (one did, on sm_80). Integer sums are compiled composed only; without a bias there are none, and the
    deterministic form is the short one.
    """
    found = []
    for key, tile in triton_tiles.shipped().items():
        if key.architecture != architecture:
            continue
        dtype = "bfloat16" if key.half else "float32"
        found += [Variant(key, dtype, composed) for composed in (False, True)]
        if key.half and key.dim == 64:
            found.append(Variant(key, "float16"))
        if key.bias and key.kernel in ("backward", "backward_packed"):
            found.append(Variant(key, dtype, True, True))
        form = triton_tiles.form_of(LONGEST, False, False, key.half, 0, tile.block_n)
        if key.kernel == "backward" and form == "atomic":
            found += [Variant(key, dtype, composed, short=True) for composed in (False, True)]
    return found


@cache
def source() -> str:
    """Hash of the kernels and of what they call."""
    folder = Path(triton_tiles.__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def check(key: Key, tile: Tile) -> list[str]:
    """What forbids a tile for the plain causal call of a key; triton keeps the machine code for the launch."""
    with triton_tiles.forced(key.kernel, tile):
        return compiled.faults(row(Variant(key, "bfloat16" if key.half else "float32")))


def row(variant: Variant) -> Row:
    """Compiles one variant; a compiler's refusal is a row, too."""
    key, tile, found = variant.key, triton_tiles.choose(variant.key), []
    try:
        with (
            mock.patch.object(triton_tiles, "architecture", lambda device: key.architecture),
            recording(key.architecture) as found,
        ):
            launch(variant)
    except Exception as error:  # triton and ptxas refuse in many classes of exceptions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return _row(variant, tile, failure=f"{type(error).__name__}: {lines[-1][:200] if lines else ''}")
    own = [each for each in found if each.name == FUNCTIONS[key.kernel]]
    assert len(own) == 1, f"{variant} launched {[each.name for each in found]}"
    return _counted(variant, tile, own[0])


def _counted(variant: Variant, tile: Tile, code: Compiled) -> Row:
    key, usage = variant.key, sass.read(code.cubin, code.num_warps)
    # Two loops: over whole tiles, and over those that the mask cuts; the first has fewer instructions.
    loops = [loop for loop in usage.loops if loop.instructions["MUFU"] and (loop.multiply_adds or not key.half)]
    whole = min((loop.instructions for loop in loops), key=lambda each: each.total(), default=None)
    if key.kernel.endswith("_packed"):
        whole = usage.instructions
    scored = reciprocals = None
    if whole is not None:
        share = compiled.THREADS * code.num_warps / (tile.block_m * tile.block_n)
        function = whole["MUFU.TANH" if key.half else "MUFU.EX2"]
        scored, reciprocals = function * share, (whole["MUFU"] - function) * share
    counts = usage.instructions
    return _row(
        variant, tile, registers=usage.registers, stack=usage.stack, spills=usage.spills, shared=code.shared,
        hgmma=counts["HGMMA"], hmma=counts["HMMA"], scored=scored, reciprocals=reciprocals,
    )  # fmt: skip


def _row(variant: Variant, tile: Tile, **counted: Any) -> Row:
    import triton

    key = variant.key
    nothing = dict.fromkeys(("registers", "stack", "spills", "shared", "hgmma", "hmma"), 0)
    return Row(
        architecture=key.architecture, kernel=key.kernel, dtype=variant.dtype, dim=key.dim, bias=key.bias,
        composed=variant.composed, deterministic=variant.deterministic, short=variant.short, **asdict(tile),
        **nothing | {"scored": None, "reciprocals": None, "failure": ""} | counted,
        source=source(), triton=triton.__version__,
    )  # fmt: skip


def launch(variant: Variant) -> None:
    """Calls the launcher such that the variant's kernel is among those that it launches, and no other is compiled."""
    from gr.kernels.hstu_attention import triton_launch

    key = variant.key
    longest = triton_tiles.ATOMIC_FROM - 1 if variant.short else min(key.length or LONGEST, LONGEST)
    if key.kernel.endswith("_packed"):
        longest = min(longest, triton_tiles.choose(key).block_m)
    lengths = [min(n, longest) for n in LENGTHS]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens, table = int(offsets[-1]), None
    q, k, v, grad = (torch.zeros(tokens, HEADS, key.dim, dtype=getattr(torch, variant.dtype)) for _ in range(4))
    if key.bias:
        times = torch.arange(tokens, dtype=torch.int32 if key.bias == "narrow" else torch.int64)
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
    if key.kernel == "backward_query":
        arguments = replace(arguments, deterministic=True)
    other = {"backward": "queries", "backward_query": "keys"}.get(key.kernel)
    with nullcontext() if other is None else mock.patch.object(triton_launch._Call, other, lambda *_, **__: None):
        triton_launch.backward(grad, arguments)


def main(argv: list[str]) -> int:
    parser = parser_of("benchmarks.kernels.compile", __doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--dims", type=int, nargs="+", choices=triton_tiles.DIMS, default=list(triton_tiles.DIMS))
    words = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", nargs="+", choices=words, default=list(words))
    parser.add_argument("--out", type=Path, help="a Markdown file; rows that lie beside it are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further kernel is begun after these")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set; unset it, for an interpreted kernel cannot be compiled")
    check_folder("--out", options.out)
    from gr.training.environment import describe

    environment = describe(["benchmarks.kernels.compile", *argv])
    every = [each for arch in ARCHITECTURES for each in variants(arch)]
    some = [each for each in every if each.key.architecture in options.arch and each.dtype in options.dtypes]
    some = [each for each in some if each.key.kernel in options.kernels and each.key.dim in options.dims]
    begun, rows_file, made = time.monotonic(), None, {}
    if options.out:
        rows_file = options.out.with_suffix(".jsonl")
        made = {each.what: each for each in compiled.read(rows_file)}
        compiled.write(rows_file, made.values())
    for number, variant in enumerate(some):
        what = _row(variant, triton_tiles.choose(variant.key)).what
        if what in made or time.monotonic() - begun > 60 * options.minutes:
            continue
        made[what] = row(variant)
        if rows_file:
            append_row(rows_file, asdict(made[what]))
        print(f"{number + 1}/{len(some)} {compiled.table([made[what]]).splitlines()[-1]}", flush=True)
    asked, found = (
        [made[what] for each in rows if (what := _row(each, triton_tiles.choose(each.key)).what) in made]
        for rows in (some, every)
    )
    if rows_file:
        compiled.write(rows_file, found)
        heading = (
            f"# HSTU attention compiled ahead of time\n\n`{environment['command']}`  \ncommit "
            f"{environment.get('git_commit', 'unknown')}, kernels' source {source()}, triton "
            f"{environment.get('triton')}, torch {environment['torch']}. {_told(found, len(every))}. Counts of machine "
            f"code, nothing was run.\n\n{REQUIRED}\n\n"
        )
        options.out.write_text(heading + compiled.table(found), encoding="utf-8")
    print(_told(asked, len(some)))
    return 1 if any(compiled.wrong(each) for each in asked) or len(asked) < len(some) else 0


def _told(found: list[Row], wanted: int) -> str:
    return f"{len(found)} of {wanted} kernels, {sum(1 for each in found if compiled.wrong(each))} of them wrong"


if __name__ == "__main__":
    sys.exit(run_cli(main))
