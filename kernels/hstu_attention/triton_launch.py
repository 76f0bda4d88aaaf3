"""Launches the Triton kernels: the backend's forward and backward. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from gr.kernels.hstu_attention import triton_kernels, triton_tiles
from gr.kernels.hstu_attention.time_buckets import edge_tensor
from gr.kernels.hstu_attention.triton_tiles import LARGEST_DIM
from gr.kernels.hstu_attention.types import Divisor, Mask, RelativeBias


def forward(*arguments: Any, **options: Any) -> Tensor:
    """``(T_q, H, d_v)``; arguments as in :func:`gr.kernels.hstu_attention.op.hstu_attention`, checked."""
    call = _Call(*arguments, **options)
    out = call.q.new_empty((*call.q.shape[:2], call.v.shape[2]), dtype=call.v.dtype)
    call.queries("forward", None, out)
    return out


def backward(
    grad: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, the position table and the time table (None where there is none)."""
    call = _Call(*arguments, **options)
    grad = _rows(grad.to(call.v.dtype))
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    call.queries("backward_query", grad, d_q)
    return (d_q, d_k, d_v, *call.keys(grad, d_k, d_v))


class _Call:
    """A call's arguments as the kernels take them.

    Attributes:
        reach: The longest distance that a laid out position table has an entry for, on either side.
        position: ``(1 or H, 2 reach + 1)`` float32, half of the table, repeated at its ends; None if there is none.
        time: ``(1 or H, num_buckets)`` float32, half of the table; None if there is none.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor | None,
        *,
        max_seq_len: int,
        divisor: Divisor,
        alpha: float,
        mask: Mask,
        bias: RelativeBias | None,
    ) -> None:
        if max(q.shape[2], v.shape[2]) > LARGEST_DIM:
            raise ValueError(f"q, k and v must have at most {LARGEST_DIM} columns a head for the triton backend")
        self.q, self.k, self.v = (_rows(t.detach()) for t in (q, k, v))
        self.max_seq_len, self.bias = max_seq_len, bias or RelativeBias()
        q_offsets = q_offsets.contiguous()
        self.rows, self.heads = q_offsets.shape[0] - 1, q.shape[1]
        kind = "number"
        if isinstance(divisor, str):
            kind, divisor = "visible", 1.0
        elif isinstance(divisor, Tensor):
            kind = "row" if divisor.dim() == 1 and divisor.shape[0] == self.rows else "query"
            divisor = divisor.detach().float().contiguous()
        self.position = self.source = self.time = edges = None
        num_edges = 0
        self.reach = max_seq_len + 256  # a tile's padding is at most 128 keys and 128 queries
        if self.bias.position_table is not None:
            table = self.bias.position_table.detach()
            entries = table.shape[-1]
            distance = torch.arange(-self.reach, self.reach + 1, device=q.device)
            self.source = (distance + entries // 2).clamp(0, entries - 1)
            self.position = 0.5 * table.reshape(-1, entries).float()[:, self.source]
        if self.bias.time_table is not None:
            table = self.bias.time_table.detach()
            self.time = (0.5 * table.reshape(-1, table.shape[-1]).float()).contiguous()
            edges = edge_tensor(self.bias.bucket_width, table.shape[-1], table.device)
            num_edges = edges.shape[0]
        limit = None if mask.window is None else min(mask.window, max_seq_len)
        self.common: dict[str, Any] = {
            "q": self.q, "k": self.k, "v": self.v,
            "q_offsets": q_offsets, "k_offsets": q_offsets if kv_offsets is None else kv_offsets.contiguous(),
            "num_contextual": None if mask.num_contextual is None else mask.num_contextual.contiguous(),
            "num_targets": None if mask.num_targets is None else mask.num_targets.contiguous(),
            "divisor": divisor, "DIVISOR": kind,
            "position": None if self.position is None else self.position[:, self.reach :],
            "position_row": _head_stride(self.position),
            "time_table": self.time, "time_row": _head_stride(self.time),
            "edges": edges, "num_edges": num_edges, "STEPS": num_edges.bit_length(),
            "query_times": None if edges is None else self.bias.query_times.contiguous(),
            "key_times": None if edges is None else self.bias.key_times.contiguous(),
            **_strides(q=self.q, k=self.k, v=self.v),
            "half_alpha": 0.5 * alpha, "window": limit,
            "full_tail": None if limit is None or mask.full_tail is None else min(mask.full_tail, max_seq_len),
            "group": None if mask.target_group is None else min(mask.target_group, max_seq_len),
            "heads": self.heads, "CAUSAL": mask.causal, "CLAMPED_IDS": self.bias.position_ids == "target_clamped",
            # The interpreter has no inline assembly.
            "FAST": q.dtype != torch.float32 and q.device.type == "cuda", "PRECISION": "ieee",
            "D_QK": q.shape[2], "D_V": v.shape[2], "BLOCK_QK": _padded(q.shape[2]), "BLOCK_V": _padded(v.shape[2]),
        }  # fmt: skip

    def queries(self, name: str, grad: Tensor | None, out: Tensor) -> None:
        """Fills ``out``, or dQ if there is a ``grad``."""
        if not out.numel():
            return
        tile = self._tile(name)
        blocks = triton.cdiv(self.max_seq_len, tile["BLOCK_M"])
        with _on(out):
            triton_kernels.query_kernel[(blocks * self.heads * self.rows,)](
                grad=grad, out=out, num_blocks=blocks, **_strides(grad=grad, out=out), **self.common, **tile
            )

    def keys(self, grad: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Fills dK and dV; the gradients of both tables."""
        d_position, d_time = (
            None if t is None else torch.zeros_like(t, dtype=torch.float64) for t in (self.position, self.time)
        )
        if d_k.shape[0]:
            tile = self._tile("backward")
            blocks = triton.cdiv(self.max_seq_len, tile["BLOCK_N"])
            with _on(d_k):
                triton_kernels.key_kernel[(blocks * self.heads * self.rows,)](
                    grad=grad, d_k=d_k, d_v=d_v, num_blocks=blocks, d_time=d_time,
                    d_position=None if d_position is None else d_position[:, self.reach :],
                    **_strides(grad=grad, d_k=d_k, d_v=d_v), **self.common, **tile,
                )  # fmt: skip
        if d_position is not None:
            table = self.bias.position_table
            folded = d_position.new_zeros(d_position.shape[0], table.shape[-1]).index_add_(1, self.source, d_position)
            d_position = folded.to(table.dtype).view(table.shape)
        if d_time is not None:
            d_time = d_time.to(self.bias.time_table.dtype).view(self.bias.time_table.shape)
        return d_position, d_time

    def _tile(self, kernel: str) -> dict[str, int]:
        keys = triton_tiles.keys_of(
            "forward" if kernel == "forward" else "backward",
            architecture=triton_tiles.architecture(self.q.device),
            half=self.q.dtype != torch.float32,
            dim=max(self.q.shape[2], self.v.shape[2]),
            bias=self.position is not None or self.time is not None,
            max_seq_len=self.max_seq_len,
            deterministic=True,
        )
        tile = triton_tiles.choose(replace(keys[0], kernel=kernel))
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may be another one than the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _rows(values: Tensor) -> Tensor:
    """Neighbours in memory along the last dimension."""
    return values if values.stride(2) == 1 else values.contiguous()


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    found = {}
    for name, t in tensors.items():
        found[f"{name}_token"], found[f"{name}_head"] = (0, 0) if t is None else t.stride()[:2]
    return found


def _head_stride(table: Tensor | None) -> int:
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def _padded(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 16)
