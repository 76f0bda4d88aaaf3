"""The public operators: they check their arguments, choose a backend and run it."""

from __future__ import annotations

import torch
from torch import Tensor

from gr.kernels.sampled_logits import library
from gr.kernels.sampled_logits.reference import sampled_logits_reference, sampled_softmax_reference

BACKENDS = ("reference", *library.BACKENDS)


def sampled_logits(query: Tensor, vectors: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """``out[s, r] = query[s] . vectors[index[s, r]]``.

    Args:
        query: ``(S, D)``, float.
        vectors: ``(U, D)``, the dtype of ``query``.
        index: ``(S, R)`` int64 or int32 in 0..U-1; an entry may occur any number of times.
        backend: "reference"; on a CPU also "native" (C++) and "cpu" (plain torch). "auto" is the fastest that there
            is. float64 has no native form, and takes "cpu".

    Returns:
        ``(S, R)``, the dtype of ``query``. The same bits for any number of threads, gradients included (of "native"
        and "cpu").

    Raises:
        ValueError: An argument is wrong; the message starts with its name. What ``index`` holds is looked at on the
            CPU only, where it costs no synchronisation.
    """
    _check(query, vectors, index, backend)
    with torch.autocast(query.device.type, enabled=False):  # the dtype of query decides, not the surroundings
        if backend == "reference" or query.device.type != "cpu":
            return sampled_logits_reference(query, vectors, index)
        return library.logits(query, vectors, index, backend)


def sampled_softmax_loss(
    query: Tensor,
    positive: Tensor,
    vectors: Tensor,
    index: Tensor,
    *,
    collision: Tensor | None = None,
    log_q: Tensor | None = None,
    positive_log_q: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each query's positive among candidates of its own: ``-log(e^own / (e^own + sum_r e^logit))``.

    ``own = query . positive - positive_log_q``, ``logit = sampled_logits(query, vectors, index) - log_q``.

    Args:
        query: ``(S, D)``, float.
        positive: ``(S, D)``, float.
        vectors: ``(U, D)``, the dtype of ``query``.
        index: ``(S, R)`` int64 or int32 in 0..U-1.
        collision: ``(S, R)`` bool, candidates that are left out.
        log_q: ``(R,)`` or ``(S, R)``, float; gets no gradient.
        positive_log_q: ``(S,)``, float; gets no gradient.
        backend: As of ``sampled_logits``.

    Returns:
        ``(S,)``, float32 (float64 for float64). The same bits for any number of threads, as of ``sampled_logits``.

    Raises:
        ValueError: As of ``sampled_logits``.
    """
    _check(query, vectors, index, backend)
    queries, draws = index.shape
    if positive.shape != query.shape or not positive.is_floating_point():
        raise ValueError(f"positive must be float {tuple(query.shape)}, got {tuple(positive.shape)}, {positive.dtype}")
    if collision is not None and (collision.shape != index.shape or collision.dtype != torch.bool):
        raise ValueError(f"collision must be bool {tuple(index.shape)}, got {tuple(collision.shape)} {collision.dtype}")
    if log_q is not None and tuple(log_q.shape) not in ((draws,), (queries, draws)):
        raise ValueError(f"log_q must be ({draws},) or {(queries, draws)}, got {tuple(log_q.shape)}")
    if positive_log_q is not None and tuple(positive_log_q.shape) != (queries,):
        raise ValueError(f"positive_log_q must be ({queries},), got {tuple(positive_log_q.shape)}")
    for name, tensor in (("log_q", log_q), ("positive_log_q", positive_log_q)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be float, got {tensor.dtype}")
    # A constant on every backend, and of the loss's dtype.
    exact = torch.promote_types(query.dtype, torch.float32)
    log_q, positive_log_q = (t if t is None else t.detach().to(exact) for t in (log_q, positive_log_q))
    optional = {"positive": positive, "collision": collision, "log_q": log_q, "positive_log_q": positive_log_q}
    for name, tensor in optional.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query ({query.device}), got {tensor.device}")
    with torch.autocast(query.device.type, enabled=False):
        if backend == "reference" or query.device.type != "cpu":
            return sampled_softmax_reference(
                query, positive, vectors, index, collision=collision, log_q=log_q, positive_log_q=positive_log_q
            )
        return library.softmax(query, positive, vectors, index, collision, log_q, positive_log_q, backend)[0]


def _check(query: Tensor, vectors: Tensor, index: Tensor, backend: str) -> None:
    for name, tensor in (("query", query), ("vectors", vectors)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float matrix, got {tuple(tensor.shape)} of {tensor.dtype}")
    if vectors.shape[1] != query.shape[1] or vectors.dtype != query.dtype:
        raise ValueError(
            f"vectors must have the width and dtype of query ({query.shape[1]}, {query.dtype}), "
            f"got {vectors.shape[1]}, {vectors.dtype}"
        )
    if query.shape[1] < 1:
        raise ValueError("query must have at least one column, got 0")
    if index.dim() != 2 or index.shape[0] != query.shape[0] or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index must be ({query.shape[0]}, R) integers, got {tuple(index.shape)} of {index.dtype}")
    for name, tensor in (("vectors", vectors), ("index", index)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query ({query.device}), got {tensor.device}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend in library.BACKENDS and query.device.type != "cpu":
        raise ValueError(f"backend must be auto or reference on {query.device.type}, got {backend!r}")
