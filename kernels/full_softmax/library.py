"""The blocked form as torch sees it: registered ops, opaque to compilers, with fakes and a backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gr.kernels.full_softmax import blocked


@torch.library.custom_op("gr::full_softmax", mutates_args=())
def losses(query: Tensor, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and, for the backward, largest logits and sums of exponentials beside these; ``(S,)`` each."""
    return blocked.losses(query, vectors, target)


@losses.register_fake
def _(query, vectors, target):
    return tuple(query.new_empty(target.shape, dtype=blocked.exact_dtype(query)) for _ in range(3))


@torch.library.custom_op("gr::full_softmax_backward", mutates_args=())
def _gradients(
    grad: Tensor, query: Tensor, vectors: Tensor, target: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    return blocked.gradients(grad, query, vectors, target, top, total)


@_gradients.register_fake
def _(grad, query, vectors, target, top, total):
    return query.new_empty(query.shape), vectors.new_empty(vectors.shape)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return None, None, None
    if torch.is_grad_enabled():  # what was saved is no function of the inputs any more
        raise RuntimeError('full_softmax_loss has no second derivative; ask for backend="reference"')
    return *_gradients(grad, *ctx.saved_tensors), None


losses.register_autograd(_backward, setup_context=_save)
