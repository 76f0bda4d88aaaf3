"""How long training stands still for a checkpoint: in the background, at once, and against one copy in memory.

    python -m benchmarks.train.checkpoint_stall [--world 2] [--gib 1] [--repeats 7] [--beside] [--folder DIR]

The state is that of a run: dense weights with AdamW's two moments (a fifth of it, written by rank 0) and an item table
with row-wise sums of squares (the rest; local with ``--world 1``, else divided by rows among processes over gloo).
``--repeats`` times, in turn: one copy of as many bytes, flat, into memory that is there already; a save in the
background; a save at once. Ranks begin together and the slowest counts. What was being written is on disk before each
measurement, so that waiting for an earlier save is not in the figures. Beside them the memory that a process has more
after its first save and, with ``--beside``, what the background costs the steps: a piece of arithmetic with a save
in flight and without.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from benchmarks.memory import memory
from benchmarks.written import write_page
from gr.distributed.process import ProcessContext, all_gather_object, barrier, process
from gr.distributed.tables import make_tables
from gr.embedding.config import TableOptimizerConfig, TablesConfig
from gr.embedding.spec import TableSpec
from gr.training.saver import Saver
from gr.training.weights import gather, write_step

DIM = 128
GIB = 2**30


class Model(nn.Module):
    """Tables that own their optimizer, and dense layers."""

    def __init__(self, size: int, config: TablesConfig, ctx: ProcessContext) -> None:
        super().__init__()
        dense = size // 5 // 12
        width = 1024
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(dense // width**2))
        rows = size * 4 // 5 // (4 * DIM + 4)
        self.tables = make_tables(config, ctx)((TableSpec("item", rows, DIM, init_std=0.02),))


def measure(ctx: ProcessContext, folder: Path, size: int, repeats: int, beside: bool) -> dict[str, Any]:
    """Seconds of every repeat, the slowest rank's each time."""
    config = TablesConfig(
        kind="sharded" if ctx.world > 1 else "local", optimizer=TableOptimizerConfig(kind="rowwise_adagrad")
    )
    model = Model(size, config, ctx)
    dense = [*model.layers.parameters()]
    optimizer = torch.optim.AdamW(dense)
    for parameter in dense:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step = 0

    def write(state: Any, writer: ProcessContext) -> None:
        write_step(state, folder, step, {}, 2, writer)

    def save(saver: Saver) -> float:
        nonlocal step
        step += 1
        return slowest(lambda: saver.submit(gather(model, optimizer, ctx), write))

    def slowest(work: Callable[[], None]) -> float:
        barrier(ctx)
        begin = time.perf_counter()
        work()
        return max(all_gather_object(time.perf_counter() - begin, ctx))

    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def arithmetic() -> None:
        for _ in range(200):
            torch.mm(left, right)

    found: dict[str, Any] = {name: [] for name in ("copy", "background", "at once", "written", "alone", "beside")}
    with Saver(ctx, background=True) as background, Saver(ctx, background=False) as at_once:
        before = memory()["RssAnon"]
        found["first"] = save(background)
        background.wait()
        found["memory"] = all_gather_object(memory()["RssAnon"] - before, ctx)
        found["bytes"] = all_gather_object(held(background), ctx)
        source = torch.ones(found["bytes"][ctx.rank] // 4)
        target = torch.ones_like(source)
        for _ in range(repeats):
            found["copy"].append(slowest(lambda: target.copy_(source)))
            begin = time.perf_counter()
            found["background"].append(save(background))
            background.wait()
            found["written"].append(max(all_gather_object(time.perf_counter() - begin, ctx)))
            found["at once"].append(save(at_once))
            if beside:
                found["alone"].append(slowest(arithmetic))
                save(background)
                found["beside"].append(slowest(arithmetic))
                background.wait()
    return found


def held(saver: Saver) -> int:
    """Bytes that a saver's copy takes."""
    return sum(buffer.numel() * buffer.element_size() for buffer in saver._buffers._held.values())


def worker(rank: int, world: int, box: Any, threads: int, meeting: str, *what: Any) -> None:
    torch.set_num_threads(threads)
    where = {} if world == 1 else {"init_method": f"file://{meeting}", "rank": rank, "world": world}
    with process("cpu", **where) as ctx:
        found = measure(ctx, *what)
        if ctx.is_main:
            box.put(found)


def told(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--beside", action="store_true", help="also time arithmetic with a save in flight and without")
    parser.add_argument("--folder", help="where checkpoints go; the system's temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        context = mp.get_context("spawn")
        box = context.SimpleQueue()
        what = (Path(folder) / "checkpoints", int(args.gib * GIB), args.repeats, args.beside)
        mp.spawn(worker, (args.world, box, args.threads, f"{folder}/meeting", *what), nprocs=args.world)
        found = box.get()
        shutil.rmtree(f"{folder}/checkpoints")
    copy, stall, sync = (statistics.median(found[name]) for name in ("copy", "background", "at once"))
    rows = [
        ("state", f"{sum(found['bytes']) / GIB:.2f} GiB, of which the processes copy "
         + " and ".join(f"{size / GIB:.2f}" for size in found["bytes"])),
        ("one copy in memory", told(found["copy"])),
        ("stall, in the background", f"{told(found['background'])}; the first, which takes the memory: "
         f"{found['first']:.3f} s"),
        ("stall, at once", told(found["at once"])),
        ("stall over one copy", f"{stall / copy:.2f} (<= 1.2 wanted)"),
        ("stall over a save at once", f"{stall / sync:.1%} (<= 25 % wanted)"),
        ("until a background save is on disk", told(found["written"])),
        ("memory more after the first save", " and ".join(f"{size / GIB:.2f} GiB" for size in found["memory"])),
    ]  # fmt: skip
    if args.beside:
        rows.append(("arithmetic alone, and beside a save", f"{told(found['alone'])}, {told(found['beside'])}"))
    command = f"python -m benchmarks.train.checkpoint_stall --world {args.world} --gib {args.gib:g} "
    command += f"--repeats {args.repeats} --threads {args.threads}{' --beside' if args.beside else ''}"
    write_page(f"checkpoint_stall_{args.world}_ranks", command, rows)


if __name__ == "__main__":
    main()
