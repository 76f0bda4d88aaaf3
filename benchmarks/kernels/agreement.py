"""Whether a provider computes the operator: no figure is given of one that does not.

On a case's own inputs, in the dtype used. A part of the rows is computed in float64 by the definition; a provider must
come as near to it as the definition does in the dtype used (twice its error), or to 4 units in the last place of the
largest value. It is judged twice: on that part alone, with all gradients, and on the whole batch as it will be timed:
there the part's rows are looked at (output, and gradients that have rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.registry import BASELINE, Case, Inputs, Operator
from gr.errors import UserError

SCORES = 1 << 20
"""Scores of the part, in padded form: seconds in float64 on a CPU."""
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """How a provider fared: the largest error as a share of what is allowed, and of which tensor."""

    worst: float
    tensor: str


def results(operator: Operator, inputs: Inputs, provider: str) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf."""
    out = operator.run(inputs, provider)
    gradients = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad)
    return {"output": out.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs.leaves, gradients, strict=True)
    }


def check(
    operator: Operator, case: Case, providers: list[str], device: str, dtype: torch.dtype
) -> dict[str, Agreement]:
    """How each provider fared; those whose whole batch does not fit into the device's memory are missing.

    Raises:
        UserError: A provider disagrees with the definition.
    """
    inputs = operator.make(case, device, dtype, SEED)
    part, rows = operator.shorten(inputs, SCORES)
    exact = results(operator, part.to(torch.float64), BASELINE)
    own = results(operator, part, BASELINE)
    allowed = {}
    for name, truth in exact.items():
        allowed[name] = max(2 * _distance(own[name], truth), 4 * torch.finfo(dtype).eps * _scale(truth))
    by_row = {"output", *(f"gradient of {name}" for name in operator.by_row)}
    found = {}
    for provider in providers:
        try:
            few, all_rows = (results(operator, x, provider) for x in (part, inputs))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        shares = {}
        for name, truth in exact.items():
            pairs = [few[name]] + ([all_rows[name][rows]] if name in by_row else [])
            error = max((_distance(got, truth) for got in pairs), key=lambda e: (e != e, e))  # NaN is the worst
            if not error <= allowed[name]:
                unit = torch.finfo(dtype).eps * _scale(truth) or 1.0
                raise UserError(
                    f"provider {provider!r} of {operator.name} disagrees with its definition on case {case.name} in "
                    f"{str(dtype).removeprefix('torch.')} on {device}: {name} is off by {error / unit:.2f} units in "
                    f"the last place of its largest value where {allowed[name] / unit:.2f} are allowed, so no figures "
                    "are given"
                )
            shares[name] = error / allowed[name] if allowed[name] else 0.0
        worst = max(shares, key=shares.__getitem__)
        found[provider] = Agreement(shares[worst], worst)
    return found


def _distance(found: Tensor, truth: Tensor) -> float:
    return _scale(found.to(truth.dtype) - truth)


def _scale(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
