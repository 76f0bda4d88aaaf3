"""Which tile each Triton kernel runs with: plain data and look-ups, no triton.

A tile is found by a :class:`Key`. The shipped table is small: an entry may leave the length open. A user's own file,
written by a tuner, is looked at first. Everything that asks the machine something is a function of its own here, so
that a check without a GPU can stand in for it: :func:`architecture`, :func:`interpreted`, :func:`forced`.
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
KERNELS = ("forward", "forward_packed", "backward", "backward_query", "backward_packed")
DIMS = (16, 32, 64, 128, 256)
LENGTHS = (128, 512, 2048, 1 << 30)
LARGEST_DIM = DIMS[-1]
PACKED_BLOCK = 128
FILE_VARIABLE = "GR_HSTU_TILES"


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for.

    Attributes:
        block_m: Query rows of a tile; of a packed kernel, tokens of a program.
        block_n: Keys of a tile.
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
        architecture: 80 or 90: the newest one not above the device's own.
        kernel: One of ``KERNELS``: "backward" makes dK and dV (and adds dQ), "backward_query" dQ alone.
        half: float16 or bfloat16, else float32.
        dim: The larger of d_qk and d_v, padded: one of ``DIMS``.
        bias: There is a position or a time table.
        length: One of ``LENGTHS``: the smallest that holds ``max_seq_len``. 0 in a table: every length.
    """

    architecture: int
    kernel: str
    half: bool
    dim: int
    bias: bool
    length: int = 0


def key(
    architecture: int, kernel: str, dtype: torch.dtype, d_qk: int, d_v: int, max_seq_len: int, bias: bool
) -> Key:
    """The key of a call."""
    return Key(
        architecture=max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0]),
        kernel=kernel,
        half=dtype != torch.float32,
        dim=next(d for d in DIMS if d >= max(d_qk, d_v)),
        bias=bias,
        length=next(n for n in LENGTHS if n >= max_seq_len),
    )


def _rows() -> Iterator[tuple[Key, Tile]]:
    """The shipped table: kernel, half, bias -> a tile for each dim, for sm_80 and sm_90."""
    for architecture in ARCHITECTURES:
        for (kernel, half, bias), tiles in _TILES[architecture].items():
            for dim, tile in zip(DIMS, tiles, strict=True):
                for each in (False, True) if bias is None else (bias,):
                    yield Key(architecture, kernel, half, dim, each), Tile(*tile)


def _one(tile: tuple[int, int, int, int]) -> tuple[tuple[int, int, int, int], ...]:
    return (tile,) * len(DIMS)


_TILES: dict[int, dict[tuple[str, bool, bool | None], tuple[tuple[int, int, int, int], ...]]] = {
    # (kernel, half, bias or either): (block_m, block_n, num_warps, num_stages) for dims 16, 32, 64, 128, 256.
    80: {
        ("forward", True, False): ((128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        ("forward", True, True): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        ("backward", True, None): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
        ("backward_query", True, None): _one((64, 64, 4, 2)),
        ("forward_packed", True, None): _one((64, 64, 4, 1)),
        ("backward_packed", True, None): _one((64, 64, 8, 1)),
        **{(kernel, False, None): _one((32, 32, 4, 1)) for kernel in KERNELS},
    },
    90: {
        ("forward", True, False): (
            (128, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2),
        ),
        ("forward", True, True): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        ("backward", True, None): ((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 1)),
        ("backward_query", True, None): _one((64, 64, 4, 2)),
        ("forward_packed", True, None): _one((128, 128, 8, 1)),
        ("backward_packed", True, None): _one((64, 64, 8, 1)),
        **{(kernel, False, None): _one((32, 32, 4, 1)) for kernel in KERNELS},
    },
}  # fmt: skip

_forced: dict[str, Tile] = {}


def shipped() -> dict[Key, Tile]:
    """Every shipped tile; a key's length is 0."""
    return dict(_rows())


def candidates(wanted: Key) -> list[Tile]:
    """What a tuner should try for a key."""
    if wanted.kernel.endswith("_packed"):
        sizes = [(n, n) for n in (32, 64, 128)]
    elif wanted.half:
        sizes = [(m, n) for m in (32, 64, 128) for n in (32, 64, 128)]
    else:
        sizes = [(16, 16), (32, 16), (16, 32), (32, 32), (64, 32)]
    stages = (1,) if wanted.kernel.endswith("_packed") else (1, 2, 3, 4)
    return [Tile(m, n, warps, stage) for m, n in sizes for warps in (4, 8) for stage in stages]


def choose(wanted: Key) -> Tile:
    """The tile of a kernel: forced, else the user's, else the shipped one."""
    if wanted.kernel in _forced:
        return _forced[wanted.kernel]
    for table in (_user_table(), _shipped_table()):
        for found in (wanted, replace(wanted, length=0)):
            if found in table:
                return table[found]
    raise AssertionError(f"no tile for {wanted}")


def backward_form(max_seq_len: int, delta: bool, deterministic: bool, packed_block: int) -> str:
    """How gradients are made.

    Returns:
        "packed": one pass over rows of at most ``packed_block`` tokens, several to a program. "split": dK and dV in one
        kernel, dQ in a second one: 7 products, no atomic dQ. "atomic": 5 products, dQ added atomically in float32.
    """
    if not delta and max_seq_len <= packed_block:
        return "packed"
    # Atomic dQ costs 10 bytes an element more (zeros, sum, conversion), which short rows cannot hide.
    return "split" if deterministic or max_seq_len <= 512 else "atomic"


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
    """Writes a user's file, aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"key": asdict(k), "tile": asdict(t)} for k, t in table.items()]
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    aside.replace(path)


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
    for k, t in table.items():
        sizes = (t.block_m, t.block_n, t.num_warps)
        right = k.kernel in KERNELS and all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in sizes)
        right = right and 16 <= t.block_m <= 256 and 16 <= t.block_n <= 256 and 1 <= t.num_stages <= 8
        if not right or (k.kernel.endswith("_packed") and t.block_m != t.block_n):
            raise ValueError(f"{path} must hold tiles of powers of two from 16 to 256, got {t} for {k}")
    return table


@cache
def _user_table() -> dict[Key, Tile]:
    path = user_file()
    return read(path) if path.is_file() else {}


@cache
def _shipped_table() -> dict[Key, Tile]:
    return shipped()


@cache
def architecture(device: torch.device) -> int:
    """Compute capability, 80 for instance; where kernels are interpreted, that of the table's newest."""
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET was set when they were loaded, and on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"
