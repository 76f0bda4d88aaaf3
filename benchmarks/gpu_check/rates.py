"""Speed: the device's own ceilings, then every attention row with a floor and a target, then the rest of the cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu_check.correctness import refusal
from benchmarks.gpu_check.plan import Context, Result, Unit
from benchmarks.kernels import device as devices
from benchmarks.kernels import timing
from benchmarks.kernels.agreement import SEED, check
from benchmarks.kernels.hstu_attention import OPERATOR, AttentionCase
from benchmarks.kernels.registry import Operator
from benchmarks.kernels.rows import rows_of, say
from benchmarks.kernels.targets import ATTENTION, verdict

REPEATS = 7
PROVIDER = "triton"
TINY = {"rows": 1, "longest": 17, "heads": 1, "dim_qk": 16, "dim_v": 16}
TINY_MASK = {"window": 8, "full_tail": 2, "context": 1, "targets": 3}
FIRST = 128
"""The width of a head whose jagged rows come before the rest."""


def ceilings(context: Context) -> Iterator[Unit]:
    """What the device does at best."""
    yield Unit("device", partial(_ceilings, context), about_s=20)


def _ceilings(context: Context) -> Result:
    if context.dry:
        return {"cannot": "a CPU has no ceilings that a GPU's figures could stand beside"}
    found = devices.ceilings()
    told = f"copy {found['copy_gbs']:.0f} GB/s, bfloat16 product {found['matmul_tflops']:.0f} TFLOP/s"
    return {**found, "say": f"{told}, clocks {found['clocks']}"}


def units(context: Context) -> Iterator[Unit]:
    """Rows with a target; other functions on the same cases; jagged rows; then the rest."""
    operator = tiny() if context.dry else OPERATOR
    provider = best(context)
    for key in ATTENTION:
        yield Unit(key, partial(judged, context, operator, key, provider), about_s=25)
    cases = [case for case in operator.cases if case.device == "cuda"]
    seen = {(provider, target.case, target.direction) for target in ATTENTION.values()}
    wanted = [(other.name, t.case, d) for other in operator.others for t in ATTENTION.values() for d in ("fwd", "bwd")]
    for jagged in (True, False):
        some = [case for case in cases if (case.law != "full" and case.dim_qk == FIRST) == jagged]
        wanted += [(provider, case.name, direction) for case in some for direction in ("fwd", "bwd")]
        wanted += [(o.name, case.name, d) for o in operator.others for case in some for d in ("fwd", "bwd") if jagged]
    if context.dry:  # one of ours, and each of the others
        wanted = [(provider, cases[0].name, "fwd"), *((o.name, cases[0].name, "fwd") for o in operator.others)]
    for one in wanted:
        if one not in seen:
            seen.add(one)
            name, case, direction = one
            run = partial(measured, context, operator, case, direction, name)
            yield Unit(f"{name}/{direction}/{case}", run, about_s=25 if name == provider else 40)


def best(context: Context) -> str:
    """The backend whose rows these are."""
    from gr.kernels.hstu_attention.op import has_triton

    return PROVIDER if has_triton() else "cpu" if context.dry else "reference"


def tiny() -> Operator:
    """The same cases, shrunk until an interpreter can run them."""

    def shrunk(case: AttentionCase) -> AttentionCase:
        return replace(case, **TINY, **{name: size for name, size in TINY_MASK.items() if getattr(case, name)})

    return replace(OPERATOR, cases=tuple(shrunk(case) for case in OPERATOR.cases if case.device == "cuda"))


def judged(context: Context, operator: Operator, key: str, provider: str) -> Result:
    """A row with its floor, its target, and how it fares."""
    target = ATTENTION[key]
    found = measured(context, operator, target.case, target.direction, provider)
    return found | verdict(key, target.value(found["row"])) if "row" in found else found


def measured(context: Context, operator: Operator, name: str, direction: str, provider: str) -> Result:
    """One case timed, after it was held to the definition; refused where the correctness slice found faults."""
    device, case, other = context.device, operator.case(name), operator.other(provider)
    word = "float16" if context.dry else "bfloat16"
    dtype = timing.DTYPES[word]
    refused = refusal(context.kept, provider, word) if other is None else None
    if refused is not None:
        return refused
    names = [each for each in (case.name, case.against) if each is not None]
    agreed = {}
    if other is not None:
        try:
            for each in names:
                other.prepare(operator.make(operator.case(each), device, dtype, SEED))
        except ValueError as error:
            if not str(error).startswith("backend"):
                raise
            return {"cannot": str(error)}
    else:
        for each in names:
            found = check(operator, operator.case(each), [provider], device, dtype)
            if provider not in found:
                return {"ok": False, "say": f"{each} does not fit into the device's memory"}
            agreed[each] = found[provider].worst
    ceiling = context.kept.get(("ceilings", "device"), {})
    if "copy_gbs" not in ceiling and not context.dry:
        return {"left": "figures are refused: the ceilings were not measured"}
    clocks = {"here": timing.here(operator, device, dtype, 1)}
    every = timing.measure(case, {"here": [provider]}, [direction], 1 if context.dry else REPEATS, clocks)
    if context.dry:
        return {"agreement": agreed, "say": "ran; a CPU gives no figures"}
    times = {key[1:]: spent for key, spent in every.items()}
    costs = {each: operator.cost(operator.make(operator.case(each), device, dtype, SEED)) for each in names}
    (row,) = rows_of(operator, case, [provider], [direction], times, costs, device, dtype, ceiling)
    row |= {"agreement": agreed, "clocks": devices.clocks()}
    torch.cuda.empty_cache()
    return {"row": row, "say": say(row)}
