"""Tiles for this device: a unit a key, written to the file that the operator reads (see benchmarks.kernels.tune)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu_check.models import refuse
from benchmarks.gpu_check.plan import Context, Result, Unit
from benchmarks.gpu_check.rates import TINY
from benchmarks.kernels import tune
from gr.kernels.hstu_attention import triton_tiles as tiles
from gr.kernels.hstu_attention.triton_tiles import Key, Tile

DIMS = (128, 64, 256)
LENGTHS = (4096, 512, 2048, 128, 64)
DIRECTIONS = ("forward", "backward")


def units(context: Context) -> Iterator[Unit]:
    """Keys in order of importance; on a CPU one, which shows that tiles are forced, compared and kept."""
    if context.dry:
        key = next(iter(tune.keys(90, ("forward",), (16,), (65,))))
        yield Unit(name_of(key), partial(try_out, key, context))
        return
    for key, longest in tune.keys(tiles.architecture(torch.device("cuda", 0)), DIRECTIONS, DIMS, LENGTHS).items():
        yield Unit(name_of(key), partial(find, key, longest, context), about_s=60 if key.bias else 40)


def name_of(key: Key) -> str:
    """Of a unit."""
    return f"{key.kernel}/{key.dim}/{key.length}" + "/bias" * bool(key.bias)


def find(key: Key, longest: int, context: Context) -> Result:
    """Compiles in several processes, then times."""
    refused = refuse(context)
    if refused is not None:
        return refused
    some = tune.worth_trying(key, longest)
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    faults = tune.compiled(key, some, processes, context.deadline - 10)
    clock = tune.clock(key, tune.case_of(key, longest), "cuda", torch.bfloat16)
    found = tune.tune(key, tiles.choose(key), some, faults, clock)
    told = f"{len(found['tried'])} timed, {len(found['dropped'])} dropped"
    return found | {"say": f"{tune.line(key, Tile(**found['tile']))}, {found['gain']:.3f}x ({told})"}


def try_out(key: Key, context: Context) -> Result:
    """Two tiles of a tiny batch in the interpreter; nothing is kept of what they took."""
    refused = refuse(context)
    if refused is not None:
        return refused
    used, other = Tile(16, 16, 4, 1), Tile(32, 32, 4, 1)
    case = replace(tune.case_of(key, 65), **{**TINY, "longest": 65})
    found = tune.tune(key, used, [other], {}, _Fake(tune.clock(key, case, context.device, torch.float16), other))
    assert found["tile"] == {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
    assert tiles.choose(key) == other and tiles.read(tiles.user_file())[key] == other
    return {"say": "ran with a made-up clock; a CPU finds no tile"}


class _Fake:
    """Runs the call, and says that one tile takes half as long as any other."""

    def __init__(self, clock: tune.Clock, faster: Tile) -> None:
        self._clock, self._faster = clock, faster

    def __call__(self, tile: Tile) -> float:
        self._clock(tile)
        return 0.5 if tile == self._faster else 1.0
