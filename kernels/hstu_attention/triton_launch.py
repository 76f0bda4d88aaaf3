"""Launches the Triton kernels: the backend's forward and backward. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from gr.kernels.hstu_attention import triton_tiles
from gr.kernels.hstu_attention.time_buckets import edge_tensor
from gr.kernels.hstu_attention.triton_kernels import key_kernel, query_kernel
from gr.kernels.hstu_attention.triton_packed import packed_kernel
from gr.kernels.hstu_attention.types import Arguments, RelativeBias

# Asked where kernels are decorated, for that is what decides. The interpreter has no inline assembly.
INTERPRETED = bool(triton.knobs.runtime.interpret)
SORTED_ROWS = 8192
"""More rows fill any device in whatever order they come."""
FIXED_BITS = 61
"""Of a sum in integers, which is never longer."""


def forward(arguments: Arguments) -> Tensor:
    """``(T_q, H, d_v)`` of checked arguments."""
    call = _Call(arguments)
    out = call.q.new_empty((*call.q.shape[:2], call.v.shape[2]), dtype=call.v.dtype)
    if not out.numel():
        return out
    (key,) = call.keys_of("forward", deterministic=False)
    if key.kernel == "forward_packed":
        call.pack(key, out=out)
    else:
        call.queries(key, None, out)
    return out


def backward(grad: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, the position table and the time table (None where there is none).

    Deterministic, dQ has a kernel of its own, and the tables are summed in integers.
    """
    call, deterministic = _Call(arguments), arguments.deterministic
    # A head may be repeated (stride 0), as in the gradient of a sum.
    grad = _rows(grad.to(call.v.dtype))
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    keys = call.keys_of("backward", deterministic)
    if not d_k.shape[0]:
        keys = ()
    tables = _TableGradients(call, grad, deterministic)
    for key in keys:
        if key.kernel == "backward_packed":
            call.pack(key, grad=grad, d_q=d_q, d_k=d_k, d_v=d_v, **tables.arguments)
        elif key.kernel == "backward_query":
            call.queries(key, grad, d_q)
        else:
            added = torch.zeros(d_q.shape, dtype=torch.float32, device=d_q.device) if len(keys) == 1 else None
            call.keys(key, grad=grad, d_q=added, d_k=d_k, d_v=d_v, **tables.arguments)
            if added is not None:
                torch.mul(added, call.half_alpha / call.number, out=d_q)
    return (d_q, d_k, d_v, *tables.finished())


class _Call:
    """A call's arguments as the kernels take them.

    Attributes:
        reach: The longest distance that a laid out position table has an entry for, on either side.
        position: ``(1 or H, 2 reach + 1)`` float32, half of the table, repeated at its ends; None if there is none.
        time: ``(1 or H, num_buckets)`` float32, half of the table; None if there is none.
        number: The divisor if it is a number, else 1.
    """

    def __init__(self, arguments: Arguments) -> None:
        q, k, v, mask, divisor = arguments.q, arguments.k, arguments.v, arguments.mask, arguments.divisor
        q_offsets, kv_offsets, max_seq_len = arguments.q_offsets, arguments.kv_offsets, arguments.max_seq_len
        if max(q.shape[2], v.shape[2]) > triton_tiles.LARGEST_DIM:
            largest = triton_tiles.LARGEST_DIM
            raise ValueError(f"q, k and v must have at most {largest} columns a head for the triton backend")
        self.q, self.k, self.v = (_rows(t.detach()) for t in (q, k, v))
        self.max_seq_len, self.half_alpha = max_seq_len, 0.5 * arguments.alpha
        self.bias = arguments.bias or RelativeBias()
        self.q_offsets = q_offsets.contiguous()
        self.delta = kv_offsets is not None
        self.k_offsets = kv_offsets.contiguous() if self.delta else self.q_offsets
        self.rows, self.heads = q_offsets.shape[0] - 1, q.shape[1]
        if isinstance(divisor, str):
            self.kind, self.divisor = "visible", 1.0
        elif isinstance(divisor, Tensor):
            self.kind = "row" if divisor.dim() == 1 and divisor.shape[0] == self.rows else "query"
            self.divisor = divisor.detach().float().contiguous()
        else:
            self.kind, self.divisor = "number", float(divisor)
        self.number = self.divisor if self.kind == "number" else 1.0
        self.position = self.time = edges = query_times = key_times = None
        num_edges = 0
        self.reach = max_seq_len + 2 * triton_tiles.LARGEST_BLOCK  # a tile's padding: a block of keys, one of queries
        if self.bias.position_table is not None:
            table = self.bias.position_table.detach()
            entries = table.shape[-1]
            distance = torch.arange(-self.reach, self.reach + 1, device=q.device)
            self.position = 0.5 * table.reshape(-1, entries).float()[:, (distance + entries // 2).clamp(0, entries - 1)]
        if self.bias.time_table is not None:
            table = self.bias.time_table.detach()
            self.time = (0.5 * table.reshape(-1, table.shape[-1]).float()).contiguous()
            # float32 kernels are compiled for wide times alone.
            width = torch.int64 if q.dtype == torch.float32 else self.bias.key_times.dtype
            query_times, key_times = (t.to(width).contiguous() for t in (self.bias.query_times, self.bias.key_times))
            edges = edge_tensor(self.bias.bucket_width, table.shape[-1], width, table.device)
            num_edges = edges.shape[0]
        # Beyond the longest sequence a limit changes nothing; as they are they need not fit 32 bits.
        window, full_tail, group = (
            None if n is None else min(n, max_seq_len) for n in (mask.window, mask.full_tail, mask.target_group)
        )
        self.common: dict[str, Any] = {
            "q": self.q, "k": self.k, "v": self.v, **_strides(q=self.q, k=self.k, v=self.v),
            "num_contextual": None if mask.num_contextual is None else mask.num_contextual.contiguous(),
            "num_targets": None if mask.num_targets is None else mask.num_targets.contiguous(),
            "divisor": self.divisor, "DIVISOR": self.kind,
            "position": None if self.position is None else self.position[:, self.reach :],
            "position_row": _head_stride(self.position),
            "time_table": self.time, "time_row": _head_stride(self.time),
            "edges": edges, "num_edges": num_edges, "EDGES": max(triton.next_power_of_2(num_edges), 16),
            "query_times": query_times, "key_times": key_times,
            "half_alpha": self.half_alpha, "window": window, "full_tail": None if window is None else full_tail,
            "group": group, "heads": self.heads, "CAUSAL": mask.causal,
            "CLAMPED_IDS": self.bias.position_ids == "target_clamped",
            "FAST": q.dtype != torch.float32 and not INTERPRETED,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "D_QK": q.shape[2], "D_V": v.shape[2], "BLOCK_QK": _padded(q.shape[2]), "BLOCK_V": _padded(v.shape[2]),
        }  # fmt: skip

    def keys_of(self, direction: str, deterministic: bool) -> tuple[triton_tiles.Key, ...]:
        bias = "" if self.position is None and self.time is None else "narrow"
        if self.time is not None and self.bias.key_times.dtype == torch.int64:
            bias = "wide"
        return triton_tiles.keys_of(
            direction,
            architecture=triton_tiles.architecture(self.q.device),
            half=self.q.dtype != torch.float32,
            dim=max(self.q.shape[2], self.v.shape[2]),
            bias=bias,
            max_seq_len=self.max_seq_len,
            delta=self.delta,
            deterministic=deterministic,
        )

    def queries(self, key: triton_tiles.Key, grad: Tensor | None, out: Tensor) -> None:
        """Fills ``out``, or dQ if there is a ``grad``."""
        tile = triton_tiles.choose(key)
        blocks = triton.cdiv(self.max_seq_len, tile.block_m)
        with _on(out):
            query_kernel[(blocks * self.heads * self.rows,)](
                grad=grad, out=out, num_blocks=blocks, **_strides(grad=grad, out=out), **self._long(tile)
            )

    def keys(self, key: triton_tiles.Key, d_k: Tensor, d_v: Tensor, **more: Any) -> None:
        """Fills dK and dV; adds dQ if there is a ``d_q``, and the tables' gradients."""
        tile = triton_tiles.choose(key)
        blocks = triton.cdiv(self.max_seq_len, tile.block_n)
        strides = _strides(grad=more["grad"], d_q=more["d_q"], d_k=d_k, d_v=d_v)
        with _on(d_k):
            key_kernel[(blocks * self.heads * self.rows,)](
                d_k=d_k, d_v=d_v, num_blocks=blocks, **more, **strides, **self._long(tile)
            )

    def pack(self, key: triton_tiles.Key, **given: Any) -> None:
        """Fills ``out``, or with ``grad`` all gradients, in one pass."""
        tile = triton_tiles.choose(key)
        rows = min(tile.block_m // self.max_seq_len, self.rows)
        tensors = {name: given.pop(name, None) for name in ("out", "grad", "d_q", "d_k", "d_v")}
        none = dict.fromkeys(("d_position", "d_time", "scale"))
        with _on(self.q):
            packed_kernel[(triton.cdiv(self.rows, rows) * self.heads,)](
                offsets=self.q_offsets, num_rows=self.rows,
                ROWS=rows, ROWS_PADDED=triton.next_power_of_2(rows), BLOCK=tile.block_m,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
                **tensors, **none | given, **_strides(**tensors), **self.common,
            )  # fmt: skip

    def _long(self, tile: triton_tiles.Tile) -> dict[str, Any]:
        """What both kernels of long rows take."""
        return self.common | {
            "q_offsets": self.q_offsets,
            "k_offsets": self.k_offsets,
            "order": self._order(),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def _order(self) -> Tensor | None:
        """Rows by work, the largest first, so that none of them is left alone at the end; None where there are many."""
        if not 1 < self.rows <= SORTED_ROWS:
            return None
        work = self.q_offsets.diff() * self.k_offsets.diff().long()
        return work.argsort(descending=True, stable=True).int()


class _TableGradients:
    """Where kernels add the tables' gradients, and how those are read off.

    Sums are float64, or deterministic: int64 of 1 / ``scale``, such that a bound of all |ds| together has 61 bits.
    """

    def __init__(self, call: _Call, grad: Tensor, deterministic: bool) -> None:
        self.call, self.scale = call, None
        self.position, self.time = (
            None if t is None else torch.zeros_like(t, dtype=torch.int64 if deterministic else torch.float64)
            for t in (call.position, call.time)
        )
        if deterministic and grad.numel() and (self.position is not None or self.time is not None):
            # |ds| <= |SiLU'| sum_d |g_d v_d| / n and |SiLU'| < 1.1; kernels add 2 ds, without an n that is a number.
            largest = grad.abs().amax().double() * call.v.abs().amax().double() * (2.2 * call.v.shape[2])
            if call.kind in ("row", "query"):
                largest = largest / call.divisor.amin().double()
            pairs = call.q.shape[0] * call.max_seq_len * call.heads
            self.scale = 2.0**FIXED_BITS / (largest * pairs).clamp(min=1e-200)
        self.arguments = {
            "d_position": None if self.position is None else self.position[:, call.reach :],
            "d_time": self.time,
            "scale": self.scale,
        }

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients, in the shapes and dtypes of the tables."""
        found, bias = [], self.call.bias
        for table, total in ((bias.position_table, self.position), (bias.time_table, self.time)):
            if total is not None:
                total = total.double() if self.scale is None else total / self.scale
                if table is bias.position_table:
                    total = _fold(total, table.shape[-1] // 2)
                total = (total * (0.5 / self.call.number)).to(table.dtype).view(table.shape)
            found.append(total)
        return tuple(found)


def _fold(total: Tensor, half: int) -> Tensor:
    """``(rows, 2 reach + 1)`` sums by distance -> ``(rows, 2 half + 1)``; the ends take what lies beyond."""
    extra = total.shape[1] // 2 - half
    if extra <= 0:
        return torch.nn.functional.pad(total, (-extra, -extra))
    core = total[:, extra:-extra].clone()
    core[:, 0] += total[:, :extra].sum(1)
    core[:, -1] += total[:, -extra:].sum(1)
    return core


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
