"""Small runs with tables that own their optimizer, local or sharded; shared by the tests of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gr import config as configs
from gr.distributed.process import ProcessContext
from gr.training.assemble import assemble, open_data, train_loader
from gr.training.phase import Hooks, Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer

SAVED = "rowwise_adagrad"
"""The run that is saved within its only epoch of 50 steps."""
FULL = {"kind": "full_softmax"}
EACH = {"kind": "sampled_softmax", "num_negatives": 8}
SHARED = {"kind": "sampled_softmax", "num_negatives": 32, "shared": True}
RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"kind": "sgd", "lr": 2.0}, "objective": FULL, "layout": "items"},
    "adagrad": {"optimizer": {"kind": "adagrad", "lr": 0.05}, "objective": SHARED, "layout": "added"},
    "rowwise_adagrad": {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}, "objective": FULL, "layout": "added"},
    "rowwise_adagrad_sampled": {
        "optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}, "objective": EACH, "layout": "items"
    },
    "hashed": {"optimizer": {"kind": "adagrad", "lr": 0.05}, "objective": FULL, "layout": "added", "item_rows": 100},
    "adagrad_full": {"optimizer": {"kind": "adagrad", "lr": 0.02}, "objective": FULL, "layout": "interleaved"},
}  # fmt: skip


def run_config(folder: Path, run: str, sharding: str | None, **tables: Any) -> RunConfig:
    """Row of ``RUNS``; ``sharding`` None: local tables."""
    parts = RUNS[run]
    kind = {"kind": "local"} if sharding is None else {"kind": "sharded", "sharding": sharding}
    raw = {
        "data": {
            "kind": "planted", "num_users": 400, "num_items": 121, "num_topics": 4, "subtopics": 2, "actions": True,
        },
        "layout": {"kind": parts["layout"], "max_events": 28},
        "model": {
            "dim": 16, "table_init_std": 0.1, "item_rows": parts.get("item_rows", 0),
            "encoder": {"kind": "hstu", "num_layers": 1, "num_heads": 2, "dim_qk": 8, "dim_v": 8, "dropout": 0.0},
            "preprocessor": {"dropout": 0.0},
        },
        "objective": parts["objective"],
        "train": {
            "epochs": 1, "batching": {"batch_size": 8}, "log_every_steps": 1, "clip_norm": 1.0, "tensorboard": False,
            "schedule": {"kind": "cosine", "warmup_steps": 5},
            "checkpoint_every_steps": 20 if run == SAVED else 0, "keep_last": 10,
        },
        "distributed": {"tables": {"optimizer": parts["optimizer"], **kind, **tables}},
        "cache": str(folder / "cache"),
    }  # fmt: skip
    return configs.from_dict(RunConfig, raw, run)


def train(folder: Path, name: str, config: RunConfig, ctx: ProcessContext, hooks: Hooks | None = None) -> Trainer:
    """Trains in ``folder/name``."""
    store, split = open_data(config)
    model = assemble(config, store, split, ctx)
    loader = train_loader(config, store, split, ctx)
    trainer = Trainer(
        model, [Phase(hooks=hooks or Hooks())], loader, None, config.train, ctx, folder / name, config.seed
    )
    trainer.fit()
    return trainer


def losses(folder: Path) -> torch.Tensor:
    """(steps,) float64 losses that a run wrote down."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)
