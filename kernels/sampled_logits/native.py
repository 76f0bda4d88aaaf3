"""Sampled logits on a CPU by ``native.cpp``: the same four functions as in ``cpu.py``, for float32 and below.

The index is checked while it is read. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from gr.kernels.native import load

SOURCE = Path(__file__).with_name("native.cpp")


def available() -> bool:
    """Whether the C++ form is there (it is built on the first call)."""
    return load(SOURCE) is not None


def scores(query: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """``(S, R)`` inner products."""
    out = _new(query, index.shape)
    _call("scores", [_float(query), _float(vectors), *_index(index)], index, vectors, [out])
    return out.to(query.dtype)


def combine(weights: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """``(S, D)`` sums of each query's candidates with weights ``(S, R)``."""
    out = _new(weights, (index.shape[0], vectors.shape[1]))
    _call("combine", [_float(weights), _float(vectors), *_index(index)], index, vectors, [out])
    return out.to(vectors.dtype)


def spread(weights: Tensor, query: Tensor, index: Tensor, count: int) -> Tensor:
    """``(count, D)`` sums of each vector's queries with weights ``(S, R)``."""
    out = _new(query, (count, query.shape[1]))
    _call("spread", [_float(weights), _float(query), *_index(index)], index, out, [out])
    return out.to(query.dtype)


def softmax(
    query: Tensor,
    positive: Tensor,
    vectors: Tensor,
    index: Tensor,
    collision: Tensor | None,
    log_q: Tensor | None,
    positive_log_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss ``(S,)``, its gradient by query ``(S, D)``, probabilities ``(S, R)`` and their sums ``(S,)``, float32."""
    (queries, draws), width = index.shape, query.shape[1]
    shapes = ((queries,), (queries, width), (queries, draws), (queries,))
    found = tuple(_new(query, shape) for shape in shapes)
    inputs = [
        *(_float(query), _float(positive), _float(vectors)),
        *_index(index),
        None if collision is None else collision.contiguous(),
        None if log_q is None else _float(log_q),
        ctypes.c_int64(draws if log_q is not None and log_q.dim() == 2 else 0),
        None if positive_log_q is None else _float(positive_log_q),
    ]
    _call("softmax", inputs, index, vectors, found)
    return found


def _call(name: str, inputs: list, index: Tensor, vectors: Tensor, outputs) -> None:
    """Calls a function of the library: inputs, then S, R, U, D, the number of threads, then outputs."""
    sizes = (*index.shape, *vectors.shape)
    values = [*inputs, *(ctypes.c_int64(size) for size in sizes), torch.get_num_threads(), *outputs]
    function = getattr(load(SOURCE), f"sampled_{name}")
    # `values` keeps the tensors alive during the call.
    if function(*(ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else v for v in values)):
        low, high = map(int, index.aminmax())
        raise ValueError(f"index must lie in 0..{vectors.shape[0] - 1}, got {low}..{high}")


def _index(index: Tensor) -> tuple[Tensor, int]:
    return index.contiguous(), int(index.dtype == torch.int64)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _new(like: Tensor, shape) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
