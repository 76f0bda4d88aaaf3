"""Everything that only a GPU can show, in one unattended command, from a bare checkout.

    python -m benchmarks.gpu_check [--minutes 9] [--out gpu_check.json] [--resume] [--slices correctness rates ...]
        [--again rates ...]
    python -m benchmarks.gpu_check --device cpu      (in Triton's interpreter, tiny: shows that the command works)

Needs torch, triton and numpy; nothing is installed, no test runner is used. Slices, in this order:

- ``correctness``: every backend against the definition in float64 (bf16, fp16, fp32; edges of tiles; all pairs of
  options; memory that nobody wrote is NaN), and the deterministic form twice.
- ``ceilings``: a large copy, an 8192^3 product in bfloat16, clocks under load.
- ``rates``: attention rows beside floor and target, other functions on the same cases, then all other cases.
- ``models``: training steps and inference of whole models beside floor and target.
- ``long``: a training step against a softmax Transformer's at N = 8192.
- ``sync``: one step of the trainer in which any wait for the device is an error.
- ``sanitizer``: compute-sanitizer's memcheck and racecheck on small batches, where it is installed.
- ``tuning``: tiles for this device; written to ``tiles.json`` beside the report, in the form that GR_HSTU_TILES names.

Figures of a dtype are refused while a check of it is red. The clock is kept: nothing begins that would not end in time,
what hangs is ended, and a unit that fails is recorded and passed over. What was left out, and why, stands under "left"
and "cannot". ``--resume`` goes on where the last call stopped, from the units kept beside the report, if the code is
the same; ``--again SLICE`` does a slice anew. Exit status: 0 all done and right, 1 something is wrong or failed, 2 a
mistake in the call or no GPU, 3 right so far, but something is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from benchmarks.command import check_folder, parser_of
from benchmarks.gpu_check.plan import NEVER_ENDED, POISONED, PROCESS, Context, Kept, Slice, Unit, run_slice
from benchmarks.gpu_check.report import Report, code
from gr.errors import UserError, run_cli

TILES = "GR_HSTU_TILES"
POLL_S = 0.5
GRACE_S = 5
RESERVE_S = 12
"""Of the minutes, for ending what hangs and for writing the report."""
RESTARTS = 20
"""Of a slice's processes after they ended by a fault of the device."""


def of(module: str, function: str = "units") -> Callable[[Context], Iterable[Unit]]:
    """A slice's units; its module is imported where they are asked for, so that a broken one is one failure."""
    return lambda context: getattr(import_module(f"benchmarks.gpu_check.{module}"), function)(context)


WORKERS = max(1, min(8, (os.cpu_count() or 2) // 2))
SLICES = (
    Slice("correctness", "every backend against the definition", of("correctness"), 0.4, WORKERS),
    Slice("ceilings", "what the device does at best", of("rates", "ceilings"), 0.1),
    Slice("rates", "attention beside floor and target", of("rates"), 0.35),
    Slice("models", "training steps and inference", of("models"), 0.3),
    Slice("long", "against a softmax Transformer", of("long"), 0.15),
    Slice("sync", "a step that waits for nothing", of("sync"), 0.15),
    Slice("sanitizer", "compute-sanitizer on small batches", of("sanitizer"), 0.3),
    Slice("tuning", "tiles for this device", of("tuning"), 0.9),
)
NAMES = tuple(part.name for part in SLICES)


def options_of(argv: list[str]) -> Namespace:
    parser = parser_of("benchmarks.gpu_check", __doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slices", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--again", nargs="+", choices=NAMES, default=[])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--child", help="internal")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {options.minutes:g}")
    check_folder("--out", options.out)
    return options


def main(argv: list[str]) -> int:
    begin = time.time()
    options = options_of(argv)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated
    from benchmarks.gpu_check import bare

    bare.install()
    if options.child:
        return child(json.loads(options.child), options)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("this checks an NVIDIA GPU, and torch sees none; to try the command: --device cpu")
    with ExitStack() as stack:
        tiles = options.out.resolve().with_name("tiles.json")
        if options.device == "cpu":  # what a CPU "finds" is not kept
            tiles = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiles.json"
            os.environ[TILES] = str(tiles)
        os.environ.setdefault(TILES, str(tiles))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that children end, too
        return check(options, begin + max(1.0, 60 * options.minutes - RESERVE_S))


def check(options: Namespace, end: float) -> int:
    """Slice after slice, each in processes of its own, with a report after each.

    Args:
        options: Of the command.
        end: ``time.time()`` at which everything must have ended.
    """
    kept = Kept(options.out.with_suffix(".units.jsonl"), code())
    if not options.resume and not options.again:
        kept.path.unlink(missing_ok=True)
    kept.forget(options.again)
    report = Report(options.out, options.slices, options.device, kept)
    wanted = [part for part in SLICES if part.name in options.slices]
    # Importing torch takes seconds: slices that have one process share it; on a CPU all do.
    alone = [part for part in wanted if part.processes > 1 and options.device != "cpu"]
    for parts in [*([part] for part in alone), [part for part in wanted if part not in alone]]:
        until = min(end, time.time() + sum(part.share for part in parts) * 60 * options.minutes)
        if parts and until > time.time() + 1:
            print(f"{', '.join(part.name for part in parts)}: {until - time.time():.0f} s at most", flush=True)
            supervise(parts, until, options, kept)
        report.write()
    status = report.write()
    print(f"wrote {options.out}: {report.told()}")
    return status


def supervise(parts: list[Slice], until: float, options: Namespace, kept: Kept) -> None:
    """Runs slices in child processes until they are done or time is up.

    A child that ends by a fault of the device, or that hangs and is ended, is followed by one that goes on behind.
    """
    count = 1 if options.device == "cpu" else max(part.processes for part in parts)
    names = [part.name for part in parts]
    restarts = RESTARTS
    running: dict[int, subprocess.Popen] = {}

    def start(number: int) -> None:
        told = json.dumps({"slices": names, "part": [number, count], "until": until, "code": kept.code})
        words = ["--out", str(options.out), "--device", options.device, "--minutes", str(options.minutes)]
        command = [sys.executable, "-m", "benchmarks.gpu_check", *words, "--child", told]
        running[number] = subprocess.Popen(command, start_new_session=True)

    kept.forget(names, faults=True)
    try:
        for number in range(count):
            start(number)
        while running and time.time() < until + GRACE_S:
            time.sleep(POLL_S)
            for number, process in list(running.items()):
                if process.poll() is None and hangs(process.pid, kept):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                status = process.poll()
                if status is None:
                    continue
                del running[number]
                if (status == POISONED or status < 0) and restarts:  # what it was doing stays marked as failed
                    restarts -= 1
                    start(number)
                elif status:
                    told = f"the process ended with status {status}; what it said stands above"
                    kept.keep(names[0], f"{PROCESS}{number}", {"error": told})
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)  # its own session: sanitizer and all
            process.wait()
        ended = {process.pid for process in running.values()}
        for (name, key), result in kept.results().items():
            if result.get("error") == NEVER_ENDED and result["process"] in ended:
                kept.keep(name, key, {"left": "ended by the clock"})


def hangs(process: int, kept: Kept) -> bool:
    """Whether a process is at a unit that should have ended long ago."""
    units = [result for result in kept.results().values() if result.get("error") == NEVER_ENDED]
    return any(unit["process"] == process and unit["ends_by"] < time.time() for unit in units)


def child(told: dict, options: Namespace) -> int:
    """One process of one slice, or of several."""
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    kept = Kept(options.out.with_suffix(".units.jsonl"), told["code"])
    for part in SLICES:
        if part.name in told["slices"]:
            context = Context(
                device=options.device,
                deadline=min(told["until"], time.time() + part.share * 60 * options.minutes),
                part=tuple(told["part"]),
                kept=kept.results(),
                folder=options.out.resolve().parent,
            )
            status = run_slice(part, context, kept)
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
