"""From a config to its parts: data, model, loaders. What a notebook calls, too."""

from __future__ import annotations

import numpy as np
import torch

from gr.data.layout import check_layout
from gr.data.loader import EvalLoader, TrainLoader
from gr.data.negatives import make_sampler
from gr.data.prepare import prepare
from gr.data.split import Split, Targets, make_split, thin
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext
from gr.distributed.tables import make_tables
from gr.models.retrieval import RetrievalModel
from gr.training.run_config import RunConfig


def open_data(config: RunConfig) -> tuple[EventStore, Split]:
    """The prepared log (from the cache, or prepared now) and its split."""
    store = prepare(config.data, config.cache)
    return store, split_of(config, store)


def split_of(config: RunConfig, store: EventStore) -> Split:
    """What a config holds out of its log, and whom it trains on."""
    return thin(make_split(config.split, store), config.train_users)


def assemble(config: RunConfig, store: EventStore, split: Split, ctx: ProcessContext | None = None) -> RetrievalModel:
    """The model with its first weights, a function of ``config.seed`` only.

    Args:
        config: The run.
        store: Its log.
        split: What is held out of it.
        ctx: Among whom tables are divided, if the config shards them: a collective then. ``None``: this process alone,
            which holds all of them.

    Raises:
        UserError: The layout or the encoder needs a column that the log lacks.
    """
    check_layout(store, config.layout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RetrievalModel(
            config.model,
            config.objective,
            num_items=store.num_items,
            num_actions=store.num_actions,
            layout=config.layout.kind,
            max_tokens=config.layout.max_tokens,
            make_tables=make_tables(config.distributed.tables, ctx or ProcessContext()),
        )
    if getattr(model.encoder, "needs_times", False):
        store.require_times("the encoder's time bias")
    return model


def train_loader(
    config: RunConfig, store: EventStore, split: Split, ctx: ProcessContext, negatives: bool = True
) -> TrainLoader:
    """This rank's training batches, with the objective's negatives unless told otherwise."""
    sampler = make_sampler(config.objective.negatives(), store, split) if negatives else None
    return TrainLoader(
        store,
        split,
        config.layout,
        config.train.batching,
        sampler,
        config.seed,
        rank=ctx.rank,
        world=ctx.world,
    )


def eval_loader(config: RunConfig, store: EventStore, targets: Targets, ctx: ProcessContext) -> EvalLoader:
    """This rank's batches of histories before targets."""
    return EvalLoader(store, targets, config.layout, config.evaluation.batch_size, rank=ctx.rank, world=ctx.world)


def sample_targets(targets: Targets, count: int) -> Targets:
    """An even sample of ``count`` targets (every n-th user, no randomness); all of them if ``count`` is 0."""
    if count == 0 or count >= len(targets):
        return targets
    rows = np.linspace(0, len(targets) - 1, count).round().astype(np.int64)
    return Targets(targets.user[rows], targets.position[rows])
