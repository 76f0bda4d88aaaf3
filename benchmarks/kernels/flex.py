"""torch's flex_attention on the same shapes, masks and biases: another function, softmax in place of SiLU.

Its best form that torch documents: compiled, with a block mask that is made before timing, so that hidden blocks cost
nothing, and with what is computed for a pair (mask, bias) fused into the kernel. Tiles are torch's own choice for the
GPU. Two layouts: padded to the longest (any mask), and packed, where all sequences are one (causal masks; jagged rows
cost their own pairs, as they do for the operator).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.registry import Call, Inputs
from benchmarks.kernels.softmax import padded, plain_causal

BLOCK = 128
"""Of a block mask, flex_attention's own."""


def flex(inputs: Inputs) -> Call:
    """Padded; every mask and bias of the operator."""
    _needs_gpu(inputs, "flex")
    return padded_call(inputs, gradients=True)


def flex_packed(inputs: Inputs) -> Call:
    """Packed; causal, with or without biases."""
    _needs_gpu(inputs, "flex_packed")
    return packed_call(inputs, gradients=True)


def _needs_gpu(inputs: Inputs, name: str) -> None:
    if not inputs.grad.is_cuda:
        raise ValueError(f"backend {name} has no backward pass on a CPU")


def padded_call(inputs: Inputs, gradients: bool) -> Call:
    """On any device; a CPU can do it without gradients only."""
    from torch.nn.attention.flex_attention import create_block_mask

    offsets, longest = inputs.fixed["offsets"], inputs.fixed["longest"]
    blocks = create_block_mask(
        visible(inputs), offsets.shape[0] - 1, None, longest, longest, device=str(offsets.device)
    )
    rows = [padded(each, offsets, longest).contiguous() for each in _tensors(inputs)]
    score = _score(inputs, lambda b, i: offsets[b] + torch.minimum(i, offsets[b + 1] - offsets[b] - 1))
    return _call(inputs, rows, blocks, score, gradients)


def packed_call(inputs: Inputs, gradients: bool) -> Call:
    """On any device; a CPU can do it without gradients only."""
    plain_causal(inputs, "flex_packed", bias=True)
    rows = [each.transpose(0, 1)[None].contiguous() for each in _tensors(inputs)]
    return _call(inputs, rows, packed_blocks(inputs.fixed["offsets"]), _score(inputs, lambda b, i: i), gradients)


def _tensors(inputs: Inputs) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [inputs.leaves[name].detach() for name in "qkv"] + [inputs.grad]


def _call(inputs: Inputs, rows: list[Tensor], blocks: Any, score: Callable | None, gradients: bool) -> Call:
    leaves = [each.requires_grad_(gradients) for each in rows[:3]]
    tables = [leaf.requires_grad_(gradients) for name, leaf in inputs.leaves.items() if name.endswith("_table")]
    function = _function(rows[0].is_cuda)

    def run() -> Tensor:
        return function(*leaves, score_mod=score, block_mask=blocks, scale=inputs.fixed["alpha"])

    return Call(run, [*leaves, *tables], rows[3])


def visible(inputs: Inputs) -> Callable[..., Tensor]:
    """mask_mod of the operator's mask (README of the operator, "Mask"), on padded rows; nothing sees or is padding."""
    mask, lengths = inputs.fixed["mask"], inputs.fixed["offsets"].diff().int()
    window, tail = mask.window, mask.full_tail
    assert mask.causal and mask.target_group is None  # no case has others
    targets, context = (None if n is None else n.int() for n in (mask.num_targets, mask.num_contextual))
    if window is None and targets is None and context is None:
        return lambda b, h, i, j: (i >= j) & (i < lengths[b])

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        c = 0 if context is None else context[b]
        shift = 0 if context is None else torch.clamp(c - 1, min=0)
        last = lengths[b] - shift - (0 if targets is None else targets[b])
        row, column = (torch.minimum(torch.clamp(at - shift, min=0), last) for at in (i, j))
        seen = (i == j) | (row > column)
        if window is not None:
            near = row - column <= window
            seen = seen & (near if tail is None else near | (row >= last - tail))
        if context is not None:
            seen = seen | ((c > 0) & (row == 0) & (column < last))
        return seen & (i < lengths[b]) & (j < lengths[b])

    return mod


def packed_blocks(offsets: Tensor) -> Any:
    """The block mask of causal sequences that follow each other; made from blocks, never from all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = int(offsets[-1])
    owner = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets.diff())
    begin = torch.arange(0, tokens, BLOCK, device=offsets.device)
    first, last = owner[begin], owner[(begin + BLOCK).clamp(max=tokens) - 1]
    at = torch.arange(begin.shape[0], device=offsets.device)
    below = at[:, None] > at[None]
    # Of an earlier block of keys the last token is the nearest: it is of the first query's sequence, or nobody sees it.
    touched = (below & (first[:, None] == last[None])) | (at[:, None] == at[None])
    whole = below & (last[:, None] == first[None])

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens),
        mask_mod=lambda b, h, i, j: (i >= j) & (owner[i] == owner[j]),
    )  # fmt: skip


def _score(inputs: Inputs, token: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor] | None:
    """score_mod of the tables there are; ``token`` gives the place in ``times`` of a row's position.

    A time's bucket is made by a logarithm in float32: next to a bucket's edge it may be the other one.
    """
    position, time = (inputs.leaves.get(name) for name in ("position_table", "time_table"))
    if position is None and time is None:
        return None
    bias = inputs.fixed["bias"]

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if position is not None:
            # Packed, a pair of two sequences is hidden, and computed: its distance may be beyond the table.
            at = torch.clamp(j - i + position.shape[0] // 2, min=0, max=position.shape[0] - 1)
            value = value + position[at]
        if time is not None:
            apart = (bias.query_times[token(b, i)] - bias.key_times[token(b, j)]).abs().float()
            bucket = (torch.log(torch.clamp(apart, min=1.0)) / bias.bucket_width).floor()
            value = value + time[torch.clamp(bucket, max=time.shape[0] - 1.0).to(torch.int32)]
        return value

    return score


@cache
def _function(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # Beyond its limit of variants torch would silently run all pairs unfused.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)
