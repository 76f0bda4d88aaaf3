"""Time of an operator's backends on named cases, measured alternately.

    python -m benchmarks.kernels.run hstu_attention [--cases ml1m zipf ...] [--providers reference cpu ...]
        [--directions fwd bwd fwd+bwd] [--repeats 7] [--layers 1] [--device cpu|cuda] [--dtype float32]
        [--threads 2] [--allocator kept] [--json OUT.jsonl] [--out FOLDER] [--base COMMIT]
    python -m benchmarks.kernels.run sampled_logits

A case is asked for by name, or by family: those of the family that are meant for the device; ``--cases targets`` are
those that have a floor and a target (``targets.py``). Every repeat times all
providers in turn, each on a batch of its own: lengths, and so the work, are the case's, but order of rows, values and
times are new, so that nothing kept from an earlier call helps. ``--layers N`` makes N calls on each batch, as the
layers of a stack do, and gives the time of one: what a provider keeps for the next layer then counts once.

- ``fwd``: without gradients. ``bwd``: gradients of all float arguments, after a forward that is not timed.
- On a CPU: how many times as fast as ``reference``, the padded definition, within a repeat: median, smallest, largest.
  No absolute figure is printed. ``--allocator kept`` is explained in :mod:`benchmarks.train.ml1m`: look at both.
- On a GPU: milliseconds, TFLOP/s, GB/s and their shares of what this GPU does at best (a large copy; an 8192^3 product
  in bfloat16), by events, with caches flushed; a repeat is the median of ten runs.
- ``per pair``: a case's time per unmasked pair, relative to that of the case that it names, timed alternately. 1 says
  that a mask costs what its pairs cost, or that a bias costs nothing.

- ``--base COMMIT`` times the operator of another commit alternately with this one, each in a process of its own.
- ``--out FOLDER``: rows.jsonl, table.md and a plot a direction.
- Providers are the operator's backends; an implementation of yours, ``package.module:function``, which is held to the
  definition as they are (signature: the operator's module here); and other functions of the same shape (``others.py``,
  or ``package.module:name`` of an ``Other``), marked as such in every table (on a GPU all of them, elsewhere by name).

First every provider is held to the definition on every case (:mod:`benchmarks.kernels.agreement`); one that disagrees
ends the run with status 2. A backend that the device lacks is left out. Excluded: making inputs, one round to warm up.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocator import KEPT
from benchmarks.command import check_folder, parser_of
from benchmarks.kernels import device as devices
from benchmarks.kernels import figures, targets, timing
from benchmarks.kernels.agreement import SEED, check
from benchmarks.kernels.registry import BASELINE, Operator, load
from benchmarks.kernels.rows import rows_of, say
from benchmarks.kernels.timing import DIRECTIONS, DTYPES, Timed, available
from benchmarks.kernels.worker import remotes
from benchmarks.written import append_row
from gr.errors import UserError, run_cli
from gr.training.environment import describe


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("benchmarks.kernels.run", __doc__)
    parser.add_argument("operator")
    parser.add_argument("--cases", nargs="+", help="names or families, or: targets; all for the device if left out")
    parser.add_argument("--providers", nargs="+", help="backends; all that the device has if left out")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=1, help="calls on each batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU if left out")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--allocator", choices=("default", "kept"), default="default")
    parser.add_argument("--json", type=Path, help="append the rows here")
    parser.add_argument("--out", type=Path, help="a folder for rows, a table and plots")
    parser.add_argument("--base", help="a commit whose operator is timed alternately with this one")
    options = parser.parse_args(argv)
    for name in ("repeats", "layers"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs an NVIDIA GPU that torch can use, and there is none")
    check_folder("--json", options.json)
    return options


def main(argv: list[str]) -> int:
    options = options_of(argv)
    if options.allocator == "kept" and any(os.environ.get(name) != value for name, value in KEPT.items()):
        # glibc reads these when the process starts.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.kernels.run", *argv], os.environ | KEPT)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, operator = options.device, load(options.operator)
    word = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    dtype = DTYPES[word]
    words = options.cases
    if words == ["targets"]:
        words = list(dict.fromkeys(target.case for target in targets.ATTENTION.values()))
    cases = operator.select(words, device)
    providers = available(operator, cases[0], options.providers, device, dtype)
    held = [name for name in providers if operator.other(name) is None]
    # The case that another is compared with is timed too, so it is checked too.
    names = list(dict.fromkeys(name for case in cases for name in (case.name, case.against) if name is not None))
    agreed = {name: check(operator, operator.case(name), held, device, dtype) for name in names}
    environment = describe(["benchmarks.kernels.run", *argv])
    ceilings = devices.ceilings() if device == "cuda" else None
    clocks: dict[str, Timed] = {"here": timing.here(operator, device, dtype, options.layers)}
    common = {"layers": options.layers, "allocator": options.allocator, "environment": environment}
    found: list[dict[str, Any]] = []
    past: list[str] = []
    with ExitStack() as stack:
        told = heading(environment, device, ceilings)
        if options.base:
            threads = options.threads or (torch.get_num_threads() if device == "cpu" else 0)
            arguments = {"operator": operator.name, "device": device, "dtype": word, "layers": options.layers}
            workers, commit = stack.enter_context(remotes(options.base, arguments | {"threads": threads}))
            past = workers["base"].ask(what="available", case=cases[0].name, providers=None)
            past = [name for name in held if name in past]
            for name in names:
                workers["base"].ask(what="check", case=name, providers=past)
            clocks = {name: worker.timed for name, worker in workers.items()}
            common["base_commit"] = commit
            told += f"\nbase: commit {commit[:12]}"
        print(told, flush=True)
        for case in cases:
            fit = [name for name in providers if fits(operator, name, agreed, case)]
            for name in set(providers) - set(fit):
                print(f"{case.name}: left out {name}, which needs more memory than the device has")
            fit = able(operator, fit, case, device, dtype)
            some = {"here": fit, "base": [name for name in fit if name in past]}
            every = timing.measure(case, some, options.directions, options.repeats, clocks)
            times, base = ({key[1:]: all_ for key, all_ in every.items() if key[0] == c} for c in ("here", "base"))
            costs = {
                name: operator.cost(operator.make(operator.case(name), device, dtype, SEED))
                for name in (case.name, case.against)
                if name is not None
            }
            if ceilings is not None:
                common |= {"ceilings": ceilings, "clocks": devices.clocks()}
            for row in rows_of(operator, case, fit, options.directions, times, costs, device, dtype, ceilings, base):
                print(say(row), flush=True)
                judged = targets.of_row(row) if device == "cuda" and row["provider"] in held else None
                if judged is not None:
                    print(f"  {judged['what']}: {judged['say']}")
                    row["target"] = judged
                if row["provider"] in held:
                    row["agreement"] = asdict(agreed[case.name][row["provider"]])
                found.append(row | common)
                if options.json:
                    append_row(options.json, found[-1])
    if options.out:
        for path in figures.write(options.out, found, told):
            print(f"wrote {path}")
    return 0


def fits(operator: Operator, provider: str, agreed: dict[str, dict], case: Any) -> bool:
    """Whether a provider ran the whole case, and the one that it is compared with."""
    if operator.other(provider) is not None:
        return True
    return provider in agreed[case.name] and provider in agreed[case.against or case.name]


def able(operator: Operator, providers: list[str], case: Any, device: str, dtype: torch.dtype) -> list[str]:
    """Without the other functions that cannot do this case or the one that it is compared with."""
    found = []
    for provider in providers:
        other = operator.other(provider)
        try:
            for name in (case.name, case.against) if other is not None else ():
                if name is not None:
                    other.prepare(operator.make(operator.case(name), device, dtype, SEED))
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"{case.name}: left out {provider}: {error}")
            continue
        found.append(provider)
    return found


def heading(environment: dict[str, Any], device: str, ceilings: dict[str, Any] | None) -> str:
    """What the figures were measured on, and what they are."""
    versions = f"torch {environment['torch']}"
    if ceilings is None:
        told = f"{environment['cpu']}, {environment['threads']} threads, {versions}"
        return f"{told}\nspeed relative to {BASELINE}: median (smallest to largest)"
    name = torch.cuda.get_device_name()
    versions += f", triton {environment.get('triton', 'none')}, commit {environment.get('git_commit', 'unknown')}"
    best = f"copy {ceilings['copy_gbs']:.0f} GB/s, bfloat16 product {ceilings['matmul_tflops']:.0f} TFLOP/s"
    return f"{name}, {versions}\nat best: {best}, clocks {ceilings['clocks']}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
