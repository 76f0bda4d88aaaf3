"""Dense data parallelism: each rank holds the whole model; gradients are averaged as they arise."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gr.distributed.process import ProcessContext


class PlainOutput(nn.Module):
    """Calls the model and hands its losses on as a plain tuple.

    Wrappers find the tensors of an output by flattening tuples, lists and dicts. They take a dataclass for a leaf
    without tensors: FSDP2 then never gathers before the backward pass, and DistributedDataParallel with a static graph
    never averages the gradients (seen with torch 2.13).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses_type: type | None = None

    def forward(self, batch: Any) -> tuple[Any, Any, Any]:
        losses = self.model(batch)
        self.losses_type = type(losses)
        return losses.total, dict(losses.parts), losses.weight


class Wrapped(nn.Module):
    """A model inside a wrapper; ``forward(batch)`` returns the model's own ``Losses``.

    Args:
        wrapper: Calls ``plain`` and returns what it returned.
        plain: The model.
    """

    def __init__(self, wrapper: nn.Module, plain: PlainOutput) -> None:
        super().__init__()
        self.wrapper = wrapper
        self._plain = (plain,)  # not a part: the wrapper may hide it from whoever looks for parameters

    def forward(self, batch: Any) -> Any:
        """The model's ``Losses`` for this rank's batch."""
        total, parts, weight = self.wrapper(batch)
        return self._plain[0].losses_type(total=total, parts=parts, weight=weight)


class DataParallel(Wrapped):
    """The model, its gradients averaged over ranks.

    Call it once per backward pass. The average is over ranks, so a gradient of sums must be multiplied by
    ``world``.
    """

    def __init__(self, model: nn.Module, ctx: ProcessContext, accumulate: bool) -> None:
        # A static graph finds out once which parameters a step uses; a model whose steps differ must say so.
        # Under no_sync torch 2.13 fails an internal assertion in a static graph: then each pass is searched.
        find_unused = accumulate or bool(getattr(model, "find_unused_parameters", False))
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers to a word that 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            plain = PlainOutput(model)
            # What is sharded learns by itself.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(plain, _sharded_names(plain))
            parallel = DistributedDataParallel(
                plain,
                device_ids=[ctx.device.index] if ctx.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=find_unused,
                static_graph=not find_unused,
            )
        super().__init__(parallel, plain)


def _sharded_names(model: nn.Module) -> list[str]:
    """Names of all parameters and buffers of modules that say ``sharded``."""
    parts = [(name, part) for name, part in model.named_modules() if getattr(part, "sharded", False)]
    held = [(name, [*part.named_parameters(), *part.named_buffers()]) for name, part in parts]
    return [f"{name}.{inner}" for name, found in held for inner, _ in found]


def wrap(model: nn.Module, ctx: ProcessContext, accumulate: bool = False) -> nn.Module:
    """The model itself on one rank, ``DataParallel`` on several. Freeze parameters before, not after.

    Args:
        model: Gives ``Losses``. Its attribute ``find_unused_parameters`` says that steps use differing
            parameters.
        ctx: Rank, world and device.
        accumulate: Whether ``no_sync`` will be used.
    """
    return model if ctx.world == 1 else DataParallel(model, ctx, accumulate)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it gradients only accumulate: for all micro-batches of a step but the last."""
    return model.wrapper.no_sync() if isinstance(model, DataParallel) else contextlib.nullcontext()
