"""Calls the compiled CPU form (native.cpp): float32, jagged as given, no padding.

bfloat16 and float16 are converted to float32 and back; float64 is not computed here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.kernels import native
from gr.kernels.hstu_attention.time_buckets import edge_tensor
from gr.kernels.hstu_attention.types import Arguments, RelativeBias, divisor_by_query

_SOURCE = Path(__file__).with_name("native.cpp")
_SLACK = 16  # entries behind a position table that a vector load may touch

_INTEGERS, _NUMBER, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Call(ctypes.Structure):
    """Mirrors ``struct Call``."""

    _fields_ = (
        *((name, _INTEGERS) for name in ("batch", "heads", "dim_qk", "dim_v")),
        *((name, _POINTER) for name in ("q_offsets", "k_offsets", "q", "k", "v")),
        *((f"{name}_{stride}", _INTEGERS) for name in "qkv" for stride in ("token", "head")),
        ("alpha", _NUMBER),
        *((name, _INTEGERS) for name in ("causal", "window", "full_tail", "target_group")),
        *((name, _POINTER) for name in ("num_contextual", "num_targets", "inverse_divisor", "position_table")),
        *((name, _INTEGERS) for name in ("position_entries", "position_stride", "position_clamped_ids")),
        ("time_table", _POINTER),
        *((name, _INTEGERS) for name in ("time_buckets", "time_stride", "num_edges")),
        *((name, _POINTER) for name in ("edges", "query_times", "key_times")),
        ("threads", _INTEGERS),
    )


def library() -> ctypes.CDLL | None:
    """The compiled form, built at the first call; None where it cannot be."""
    return native.load(_SOURCE)


def forward(call: Arguments) -> Tensor:
    """``(T_q, H, d_v)`` of checked arguments."""
    held = _Held(call)
    out = call.q.new_empty((call.q.shape[0], *call.v.shape[1:]), dtype=torch.float32)
    library().hstu_attention_forward(ctypes.byref(held.struct), _POINTER(_address(out)))
    return out.to(call.v.dtype)


def backward(grad: Tensor, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, the position table and the time table (None where there is none)."""
    q, k, v, bias, held = call.q, call.k, call.v, call.bias, _Held(call)
    grad = grad.float().contiguous()
    # Rows without queries are not visited, and their keys have no gradient.
    make = torch.empty if call.kv_offsets is None else torch.zeros
    d_q, d_k, d_v = (make(t.shape, dtype=torch.float32) for t in (q, k, v))
    tables = [torch.zeros(t.shape, dtype=torch.float64) for t in (held.position, held.time)]
    tables[0] = tables[0][:, : held.struct.position_entries].contiguous()
    library().hstu_attention_backward(
        ctypes.byref(held.struct), *(_POINTER(_address(t)) for t in (grad, d_q, d_k, d_v, *tables))
    )
    d_position = d_time = None
    if bias is not None and bias.position_table is not None:
        d_position = _fold(tables[0], held.extra).to(bias.position_table.dtype).view(bias.position_table.shape)
    if bias is not None and bias.time_table is not None:
        d_time = tables[1].to(bias.time_table.dtype).view(bias.time_table.shape)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_position, d_time


class _Held:
    """A call as a struct, and the tensors that it points into.

    Attributes:
        struct: What the compiled functions take.
        position: ``(1 or H, entries + slack)`` float32, extended by its ends to the longest distance; empty if none.
        extra: Entries by which it was extended on each side.
        time: ``(1 or H, num_buckets)`` float32; empty if none.
    """

    def __init__(self, call: Arguments) -> None:
        q, k, v, q_offsets, kv_offsets = call.q, call.k, call.v, call.q_offsets, call.kv_offsets
        mask, bias, divisor = call.mask, call.bias or RelativeBias(), call.divisor
        self.extra = 0
        self.position = self.time = torch.empty((0, 0), dtype=torch.float32)
        if bias.position_table is not None:
            table = bias.position_table.detach().float().view(-1, bias.position_table.shape[-1])
            if bias.position_ids == "index":
                lengths = (q_offsets if kv_offsets is None else kv_offsets).diff()
                longest = int(lengths.max()) if lengths.numel() else 0
                self.extra = max(0, longest - 1 - table.shape[1] // 2)
            padded = F.pad(table[:, None], (self.extra, self.extra), mode="replicate")[:, 0] if self.extra else table
            entries = padded.shape[1]
            self.position = F.pad(padded, (0, _SLACK))
        if bias.time_table is not None:
            self.time = bias.time_table.detach().float().view(-1, bias.time_table.shape[-1]).contiguous()
        edges = None
        if bias.time_table is not None:
            edges = edge_tensor(bias.bucket_width, self.time.shape[1], torch.int64, self.time.device)
        q_offsets = q_offsets.long().contiguous()
        k_offsets = q_offsets if kv_offsets is None else kv_offsets.long().contiguous()
        inverse = None
        if not isinstance(divisor, str):
            each = divisor_by_query(divisor, q_offsets.diff(), q.shape[0])
            inverse = (
                each.double().reciprocal().float()
                if isinstance(each, Tensor)
                else torch.full((q.shape[0],), 1.0 / each, dtype=torch.float32)
            )
        counts = [None if t is None else t.long().contiguous() for t in (mask.num_contextual, mask.num_targets)]
        times = [None if edges is None else t.long().contiguous() for t in (bias.query_times, bias.key_times)]
        q, k, v = (_rows(t) for t in (q, k, v))
        self._alive = (q, k, v, q_offsets, k_offsets, inverse, counts, times, edges)
        has_position = bias.position_table is not None
        self.struct = _Call(
            batch=q_offsets.shape[0] - 1,
            heads=q.shape[1],
            dim_qk=q.shape[2],
            dim_v=v.shape[2],
            q_offsets=_address(q_offsets),
            k_offsets=_address(k_offsets),
            q=_address(q),
            k=_address(k),
            v=_address(v),
            **{f"{name}_token": t.stride(0) for name, t in zip("qkv", (q, k, v), strict=True)},
            **{f"{name}_head": t.stride(1) for name, t in zip("qkv", (q, k, v), strict=True)},
            alpha=call.alpha,
            causal=mask.causal,
            window=mask.window or 0,
            full_tail=mask.full_tail or 0,
            target_group=mask.target_group or 0,
            num_contextual=_address(counts[0]),
            num_targets=_address(counts[1]),
            inverse_divisor=_address(inverse),
            position_table=_address(self.position) if has_position else None,
            position_entries=entries if has_position else 0,
            position_stride=self.position.shape[1] if self.position.shape[0] > 1 else 0,
            position_clamped_ids=bias.position_ids == "target_clamped",
            time_table=_address(self.time) if edges is not None else None,
            time_buckets=self.time.shape[1],
            time_stride=self.time.shape[1] if self.time.shape[0] > 1 else 0,
            num_edges=0 if edges is None else edges.shape[0],
            edges=_address(edges),
            query_times=_address(times[0]),
            key_times=_address(times[1]),
            threads=torch.get_num_threads(),
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(values: Tensor) -> Tensor:
    """Float32, neighbours in memory along the last dimension."""
    values = values.detach().float()
    return values if values.stride(2) == 1 or values.shape[2] == 1 else values.contiguous()


def _fold(total: Tensor, extra: int) -> Tensor:
    """Gradient of a table from that of the one extended by its ends."""
    if not extra:
        return total
    core = total[:, extra:-extra].clone()
    core[:, 0] += total[:, :extra].sum(1)
    core[:, -1] += total[:, -extra:].sum(1)
    return core
