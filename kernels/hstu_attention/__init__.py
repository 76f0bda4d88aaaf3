"""HSTU attention: pointwise SiLU attention over jagged sequences with relative bias (see README.md)."""

from gr.kernels.hstu_attention.op import choose_backend, hstu_attention
from gr.kernels.hstu_attention.reference import visible_pairs
from gr.kernels.hstu_attention.types import Mask, RelativeBias

__all__ = ["Mask", "RelativeBias", "choose_backend", "hstu_attention", "visible_pairs"]
