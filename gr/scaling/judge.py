"""How a run of a study is judged: held-out cross-entropy over the whole catalogue, HR, NDCG and MRR on the same
targets, and on a planted world the least loss that any model could have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gr.data.ceiling import ideal_scores
from gr.data.layout import evaluation_batch
from gr.data.planted import PlantedConfig
from gr.data.split import Targets
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext
from gr.evaluation.metrics import summarise
from gr.models.retrieval import RetrievalModel
from gr.recipes.retrieval import rank
from gr.training.run_config import RunConfig


@torch.no_grad()
def cross_entropy(
    config: RunConfig, ctx: ProcessContext, store: EventStore, targets: Targets, model: RetrievalModel
) -> np.ndarray:
    """(n,) float64 nats: -log softmax of each target's score among all items; one process, items already seen stay."""
    found = []
    for lo in range(0, len(targets), config.evaluation.batch_size):
        rows = np.arange(lo, min(lo + config.evaluation.batch_size, len(targets)))
        batch = evaluation_batch(store, targets, rows, config.layout)
        wanted = batch.labels.item_id.to(ctx.device)
        scores = model.scores(batch.to(ctx.device), (0, store.num_items)).double()
        found.append(torch.logsumexp(scores, 1) - scores.gather(1, wanted[:, None])[:, 0])
    return torch.cat(found).cpu().numpy()


def judge(
    config: RunConfig,
    ctx: ProcessContext,
    store: EventStore,
    targets: Targets,
    model: RetrievalModel,
    ks: Sequence[int],
) -> dict[str, float]:
    """``loss``, ``loss_se`` and every metric of ``ks``; in one process."""
    model.eval()
    ranks = rank(config, ctx, store, targets, model)
    each = cross_entropy(config, ctx, store, targets, model)
    metrics: dict[str, float] = {"loss": float(each.mean()), "loss_se": float(each.std(ddof=1) / len(each) ** 0.5)}
    return metrics | {name: found.mean for name, found in summarise(ranks, tuple(ks)).items()}


def loss_floor(config: RunConfig, store: EventStore, targets: Targets) -> float | None:
    """Mean -log P(target) under the planted law given the visible history: no model expects less. ``None``: not known.

    The sampling noise of the targets is in it as it is in every run's loss, so that differences are almost free of it.
    """
    if not isinstance(config.data, PlantedConfig):
        return None
    return float(ideal_scores(store, config.data, targets)[0].mean())
