"""Learning rate schedules as one pure function of the step."""

from __future__ import annotations

import math

from gr.errors import UserError
from gr.training.config import ScheduleConfig


def lr_factor(step: int, total_steps: int, cfg: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at a step.

    Warm-up takes steps 0..w-1 with factors 1/w, 2/w, ..., 1. After it, linear and cosine start from 1 at step
    w and reach ``final_ratio`` at the last step; wsd stays at 1 and falls linearly to ``final_ratio`` over
    the last ``decay_fraction`` of all steps. Beyond the last step the factor stays what it was there.

    Args:
        step: Zero-based step within the phase.
        total_steps: Steps in the phase, at least 1.
        cfg: The schedule.

    Returns:
        A factor in (0, 1], or 0 where ``final_ratio`` is 0.
    """
    step = min(step, total_steps - 1)
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.kind == "constant":
        return 1.0
    if cfg.kind == "wsd":
        decay = min(round(cfg.decay_fraction * total_steps), total_steps - cfg.warmup_steps)
        done = max(0, step - (total_steps - decay) + 1)
        return 1.0 + (cfg.final_ratio - 1.0) * (done / decay if decay else 0.0)
    last = total_steps - 1
    progress = (step - cfg.warmup_steps) / (last - cfg.warmup_steps) if last > cfg.warmup_steps else 0.0
    shape = 1.0 - progress if cfg.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.final_ratio + (1.0 - cfg.final_ratio) * shape


def check_schedule(total_steps: int, cfg: ScheduleConfig) -> None:
    """Refuses a warm-up that training would never finish."""
    if cfg.warmup_steps and cfg.warmup_steps >= total_steps:
        raise UserError(
            f"train.schedule.warmup_steps is {cfg.warmup_steps} but training has only {total_steps} steps; "
            f"it must be below {total_steps}"
        )
