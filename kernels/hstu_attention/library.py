"""The fast backends as torch sees them: one registered op, opaque to compilers, with a fake and a backward.

torch.library takes tensors and plain values, so masks and biases are spread out here and put together again inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr.kernels.hstu_attention import cpu, native
from gr.kernels.hstu_attention.checks import check_contents
from gr.kernels.hstu_attention.types import Arguments, Mask, RelativeBias
from gr.kernels.registration import op


def _triton_forward(call: Arguments) -> Tensor:
    from gr.kernels.hstu_attention import triton_launch  # imports triton: only where it is asked for

    return triton_launch.forward(call)


def _triton_backward(grad: Tensor, call: Arguments) -> tuple:
    from gr.kernels.hstu_attention import triton_launch

    return triton_launch.backward(grad, call)


BACKENDS = {
    "cpu": (cpu.forward, cpu.backward),
    "native": (native.forward, native.backward),
    "triton": (_triton_forward, _triton_backward),
}
"""Name -> (forward, backward) of :class:`Arguments`, which keep no graph."""


def call(a: Arguments, backend: str) -> Tensor:
    """Runs the registered op on checked arguments."""
    mask, bias, divisor = a.mask, a.bias or RelativeBias(), a.divisor
    timed = bias.time_table is not None
    return _attention(
        a.q,
        a.k,
        a.v,
        a.q_offsets,
        a.kv_offsets,
        divisor if isinstance(divisor, Tensor) else None,
        mask.num_contextual,
        mask.num_targets,
        bias.position_table,
        bias.time_table,
        bias.query_times if timed else None,
        bias.key_times if timed else None,
        [mask.window or 0, mask.full_tail or 0, mask.target_group or 0, int(mask.causal), a.max_seq_len],
        [float(a.alpha), 0.0 if isinstance(divisor, Tensor | str) else float(divisor), float(bias.bucket_width)],
        bias.position_ids,
        a.deterministic,
        backend,
    )


@op("hstu_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    divisor: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    position_table: Tensor | None,
    time_table: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    integers: list[int],
    numbers: list[float],
    position_ids: str,
    deterministic: bool,
    backend: str,
) -> Tensor:
    tensors = (divisor, num_contextual, num_targets, position_table, time_table, query_times, key_times)
    forward, _ = BACKENDS[backend]
    arguments = _gather((q, k, v, q_offsets, kv_offsets), tensors, integers, numbers, position_ids, deterministic)
    check_contents(arguments)
    with torch.autocast(q.device.type, enabled=False):  # the dtype of q decides, not the surroundings
        return forward(arguments)


@_attention.register_fake
def _(q, k, v, *rest) -> Tensor:
    return q.new_empty((*q.shape[:2], v.shape[2]))


@op("hstu_attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    divisor: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    position_table: Tensor | None,
    time_table: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    integers: list[int],
    numbers: list[float],
    position_ids: str,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (divisor, num_contextual, num_targets, position_table, time_table, query_times, key_times)
    _, backward = BACKENDS[backend]
    arguments = _gather((q, k, v, q_offsets, kv_offsets), tensors, integers, numbers, position_ids, deterministic)
    with torch.autocast(q.device.type, enabled=False):
        found = backward(grad, arguments)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in found)


@_attention_backward.register_fake
def _(grad, q, k, v, q_offsets, kv_offsets, divisor, num_contextual, num_targets, position_table, time_table, *rest):
    tables = (
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (position_table, time_table)
    )
    dense = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return (*dense, *tables)


_attention_backward.without_derivative()


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.values = inputs[12:]


def _backward(ctx, grad: Tensor):
    saved = ctx.saved_tensors
    d_q, d_k, d_v, d_position, d_time = _attention_backward(grad, *saved, *ctx.values)
    tables = (None if saved[8] is None else d_position, None if saved[9] is None else d_time)
    return (d_q, d_k, d_v, *[None] * 5, *tables, *[None] * 7)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _gather(
    rows: tuple, tensors: tuple, integers: list[int], numbers: list[float], position_ids: str, deterministic: bool
) -> Arguments:
    """What was spread out, together again."""
    q, k, v, q_offsets, kv_offsets = rows
    divisor, num_contextual, num_targets, position_table, time_table, query_times, key_times = tensors
    window, full_tail, target_group, causal, max_seq_len = integers
    alpha, number, bucket_width = numbers
    bias = None
    if position_table is not None or time_table is not None:
        bias = RelativeBias(
            position_table=position_table,
            clamp_positions=True,
            time_table=time_table,
            key_times=key_times,
            query_times=query_times,
            bucket_width=bucket_width,
            position_ids=position_ids,
        )
    mask = Mask(
        causal=bool(causal),
        window=window or None,
        full_tail=full_tail or None,
        num_contextual=num_contextual,
        num_targets=num_targets,
        target_group=target_group or None,
    )
    return Arguments(
        q=q,
        k=k,
        v=v,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        max_seq_len=max_seq_len,
        divisor=divisor if divisor is not None else (number or "visible"),
        alpha=alpha,
        mask=mask,
        bias=bias,
        deterministic=deterministic,
    )
