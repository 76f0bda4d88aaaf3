"""Scores of queries against candidates of their own, and the softmax loss over them (see README.md)."""

from gr.kernels.sampled_logits.op import sampled_logits, sampled_softmax_loss
from gr.kernels.sampled_logits.reference import softmax_of_logits

__all__ = ["sampled_logits", "sampled_softmax_loss", "softmax_of_logits"]
