"""Copies of a state in host memory, which training may not touch while a background thread writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gr.distributed.process import ProcessContext

Key = tuple[str | int, ...]
"""Where in the nested containers a tensor is."""


class HostBuffers:
    """Memory for one copy of a state, taken at the first copy and used again by the next ones.

    Plain tensors and torch's sharded tensors (of which a rank copies its own shards) become tensors on the CPU; dicts,
    lists and tuples are copied, and everything else is taken as it is.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}

    def copy(self, state: Any, ctx: ProcessContext) -> Any:
        """The state as it is now. It is overwritten by the next copy.

        Args:
            state: Nested containers.
            ctx: Whose group sharded tensors then belong to.
        """
        before, self._held = self._held, {}
        copied = self._copy((), state, before, ctx)
        if any(buffer.is_pinned() for buffer in self._held.values()) and torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, key: Key, value: Any, before: dict[Key, Tensor], ctx: ProcessContext) -> Any:
        if hasattr(value, "local_shards"):
            return self._copy_shards(key, value, before, ctx)
        if isinstance(value, Tensor):
            return self._copy_tensor(key, value, before)
        if isinstance(value, dict):
            return {name: self._copy((*key, name), item, before, ctx) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy((*key, i), item, before, ctx) for i, item in enumerate(value))
        return value

    def _copy_tensor(self, key: Key, tensor: Tensor, before: dict[Key, Tensor]) -> Tensor:
        tensor = tensor.detach()
        buffer = before.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._held[key] = buffer.copy_(tensor, non_blocking=True)
        return buffer

    def _copy_shards(self, key: Key, value: Any, before: dict[Key, Tensor], ctx: ProcessContext) -> Any:
        from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

        shards = [
            Shard(self._copy_tensor((*key, i), shard.tensor, before), shard.metadata)
            for i, shard in enumerate(value.local_shards())
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, value.metadata(), process_group=ctx.group
        )
