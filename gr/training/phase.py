"""A phase: which parameters learn from which objective, for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from gr.data.batch import JaggedBatch
from gr.losses import Losses


@dataclass(frozen=True)
class StepContext:
    """What an objective may know besides the batch.

    Attributes:
        step: Zero-based optimizer step of the whole run.
        seed: The run's seed.
        epoch: Zero-based epoch of the phase.
        phase: The phase's name.
        training: False where an objective is only measured.
    """

    step: int
    seed: int
    epoch: int = 0
    phase: str = "train"
    training: bool = True


@dataclass(frozen=True)
class Hooks:
    """Called on every rank with the bare model, where they must do the same: buffers are not broadcast.

    What they keep must be in buffers of the model, or a resume loses it. From ``before_epoch`` on they may read the
    dense weights, but not change them: the processes may hold others (``distributed.dense``).

    Attributes:
        before_phase: Once, before the phase's first step.
        before_epoch: Before each epoch's first step, with the epoch's number (re-clustering, re-encoding
            items).
        after_step: After each update.
    """

    before_phase: Callable[[nn.Module], None] | None = None
    before_epoch: Callable[[nn.Module, int], None] | None = None
    after_step: Callable[[nn.Module, StepContext], None] | None = None


def all_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Every parameter of the model."""
    return model.parameters()


def forward_losses(model: nn.Module, batch: JaggedBatch, context: StepContext) -> Losses:
    """The model's own losses."""
    return model(batch)


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: Shown in logs.
        parameters: Which parameters of the (bare) model learn; all others are frozen for the phase.
        objective: Called with the model as wrapped for data parallelism: it must call ``model(batch)``, once.
        epochs: Overrides the config's.
        max_steps: Overrides the config's.
        hooks: Called on the way.
    """

    name: str = "train"
    parameters: Callable[[nn.Module], Iterable[nn.Parameter]] = all_parameters
    objective: Callable[[nn.Module, JaggedBatch, StepContext], Losses] = forward_losses
    epochs: int | None = None
    max_steps: int | None = None
    hooks: Hooks = Hooks()
