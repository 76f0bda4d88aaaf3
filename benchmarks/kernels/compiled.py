"""One kernel as compiled ahead of time: what was counted, what is wrong with it, the table, and the file of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

THREADS = 32
"""Of a warp."""
SHARED_KIB = {80: 163, 90: 227}
"""Shared memory that one program may have (CUDA C++ Programming Guide, technical specifications)."""
AGAIN: dict[tuple[int, str, bool, int, str], float] = {
    # With as many warps as the tile has rows for, these spill: two or four warps make each score.
    (80, "backward", True, 128, "narrow"): 2.0,
    (80, "backward", True, 256, "narrow"): 2.0,
    (80, "backward", True, 256, "wide"): 4.0,
    (80, "forward_packed", True, 32, "narrow"): 2.0,
    (80, "backward_packed", True, 128, "narrow"): 2.0,
    (80, "backward_packed", True, 128, "wide"): 2.0,
    (90, "backward", True, 128, "wide"): 2.0,
    (90, "backward", True, 256, "narrow"): 2.0,
    (90, "backward", True, 256, "wide"): 2.0,
    (90, "forward_packed", True, 128, "narrow"): 2.0,
    **{(90, "backward_packed", True, dim, "narrow"): 2.0 for dim in (16, 32, 128, 256)},
    (90, "backward_packed", True, 256, ""): 2.0,
    (90, "backward_packed", True, 256, "wide"): 2.0,
    # Some thirty tiles for each, with 2 to 16 warps, that make a score once spill in some form, with dQ or without it
    # (often 8 to 24 bytes, where ptxas keeps to half of the registers), or take too much shared memory.
    (80, "backward", False, 128, "wide"): 2.0,
    (80, "backward", False, 256, ""): 2.0,
    # ptxas makes some of them again rather than keep all of a tile in registers.
    **{(sm, "backward_packed", True, dim, ""): 1.5 for sm in (80, 90) for dim in (16, 32, 64)},
    (80, "backward_packed", True, 64, "narrow"): 1.5,
    (90, "backward_packed", True, 128, "wide"): 1.5,
}
"""(architecture, kernel, half, dim, bias) of shipped tiles whose scores are made more than once: how often at most."""


@dataclass(frozen=True)
class Row:
    """One kernel as compiled.

    Attributes:
        composed, deterministic, short: As of a variant (compile.py).
        scored: tanh or, in float32, exp instructions a score; None where no loop was found.
        reciprocals: The others of the special-function unit, a score; None likewise.
        failure: The compiler's words if it refused, else "".
        source: Hash of the kernels' source.
        triton: Version.
    """

    architecture: int
    kernel: str
    dtype: str
    dim: int
    bias: str
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
    scored: float | None
    reciprocals: float | None
    failure: str
    source: str
    triton: str
    short: bool = False

    @property
    def half(self) -> bool:
        """bfloat16 or float16."""
        return self.dtype != "float32"

    @property
    def what(self) -> tuple:
        """All that decides what is compiled."""
        key = (self.architecture, self.kernel, self.dtype, self.dim, self.bias)
        tile = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        return (*key, self.composed, self.deterministic, self.short, *tile, self.source, self.triton)


def designed(row: Row) -> tuple[float, float]:
    """Special-function instructions a score, as the kernels are meant: the most tanh (float32: exp) and reciprocals.

    A score takes one tanh (float32: one exp and a reciprocal), never less, and more only by ``AGAIN``. To that come
    the reciprocals of divisors in a packed kernel, whose every instruction is counted, and where a loop over queries
    divides by each one's: at most one for each query that a thread has, of which matrix units give it a quarter of the
    tile's, and one for a divisor that is a number. In float32 a thread may have all of them, and part of a loop over
    keys may be laid out behind the division that follows it (as seen on sm_80), which is then counted as the loop's.
    """
    times = AGAIN.get((row.architecture, row.kernel, row.half, row.dim, row.bias), 1.0)
    divides = row.kernel.endswith("_packed") or (row.composed and (row.kernel == "backward" or not row.half))
    queries = row.block_m / 4 if row.half else row.block_m
    divisors = (queries + 1) * THREADS * row.num_warps / (row.block_m * row.block_n) if divides else 0.0
    return times, divisors if row.half else times + divisors


def faults(row: Row) -> list[str]:
    """Why a tile cannot be shipped, nor timed by a tuner."""
    if row.failure:
        return [f"does not compile: {row.failure}"]
    wrong = []
    if row.stack or row.spills:
        wrong.append(f"spills: {row.stack} bytes of stack, {row.spills} LDL and STL")
    if row.shared > SHARED_KIB[row.architecture] * 1024:
        wrong.append(f"{row.shared / 1024:.0f} KiB of shared memory of {SHARED_KIB[row.architecture]}")
    if row.half and not row.hgmma + row.hmma:
        wrong.append("no tensor-core instruction")
    return wrong


def undesigned(row: Row) -> list[str]:
    """Special-function instructions that are not as designed."""
    if row.failure:
        return []
    if row.scored is None or row.reciprocals is None:
        return ["no loop of scores was found"]
    times, most = designed(row)
    wrong = [] if 1 <= row.scored <= times else [f"{row.scored:g} tanh or exp a score, by design 1 to {times:g}"]
    return wrong + ([] if row.reciprocals <= most else [f"{row.reciprocals:.2f} reciprocals a score of {most:.2f}"])


def wrong(row: Row) -> list[str]:
    """Both."""
    return faults(row) + undesigned(row)


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file; a line cut off by an interruption, or of another form, is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(Row(**json.loads(line)))
        except (TypeError, ValueError):
            continue
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """The file of exactly these rows."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    columns = (
        "sm", "kernel", "dtype", "dim", "bias", "mask", "sums", "rows", "tile", "warps", "stages", "registers", "stack",
        "LDL+STL", "shared KiB", "HGMMA", "HMMA", "tanh, exp a score", "by design", "reciprocals a score", "at most",
        "verdict",
    )  # fmt: skip
    text = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    for each in found:
        times, most = designed(each)
        cells = (
            each.architecture, each.kernel, each.dtype, each.dim, each.bias,
            "composed" if each.composed else "causal", "integers" if each.deterministic else "",
            "short" if each.short else "",
            f"{each.block_m}x{each.block_n}", each.num_warps, each.num_stages, each.registers, each.stack, each.spills,
            f"{each.shared / 1024:.0f}", each.hgmma, each.hmma, _number(each.scored),
            "1" if times == 1 else f"1 to {times:g}", _number(each.reciprocals), _number(most),
            "; ".join(wrong(each)) or "right",
        )  # fmt: skip
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
