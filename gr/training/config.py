"""What training needs to be told. Impossible values are refused here, in one sentence naming the field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gr.config import runtime
from gr.data.loader import BatchingConfig
from gr.errors import UserError


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; it must be {right}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        kind: The only one so far.
        lr: Peak learning rate; the schedule multiplies it.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; on dense parameters of two or more dimensions only, never on tables, biases,
            norms.
        table_lr_factor: Tables learn at ``lr * table_lr_factor``.
        fused: One pass over each parameter instead of one an operation.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    table_lr_factor: float = 1.0
    fused: bool = True

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "above 0")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "eps", self.eps, "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.table_lr_factor >= 0, "table_lr_factor", self.table_lr_factor, "at least 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a phase's steps; see ``gr.training.schedule.lr_factor``.

    Attributes:
        kind: constant, linear or cosine decay, or wsd (warm-up, stable, decay).
        warmup_steps: Steps of linear rise from 1/warmup_steps to 1.
        final_ratio: Factor at the last step (all kinds but constant).
        decay_fraction: Share of all steps in which wsd decays.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        _require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "in [0, 1]")
        _require(0 <= self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "in [0, 1]")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Keeps the weights that were best on validation, and stops when they no longer improve.

    Attributes:
        metric: A key of what evaluation returns.
        patience: Evaluations without improvement after which training stops; 0: never, the best is only kept.
        mode: Whether larger or smaller is better.
        min_delta: An improvement must exceed this.
    """

    metric: str = "ndcg@10"
    patience: int = 5
    mode: Literal["max", "min"] = "max"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _require(self.patience >= 0, "patience", self.patience, "at least 0")
        _require(self.min_delta >= 0, "min_delta", self.min_delta, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: Passes over the training sequences.
        max_steps: Optimizer steps after which training ends even within an epoch; ``None``: no limit.
        batching: What a (micro-)batch is.
        optimizer: The update rule.
        schedule: The learning rate over steps.
        clip_norm: Largest norm of the dense parameters' gradient; ``None``: not clipped.
        accumulate: Loader batches per optimizer step; n batches of b sequences learn as one batch of n * b (but for
            the objective in_batch, whose negatives come from each loader batch).
        precision: bf16 runs matrix products in bfloat16; parameters and their update stay fp32.
        compile: Runs the model through torch.compile.
        early_stopping: ``None``: the last weights are kept and the number of epochs is as configured.
        evaluate_every_epochs: Validation after every so many epochs, and after the last.
        checkpoint_every_steps: Saves within an epoch too; 0: after every epoch only.
        checkpoint_async: Training waits for a copy in memory, not for the disk. Takes host memory for one more copy of
            what a process saves (rank 0: dense weights and moments; each rank: its share of tables that own their
            optimizer). Where those lie on GPUs, the save is waited for all the same.
        keep_last: How many checkpoints stay on disk.
        log_every_steps: Steps per line of metrics.jsonl.
        tensorboard: Writes TensorBoard events where the package is installed.
    """

    epochs: int = 10
    max_steps: int | None = None
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    early_stopping: EarlyStoppingConfig | None = None
    evaluate_every_epochs: int = 1
    checkpoint_every_steps: int = runtime(0)
    checkpoint_async: bool = runtime(True)
    keep_last: int = runtime(2)
    log_every_steps: int = runtime(50)
    tensorboard: bool = runtime(True)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or null")
        for name in ("accumulate", "evaluate_every_epochs", "keep_last", "log_every_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.checkpoint_every_steps >= 0,
            "checkpoint_every_steps",
            self.checkpoint_every_steps,
            "at least 0",
        )
