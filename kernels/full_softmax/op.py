"""The public operator: it checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from gr.kernels.full_softmax import library
from gr.kernels.full_softmax.reference import full_softmax_reference

BACKENDS = ("reference", "blocked")


def full_softmax_loss(
    query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``sum_s weight[s] (log(sum_v e^(query[s] . vectors[v])) - query[s] . vectors[target[s]])``.

    Args:
        query: ``(S, D)``, float.
        vectors: ``(V, D)``, the dtype of ``query``, V at least 1.
        target: ``(S,)`` int64 in 0..V-1.
        weight: ``(S,)``, float; gets no gradient.
        backend: "reference" makes the (S, V) logits; "blocked" a block of them at a time, with the gradients in the
            same walk, and has no second derivative. "auto" is "blocked".

    Returns:
        ``()``, float32 (float64 for float64).

    Raises:
        ValueError: An argument is wrong; the message starts with its name. What ``target`` holds is looked at on the
            CPU only, where it costs no synchronisation.
    """
    _check(query, vectors, target, weight, backend)
    with torch.autocast(query.device.type, enabled=False):  # the dtype of query decides, not the surroundings
        if backend == "reference":
            return full_softmax_reference(query, vectors, target, weight.detach())
        gradients = torch.is_grad_enabled() and (query.requires_grad or vectors.requires_grad)
        return library.total_loss(query, vectors, target, weight.detach(), gradients)[0]


def _check(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor, backend: str) -> None:
    for name, tensor in (("query", query), ("vectors", vectors)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float matrix, got {tuple(tensor.shape)} of {tensor.dtype}")
    if vectors.shape[1] != query.shape[1] or vectors.dtype != query.dtype or not vectors.shape[0]:
        raise ValueError(
            f"vectors must have at least one row, and the width and dtype of query ({query.shape[1]}, {query.dtype}), "
            f"got {tuple(vectors.shape)}, {vectors.dtype}"
        )
    if tuple(target.shape) != (query.shape[0],) or target.dtype != torch.int64:
        raise ValueError(f"target must be ({query.shape[0]},) int64, got {tuple(target.shape)} of {target.dtype}")
    if weight.shape != target.shape or not weight.is_floating_point():
        raise ValueError(f"weight must be ({query.shape[0]},) floats, got {tuple(weight.shape)} of {weight.dtype}")
    for name, tensor in (("vectors", vectors), ("target", target), ("weight", weight)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query ({query.device}), got {tensor.device}")
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = target.aminmax()
        if low < 0 or high >= vectors.shape[0]:
            raise ValueError(f"target must lie in 0..{vectors.shape[0] - 1}, got {int(low)} to {int(high)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
