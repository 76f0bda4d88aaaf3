"""The step loop and what surrounds it: optimizers, schedules, checkpoints, logs, run folders."""
