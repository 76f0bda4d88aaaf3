"""The retrieval recipe: prepare -> train -> baselines -> evaluate -> report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from gr import config as configs
from gr.config import config_hash
from gr.data.ceiling import ceiling
from gr.data.layout import evaluation_batch
from gr.data.planted import PlantedConfig
from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext, all_gather_object, main_only_errors
from gr.embedding.hashing import expected_sharing, ids_of_rows, key_of, sharing
from gr.errors import UserError
from gr.evaluation.audit import audit, repeated_targets
from gr.evaluation.baselines import LABELS
from gr.evaluation.metrics import means, summarise
from gr.evaluation.ranking import Ranks, masked_events, rank_targets, seen_mask
from gr.evaluation.saved_ranks import load_ranks, save_ranks
from gr.evaluation.sharded_ranking import rank_by_shards
from gr.evaluation.significance import compare
from gr.evaluation.tuning import tune_all
from gr.files import write_json
from gr.models.retrieval import RetrievalModel
from gr.recipes.stage import Stage, Stopped, run_stage
from gr.report.report import write_report
from gr.training.assemble import assemble, eval_loader, open_data, sample_targets, train_loader
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.run_folder import RunFolder, claim
from gr.training.trainer import Trainer
from gr.training.weights import load_weights

Work = Callable[[Path], Mapping[str, Any]]
RANKS = "ranks_test.parquet"
EXAMPLE_USERS = 4
EXAMPLE_HISTORY = 8


def run(config: RunConfig, ctx: ProcessContext, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Runs every stage that is not done yet.

    Returns:
        The contents of ``results.json``; ``None`` if training was asked to stop and has saved.

    Raises:
        UserError: Bad input, or a run folder of another config or another log.
    """
    store, split = open_data(config)
    _check(config, store, split, ctx)
    folder = RunFolder(Path(config.runs) / config.name)
    key = {"config": config_hash(config), "data": store.manifest["content_hash"]}
    _check_alike(ctx, folder.path, key)
    with main_only_errors(ctx) as main:
        if main:
            claim(folder.path, config, argv, store)
    _check_shared(ctx, folder)
    fields = ("split", "layout", "evaluation")
    judging = {name: configs.to_dict(getattr(config, name)) for name in fields} | {"data": key["data"]}

    def stage(name: str, inputs: dict[str, Any], work: Work, everywhere: bool, *outputs: str) -> dict[str, Any]:
        return run_stage(Stage(name, inputs, work, everywhere, outputs), folder.path, ctx)

    try:
        train = partial(_train, config, ctx, store, split, folder)
        trained = stage("train", key, train, True, folder.best.name)
        counted = stage("baselines", judging, partial(_baselines, config, ctx, store, split), False)
        evaluate = partial(_evaluate, config, ctx, store, split, folder, trained, counted)
        results = stage("evaluate", {**key, "trained": trained}, evaluate, True, RANKS, folder.results.name)
        stage("report", {"results": results}, partial(_report, folder), False, folder.report.name)
    except Stopped:
        return None
    return results


def _check(config: RunConfig, store: EventStore, split: Split, ctx: ProcessContext) -> None:
    """What can be known to fail later is refused before a run folder is made."""
    assemble(config, store, split, ctx)
    if split.valid is None and config.train.early_stopping is not None:
        raise UserError(
            f"split {config.split.kind!r} has no validation targets, which train.early_stopping needs; "
            "set train.early_stopping to null"
        )


def _check_alike(ctx: ProcessContext, path: Path, key: dict[str, str]) -> None:
    """Refuses processes that were started with different things, before any of them writes."""
    first, *others = all_gather_object({"run folder": str(path), **key}, ctx)
    for rank, other in enumerate(others, 1):
        for what, value in other.items():
            if value != first[what]:
                raise UserError(
                    f"process {rank} has {what} {value} and process 0 has {first[what]}; "
                    "start all processes with the same command, config file and data"
                )


def _check_shared(ctx: ProcessContext, folder: RunFolder) -> None:
    blind = [rank for rank, sees in enumerate(all_gather_object(folder.config.exists(), ctx)) if not sees]
    if blind:
        raise UserError(
            f"process {blind[0]} does not see run folder {folder.path}, which process 0 has made; "
            "runs must be a folder that all machines share"
        )


def rank(
    config: RunConfig, ctx: ProcessContext, store: EventStore, targets: Targets, recommender: Any, alone: bool = False
) -> Ranks:
    """Ranks of all targets, computed by all ranks together, or by this one ``alone``."""
    worker = ProcessContext(device=ctx.device) if alone else ctx
    loader = eval_loader(config, store, targets, worker)
    if isinstance(recommender, RetrievalModel) and recommender.tables.sharded:
        return rank_by_shards(recommender, loader, config.evaluation.mask_seen, ctx)
    device = ctx.device if isinstance(recommender, RetrievalModel) else None
    gather = None if worker.world == 1 else partial(all_gather_object, ctx=ctx)
    return rank_targets(recommender, loader, config.evaluation.mask_seen, device=device, gather=gather)


def _train(
    config: RunConfig, ctx: ProcessContext, store: EventStore, split: Split, folder: RunFolder, _: Path
) -> dict[str, Any]:
    validate = None
    if split.valid is not None:
        targets = sample_targets(split.valid, config.evaluation.validation_users)

        def validate(model: RetrievalModel) -> dict[str, float]:
            return means(rank(config, ctx, store, targets, model), config.evaluation.ks)

    trainer = Trainer(
        assemble(config, store, split, ctx),
        [Phase("train")],
        train_loader(config, store, split, ctx),
        validate,
        config.train,
        ctx,
        folder.path,
        config.seed,
        config.distributed.dense,
    )
    result = trainer.fit()
    if result.status == "stopped":
        raise Stopped
    return {
        "best_step": result.best_step,
        "best_metrics": result.best_metrics,
        "epochs_run": result.epochs,
        "loss": result.loss,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
        "model_flops": result.model_flops,
    }


def _baselines(config: RunConfig, ctx: ProcessContext, store: EventStore, split: Split, folder: Path) -> dict[str, Any]:
    tuned = tune_all(store, split, config.layout, config.evaluation.mask_seen, kinds=config.evaluation.baselines)
    for kind, best in tuned.items():
        print(best.headline(), flush=True)
        save_ranks(rank(config, ctx, store, split.test, best.recommender, alone=True), folder / f"ranks_{kind}.parquet")
    return {kind: {"setting": best.setting, "grid": best.rows} for kind, best in tuned.items()}


def _evaluate(
    config: RunConfig,
    ctx: ProcessContext,
    store: EventStore,
    split: Split,
    folder: RunFolder,
    trained: dict[str, Any],
    counted: dict[str, Any],
    _: Path,
) -> dict[str, Any]:
    model = assemble(config, store, split, ctx).to(ctx.device)
    load_weights(model, folder.best, ctx.device, ctx)
    model.eval()
    ranks = rank(config, ctx, store, split.test, model)
    shown = examples(config, store, split.test, model, ctx)
    if not ctx.is_main:
        return {}
    save_ranks(ranks, folder.path / RANKS)
    label, ks = model_label(config), config.evaluation.ks
    by_label = {label: ranks}
    for kind in counted:
        by_label[LABELS[kind]] = load_ranks(folder.path / "stages" / "baselines" / f"ranks_{kind}.parquet")
    estimates = {name: summarise(found, ks) for name, found in by_label.items()}
    metrics = {name: {m: e.to_dict() for m, e in found.items()} for name, found in estimates.items()}
    for kind, found in counted.items():
        metrics[LABELS[kind]]["setting"] = found["setting"]
    alone = ProcessContext()
    loader = train_loader(config, store, split, alone, negatives=False)
    best = best_possible(config, store, split.test)
    findings = audit(
        store,
        split,
        eval_loader(config, store, split.test, alone),
        (loader.batch(0, index, 0) for index in range(loader.num_batches(0))),
        estimates,
        best.get("ceiling"),
    )
    results = {
        "name": config.name,
        "config_hash": config_hash(config),
        "seed": config.seed,
        "data": describe_data(config, store, split, split.test),
        "protocol": protocol(config, store),
        "model": {
            "label": label,
            "parameters_dense": sum(p.numel() for p in model.dense_parameters()),
            "parameters_tables": model.tables.num_parameters,
            **trained,
        },
        "metrics": metrics,
        "ceiling": None,
        **best,
        "baseline_grids": {kind: found["grid"] for kind, found in counted.items()},
        "comparison": against_the_best(label, by_label),
        "audit": [finding.to_dict() for finding in findings],
        "examples": shown,
    }
    write_json(folder.results, results)
    return results


def protocol(config: RunConfig, store: EventStore) -> dict[str, Any]:
    """How targets are ranked, for the results."""
    return {
        "split": config.split.kind,
        "ranking": "full",
        "mask_seen": config.evaluation.mask_seen,
        "ties": "middle rank; metrics averaged over the order of ties",
        "num_candidates": store.num_items,
    }


def against_the_best(label: str, by_label: dict[str, Ranks]) -> dict[str, Any] | None:
    """The model against the best baseline on the test targets: paired bootstrap over users."""
    others = [name for name in by_label if name != label]
    if not others:
        return None
    rival = max(others, key=lambda name: means(by_label[name])["ndcg@10"])
    found = compare(by_label[label], by_label[rival], "ndcg@10")
    return {"rival": rival, "metric": "ndcg@10", **{k: v for k, v in vars(found).items() if k != "metric"}}


def _report(folder: RunFolder, _: Path) -> dict[str, Any]:
    return {"report": write_report(folder.path).name}


def model_label(config: RunConfig) -> str:
    """What tables call the model."""
    encoder = config.model.encoder
    name = {"hstu": "HSTU", "transformer": "SASRec"}.get(encoder.kind, encoder.kind)
    return f"{name} without time bias" if getattr(encoder, "time_bias", None) is False else name


def best_possible(config: RunConfig, store: EventStore, targets: Targets) -> dict[str, dict[str, float]]:
    """``ceiling`` and ``ceiling_without_times`` of a planted log; nothing for others."""
    if not isinstance(config.data, PlantedConfig):
        return {}
    rule = config.evaluation.mask_seen
    best = partial(
        ceiling, store, config.data, targets, config.evaluation.ks, mask_seen=bool(rule),
        window=masked_events(rule, config.layout),
    )  # fmt: skip
    found = {"ceiling": best()}
    if not config.data.item_arrival:  # what has arrived depends on the clock, so nobody is blind to it there
        found["ceiling_without_times"] = best(see_times=False)
    return found


def describe_data(config: RunConfig, store: EventStore, split: Split, targets: Targets) -> dict[str, Any]:
    """Counts, and caveats of judging with ``targets``, for the results."""
    lengths = store.lengths
    caveats = list(store.manifest.get("caveats", []))
    rule, part = config.evaluation.mask_seen, "test" if targets is split.test else "validation"
    again, copies = repeated_targets(store, targets, masked_events(rule, config.layout))
    if rule and again:
        caveats.append(
            f"{again:,} of {len(targets):,} {part} targets had been seen before: with mask_seen they count as missed"
        )
    rows = config.model.item_rows
    if rows:
        counts = ids_of_rows(store.num_items, rows, key_of("item"))
        caveats.append(
            f"items are hashed into {rows:,} rows: {100 * sharing(counts):.2f} % of them share theirs with another and "
            f"tie with it ({100 * expected_sharing(store.num_items, rows):.2f} % expected)"
        )
    if copies:
        caveats.append(f"{copies:,} {part} targets stand in their own history with the same item and time")
    return {
        "source": store.manifest.get("source", ""),
        "users": store.num_users,
        "items": store.num_items,
        "events": store.num_events,
        "train_events": int(split.train_stop.sum()),
        "valid_targets": 0 if split.valid is None else len(split.valid),
        "test_targets": len(split.test),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "density": store.num_events / (store.num_users * store.num_items),
        "has_times": store.has_times,
        "caveats": caveats,
        "repairs": dict(store.manifest.get("repairs", {})),
    }


def examples(
    config: RunConfig, store: EventStore, targets: Targets, model: RetrievalModel, ctx: ProcessContext
) -> list[dict[str, Any]]:
    """What a few test users would be shown."""
    rows = np.linspace(0, len(targets) - 1, min(EXAMPLE_USERS, len(targets))).round().astype(np.int64)
    batch = evaluation_batch(store, targets, rows, config.layout).to(ctx.device)
    exclude = None
    if config.evaluation.mask_seen:
        window = masked_events(config.evaluation.mask_seen, config.layout)
        exclude = seen_mask(store, targets.user[rows], targets.position[rows], window).to(ctx.device)
    ranked = model.recommend(batch, 10, exclude)
    shown = []
    for row, index in enumerate(rows):
        user, position = targets.user[index], targets.position[index]
        start = store.offsets[user]
        events = store.columns["item_id"][start + max(0, position - EXAMPLE_HISTORY) : start + position + 1]
        titles = _titles(store, events)
        shown.append(
            {
                "user": str(store.user_ids[int(user)].as_py()),
                "history": titles[:-1],
                "target": titles[-1],
                "recommended": [
                    {"title": title, "score": score}
                    for title, score in _shown(store, ranked.items[row], ranked.scores[row])
                ],
            }
        )
    return shown


def _shown(store: EventStore, items: Tensor, scores: Tensor) -> list[tuple[str, float]]:
    kept = items >= 0
    return list(zip(_titles(store, items[kept].cpu().numpy()), scores[kept].tolist(), strict=True))


def _titles(store: EventStore, items: np.ndarray) -> list[str]:
    return [str(title) for title in pc.take(store.items["title"], items).to_pylist()]
