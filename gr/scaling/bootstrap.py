"""How sure a fit is: laws of resampled runs, the noise of a seed, and the interval of a run that was not fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gr.scaling.law import Law, axes_of, fit_law

LEVEL = (2.5, 97.5)


def cells(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Runs that differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        cell = (row["budget"], row["n_encoder"], row.get("max_events"), row.get("train_users"))
        groups.setdefault(cell, []).append(i)
    return list(groups.values())


def seed_noise(rows: Sequence[dict[str, Any]]) -> tuple[float, int] | None:
    """(standard deviation of log loss over seeds, degrees of freedom); ``None`` if no cell has two."""
    logs = np.log([row["loss"] for row in rows])
    parts = [logs[group] for group in cells(rows) if len(group) > 1]
    freedom = sum(len(part) - 1 for part in parts)
    if not freedom:
        return None
    return float(np.sqrt(sum(((part - part.mean()) ** 2).sum() for part in parts) / freedom)), freedom


def _by_run(rows: Sequence[dict[str, Any]], draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    pick = draw.integers(0, len(rows), len(rows))
    return pick, np.zeros(len(rows))


def _by_seed(rows: Sequence[dict[str, Any]], draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every cell stays; its runs are drawn from its seeds, and one that has a single seed is moved by the noise."""
    noise = seed_noise(rows)
    pick, moved = np.arange(len(rows)), np.zeros(len(rows))
    for group in cells(rows):
        if len(group) > 1:
            pick[group] = draw.choice(group, len(group))
        elif noise is not None:
            moved[group] = noise[0] * draw.standard_normal(1)
    return pick, moved


WAYS = {"run": _by_run, "seed": _by_seed}


def bootstrap(rows: Sequence[dict[str, Any]], start: Law, samples: int, way: str = "run") -> Iterator[Law]:
    """Laws of resampled runs, each refined from the fitted one.

    Args:
        rows: The fitted runs.
        start: Their law.
        samples: How many.
        way: ``run`` draws runs with replacement: what if other cells had been chosen; ``seed`` keeps the cells: what if
            other seeds had been.
    """
    draw = np.random.default_rng(0)
    axes = axes_of(rows)
    loss = np.array([row["loss"] for row in rows])
    for _ in range(samples):
        pick, moved = WAYS[way](rows, draw)
        yield fit_law(axes[:, pick], loss[pick] * np.exp(moved), start)


def spread(values: Sequence[float] | np.ndarray) -> list[float]:
    """95 % interval."""
    return [float(x) for x in np.percentile(values, LEVEL)]


def run_interval(laws: Sequence[Law], n: float, tokens: float, noise: float, drift: float = 0.0) -> list[float] | None:
    """95 % interval of a further run's loss: of the law, times the scatter of runs about it, times its drift.

    Args:
        laws: From ``bootstrap``.
        n: Encoder parameters.
        tokens: Tokens read.
        noise: Standard deviation of log loss about the law.
        drift: Error in log loss that the law made when it foretold its own largest budget.
    """
    if not laws:
        return None
    draw = np.random.default_rng(1)
    said = np.repeat([float(law(n, tokens)) for law in laws], 50)
    return spread(said * np.exp(np.hypot(noise, drift) * draw.standard_normal(said.size)))
