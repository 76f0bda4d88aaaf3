"""Judges a trained run again: its checkpoint and the baselines, on one part of the split, under one rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.evaluation.audit import audit
from gr.evaluation.baselines import LABELS
from gr.evaluation.metrics import summarise
from gr.evaluation.ranking import Ranks, SeenRule
from gr.evaluation.saved_ranks import load_ranks, save_ranks
from gr.evaluation.slices import Slice, make_slices
from gr.evaluation.tuning import tune_all
from gr.files import write_json
from gr.inference.load import load_run, resolve_run
from gr.recipes.retrieval import against_the_best, best_possible, describe_data, model_label, protocol, rank
from gr.training.assemble import eval_loader
from gr.training.run_config import RunConfig

SEEN: dict[str, SeenRule] = {"keep": False, "mask": True, "window": "window"}
RANKS = "ranks.parquet"
FEW = 1000  # targets; with fewer the 95 % interval of a hit rate near 0.1 is wider than 0.037


def evaluate(
    run: str | Path,
    *,
    part: str = "test",
    seen: str | None = None,
    ks: tuple[int, ...] | None = None,
    checkpoint: str | None = None,
    baselines: bool = True,
    cache: str | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Any], Path]:
    """Ranks a part's targets with a run's weights, and writes ``<run>/evaluations/<name>/``.

    Args:
        run: Run folder or name; it may have stopped early, if it has saved weights.
        part: ``test`` or ``valid``.
        seen: Key of ``SEEN``; ``None``: as in the run's config.
        ks: Cut-offs, 10 among them; ``None``: as in the config.
        checkpoint: ``best`` or ``last``; ``None``: the best, else the last.
        baselines: Whether the config's baselines are judged beside the model, tuned under this rule.
        cache: Where prepared data are kept; ``None``: as in the config.
        device: Where the model runs.

    Returns:
        The results, as in ``results.json`` there, and the folder. The run's own results stay as they are.

    Raises:
        UserError: No such run, no weights, no validation part, impossible ks.
    """
    folder = resolve_run(run)
    loaded = load_run(folder, cache, device, checkpoint)
    store, split = loaded.store, loaded.split
    targets = split.test if part == "test" else split.valid
    if targets is None:
        raise UserError(
            f"split {loaded.config.split.kind!r} of run {folder} has no validation targets; use --part test"
        )
    judging = loaded.config.evaluation
    if seen is not None:
        judging = replace(judging, mask_seen=SEEN[seen])
    if ks is not None:
        judging = replace(judging, ks=ks)
    config = replace(loaded.config, evaluation=judging)
    rule = next(name for name, value in SEEN.items() if value == judging.mask_seen)
    name = f"{part}-{rule}" + ("-last" if checkpoint == "last" else "")

    ctx = ProcessContext(device=torch.device(device))
    label = model_label(config)
    by_label = {label: rank(config, ctx, store, targets, loaded.model)}
    same = part == "test" and judging.mask_seen == loaded.config.evaluation.mask_seen
    counted = (same and _counted(folder, config)) or {} if baselines else {}
    if baselines and not counted:
        counted = _tuned(config, ctx, store, split, targets)
    for kind, (found, _) in counted.items():
        by_label[LABELS[kind]] = found

    place = folder / "evaluations" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "results.json").unlink(missing_ok=True)  # written last, so that it never tells of other ranks
    for old in place.glob("ranks*.parquet"):
        old.unlink()
    save_ranks(by_label[label], place / RANKS)
    for kind, (found, _) in counted.items():
        save_ranks(found, place / f"ranks_{kind}.parquet")
    results = _results(config, store, split, targets, by_label, part) | {"name": config.name, "evaluation": name}
    results["weights"] = loaded.weights
    for kind, (_, about) in counted.items():
        results["metrics"][LABELS[kind]]["setting"] = about["setting"]
        results["baseline_grids"][kind] = about["grid"]
    write_json(place / "results.json", results)
    return results, place


def _counted(folder: Path, config: RunConfig) -> dict[str, tuple[Ranks, dict[str, Any]]]:
    """The run's own baselines on the test part, if it came so far."""
    stage = folder / "stages" / "baselines"
    try:
        done = json.loads((stage / "artifact.json").read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError):
        return {}
    if set(done) != set(config.evaluation.baselines):
        return {}
    return {kind: (load_ranks(stage / f"ranks_{kind}.parquet"), about) for kind, about in done.items()}


def _tuned(
    config: RunConfig, ctx: ProcessContext, store: EventStore, split: Split, targets: Targets
) -> dict[str, tuple[Ranks, dict[str, Any]]]:
    judging = config.evaluation
    tuned = tune_all(store, split, config.layout, judging.mask_seen, kinds=judging.baselines)
    return {
        kind: (
            rank(config, ctx, store, targets, best.recommender),
            {"setting": best.setting, "grid": best.rows},
        )
        for kind, best in tuned.items()
    }


def _results(
    config: RunConfig, store: EventStore, split: Split, targets: Targets, by_label: dict[str, Ranks], part: str
) -> dict[str, Any]:
    label, ks = model_label(config), config.evaluation.ks
    estimates = {name: summarise(found, ks) for name, found in by_label.items()}
    slices = make_slices(store, split, targets.user, targets.position)
    best = best_possible(config, store, targets)
    data = describe_data(config, store, split, targets)
    if part == "valid":
        data["caveats"].append(
            "these validation targets chose the checkpoint and the baselines' settings, so scores on them are too good"
        )
    if len(targets) < FEW:
        found = estimates[label]["hr@10"]
        data["caveats"].append(
            f"only {len(targets):,} targets: {label}'s HR@10 is known to within an interval of width "
            f"{found.high - found.low:.3f}, and smaller differences may be chance"
        )
    loader = eval_loader(config, store, targets, ProcessContext())
    findings = audit(store, split, loader, metrics=estimates, ceiling=best.get("ceiling"))
    return {
        "part": part,
        "targets": len(targets),
        "ks": list(ks),
        "seed": config.seed,
        "data": data,
        "protocol": protocol(config, store),
        "model": {"label": label},
        "metrics": {name: {m: e.to_dict() for m, e in found.items()} for name, found in estimates.items()},
        "slices": {name: [_slice(one, found, ks) for one in slices] for name, found in by_label.items()},
        "ceiling": None,
        **best,
        "baseline_grids": {},
        "comparison": against_the_best(label, by_label),
        "audit": [finding.to_dict() for finding in findings],
    }


def _slice(one: Slice, ranks: Ranks, ks: tuple[int, ...]) -> dict[str, Any]:
    found = summarise(ranks.where(one.rows), ks)
    return {
        "group": one.group,
        "name": one.name,
        "num": int(one.rows.sum()),
        "metrics": {name: value.to_dict() for name, value in found.items()},
    }
