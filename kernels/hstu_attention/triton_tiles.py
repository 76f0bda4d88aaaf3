"""Which tile each Triton kernel runs with: plain data, no triton. Chosen by compiling (no spills), not by measuring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for.

    Attributes:
        block_m: Queries of a tile, at most 128.
        block_n: Keys of a tile, at most 128.
        num_warps: Warps of a program.
        num_stages: Stages of the loads' pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


LARGEST_DIM = 256


def choose(kernel: str, half: bool, dim: int, bias: bool) -> Tile:
    """The tile of "forward", "query_gradient" or "key_gradient".

    Args:
        kernel: One of the three.
        half: float16 or bfloat16, else float32.
        dim: The larger of d_qk and d_v, padded to a power of two, at most ``LARGEST_DIM``.
        bias: There is a position or a time table. Times take two registers a pair.
    """
    if not half:
        return Tile(32, 32, 4, 1)
    if dim > 128:
        return Tile(32, 32, 8, 1)
    if kernel == "key_gradient":
        if bias:
            return Tile(64, 32, 8, 1) if dim <= 64 else Tile(32, 32, 8, 1)
        return Tile(64, 64, 4 if dim <= 64 else 8, 2)
    return Tile(64, 32, 8, 2) if bias else Tile(64, 64, 4, 2)
