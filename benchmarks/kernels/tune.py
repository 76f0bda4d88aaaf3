"""Finds tiles for this GPU and keeps them in the user's own table, which the operator looks at first.

    python -m benchmarks.kernels.tune [--directions forward backward] [--dims 128 64] [--lengths 4096 512 ...]
        [--dtype bfloat16] [--minutes 10] [--processes 8] [--thorough] [--compile-only]
    python -m benchmarks.kernels.tune --emit            (the user's table in the words of the shipped one)

For each key (kernel, width, with and without bias, bucket of lengths): candidates are compiled in several processes
without touching the GPU; those that spill or need too much shared memory leave. The others, and the tile in use, are
timed in turn on random batches, and the fastest is kept if it beats the one in use by more than 2 %. The file is that
of ``GR_HSTU_TILES``, else in the user's cache folder; what it holds already stays. A tile goes from there into the
package's table by hand: ``--emit`` prints the lines, sorted by key.

``--compile-only`` needs no GPU: it says what each candidate compiles to for ``--architecture`` and keeps nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.command import parser_of
from benchmarks.kernels import device as devices
from benchmarks.kernels import timing
from benchmarks.kernels.hstu_attention import AttentionCase, make, run
from benchmarks.kernels.registry import Call
from gr.errors import UserError, run_cli
from gr.kernels.hstu_attention import triton_tiles as tiles
from gr.kernels.hstu_attention.triton_tiles import Key, Tile

BACKEND = "triton"
GAIN = 0.98
"""A new tile must take less than this share of the time of the one in use."""
REPEATS = 3
TOKENS = 1 << 17
"""Of a batch that is timed: as the peers' tables at N = 4096 have them."""
HEADS = 4
LONGEST = 4096
"""Where a key's length is open."""
USUAL_DIMS, USUAL_BLOCKS, USUAL_STAGES = (64, 128), (64, 128), (1, 2, 3)

Clock = Callable[[Tile], float]
"""Seconds of a call in which the kernel runs with that tile."""


def keys(
    architecture: int, directions: Sequence[str], dims: Sequence[int], lengths: Sequence[int], half: bool = True
) -> dict[Key, int]:
    """The keys that such calls launch, in order of importance, and the length at which each is reached."""
    found: dict[Key, int] = {}
    for bias in ("", "narrow"):  # times of nearly every log have 32 bits
        for dim in dims:
            for length in lengths:
                for direction in directions:
                    call = {"half": half, "dim": dim, "bias": bias, "max_seq_len": length}
                    for key in tiles.keys_of(direction, architecture=architecture, **call):
                        found.setdefault(key, length)
    return found


def case_of(key: Key, longest: int) -> AttentionCase:
    """The batch on which tiles of a key are compared; full rows."""
    return AttentionCase(
        name="tile", family="tile", device="none", rows=max(1, TOKENS // longest), longest=longest, heads=HEADS,
        dim_qk=key.dim, dim_v=key.dim, position=bool(key.bias), time=bool(key.bias),
    )  # fmt: skip


def worth_trying(key: Key, longest: int, thorough: bool = False) -> list[Tile]:
    """The table's candidates that a call of this length reaches; unless thorough, the usual ones of 16-bit kernels."""
    found = tiles.candidates(key)
    if key.kernel.endswith("_packed"):
        return [tile for tile in found if tile.block_m >= longest]
    if thorough or not key.half:
        return found
    # A bias takes registers, and so does a wide head: smaller tiles, and no deep pipeline.
    small = key.bias or key.dim not in USUAL_DIMS
    blocks = {32, *USUAL_BLOCKS} if small else set(USUAL_BLOCKS)
    stages = USUAL_STAGES[:2] if small else USUAL_STAGES[1:]
    return [t for t in found if {t.block_m, t.block_n} <= blocks and t.num_stages in stages]


def compiled(key: Key, some: Sequence[Tile], processes: int, deadline: float = float("inf")) -> dict[Tile, list[str]]:
    """What is wrong with each tile, by ahead-of-time compilation; it also fills triton's cache for the launches.

    Args:
        key: Of the kernel.
        some: Tiles.
        processes: At once.
        deadline: ``time.time()`` at which what still compiles is ended.
    """
    shares = [list(some[start::processes]) for start in range(min(processes, len(some)))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = []
    for share in shares:
        told = json.dumps({"key": asdict(key), "tiles": [asdict(tile) for tile in share]})
        command = [sys.executable, "-m", "benchmarks.kernels.tune", "--share", told]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found: dict[Tile, list[str]] = {}
    for process in running:
        try:
            out, _ = process.communicate(timeout=max(0.1, deadline - time.time()) if deadline < float("inf") else None)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        for line in out.splitlines():
            answer = json.loads(line)
            found[Tile(**answer["tile"])] = answer["wrong"]
    return {tile: found.get(tile, ["its compilation did not end"]) for tile in some}


def compile_share(told: dict[str, Any]) -> None:
    """Answers, a line a tile, in a process of its own."""
    from benchmarks.kernels.compile import check

    for each in told["tiles"]:
        try:
            wrong = check(Key(**told["key"]), Tile(**each))
        except Exception as error:  # a tile that triton or ptxas refuses is no candidate
            wrong = [f"{type(error).__name__}: {error}"[:200]]
        print(json.dumps({"tile": each, "wrong": wrong}), flush=True)


def clock(key: Key, case: AttentionCase, device: str, dtype: torch.dtype) -> Clock:
    """On a batch that all tiles share."""
    inputs = make(case, device, dtype, 0)
    direction = "fwd" if key.kernel.startswith("forward") else "bwd"
    # dQ has a kernel of its own in short rows, and in the deterministic form.
    alone = key.kernel == "backward_query" and case.longest >= tiles.ATOMIC_FROM
    call = Call(lambda: run(inputs, BACKEND, alone), list(inputs.leaves.values()), inputs.grad)
    timer = devices.timer(device)

    def seconds(tile: Tile) -> float:
        with tiles.forced(key.kernel, tile):
            return timing.seconds(timer, call, direction, 1)

    return seconds


def best(some: Sequence[Tile], used: Tile, seconds: Clock, repeats: int = REPEATS) -> tuple[Tile, dict[Tile, float]]:
    """The tile to use, and the median time of each; one that cannot be launched is left out."""
    spent: dict[Tile, list[float]] = {tile: [] for tile in dict.fromkeys([used, *some])}
    for repeat in range(-1, repeats):
        for tile in list(spent):
            try:
                took = seconds(tile)
            except Exception as error:
                if tile == used or "out of resource" not in str(error).lower():
                    raise
                del spent[tile]
                continue
            if repeat >= 0:
                spent[tile].append(took)
    medians = {tile: statistics.median(each) for tile, each in spent.items()}
    fastest = min(medians, key=medians.__getitem__)
    return (fastest if medians[fastest] < GAIN * medians[used] else used), medians


def tune(key: Key, used: Tile, some: Sequence[Tile], faults: dict[Tile, list[str]], seconds: Clock) -> dict[str, Any]:
    """Finds the tile of a key and keeps it in the user's table, if it is another one.

    Returns:
        "key", "used" before, "tile", "gain" (time before over time now), "tried", "dropped".
    """
    tile, medians = best([each for each in some if not faults.get(each)], used, seconds)
    if tile != used:
        tiles.write({key: tile}, tiles.user_file())
    return {
        "key": asdict(key),
        "used": asdict(used),
        "tile": asdict(tile),
        "gain": medians[used] / medians[tile],
        "tried": [{**asdict(each), "ms": 1e3 * medians[each]} for each in medians],
        "dropped": [{**asdict(each), "wrong": wrong} for each, wrong in faults.items() if wrong],
    }


def line(key: Key, tile: Tile) -> str:
    """An entry in the words of the shipped table."""
    sizes = (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)
    length = "every" if key.length in (0, tiles.LENGTHS[-1]) else f"<= {key.length}"
    return f"{key.architecture}: {(key.kernel, key.half, key.bias)} dim {key.dim}, length {length}: {sizes}"


def options_of(argv: list[str]) -> Any:
    parser = parser_of("benchmarks.kernels.tune", __doc__)
    parser.add_argument("--directions", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--dims", type=int, nargs="+", choices=tiles.DIMS, default=[128, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[LONGEST, 512, 2048, 128, 64])
    parser.add_argument("--dtype", choices=tuple(timing.DTYPES), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--thorough", action="store_true", help="all candidates, not the usual ones alone")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: what candidates compile to")
    parser.add_argument("--architecture", type=int, choices=tiles.ARCHITECTURES, default=tiles.ARCHITECTURES[-1])
    parser.add_argument("--emit", action="store_true", help="print the user's table and end")
    parser.add_argument("--share", help="internal")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.processes < 1 or min(options.lengths) < 1:
        raise UserError("--minutes, --processes and --lengths must be positive")
    return options


def main(argv: list[str]) -> int:
    options = options_of(argv)
    if options.share:
        compile_share(json.loads(options.share))
        return 0
    if options.emit:
        path = tiles.user_file()
        for key, tile in sorted((tiles.read(path) if path.is_file() else {}).items(), key=lambda each: str(each[0])):
            print(line(key, tile))
        return 0
    if not options.compile_only and not torch.cuda.is_available():
        raise UserError("tiles are timed on an NVIDIA GPU, and torch sees none; without one: --compile-only")
    end = time.time() + 60 * options.minutes
    here = options.architecture if options.compile_only else tiles.architecture(torch.device("cuda", 0))
    wanted = keys(here, options.directions, options.dims, options.lengths, options.dtype != "float32")
    where = "nothing is kept" if options.compile_only else f"into {tiles.user_file()}"
    print(f"sm_{here}, {len(wanted)} keys, {where}", flush=True)
    for number, (key, longest) in enumerate(wanted.items()):
        if time.time() > end:
            print(f"time is up: {len(wanted) - number} keys are left")
            break
        some = worth_trying(key, longest, options.thorough)
        faults = compiled(key, some, options.processes, end)
        if options.compile_only:
            for tile, wrong in faults.items():
                print(f"{line(key, tile)}: {'; '.join(wrong) or 'right'}", flush=True)
            continue
        case = case_of(key, longest)
        found = tune(key, tiles.choose(key), some, faults, clock(key, case, "cuda", timing.DTYPES[options.dtype]))
        told = f"{len(found['tried'])} timed, {len(found['dropped'])} dropped"
        print(f"{line(key, Tile(**found['tile']))}  # {found['gain']:.3f}x ({told})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
