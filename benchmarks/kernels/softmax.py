"""torch's softmax attention (SDPA) on the same shapes: what people would use in HSTU attention's place.

Another function: softmax is not SiLU. It is held to a plain softmax in the tests, not to the operator's definition.
FLOPs are counted as for HSTU, by exact pairs; what is computed for padding counts as time only. Arguments are in the
kernel's own memory layout before timing begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.registry import Call, Inputs


def padded(values: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """``(T, H, d)`` -> ``(B, H, N, d)``, a view of ``(B, N, H, d)``, with zeros after each sequence."""
    lengths = offsets.diff()
    inside = torch.arange(longest, device=values.device) < lengths[:, None]
    found = values.new_zeros((lengths.shape[0], longest, *values.shape[1:]))
    found[inside] = values
    return found.transpose(1, 2)


def plain_causal(inputs: Inputs, name: str, bias: bool = False) -> None:
    """Refuses what a causal kernel cannot do.

    Raises:
        ValueError: The case has more mask than causal, or a bias where there may be none.
    """
    mask = inputs.fixed["mask"]
    if not mask.causal or any(each is not None for each in (mask.window, mask.num_targets, mask.num_contextual)):
        raise ValueError(f"backend {name} does causal attention only")
    if not bias and len(inputs.leaves) > 3:
        raise ValueError(f"backend {name} does attention without bias only")


def sdpa(inputs: Inputs, kernel: SDPBackend, name: str) -> Call:
    """One of torch's kernels on sequences padded to the longest; padding is outside of what is timed."""
    plain_causal(inputs, name)
    _half_on_gpu(inputs, name)
    offsets, longest = inputs.fixed["offsets"], inputs.fixed["longest"]
    every = [inputs.leaves[each].detach() for each in "qkv"] + [inputs.grad]
    *leaves, grad = (padded(each, offsets, longest) for each in every)
    leaves = [each.requires_grad_() for each in leaves]

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(*leaves, is_causal=True, scale=inputs.fixed["alpha"])

    return Call(run, leaves, grad)


sdpa_flash = partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION, name="sdpa_flash")
sdpa_cudnn = partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION, name="sdpa_cudnn")


def sdpa_varlen(inputs: Inputs) -> Call:
    """torch's flash kernel on jagged rows (``varlen_attn``): nothing is padded."""
    plain_causal(inputs, "sdpa_varlen")
    _half_on_gpu(inputs, "sdpa_varlen")
    if inputs.grad.device.type != "cuda":
        raise ValueError("backend sdpa_varlen has no kernel off a GPU")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ValueError("backend sdpa_varlen needs a torch that has torch.nn.attention.varlen") from error
    return varlen_call(inputs, varlen_attn)


def varlen_call(inputs: Inputs, function: Callable[..., Any]) -> Call:
    """With the function given; older ones have ``is_causal`` for a window, and divide by the root of d."""
    offsets, longest, alpha = inputs.fixed["offsets"].int(), inputs.fixed["longest"], inputs.fixed["alpha"]
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    q, *others = (inputs.leaves[name] for name in "qkv")
    if "scale" in known:
        options["scale"] = alpha
    else:  # the case's alpha goes into q, outside of timing
        q = (q.detach() * (alpha * q.shape[-1] ** 0.5)).requires_grad_()

    def run() -> Tensor:
        return function(q, *others, offsets, offsets, longest, longest, **options)

    return Call(run, [q, *others], inputs.grad)


def _half_on_gpu(inputs: Inputs, name: str) -> None:
    if inputs.grad.device.type == "cuda" and inputs.grad.dtype == torch.float32:
        raise ValueError(f"backend {name} has no float32 on a GPU")
    if inputs.grad.device.type == "cpu" and name == "sdpa_cudnn":
        raise ValueError("backend sdpa_cudnn has no kernel off a GPU")
