"""Rows of the kernel benchmarks: one for each case, direction and provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.kernels.registry import BASELINE, Case, Cost, Operator
from benchmarks.kernels.timing import ratios, spread


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
    base: dict[tuple[str, str, str], list[float]] | None = None,
) -> list[dict[str, Any]]:
    """One row for each direction and provider; on a CPU none for the baseline alone.

    Args:
        operator: The operator.
        case: The case.
        providers: Those that were timed.
        directions: Those that were timed.
        times: Seconds of each repeat by (case, provider, direction).
        costs: Of the case and of the one that it names.
        device: "cpu" or "cuda".
        dtype: Of the inputs.
        ceilings: From :func:`benchmarks.kernels.device.ceilings`; None on a CPU.
        base: Those of another commit, as far as it has the provider.
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
            past = (base or {}).get((case.name, provider, direction))
            if past is not None:
                row["base"] = ratios(past, spent)
            stranger = operator.other(provider)
            if stranger is not None:
                row["function"] = stranger.about
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
            elif provider == BASELINE and other is None and past is None:
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
    if "base" in row:
        text += "{median:.2f}x ({low:.2f} to {high:.2f}) of the base  ".format(**row["base"]["ratio"])
    if "function" in row:
        text += "another function  "
    if "per_pair" in row:
        text += "per pair {median:.2f} ({low:.2f} to {high:.2f}) of {against}".format(**row["per_pair"])
    return text.rstrip()
