"""One step of the trainer in which nothing may wait for the device: a wait is an exception there.

``torch.cuda.set_sync_debug_mode("error")``. The first step is left out: it compiles kernels, makes the optimizer's
states and fills caches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.models import TINY, Shape, build, make_batch
from benchmarks.gpu_check.plan import Context, Result, Unit

SHAPE = Shape("step", 4, 64, layers=2, width=256, rows=16, longest=1024, law="uniform")


def units(context: Context) -> Iterator[Unit]:
    """One."""
    yield Unit("step", partial(without_waiting, context), about_s=40)


class _Loader:
    """Two batches, over and over."""

    def __init__(self, shape: Shape) -> None:
        self._batches = [make_batch(shape, seed) for seed in range(2)]

    def num_batches(self, epoch: int) -> int:
        return 4

    def batch(self, epoch: int, index: int, step: int) -> Any:
        return self._batches[index % 2]


def watched(on: bool, step: Callable[[], Any]) -> None:
    """Runs it, and has torch refuse what waits."""
    if on:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


def without_waiting(context: Context) -> Result:
    """Two steps of the trainer itself, the second one watched."""
    from gr.distributed.process import ProcessContext
    from gr.training.config import TrainConfig
    from gr.training.phase import Phase
    from gr.training.trainer import Trainer

    shape = Shape("step", 1, 16, law="uniform", **TINY) if context.dry else SHAPE
    config = TrainConfig(epochs=1, precision="fp32" if context.dry else "bf16", tensorboard=False)
    process = ProcessContext(device=torch.device(context.device))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(build(shape, context), [Phase()], _Loader(shape), None, config, process, folder, seed=0)
        run = trainer._begin_phase()
        batches = iter([trainer._make_batch(0, index, index) for index in range(3)])
        trainer._step(run, batches, 1)
        watched(context.device == "cuda", lambda: trainer._step(run, batches, 1))
        norms = [float(taken.result.grad_norm) for taken in trainer._pending]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)
    if context.device != "cuda":
        return {"cannot": "a CPU has nothing to wait for; the step ran"}
    return {"say": "a step waited for nothing"}
