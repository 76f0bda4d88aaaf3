"""The best size for a budget where FLOPs a token are not 6 N, and the compute that two models need for one loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from gr.errors import UserError
from gr.scaling.bootstrap import spread
from gr.scaling.law import Law, law_of


class Price:
    """Model FLOPs a token, of the encoder's parameters N: p N + q sqrt(N) + r, none negative.

    Products cost in proportion to N; scores of a catalogue, and attention, in proportion to the width, which at one
    depth is that of sqrt(N).

    Args:
        parts: (p, q, r).
    """

    def __init__(self, parts: Sequence[float]) -> None:
        self.parts = tuple(float(x) for x in parts)

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Price:
        """Fitted to runs, in relative terms."""
        n = np.array([row["n_encoder"] for row in rows])
        seen = np.array([row["model_flops"] / row["tokens"] for row in rows])
        columns = np.stack([n, np.sqrt(n), np.ones_like(n)], 1) / seen[:, None]
        norm = np.linalg.norm(columns, axis=0)
        return cls(nnls(columns / norm, np.ones_like(seen))[0] / norm)

    def __call__(self, n: np.ndarray | float) -> np.ndarray:
        """FLOPs a token at N."""
        return self.parts[0] * np.asarray(n, float) + self.parts[1] * np.sqrt(n) + self.parts[2]


def best_size(law: Law, price: Price, budget: float, sizes: np.ndarray) -> tuple[float, float, float]:
    """(N, D, loss) of the least loss at a budget among ``sizes``."""
    tokens = budget / price(sizes)
    said = law(sizes, tokens)
    best = int(np.argmin(said))
    return float(sizes[best]), float(tokens[best]), float(said[best])


def compute_for(law: Law, price: Price, loss: float, sizes: np.ndarray) -> float:
    """Least FLOPs that reach a loss; infinite if the law's floor lies above it."""
    rest = loss - law.floor - law.factors[0] * sizes ** -law.exponents[0]
    able = rest > 0
    if not able.any():
        return float("inf")
    tokens = (law.factors[1] / rest[able]) ** (1 / law.exponents[1])
    return float((tokens * price(sizes[able])).min())


def multiplier(
    first: tuple[Law, Sequence[Law], Price, np.ndarray],
    second: tuple[Law, Sequence[Law], Price, np.ndarray],
    loss: float,
) -> dict[str, Any]:
    """How many times the compute of the first the second needs for the same loss.

    Args:
        first: Law, its bootstrap, its price, sizes to choose from.
        second: The same of the other.
        loss: To be reached.

    Returns:
        ``loss``, ``multiplier`` (infinite where the second's floor lies above the loss), ``interval`` (95 %; its upper
        end ``None`` where so many resamples of the second never reach the loss that there is none; ``None`` without a
        bootstrap), ``samples``, ``unreached`` (resamples whose floor lies above the loss, of the first and of the
        second; those of the first count as 0, those of both tell nothing and are left out of the interval).
    """
    at = compute_for(second[0], second[2], loss, second[3]) / compute_for(first[0], first[2], loss, first[3])
    pairs = list(zip(first[1], second[1], strict=False))
    needs = np.array(
        [(compute_for(a, first[2], loss, first[3]), compute_for(b, second[2], loss, second[3])) for a, b in pairs]
    ).reshape(-1, 2)
    never = ~np.isfinite(needs)
    told = needs[~never.all(axis=1)]
    return {
        "loss": loss,
        "multiplier": at,
        "interval": _interval(np.sort(told[:, 1] / told[:, 0])),
        "samples": len(pairs),
        "unreached": [int(count) for count in never.sum(axis=0)],
    }


def _interval(ratios: np.ndarray) -> list[float | None] | None:
    """Of sorted ratios, some perhaps infinite: between such there is nothing to interpolate."""
    if not ratios.size:
        return None
    if np.isfinite(ratios[-1]):
        return [*spread(ratios)]
    low, high = (ratios[i] for i in (int(0.025 * (ratios.size - 1)), math.ceil(0.975 * (ratios.size - 1))))
    return [float(low), float(high) if np.isfinite(high) else None] if np.isfinite(low) else None


def unreached(row: dict[str, Any], first: str, second: str) -> str:
    """In words, how many resampled laws never reach the loss of a multiplier; empty if all do."""
    said = [
        f"{name} never reaches it in {count} of {row['samples']} resamples"
        for name, count in zip((first, second), row["unreached"], strict=True)
        if count
    ]
    return ", ".join(said)


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Multipliers at three losses that both have reached: the best of the worse one, and two on the way there.

    Args:
        first: From ``fit.fit_runs``.
        second: The same of the other; its runs and the first's must overlap in loss.

    Raises:
        UserError: They do not.
    """
    sides, ranges = [], []
    for fitted in (first, second):
        if not fitted["surface"]["converged"]:
            raise UserError("one of the fits did not converge, so that its compute means nothing; add sizes or budgets")
        laws = [law_of(raw) for raw in fitted["bootstrap"]]
        law, price = law_of(fitted["surface"]), Price(fitted["price"])
        sizes = np.geomspace(fitted["n_range"][0] / 10, fitted["n_range"][1] * 10, 801)
        sides.append((law, laws, price, sizes))
        ends = [best_size(law, price, fitted["budgets"][i], sizes)[2] for i in (0, -1)]
        ranges.append((ends[1], ends[0]))
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if low >= high:
        raise UserError(
            f"no loss was reached by both: one has {ranges[0][0]:.4f} to {ranges[0][1]:.4f}, the other "
            f"{ranges[1][0]:.4f} to {ranges[1][1]:.4f}; give both more budgets"
        )
    return [multiplier(sides[0], sides[1], low + share * (high - low)) for share in (0.5, 0.25, 0.0)]
