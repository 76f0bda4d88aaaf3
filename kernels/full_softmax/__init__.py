"""The softmax over a whole catalogue, without its logits."""

from gr.kernels.full_softmax.op import BACKENDS, full_softmax_loss

__all__ = ["BACKENDS", "full_softmax_loss"]
