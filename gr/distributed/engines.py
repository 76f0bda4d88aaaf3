"""The engine that a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gr.distributed.config import DenseConfig
from gr.distributed.engine import Engine, MakeOptimizer
from gr.distributed.process import ProcessContext


def make_engine(
    config: DenseConfig,
    model: nn.Module,
    dense: Sequence[nn.Parameter],
    tables: Sequence[nn.Parameter],
    make_optimizer: MakeOptimizer,
    ctx: ProcessContext,
    *,
    clip_norm: float | None,
    accumulate: bool,
) -> Engine:
    """The engine of a phase. Freeze parameters before, not after.

    Args:
        config: Who holds what. One process alone holds everything.
        model: Gives ``Losses``. Optional: ``table_parameters()``, which are not divided by any kind; ``blocks()``,
            modules that may be gathered one at a time; ``find_unused_parameters``, true if steps use differing
            parameters.
        dense: Parameters that learn, but for tables.
        tables: Tables' parameters that learn by the same optimizer.
        make_optimizer: Makes it.
        ctx: Rank, world and device.
        clip_norm: See ``Engine``; likewise ``accumulate``.

    Raises:
        UserError: DeepSpeed is wanted and not installed.
    """
    if ctx.world == 1 or config.kind == "ddp":
        return Engine(model, make_optimizer(dense, tables), dense, ctx, clip_norm=clip_norm, accumulate=accumulate)
    if config.kind == "fsdp2":
        from gr.distributed.fsdp import FSDPEngine

        return FSDPEngine(model, dense, tables, make_optimizer, ctx, clip_norm=clip_norm)
    from gr.distributed.zero import ZeroEngine

    assert not accumulate
    stage = {"zero1": 1, "zero2": 2}[config.kind]
    return ZeroEngine(model, dense, tables, make_optimizer, ctx, clip_norm=clip_norm, stage=stage)
