"""Is A better than B? Two rankings of the same targets: models, means over seeds, or baselines of runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gr.config import config_hash, to_dict
from gr.errors import UserError
from gr.evaluation.baselines import BASELINES, LABELS
from gr.evaluation.metrics import per_target
from gr.evaluation.ranking import Ranks
from gr.evaluation.saved_ranks import load_ranks
from gr.evaluation.significance import Comparison, holm, paired_bootstrap, same_targets
from gr.evaluation.slices import make_slices
from gr.inference.load import load_config, log_of, open_log, resolve_run
from gr.recipes.retrieval import model_label
from gr.training.run_config import RunConfig
from gr.training.run_folder import RunFolder

MIN_USERS = 20  # with fewer a bootstrap says too much


@dataclass(frozen=True)
class Judged:
    """One ranking and what it must share with another to be compared.

    Attributes:
        name: As the user wrote it.
        folder: The run's.
        config: The run's.
        label: Of the model or the baseline.
        baseline: Whether it is one.
        ranks: Of each target.
        facts: What two rankings must agree in, in words.
    """

    name: str
    folder: RunFolder
    config: RunConfig
    label: str
    baseline: bool
    ranks: Ranks
    facts: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A or B: one ranking, or several seeds of one model.

    Attributes:
        parts: The rankings, on the same targets.
        values: (n,) float64 of the metric by target, the mean over seeds.
    """

    parts: list[Judged]
    values: np.ndarray

    @property
    def name(self) -> str:
        """For tables."""
        label = self.parts[0].label
        return f"{label} ({len(self.parts)} seeds)" if len(self.parts) > 1 else f"{label} of {self.parts[0].name}"


def compare_runs(
    a: str, b: str, metric: str = "ndcg@10", slices: bool = False, samples: int = 10_000, cache: str | None = None
) -> dict[str, Any]:
    """Compares two rankings by a paired bootstrap over users.

    Args:
        a: ``RUN``, ``RUN@EVALUATION`` (a folder in its ``evaluations/``), either with ``:BASELINE``; or several
            runs that differ in their seed alone, separated by commas: their mean by target.
        b: The same.
        metric: ``hr@K``, ``ndcg@K`` or ``mrr``.
        slices: Whether differences on slices are computed, too; reads the log.
        samples: Bootstrap samples.
        cache: Where prepared data are kept; ``None``: as in the config.

    Returns:
        Plain data: ``a``, ``b`` (name, score, seeds), ``difference`` and ``slices``, whose p-values are Holm's
        over all slices with at least ``MIN_USERS`` users.

    Raises:
        UserError: Missing runs or ranks, an unknown metric, rankings that cannot be compared.
    """
    sides = [_side(spec, metric) for spec in (a, b)]
    first = sides[0].parts[0]
    for side in sides:
        for other in side.parts:
            _comparable(first, other)
    user = first.ranks.user
    whole = paired_bootstrap(sides[0].values, sides[1].values, user, samples, metric=metric)
    return {
        "metric": metric,
        "samples": samples,
        "protocol": first.facts,
        "a": _describe(sides[0], metric),
        "b": _describe(sides[1], metric),
        "difference": _plain(whole),
        "slices": _by_slice(first, sides, metric, samples, cache) if slices else None,
    }


def _side(spec: str, metric: str) -> Side:
    parts = [read_judged(name.strip()) for name in spec.split(",") if name.strip()]
    if not parts:
        raise UserError(f"{spec!r} names no run; give RUN, or several with commas between them")
    values = [per_target(part.ranks, metric) for part in parts]
    seeds, kinds = (
        [part.config.seed for part in parts],
        {(p.label, config_hash(replace(p.config, seed=0))) for p in parts},
    )
    if len(parts) > 1:
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{spec} holds seed {max(seeds, key=seeds.count)} twice; runs to average differ in their seed"
            )
        if len(kinds) > 1 or parts[0].baseline:
            raise UserError(f"{spec} are not seeds of one model: their configs differ in more than the seed")
        for other in parts[1:]:
            _comparable(parts[0], other)
    return Side(parts, np.mean(values, axis=0))


def read_judged(spec: str) -> Judged:
    """The ranking that ``RUN[@EVALUATION][:BASELINE]`` names.

    Raises:
        UserError: No such run, not evaluated yet, no such evaluation or baseline.
    """
    name, _, kind = spec.rpartition(":") if not Path(spec).is_dir() else (spec, "", "")
    if not name:
        name, kind = spec, ""
    run, _, evaluation = name.rpartition("@") if not Path(name).is_dir() else (name, "", "")
    if not run:
        run, evaluation = name, ""
    if kind and kind not in BASELINES:
        raise UserError(f"{spec}: {kind!r} is no baseline; known are {', '.join(BASELINES)}")
    folder = RunFolder(resolve_run(run))
    config = load_config(folder)
    place = folder.path / "evaluations" / evaluation if evaluation else folder.path
    try:
        results = json.loads((place / "results.json").read_text(encoding="utf-8"))
        seen = results["protocol"]["mask_seen"]
    except FileNotFoundError:
        known = sorted(path.parent.name for path in folder.path.glob("evaluations/*/results.json"))
        there = f"; there is {', '.join(f'{folder.path}@{one}' for one in known)}" if known else ""
        what = f"evaluation {evaluation!r}" if evaluation else "results.json: its training has not finished"
        raise UserError(f"run {folder.path} has no {what}{there or '; gr-evaluate judges what it has saved'}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{place / 'results.json'} is damaged; evaluate the run again") from None
    if kind:
        path = (place if evaluation else place / "stages" / "baselines") / f"ranks_{kind}.parquet"
        if not path.exists():
            raise UserError(f"{spec}: {kind} was not judged there; evaluation.baselines of the run must name it")
    else:
        path = place / ("ranks.parquet" if evaluation else "ranks_test.parquet")
    ranks = load_ranks(path)
    rules = {False: "keep", True: "mask", "window": f"the last {config.layout.max_events} events"}
    facts = {
        "log": log_of(folder)[0],
        "split": to_dict(config.split),
        "part": results.get("part", "test"),
        "seen": rules[seen],
        "candidates": ranks.num_items,
    }
    return Judged(spec, folder, config, LABELS[kind] if kind else model_label(config), bool(kind), ranks, facts)


WORDS = {
    "log": "data (content hash)",
    "split": "split",
    "part": "part of the split",
    "seen": "rule for items already seen",
    "candidates": "number of candidates",
}


def _comparable(a: Judged, b: Judged) -> None:
    for fact, words in WORDS.items():
        mine, other = a.facts[fact], b.facts[fact]
        if mine != other:
            if fact == "log":
                mine, other = mine[:12], other[:12]
            hint = "; gr-evaluate --seen judges a run under another rule" if fact == "seen" else ""
            raise UserError(f"{a.name} and {b.name} differ in their {words}: {mine} and {other}{hint}")
    same_targets(a.ranks, b.ranks)


def _describe(side: Side, metric: str) -> dict[str, Any]:
    scores = [float(per_target(part.ranks, metric).mean()) for part in side.parts]
    return {
        "name": side.name,
        "score": float(side.values.mean()),
        "runs": [
            {"run": part.name, "seed": part.config.seed, "score": score}
            for part, score in zip(side.parts, scores, strict=True)
        ],
        "sd_over_seeds": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
    }


def _plain(found: Comparison) -> dict[str, Any]:
    enough = found.num_users >= MIN_USERS
    return {
        "difference": found.difference,
        "low": found.low if enough else None,
        "high": found.high if enough else None,
        "p": found.p_value if enough else None,
        "users": found.num_users,
    }


def _by_slice(first: Judged, sides: list[Side], metric: str, samples: int, cache: str | None) -> list[dict[str, Any]]:
    store, split = open_log(first.folder, first.config, cache)
    user = first.ranks.user
    a, b = (side.values for side in sides)
    rows = []
    for one in make_slices(store, split, user, first.ranks.position):
        found = paired_bootstrap(a[one.rows], b[one.rows], user[one.rows], samples, metric=metric)
        about = {"group": one.group, "name": one.name, "num": int(one.rows.sum())}
        rows.append(about | {"a": float(a[one.rows].mean()), "b": float(b[one.rows].mean())} | _plain(found))
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return rows
