"""The CPU forms as torch sees them: registered ops, opaque to compilers, with fakes and backwards.

Which form runs is settled inside an op, so that a compiler never sees it being built.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gr.kernels.registration import op
from gr.kernels.sampled_logits import cpu, native

BACKENDS = ("cpu", "native")


def _form(backend: str, dtype: torch.dtype) -> ModuleType:
    if dtype == torch.float64 or backend == "cpu":
        return cpu
    if native.available():
        return native
    if backend == "native":
        raise ValueError("backend must be auto, reference or cpu: native could not be built, or GR_NATIVE is 0")
    return cpu


@op("sampled_logits")
def logits(query: Tensor, vectors: Tensor, index: Tensor, backend: str) -> Tensor:
    """``(S, R)``, the dtype of query."""
    if index.numel() == 0:
        return query.new_zeros(index.shape)
    return _form(backend, query.dtype).scores(query, vectors, index)


@logits.register_fake
def _(query, vectors, index, backend) -> Tensor:
    return query.new_empty(index.shape)


@op("sampled_combine")
def _combine(weights: Tensor, vectors: Tensor, index: Tensor, backend: str) -> Tensor:
    if index.numel() == 0:
        return vectors.new_zeros(index.shape[0], vectors.shape[1])
    return _form(backend, vectors.dtype).combine(weights, vectors, index)


@_combine.register_fake
def _(weights, vectors, index, backend) -> Tensor:
    return vectors.new_empty(index.shape[0], vectors.shape[1])


@op("sampled_spread")
def _spread(weights: Tensor, query: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    if index.numel() == 0:
        return query.new_zeros(count, query.shape[1])
    return _form(backend, query.dtype).spread(weights, query, index, count)


@_spread.register_fake
def _(weights, query, index, count, backend) -> Tensor:
    return query.new_empty(count, query.shape[1])


_combine.without_derivative()
_spread.without_derivative()


def _save_logits(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _logits_backward(ctx, grad: Tensor):
    query, vectors, index = ctx.saved_tensors
    by_query, by_vectors = ctx.needs_input_grad[:2]
    d_query = _combine(grad, vectors, index, ctx.backend) if by_query else None
    d_vectors = _spread(grad, query, index, vectors.shape[0], ctx.backend) if by_vectors else None
    return d_query, d_vectors, None, None


logits.register_autograd(_logits_backward, setup_context=_save_logits)


@op("sampled_softmax")
def softmax(
    query: Tensor,
    positive: Tensor,
    vectors: Tensor,
    index: Tensor,
    collision: Tensor | None,
    log_q: Tensor | None,
    positive_log_q: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss ``(S,)``, and for the backward: its gradient by query, probabilities ``(S, R)`` and their sums ``(S,)``.

    The gradient by query costs little while its candidates are in the first-level cache, and as much as the loss
    later.
    """
    if index.numel() == 0:
        exact = {"dtype": cpu.exact_dtype(query)}
        ones = query.new_zeros(index.shape[0], **exact)
        return ones, torch.zeros_like(query, **exact), query.new_zeros(index.shape, **exact), ones.clone()
    form = _form(backend, query.dtype)
    return form.softmax(query, positive, vectors, index, collision, log_q, positive_log_q)


@softmax.register_fake
def _(query, positive, vectors, index, collision, log_q, positive_log_q, backend):
    exact = {"dtype": cpu.exact_dtype(query)}
    (queries, draws), width = index.shape, query.shape[1]
    shapes = ((queries,), (queries, width), (queries, draws), (queries,))
    return tuple(query.new_empty(shape, **exact) for shape in shapes)


def _save_softmax(ctx, inputs, output) -> None:
    query, positive, vectors, index, *_, ctx.backend = inputs
    ctx.dtypes = positive.dtype, vectors.dtype
    ctx.count = vectors.shape[0]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, index, *output[1:])


def _softmax_backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # what was saved is no function of the inputs any more
        raise RuntimeError('sampled_softmax_loss has no second derivative on a CPU; ask for backend="reference"')
    query, index, unit, probability, missed = ctx.saved_tensors
    by_query, by_positive, by_vectors = ctx.needs_input_grad[:3]
    grad = grad[:, None]
    weighted = query * grad
    d_query = (unit * grad).to(query.dtype) if by_query else None
    d_positive = (weighted * -missed[:, None]).to(ctx.dtypes[0]) if by_positive else None
    d_vectors = None
    if by_vectors:
        d_vectors = _spread(probability, weighted, index, ctx.count, ctx.backend).to(ctx.dtypes[1])
    return d_query, d_positive, d_vectors, *[None] * 5


softmax.register_autograd(_softmax_backward, setup_context=_save_softmax)
