"""What a step costs: pairs, FLOPs, bytes, device peaks. Python and numpy only; needs no torch.

A multiply-add is 2 FLOPs. Only matrix products count: norms, SiLU, gates, relative bias and dropout are left
out (1 to 2 % of the pair FLOPs at a head width of 128), and a look-up is bytes, not FLOPs. Attention is
counted by the pairs (query, key) that the mask shows, summed over the real lengths: padding costs nothing, so
``C = 6 N D`` does not hold here. Three figures, never mixed: model FLOPs (3x forward), hardware FLOPs (the
backward's recomputed QK^T added) and a device's dense peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def pairs(
    lengths: ArrayLike,
    num_targets: ArrayLike | None = None,
    num_contextual: ArrayLike | None = None,
    window: int | None = None,
    *,
    full_tail: int | None = None,
    target_group: int | None = None,
) -> int:
    """Unmasked (query, key) pairs of a batch under a causal :class:`gr.kernels.hstu_attention.Mask`.

    Closed forms a row, for c contextual tokens, h history tokens, m targets and a window w: contextual rows
    see c + h keys; history token k (from 0) sees itself, min(k, w) history tokens, and the context if k + 1
    <= w; a target sees itself, min(h, w) history tokens, and the context if h + 1 <= w. The newest
    ``full_tail`` history tokens and all targets see as if there were no window.

    Args:
        lengths: ``(B,)`` tokens of each sequence, contextual tokens and targets included.
        num_targets: ``(B,)``, or None for none.
        num_contextual: ``(B,)``, or None for none.
        window: As in the mask.
        full_tail: As in the mask.
        target_group: As in the mask.

    Returns:
        The sum over the batch, an exact integer.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    c = np.zeros_like(lengths) if num_contextual is None else np.asarray(num_contextual, dtype=np.int64)
    m = np.zeros_like(lengths) if num_targets is None else np.asarray(num_targets, dtype=np.int64)
    c, m = np.where(lengths > 0, c, 0), np.where(lengths > 0, m, 0)
    h = lengths - c - m
    w = np.full_like(lengths, np.iinfo(np.int32).max if window is None else window)
    # History tokens that keep to the window; the rest, and the targets, see everything.
    tail = full_tail is not None and window is not None
    narrow = np.maximum(h - full_tail, 0) if tail else h

    near = np.minimum(narrow, w + 1)
    history = near * (near - 1) // 2 + (narrow - near) * w  # sum of min(k, w) for k < narrow
    history += (h * (h - 1) - narrow * (narrow - 1)) // 2 + h
    history += c * (np.minimum(narrow, w) + h - narrow)

    target = h + c if tail else np.minimum(h, w) + c * (h + 1 <= w)
    g = 1 if target_group is None else target_group
    rest = m % g
    own = m + (m // g) * (g * (g - 1) // 2) + rest * (rest - 1) // 2
    return int((c * (c + h) + history + m * target + own).sum())


def hstu_flops(
    *,
    dim: int,
    num_layers: int,
    num_heads: int,
    dim_qk: int,
    dim_v: int,
    tokens: int,
    pairs: int,
    out_in_dim: int | None = None,
) -> dict[str, int]:
    """Forward FLOPs of an HSTU stack by component.

    Args:
        dim: Model width D.
        num_layers: Layers.
        num_heads: H.
        dim_qk: A head's width of queries and keys.
        dim_v: A head's width of values.
        tokens: T, the sum of lengths.
        pairs: P, from :func:`pairs`.
        out_in_dim: Input width of the output projection: H d_v (None), or 3 H d_v with a concatenation.

    Returns:
        "uvqk", "attention_qk", "attention_av", "out".
    """
    out_in_dim = num_heads * dim_v if out_in_dim is None else out_in_dim
    return {
        "uvqk": num_layers * 2 * tokens * dim * num_heads * 2 * (dim_qk + dim_v),
        "attention_qk": num_layers * 2 * num_heads * dim_qk * pairs,
        "attention_av": num_layers * 2 * num_heads * dim_v * pairs,
        "out": num_layers * 2 * tokens * out_in_dim * dim,
    }


def transformer_flops(*, dim: int, num_layers: int, ffn_dim: int, tokens: int, pairs: int) -> dict[str, int]:
    """Forward FLOPs of a softmax Transformer by component; the number of heads does not matter."""
    return {
        "qkv": num_layers * 2 * tokens * dim * 3 * dim,
        "attention_qk": num_layers * 2 * dim * pairs,
        "attention_av": num_layers * 2 * dim * pairs,
        "out": num_layers * 2 * tokens * dim * dim,
        "ffn": num_layers * 2 * tokens * 2 * dim * ffn_dim,
    }


def sampled_softmax_flops(*, supervised: int, dim: int, negatives: int) -> int:
    """Forward FLOPs of scores of one positive and R negatives a supervised position."""
    return 2 * supervised * dim * (1 + negatives)


def full_softmax_flops(*, supervised: int, dim: int, num_items: int) -> int:
    """Forward FLOPs of scores against the whole catalogue."""
    return 2 * supervised * num_items * dim


def training_flops(forward: int) -> int:
    """Model FLOPs of forward and backward: each product has two gradients of its own size."""
    return 3 * forward


def hardware_training_flops(components: Mapping[str, int]) -> int:
    """FLOPs that a fused kernel executes: 3x forward, and QK^T once more, recomputed in the backward."""
    return 3 * sum(components.values()) + components.get("attention_qk", 0)


def lookup_bytes(*, rows: int, dim: int, itemsize: int) -> int:
    """Bytes read by embedding look-ups; gradient and row-wise optimizer move 2 to 3 times that."""
    return rows * dim * itemsize


@dataclass(frozen=True)
class StepCost:
    """Cost of one step, or of many added up: three exact integers, all-reduced only when logged."""

    tokens: int = 0
    pairs: int = 0
    forward_flops: int = 0

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(self.tokens + other.tokens, self.pairs + other.pairs, self.forward_flops + other.forward_flops)

    @property
    def training_flops(self) -> int:
        """Model FLOPs, 3x forward."""
        return training_flops(self.forward_flops)


# Dense peaks in TFLOP/s, without 2:4 sparsity, from the vendors' data sheets (where a sheet gives only the
# sparse figure, half of it). The first name contained in the device's own name wins, so the longer names
# stand first. "bf16" is the 16-bit tensor-core rate (fp16 on V100 and T4, which have no bf16); "tf32" falls
# back to the plain fp32 rate where there is no such unit.
DENSE_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0},  # NVIDIA HGX B200
    "H200 NVL": {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0},  # NVIDIA H200 NVL
    "H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},  # NVIDIA H200 SXM
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2},  # NVIDIA H100 PCIe
    "H100 NVL": {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0},  # NVIDIA H100 NVL
    "H100": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},  # NVIDIA H100 SXM5
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},  # NVIDIA A100, PCIe and SXM alike
    "L40S": {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6},  # NVIDIA L40S
    "L4": {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3},  # NVIDIA L4
    "A10G": {"bf16": 70.0, "tf32": 35.0, "fp32": 31.5},  # NVIDIA A10G, as in AWS G5
    "A10": {"bf16": 125.0, "tf32": 62.5, "fp32": 31.2},  # NVIDIA A10
    "V100-PCIE": {"bf16": 112.0, "tf32": 14.0, "fp32": 14.0},  # NVIDIA V100 PCIe
    "V100": {"bf16": 125.0, "tf32": 15.7, "fp32": 15.7},  # NVIDIA V100 SXM2
    "T4": {"bf16": 65.0, "tf32": 8.1, "fp32": 8.1},  # NVIDIA T4
    "MI300X": {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},  # AMD Instinct MI300X
}


def device_peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak in FLOP/s of a device by its driver's name for it; None where unknown, as for every CPU."""
    words = device_name.replace("-", " ").lower()
    for name, peaks in DENSE_PEAK_TFLOPS.items():
        if _names(name.lower(), words):
            return peaks[precision] * 1e12
    return None


def _names(name: str, device_name: str) -> bool:
    """Whole words only: "L4" must not answer for an L40, nor "A10" for an A100."""
    return f" {name} " in f" {device_name} "


def utilisation(flops: float, seconds: float, peak_flops: float | None, num_devices: int = 1) -> float | None:
    """Share of the peak: MFU from model FLOPs, HFU from hardware FLOPs. None without a known peak."""
    if peak_flops is None or seconds <= 0:
        return None
    return flops / (seconds * peak_flops * num_devices)
