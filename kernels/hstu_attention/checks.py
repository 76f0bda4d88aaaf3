"""Checks of the operator's arguments: every refusal is a ValueError that starts with the argument's name.

Three depths: shapes, dtypes and host numbers always; offsets, counts and divisors on the CPU, where reading them costs
no synchronisation; and everything, on any device and values included, in checked mode (``GR_CHECKED=1``).
"""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gr.kernels.hstu_attention.time_buckets import LARGEST_EXACT, NARROW
from gr.kernels.hstu_attention.types import Arguments, Divisor, Mask, RelativeBias, divisor_by_query

CHECKED_VARIABLE = "GR_CHECKED"
INTEGERS = (torch.int64, torch.int32)


def checked_mode() -> bool:
    """Whether the environment asks for deep checks, which read every argument and wait for the device."""
    value = os.environ.get(CHECKED_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable {CHECKED_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def check_arguments(call: Arguments) -> None:
    """Refuses arguments that are wrong or do not fit each other.

    Raises:
        ValueError: An argument is wrong; the message starts with its name.
    """
    _check_tensors(call)
    _check_mask(call.mask, call.q_offsets)
    if not _is_number(call.alpha):
        raise ValueError(f"alpha must be a finite number, got {call.alpha!r}")
    if not _is_integer(call.max_seq_len) or call.max_seq_len < 0:
        raise ValueError(f"max_seq_len must be an integer >= 0, got {call.max_seq_len!r}")
    if call.bias is not None:
        _check_bias(call.bias, call.q, call.k, call.max_seq_len)
    _check_divisor(call.divisor, call.q, call.q_offsets)


def check_contents(call: Arguments) -> None:
    """Refuses what the tensors of otherwise right arguments hold; compiled code cannot do this while it is traced.

    Raises:
        ValueError: An argument is wrong; the message starts with its name.
    """
    q, k, q_offsets, kv_offsets, bias = call.q, call.k, call.q_offsets, call.kv_offsets, call.bias
    deep = checked_mode()
    if deep or q.device.type == "cpu":
        _check_offsets("q_offsets", q_offsets, q.shape[0])
        if kv_offsets is not None:
            _check_offsets("kv_offsets", kv_offsets, k.shape[0])
        _check_lengths(q_offsets, kv_offsets, call.max_seq_len, call.mask)
        if isinstance(call.divisor, Tensor):
            _check_divisor_values(call.divisor, q_offsets, q.shape[0])
    if deep:
        _check_finite(q, k, call.v, bias)
        if bias is not None and bias.time_table is not None:
            _check_times(bias.query_times, bias.key_times)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value) if value is None or isinstance(value, Real | str) else type(value).__name__
    return f"{tuple(value.shape)} of {value.dtype} on {value.device}"


def _check_tensors(call: Arguments) -> None:
    q, k, v, q_offsets, kv_offsets = call.q, call.k, call.v, call.q_offsets, call.kv_offsets
    named = {"q": q, "k": k, "v": v, "q_offsets": q_offsets}
    if kv_offsets is not None:
        named["kv_offsets"] = kv_offsets
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {_describe(tensor)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {tensor.device}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (T, H, d), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be a float tensor of the dtype of q ({q.dtype}), got {tensor.dtype}")
        if tensor.shape[1] != q.shape[1]:
            raise ValueError(f"{name} must have the {q.shape[1]} heads of q, got {tensor.shape[1]}")
    for name, tensor in (("q", q), ("v", v)):
        if min(tensor.shape[1:]) < 1:
            raise ValueError(f"{name} must have at least one head and one dimension, got {tuple(tensor.shape)}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the last dimension of q ({q.shape[2]}), got {k.shape[2]}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have as many tokens as k ({k.shape[0]}), got {v.shape[0]}")
    if kv_offsets is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"kv_offsets must be given where k has {k.shape[0]} tokens and q has {q.shape[0]}")
    for name in ("q_offsets", "kv_offsets"):
        offsets = named.get(name)
        if offsets is None:
            continue
        if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in INTEGERS:
            raise ValueError(f"{name} must be (B+1,) integers, got {tuple(offsets.shape)} of {offsets.dtype}")
        if offsets.shape != q_offsets.shape:
            raise ValueError(f"{name} must have the {q_offsets.shape[0]} entries of q_offsets, got {offsets.shape[0]}")


def _check_mask(mask: Mask, q_offsets: Tensor) -> None:
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a Mask or None, got {_describe(mask)}")
    if not isinstance(mask.causal, bool):
        raise ValueError(f"mask.causal must be True or False, got {_describe(mask.causal)}")
    for name in ("window", "full_tail", "target_group"):
        value = getattr(mask, name)
        if value is not None and (not _is_integer(value) or value < 1):
            raise ValueError(f"mask.{name} must be None or an integer >= 1, got {_describe(value)}")
    batch = q_offsets.shape[0] - 1
    for name in ("num_contextual", "num_targets"):
        counts = getattr(mask, name)
        if counts is None:
            continue
        right = isinstance(counts, Tensor) and counts.shape == (batch,) and counts.dtype in INTEGERS
        if not right or counts.device != q_offsets.device:
            raise ValueError(
                f"mask.{name} must be ({batch},) integers on the device of q ({q_offsets.device}), "
                f"got {_describe(counts)}"
            )


def _check_bias(bias: RelativeBias, q: Tensor, k: Tensor, max_seq_len: int) -> None:
    if not isinstance(bias, RelativeBias):
        raise ValueError(f"bias must be a RelativeBias or None, got {_describe(bias)}")
    heads = q.shape[1]
    for name in ("position_table", "time_table"):
        table = getattr(bias, name)
        if table is None:
            continue
        right = isinstance(table, Tensor) and table.is_floating_point() and table.device == q.device
        right = right and (table.dim() == 1 or (table.dim() == 2 and table.shape[0] == heads))
        if not right or table.shape[-1] < 1:
            raise ValueError(
                f"bias.{name} must be (K,) or ({heads}, K) floats on the device of q ({q.device}), "
                f"got {_describe(table)}"
            )
    if not isinstance(bias.clamp_positions, bool):
        raise ValueError(f"bias.clamp_positions must be True or False, got {_describe(bias.clamp_positions)}")
    if bias.position_table is not None:
        entries = bias.position_table.shape[-1]
        if entries % 2 == 0:
            raise ValueError(f"bias.position_table must have 2P-1 entries, an odd number, got {entries}")
        if entries < 2 * max_seq_len - 1 and not bias.clamp_positions:
            raise ValueError(
                f"bias.position_table must have 2 * max_seq_len - 1 = {2 * max_seq_len - 1} entries at least, "
                f"or clamp_positions=True, got {entries}"
            )
    if bias.position_ids not in ("index", "target_clamped"):
        raise ValueError(f"bias.position_ids must be 'index' or 'target_clamped', got {_describe(bias.position_ids)}")
    if not _is_number(bias.bucket_width) or not bias.bucket_width > 0:
        raise ValueError(f"bias.bucket_width must be a positive number, got {_describe(bias.bucket_width)}")
    if bias.time_table is None:
        return
    for name, tokens in (("query_times", q.shape[0]), ("key_times", k.shape[0])):
        times = getattr(bias, name)
        right = isinstance(times, Tensor) and times.shape == (tokens,) and times.dtype in INTEGERS
        if not right or times.device != q.device:
            raise ValueError(
                f"bias.{name} must be ({tokens},) int64 or int32 seconds on the device of q ({q.device}), "
                f"got {_describe(times)}"
            )
    if bias.key_times.dtype != bias.query_times.dtype:
        raise ValueError(
            f"bias.query_times must be of the dtype of key_times ({bias.key_times.dtype}), got {bias.query_times.dtype}"
        )


def _check_divisor(divisor: Divisor, q: Tensor, q_offsets: Tensor) -> None:
    if not isinstance(divisor, Tensor):
        if divisor != "visible" and not (_is_number(divisor) and divisor > 0):
            raise ValueError(f"divisor must be a positive number, a tensor or 'visible', got {_describe(divisor)}")
        return
    batch, queries = q_offsets.shape[0] - 1, q.shape[0]
    if tuple(divisor.shape) not in ((batch,), (queries,), (queries, 1)) or divisor.device != q.device:
        raise ValueError(
            f"divisor must be a number, 'visible', or ({batch},), ({queries},) or ({queries}, 1) on the device of q "
            f"({q.device}), got {_describe(divisor)}"
        )
    if divisor.dtype == torch.bool or divisor.is_complex():
        raise ValueError(f"divisor must hold real numbers, got {divisor.dtype}")
    if divisor.requires_grad:
        raise ValueError("divisor must not require a gradient: it is given none")


def _check_divisor_values(divisor: Tensor, q_offsets: Tensor, num_queries: int) -> None:
    if not bool((divisor.isfinite() & (divisor > 0)).all()):
        raise ValueError("divisor must hold positive finite numbers only")
    batch = q_offsets.shape[0] - 1
    if divisor.dim() == 1 and batch == num_queries:
        by_row = divisor_by_query(divisor, q_offsets.diff(), num_queries)
        if not torch.equal(by_row, divisor):
            raise ValueError(
                f"divisor of shape ({batch},) may mean a row or a query, as there are {batch} of either; "
                f"give one entry a query as ({batch}, 1)"
            )


def _check_offsets(name: str, offsets: Tensor, num_values: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_values or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to the number of tokens ({num_values}), got {offsets.tolist()[:8]}")


def _check_lengths(q_offsets: Tensor, kv_offsets: Tensor | None, max_seq_len: int, mask: Mask) -> None:
    lengths = q_offsets.diff()
    if kv_offsets is not None:
        q_lengths, lengths = lengths, kv_offsets.diff()
        if bool((q_lengths > lengths).any()):
            raise ValueError("kv_offsets must give each sequence at least as many keys as it has queries")
    if lengths.numel() and int(lengths.max()) > max_seq_len:
        raise ValueError(f"max_seq_len must be at least the longest sequence ({int(lengths.max())}), got {max_seq_len}")
    special = torch.zeros_like(lengths)
    for name in ("num_contextual", "num_targets"):
        counts = getattr(mask, name)
        if counts is None:
            continue
        special = special + counts
        if bool((counts < 0).any()) or bool(((special > lengths) & (lengths > 0)).any()):
            raise ValueError(f"mask.{name} must be >= 0 and leave contextual tokens and targets within each sequence")


def _check_finite(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | None) -> None:
    named = {"q": q, "k": k, "v": v}
    if bias is not None:
        named |= {"bias.position_table": bias.position_table, "bias.time_table": bias.time_table}
    for name, tensor in named.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} values that are not")


def _check_times(query_times: Tensor, key_times: Tensor) -> None:
    """Over the whole batch at once: a little stricter than row by row, and no row comes near it."""
    if query_times.dtype == torch.int32:
        for name, times in (("query_times", query_times), ("key_times", key_times)):
            if bool(((times < 0) | (times >= NARROW)).any()):
                raise ValueError(f"bias.{name} must lie in [0, 2**31 - 1) where it is int32")
    elif query_times.numel() and key_times.numel():
        (first, last), (low, high) = (map(int, times.aminmax()) for times in (query_times, key_times))
        if max(last - low, high - first) > LARGEST_EXACT:
            raise ValueError("bias.query_times must lie within 2**53 seconds of key_times")
