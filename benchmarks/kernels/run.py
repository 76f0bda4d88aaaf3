"""Time of an operator's backends on named cases, measured alternately.

    python -m benchmarks.kernels.run hstu_attention [--cases ml1m zipf ...] [--providers reference cpu ...]
        [--directions fwd bwd fwd+bwd] [--repeats 7] [--layers 1] [--device cpu|cuda] [--dtype float32]
        [--threads 2] [--allocator kept] [--json OUT.jsonl]
    python -m benchmarks.kernels.run sampled_logits

A case is asked for by name, or by family: those of the family that are meant for the device. Every repeat times all
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

First every provider is held to the definition on every case (:mod:`benchmarks.kernels.agreement`); one that disagrees
ends the run with status 2. A backend that the device lacks is left out. Excluded: making inputs, one round to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import device as devices
from benchmarks.kernels.agreement import SEED, check
from benchmarks.kernels.registry import BASELINE, Case, Cost, Inputs, Operator, load
from benchmarks.train.ml1m import KEPT, ratios
from gr.errors import UserError, run_cli
from gr.training.environment import describe

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available(operator: Operator, case: Case, wanted: list[str] | None, device: str, dtype: torch.dtype) -> list[str]:
    """Providers to time, the baseline first; on a CPU it is always among them.

    Raises:
        UserError: A provider asked for does not exist, or not on the device.
    """
    known = operator.providers()
    for name in wanted or ():
        if name not in known:
            raise UserError(f"--providers: {operator.name} has no provider {name!r}; it has {', '.join(known)}")
    names = list(known if wanted is None else dict.fromkeys(wanted))
    part, _ = operator.shorten(operator.make(case, device, dtype, SEED), 1)
    found = []
    for name in names:
        try:
            operator.run(part, name)
        except ValueError as error:
            if not str(error).startswith("backend"):
                raise
            if wanted is not None:
                raise UserError(f"--providers: {name!r} does not run on {device}: {error}") from error
            continue
        found.append(name)
    first = [BASELINE] if device == "cpu" or BASELINE in found else []
    return first + [name for name in found if name != BASELINE]


def seconds(
    timer: devices.CpuTimer | devices.CudaTimer,
    operator: Operator,
    inputs: Inputs,
    provider: str,
    direction: str,
    layers: int,
) -> float:
    """Time of one call of ``layers`` on the same batch."""
    leaves = list(inputs.leaves.values())

    def forward() -> list[torch.Tensor]:
        return [operator.run(inputs, provider) for _ in range(layers)]

    def backward(outs: list[torch.Tensor]) -> None:
        while outs:
            torch.autograd.grad(outs.pop(), leaves, inputs.grad)

    def once() -> float:
        if direction == "fwd":
            with torch.no_grad():
                timer.start()
                forward()
                return timer.stop()
        if direction == "bwd":
            outs = forward()
            timer.start()
            backward(outs)
            return timer.stop()
        timer.start()
        backward(forward())
        return timer.stop()

    return statistics.median(once() for _ in range(timer.runs)) / layers


def measure(
    operator: Operator,
    case: Case,
    providers: list[str],
    directions: Sequence[str],
    repeats: int,
    layers: int,
    device: str,
    dtype: torch.dtype,
) -> dict[tuple[str, str, str], list[float]]:
    """Seconds of each repeat by (case, provider, direction); the case that this one names is timed in turn with it."""
    cases = [case] if case.against is None else [case, operator.case(case.against)]
    entries = [(provider, one) for provider in providers for one in cases]
    timer = devices.timer(device)
    found: dict[tuple[str, str, str], list[float]] = {}
    seed = SEED
    for direction in directions:
        for repeat in range(-1, repeats):  # the first round warms up
            for provider, one in entries:
                seed += 1
                inputs = operator.make(one, device, dtype, seed)
                spent = seconds(timer, operator, inputs, provider, direction, layers)
                if repeat >= 0:
                    found.setdefault((one.name, provider, direction), []).append(spent)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rows_of(
    operator: Operator,
    case: Case,
    providers: list[str],
    directions: Sequence[str],
    times: dict[tuple[str, str, str], list[float]],
    costs: dict[str, Cost],
    device: str,
    dtype: torch.dtype,
    ceilings: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """One row for each direction and provider; on a CPU none for the baseline alone.

    Args:
        operator: The operator.
        case: The case.
        providers: Those that were timed.
        directions: Those that were timed.
        times: From :func:`measure`.
        costs: Of the case and of the one that it names.
        device: "cpu" or "cuda".
        dtype: Of the inputs.
        ceilings: From :func:`benchmarks.kernels.device.ceilings`; None on a CPU.
    """
    cost, other = costs[case.name], case.against
    rows = []
    for direction in directions:
        flops = sum(cost.flops[part] for part in direction.split("+"))
        moved = sum(cost.bytes[part] for part in direction.split("+"))
        for provider in providers:
            spent = times[case.name, provider, direction]
            row: dict[str, Any] = {
                "operator": operator.name,
                "case": case.name,
                "direction": direction,
                "provider": provider,
                "parameters": asdict(case),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "tokens": cost.tokens,
                "pairs": cost.pairs,
                "flops": flops,
                "bytes": moved,
                "repeats": len(spent),
            }
            if BASELINE in providers and provider != BASELINE:
                row |= {"baseline": BASELINE, **ratios(times[case.name, BASELINE, direction], spent)}
            if other is not None:
                apart = zip(spent, times[other, provider, direction], strict=True)
                per_pair = [own / cost.pairs / (plain / costs[other].pairs) for own, plain in apart]
                row["per_pair"] = {"against": other, **spread(per_pair)}
            if device == "cuda":
                row |= {
                    "ms": spread([1e3 * each for each in spent]),
                    "tflops": spread([flops / each / 1e12 for each in spent]),
                    "gbs": spread([moved / each / 1e9 for each in spent]),
                }
                row["share_of_matmul"] = row["tflops"]["median"] / ceilings["matmul_tflops"]
                row["share_of_copy"] = row["gbs"]["median"] / ceilings["copy_gbs"]
            elif provider == BASELINE and other is None:
                continue
            rows.append(row)
    return rows


def say(row: dict[str, Any]) -> str:
    """A row for people."""
    text = f"{row['case']:<24}{row['direction']:<9}{row['provider']:<11}"
    if "ms" in row:
        text += (
            f"{row['ms']['median']:9.3f} ms ({row['ms']['low']:.3f} to {row['ms']['high']:.3f})  "
            f"{row['tflops']['median']:6.1f} TFLOP/s ({row['share_of_matmul']:.0%})  "
            f"{row['gbs']['median']:6.0f} GB/s ({row['share_of_copy']:.0%})  "
        )
    if "ratio" in row:
        text += "{median:.2f}x ({low:.2f} to {high:.2f})  ".format(**row["ratio"])
    if "per_pair" in row:
        text += "per pair {median:.2f} ({low:.2f} to {high:.2f}) of {against}".format(**row["per_pair"])
    return text.rstrip()


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("operator")
    parser.add_argument("--cases", nargs="+", help="names or families; all that are meant for the device if left out")
    parser.add_argument("--providers", nargs="+", help="backends; all that the device has if left out")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=1, help="calls on each batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU if left out")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--allocator", choices=("default", "kept"), default="default")
    parser.add_argument("--json", type=Path, help="append the rows here")
    options = parser.parse_args(argv)
    for name in ("repeats", "layers"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs an NVIDIA GPU that torch can use, and there is none")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: there is no folder for {options.json}")
    return options


def main(argv: list[str]) -> int:
    options = options_of(argv)
    if options.allocator == "kept" and any(os.environ.get(name) != value for name, value in KEPT.items()):
        # glibc reads these when the process starts.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.kernels.run", *argv], os.environ | KEPT)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, operator = options.device, load(options.operator)
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    cases = operator.select(options.cases, device)
    providers = available(operator, cases[0], options.providers, device, dtype)
    # The case that another is compared with is timed too, so it is checked too.
    names = dict.fromkeys(name for case in cases for name in (case.name, case.against) if name is not None)
    agreed = {name: check(operator, operator.case(name), providers, device, dtype) for name in names}
    environment = describe(["benchmarks.kernels.run", *argv])
    ceilings = devices.ceilings() if device == "cuda" else None
    print(heading(environment, device, ceilings), flush=True)
    for case in cases:
        fit = [name for name in providers if name in agreed[case.name] and name in agreed[case.against or case.name]]
        for name in set(providers) - set(fit):
            print(f"{case.name}: left out {name}, which needs more memory than the device has")
        times = measure(operator, case, fit, options.directions, options.repeats, options.layers, device, dtype)
        costs = {
            name: operator.cost(operator.make(operator.case(name), device, dtype, SEED))
            for name in (case.name, case.against)
            if name is not None
        }
        common = {"layers": options.layers, "allocator": options.allocator, "environment": environment}
        if ceilings is not None:
            common |= {"ceilings": ceilings, "clocks": devices.clocks()}
        for row in rows_of(operator, case, fit, options.directions, times, costs, device, dtype, ceilings):
            print(say(row), flush=True)
            if options.json:
                row["agreement"] = asdict(agreed[case.name][row["provider"]])
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | common) + "\n")
    return 0


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
