"""FSDP2: weights, gradients and moments of the dense part are divided; a block's weights are gathered while it works.

A copy of the model is divided and trained. The bare model shares the tables and the buffers with it; its dense
parameters are empty, but where ``whole`` fills them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gr.distributed.dense import PlainOutput, Wrapped
from gr.distributed.engine import Engine, MakeOptimizer, average_gradients, table_parameters
from gr.distributed.process import ProcessContext, when_leaving


class FSDPEngine(Engine):
    """See the module; arguments as of ``make_engine``."""

    def __init__(
        self,
        model: nn.Module,
        dense: Sequence[nn.Parameter],
        tables: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
        ctx: ProcessContext,
        *,
        clip_norm: float | None,
    ) -> None:
        self._tables = table_parameters(model)
        divided = _divided(model, self._tables, ctx)
        pairs = zip(model.parameters(), divided.model.parameters(), strict=True)
        self._parts = {bare: part for bare, part in pairs if part is not bare}
        learning = [self._parts[parameter] for parameter in dense]
        super().__init__(
            Wrapped(divided, divided), make_optimizer(learning, tables), learning, ctx, clip_norm=clip_norm
        )
        self._empty()

    def _wrap(self, model: nn.Module, accumulate: bool) -> nn.Module:
        return model

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See ``Engine``."""
        self.model.wrapper.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def update(self, scale: Tensor | None, sums: Tensor) -> Tensor:
        """See ``Engine``; the tables that every process holds are looked after here."""
        average_gradients(self._tables, self.ctx)
        return super().update(scale, sums)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Engine``."""
        self._fill()
        yield
        self._empty()

    def state_dict(self) -> dict[str, Any]:
        """See ``Engine``."""
        return _each_tensor(super().state_dict(), lambda _, value: _full(value))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Engine``."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        super().load_state_dict(_each_tensor(state, lambda index, value: _as_of(parameters[index], value)))

    def close(self) -> None:
        """See ``Engine``."""
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        for bare, part in self._parts.items():
            bare.data = _full(part.data)

    def _empty(self) -> None:
        for bare in self._parts:
            bare.data = bare.data.new_empty(0)


def _divided(model: nn.Module, tables: Sequence[nn.Parameter], ctx: ProcessContext) -> nn.Module:
    """A copy of which each process holds its part, but for tables and buffers, which are the model's own."""
    kept = [*tables, *model.buffers(), *(part for part in model.modules() if getattr(part, "sharded", False))]
    plain = PlainOutput(copy.deepcopy(model, {id(one): one for one in kept}))
    mesh = init_device_mesh(ctx.device.type, (ctx.world,))
    if hasattr(mesh, "_pg_registry"):  # torch's cache of operations on divided tensors never lets a mesh go
        when_leaving(mesh._pg_registry.clear)
    for block in plain.model.blocks() if hasattr(model, "blocks") else ():
        fully_shard(block, mesh=mesh)
    return fully_shard(plain, mesh=mesh, ignored_params=set(tables))


def _each_tensor(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's state dict with ``change(index of parameter, tensor)`` in place of each tensor."""
    moments = {
        index: {name: change(index, value) if isinstance(value, Tensor) else value for name, value in of.items()}
        for index, of in state["state"].items()
    }
    return {**state, "state": moments}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_of(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of a whole tensor that all hold, divided as the parameter is; a count stays as it is."""
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
