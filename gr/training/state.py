"""Where training stands: everything a checkpoint holds besides weights and optimizer moments."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gr.training.config import EarlyStoppingConfig


@dataclass
class Counts:
    """Sums over steps, micro-batches and ranks. Integers are exact Python integers.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens learned from.
        pairs: Unmasked (query, key) pairs.
        forward_flops: FLOPs of the forward passes.
        loss: Sum of totals; divided by ``weight`` it is the mean loss.
        weight: Sum of label weights.
        parts: Sums of the named parts.
        seconds: Time in the step loop: without evaluation, saving, or preparation.
    """

    steps: int = 0
    tokens: int = 0
    pairs: int = 0
    forward_flops: int = 0
    loss: float = 0.0
    weight: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def model_flops(self) -> int:
        """Forward and backward: three times the forward pass (a product has two gradients)."""
        return 3 * self.forward_flops

    @property
    def mean_loss(self) -> float:
        """Loss per unit of label weight."""
        return self.loss / self.weight if self.weight else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the step loop."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Best:
    """Validation so far.

    Attributes:
        step: Where the best value was seen; 0: nowhere yet.
        value: It; ``None``: nothing was selected.
        metrics: All metrics there.
        worse: Evaluations since without improvement.
    """

    step: int = 0
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    worse: int = 0

    def update(self, step: int, metrics: dict[str, float], cfg: EarlyStoppingConfig | None) -> bool:
        """Takes an evaluation in; True if its weights are to be kept. Without a config the latest are."""
        if cfg is not None:
            value = metrics[cfg.metric]
            sign = 1.0 if cfg.mode == "max" else -1.0
            if self.value is not None and not sign * (value - self.value) > cfg.min_delta:
                self.worse += 1
                return False
            self.value = value
        self.step, self.metrics, self.worse = step, dict(metrics), 0
        return True

    def exhausted(self, cfg: EarlyStoppingConfig | None) -> bool:
        """Whether patience has run out."""
        return cfg is not None and 0 < cfg.patience <= self.worse


@dataclass
class TrainState:
    """Attributes:
    step: Optimizer steps done in the whole run.
    phase: Index of the current phase; number of phases when all are done.
    phase_step: Steps done in it.
    epoch: Epoch of the phase.
    index: Loader batches of the epoch used; equal to the epoch's number of batches when only evaluation is
        due.
    total: Counts since the beginning.
    window: Counts since the last line of metrics.jsonl.
    best: Validation in this phase.
    evaluation: The latest evaluation's metrics.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    epoch: int = 0
    index: int = 0
    total: Counts = field(default_factory=Counts)
    window: Counts = field(default_factory=Counts)
    best: Best = field(default_factory=Best)
    evaluation: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrainState:
        """Inverts ``to_dict``."""
        parts = {
            "total": Counts(**raw["total"]),
            "window": Counts(**raw["window"]),
            "best": Best(**raw["best"]),
        }
        return cls(**{**raw, **parts})
