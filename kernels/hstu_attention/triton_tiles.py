"""Which kernels a call launches and with which tile: plain data and look-ups, no triton.

A tile is found by a :class:`Key`: in the user's own file, which a tuner writes, else in the shipped table. Shipped
tiles were chosen by compiling, not by measuring: shared memory that fits, and no spills. Whoever stands in for a GPU or
tries tiles replaces :func:`architecture`, or works within :func:`forced`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90)
BIASES = ("", "narrow", "wide")
KERNELS = ("forward", "forward_packed", "backward", "backward_query", "backward_packed")
DIMS = (16, 32, 64, 128, 256)
LENGTHS = (128, 512, 2048, 1 << 62)
LARGEST_DIM = DIMS[-1]
LARGEST_BLOCK = 128
ATOMIC_FROM = 513
"""From this length on dQ may be added atomically: 10 bytes an element more (zeros, sums, conversion), two products
less."""
ATOMIC_KEYS = 128
"""In 16 bits, if the tile has so many keys: a sum of dQ is added for each block of keys, and by the rates assumed of an
H100 (benchmarks/kernels/predict.py) those of smaller blocks take longer than the two products."""
FILE_VARIABLE = "GR_HSTU_TILES"


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for.

    Attributes:
        block_m: Queries of a tile, at most ``LARGEST_BLOCK``; of a packed kernel, tokens of a program.
        block_n: Keys of a tile, at most ``LARGEST_BLOCK``; of a packed kernel the same as ``block_m``.
        num_warps: Warps of a program.
        num_stages: Stages of the loads' pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Key:
    """What a tile is chosen by.

    Attributes:
        architecture: One of ``ARCHITECTURES``: the newest that is not above the device's own.
        kernel: One of ``KERNELS``. "backward" makes dK and dV and, where no "backward_query" follows, adds dQ.
        half: float16 or bfloat16, else float32.
        dim: The larger of d_qk and d_v, padded: one of ``DIMS``.
        bias: "" for none, "wide" with a table of times of 64 bits, "narrow" with any other table. A distance in time
            takes a register a pair for each 32 bits. float32 has no narrow times, and its biases are all "wide".
        length: One of ``LENGTHS``: the smallest that holds ``max_seq_len``. 0 in a table: every length.
    """

    architecture: int
    kernel: str
    half: bool
    dim: int
    bias: str
    length: int = 0


def keys_of(
    direction: str,
    *,
    architecture: int,
    half: bool,
    dim: int,
    bias: str,
    max_seq_len: int,
    delta: bool = False,
    deterministic: bool = False,
) -> tuple[Key, ...]:
    """The kernels that a call launches, in order.

    Args:
        direction: "forward" or "backward".
        architecture: Compute capability, as :func:`architecture` gives it.
        half: float16 or bfloat16, else float32.
        dim: The larger of d_qk and d_v, at most ``LARGEST_DIM``.
        bias: One of ``BIASES``.
        max_seq_len: Of the call.
        delta: There are ``kv_offsets``.
        deterministic: The same bits in every run.
    """

    def key(kernel: str) -> Key:
        return Key(
            architecture=max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0]),
            kernel=kernel,
            half=half,
            dim=next(d for d in DIMS if d >= dim),
            bias=bias if half or not bias else "wide",
            length=next(n for n in LENGTHS if n >= max_seq_len),
        )

    packed, long = key(f"{direction}_packed"), key(direction)
    form = form_of(max_seq_len, delta, deterministic, half, choose(packed).block_m, choose(long).block_n)
    if form == "packed":
        return (packed,)
    if direction == "forward":
        return (long,)
    return (long, key("backward_query")) if form == "split" else (long,)


def form_of(max_seq_len: int, delta: bool, deterministic: bool, half: bool, packed_block: int, block_n: int) -> str:
    """How gradients are made.

    Args:
        max_seq_len, delta, deterministic, half: As of :func:`keys_of`.
        packed_block: Tokens of a packed kernel's program.
        block_n: Keys of a tile of the backward kernel.

    Returns:
        "packed": one pass, several whole rows to a program, 5 products; the forward pass is packed, too. "split": dQ in
        a kernel of its own, 7 products. "atomic": 5 products, dQ added atomically in float32.
    """
    if not delta and max_seq_len <= packed_block:
        return "packed"
    added = not deterministic and max_seq_len >= ATOMIC_FROM and (block_n >= ATOMIC_KEYS or not half)
    return "atomic" if added else "split"


_Sizes = tuple[int, int, int, int]
_FLOATS: dict[tuple[str, bool, str | None], tuple[_Sizes, ...]] = {
    # Float32 products (IEEE) do without tensor cores, and rows of both operands go into registers: wide heads have
    # small tiles, 8 or 16 warps. Stages of loads go through shared memory, and save registers where there is no bias.
    ("forward", False, None): (*((32, 32, 4, 1),) * 4, (32, 32, 8, 1)),
    ("forward_packed", False, None): (*((32, 32, 4, 1),) * 3, *((16, 16, 4, 1),) * 2),
    ("backward_query", False, ""): (*((32, 32, 4, 1),) * 2, (32, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    ("backward_query", False, "wide"): (*((32, 32, 4, 1),) * 3, (16, 16, 8, 1), (16, 32, 4, 1)),
    ("backward_packed", False, None): ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 4, 1), *((16, 16, 4, 1),) * 2),
}  # fmt: skip
_SHIPPED: dict[int, dict[tuple[str, bool, str | None], tuple[_Sizes, ...]]] = {
    # (kernel, half, bias or either): (block_m, block_n, num_warps, num_stages) for dims 16, 32, 64, 128, 256.
    # The rows of a tile (queries, backward keys) are 16 a warp: with fewer, warps may share rows and both compute the
    # scores; where that is so all the same, fewer warps spill. A distance in time takes one register, a wide one two.
    80: {
        ("forward", True, ""): (*((128, 64, 4, 2),) * 3, (128, 64, 8, 2), (32, 32, 4, 1)),
        ("forward", True, "narrow"): (*((64, 64, 4, 1),) * 3, *((32, 32, 4, 1),) * 2),
        ("forward", True, "wide"): (*((64, 32, 4, 2),) * 3, (32, 32, 4, 1), (32, 32, 4, 1)),
        ("backward_query", True, ""): (*((64, 64, 4, 2),) * 3, (64, 32, 4, 2), (32, 32, 4, 1)),
        ("backward_query", True, "narrow"): (*((128, 32, 8, 2),) * 3, *((32, 32, 4, 1),) * 2),
        ("backward_query", True, "wide"): (*((64, 32, 4, 2),) * 3, (32, 32, 4, 1), (32, 32, 4, 1)),
        ("backward", True, ""): (*((32, 64, 4, 2),) * 3, (64, 64, 8, 2), (32, 16, 4, 1)),
        ("backward", True, "narrow"): (*((16, 64, 4, 1),) * 3, (32, 32, 8, 1), (32, 16, 8, 1)),
        ("backward", True, "wide"): (*((16, 32, 2, 1),) * 2, (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 8, 1)),
        ("forward_packed", True, ""): (*((64, 64, 4, 1),) * 4, (64, 64, 8, 1)),
        ("forward_packed", True, "narrow"): ((64, 64, 4, 1), (64, 64, 8, 1), *((64, 64, 4, 1),) * 2, (64, 64, 8, 1)),
        ("forward_packed", True, "wide"): (*((32, 32, 2, 1),) * 2, *((32, 32, 4, 1),) * 2, (64, 64, 8, 1)),
        ("backward_packed", True, ""): (*((64, 64, 4, 1),) * 3, (64, 64, 8, 1), (32, 32, 4, 1)),
        ("backward_packed", True, "narrow"): (*((32, 32, 2, 1),) * 3, (32, 32, 8, 1), (32, 32, 4, 1)),
        ("backward_packed", True, "wide"): (*((32, 32, 2, 1),) * 3, (32, 32, 8, 1), (32, 32, 4, 1)),
        ("backward", False, ""): (*((32, 32, 4, 1),) * 2, (32, 32, 4, 2), (16, 16, 8, 1), (16, 16, 16, 2)),
        ("backward", False, "wide"): ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 16, 1), (16, 16, 8, 1)),
        **_FLOATS,
    },
    90: {
        ("forward", True, ""): (*((128, 128, 8, 2),) * 3, (128, 64, 8, 3), (128, 64, 8, 2)),
        ("forward", True, "narrow"): (*((128, 64, 8, 2),) * 3, (128, 32, 8, 2), (32, 32, 4, 1)),
        ("forward", True, "wide"): (*((64, 32, 4, 2),) * 3, (64, 16, 4, 1), (32, 32, 4, 1)),
        ("backward_query", True, ""): (*((128, 64, 8, 2),) * 4, (128, 16, 8, 1)),
        ("backward_query", True, "narrow"): (*((128, 64, 8, 2),) * 3, (128, 32, 8, 2), (32, 32, 4, 1)),
        ("backward_query", True, "wide"): (*((64, 32, 4, 2),) * 3, (64, 16, 4, 1), (32, 32, 4, 1)),
        ("backward", True, ""): (*((64, 128, 8, 2),) * 3, (16, 128, 8, 2), (32, 16, 4, 1)),
        ("backward", True, "narrow"): (*((16, 64, 4, 1),) * 3, (64, 32, 8, 1), (32, 16, 8, 1)),
        ("backward", True, "wide"): (*((16, 32, 2, 1),) * 2, (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        ("forward_packed", True, ""): (*((128, 128, 8, 1),) * 4, (64, 64, 4, 1)),
        ("forward_packed", True, "narrow"): (*((64, 64, 4, 1),) * 3, (64, 64, 8, 1), (32, 32, 4, 1)),
        ("forward_packed", True, "wide"): (*((32, 32, 2, 1),) * 2, *((32, 32, 4, 1),) * 3),
        ("backward_packed", True, ""): (*((128, 128, 8, 1),) * 3, (64, 64, 4, 1), (64, 64, 8, 1)),
        ("backward_packed", True, "narrow"): (*((64, 64, 8, 1),) * 2, (64, 64, 4, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
        ("backward_packed", True, "wide"): (*((32, 32, 2, 1),) * 2, *((32, 32, 4, 1),) * 2, (32, 32, 8, 1)),
        ("backward", False, ""): (*((32, 32, 4, 1),) * 2, (32, 32, 4, 2), (16, 16, 8, 1), (16, 16, 8, 3)),
        ("backward", False, "wide"): ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (32, 16, 16, 1), (16, 16, 8, 1)),
        **_FLOATS,
    },
}  # fmt: skip

_forced: dict[str, Tile] = {}


@cache
def shipped() -> dict[Key, Tile]:
    """Every shipped tile; a key's length is 0."""
    return {
        Key(architecture, kernel, half, dim, each): Tile(*tile)
        for architecture, table in _SHIPPED.items()
        for (kernel, half, bias), tiles in table.items()
        for dim, tile in zip(DIMS, tiles, strict=True)
        for each in (("", "wide") if bias is None else (bias,))
    }


def candidates(wanted: Key) -> list[Tile]:
    """What a tuner should try for a key."""
    if wanted.kernel.endswith("_packed"):
        return [Tile(n, n, warps, 1) for n in (32, 64, 128) for warps in (4, 8)]
    sizes = (32, 64, 128) if wanted.half else (16, 32, 64)
    return [Tile(m, n, w, s) for m in sizes for n in sizes for w in (4, 8) for s in (1, 2, 3, 4)]


def choose(wanted: Key) -> Tile:
    """The tile of a kernel: forced, else the user's, else the shipped one."""
    if wanted.kernel in _forced:
        return _forced[wanted.kernel]
    for table in (_user_table(), shipped()):
        for found in (wanted, replace(wanted, length=0)):
            if found in table:
                return table[found]
    raise AssertionError(f"no tile for {wanted}")


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, ``kernel`` runs with this tile whatever the tables say: for checks and tuners; not for threads."""
    assert kernel in KERNELS
    before = dict(_forced)
    _forced[kernel] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def user_file() -> Path:
    """Where the user's own tiles lie: ``GR_HSTU_TILES``, else ``hstu-gr/tiles.json`` in the user's cache folder.

    JSON: ``[{"key": {the fields of Key}, "tile": {the fields of Tile}}, ...]``.
    """
    if os.environ.get(FILE_VARIABLE):
        return Path(os.environ[FILE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hstu-gr" / "tiles.json"


def write(table: dict[Key, Tile], path: Path) -> None:
    """Adds to a user's file, or replaces its tiles of the same keys; written aside first, and used from now on."""
    table = (read(path) if path.is_file() else {}) | table
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    rows = [{"key": asdict(key), "tile": asdict(tile)} for key, tile in table.items()]
    aside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    aside.replace(path)
    _user_table.cache_clear()


def read(path: Path) -> dict[Key, Tile]:
    """Reads a user's file.

    Raises:
        ValueError: The file is not what :func:`user_file` says.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        table = {Key(**row["key"]): Tile(**row["tile"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a list of tiles with their keys: {error}") from error
    for key, tile in table.items():
        sizes = (tile.block_m, tile.block_n)
        right = key.kernel in KERNELS and key.bias in BIASES and all(n in (16, 32, 64, 128) for n in sizes)
        right = right and tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages in range(1, 9)
        if not right or (key.kernel.endswith("_packed") and tile.block_m != tile.block_n):
            raise ValueError(f"{path} must hold blocks of 16, 32, 64 or 128, square if packed, got {tile} for {key}")
    return table


@cache
def _user_table() -> dict[Key, Tile]:
    path = user_file()
    return read(path) if path.is_file() else {}


@cache
def architecture(device: torch.device) -> int:
    """Compute capability, 80 for instance; off CUDA that of the newest in the table."""
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
