"""Small runs of every kind of dense parallelism, with local or sharded tables; shared by the tests of both speeds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from gr.distributed.config import DenseConfig
from gr.distributed.process import ProcessContext
from gr.evaluation.metrics import means
from gr.recipes.retrieval import rank
from gr.training.assemble import assemble, open_data, train_loader
from gr.training.config import EarlyStoppingConfig, OptimizerConfig
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer
from sharded_runs import run_config


def dense_config(folder: Path, kind: str, sharded: bool, dropout: float = 0.0, **train: Any) -> RunConfig:
    """50 steps in two epochs, everything in use: warm-up, decay, clipping, validation, selection, saving.

    Local tables learn by AdamW beside the dense part, sharded ones by themselves.
    """
    if sharded:
        config = run_config(folder, "rowwise_adagrad", "row_wise")
    else:
        config = run_config(folder, "rowwise_adagrad", None, optimizer={"kind": "adamw"})
    settings = {
        "epochs": 2,
        "batching": replace(config.train.batching, batch_size=16),
        "optimizer": OptimizerConfig(lr=0.01, weight_decay=0.1, table_lr_factor=0.5),
        "clip_norm": 0.05,
        "early_stopping": EarlyStoppingConfig(metric="ndcg@10"),
        "checkpoint_every_steps": 10,
        **train,
    }
    encoder = replace(config.model.encoder, dropout=dropout, num_layers=2)
    return replace(
        config,
        train=replace(config.train, **settings),
        model=replace(config.model, encoder=encoder),
        distributed=replace(config.distributed, dense=DenseConfig(kind=kind)),
    )


def train_dense(folder: Path, name: str, config: RunConfig, ctx: ProcessContext) -> Trainer:
    """Trains in ``folder/name``, validating as the recipe does."""
    store, split = open_data(config)
    trainer = Trainer(
        assemble(config, store, split, ctx),
        [Phase()],
        train_loader(config, store, split, ctx),
        lambda model: means(rank(config, ctx, store, split.valid, model), config.evaluation.ks),
        config.train,
        ctx,
        folder / name,
        config.seed,
        config.distributed.dense,
    )
    trainer.fit()
    return trainer


def cut_off(folder: Path, source: str, step: int, name: str) -> None:
    """Makes ``folder/name`` what ``folder/source`` was when a step had just been saved."""
    checkpoints = folder / name / "checkpoints"
    checkpoints.mkdir(parents=True)
    for path in (folder / source / "checkpoints").glob(f"step-{step:08d}*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, checkpoints / path.name)
    for path in (folder / source).glob("best*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name / path.name)
