"""The blocked form as torch sees it: a registered op, opaque to compilers, with a fake and a backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gr.kernels.full_softmax import blocked
from gr.kernels.registration import op


@op("full_softmax")
def total_loss(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor, gradients: bool) -> list[Tensor]:
    """The loss ``()`` and, if asked for, its gradients by ``query`` and ``vectors``."""
    return blocked.total_loss(query, vectors, target, weight, gradients)


@total_loss.register_fake
def _(query, vectors, target, weight, gradients):
    exact = {"dtype": blocked.exact_dtype(query)}
    shapes = ((), query.shape if gradients else (0,), vectors.shape if gradients else (0,))
    return [query.new_empty(shape, **exact) for shape in shapes]


def _save(ctx, inputs, output) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grads: list[Tensor]):
    if torch.is_grad_enabled():  # what was saved is no function of the inputs any more
        raise RuntimeError('full_softmax_loss has no second derivative; ask for backend="reference"')
    d_query, d_vectors = (
        (saved * grads[0]).to(dtype) if wanted else None
        for saved, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    )
    return d_query, d_vectors, None, None, None


total_loss.register_autograd(_backward, setup_context=_save)
