"""The public operator: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from gr.kernels.hstu_attention.reference import Divisor, Mask, RelativeBias, hstu_attention_reference

BACKENDS = ("reference",)
ENVIRONMENT_VARIABLE = "GR_HSTU_BACKEND"


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor | None = None,
    *,
    max_seq_len: int,
    divisor: Divisor,
    alpha: float,
    mask: Mask | None = None,
    bias: RelativeBias | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Pointwise attention over jagged sequences: ``sum_j m_ij SiLU(alpha q_i.k_j + bias_ij) v_j /
    divisor_i``.

    Definition, with its source and its derivation: README.md of this folder.

    Args:
        q: ``(T_q, H, d_qk)``, float.
        k: ``(T_kv, H, d_qk)``, the dtype of ``q``.
        v: ``(T_kv, H, d_v)``, the dtype of ``q``.
        q_offsets: ``(B+1,)`` int64 or int32: row b owns tokens ``q_offsets[b]:q_offsets[b+1]``. Rows may be
            empty.
        kv_offsets: The same for keys and values, in the delta form: the queries are then the last rows of
            each sequence. None: the queries are the keys' own rows.
        max_seq_len: At least the longest sequence of keys. A host integer; it never enters the result. Where it is
            smaller the result is undefined (off the CPU that is not checked).
        divisor: What a query's sum is divided by: a number, ``(B,)``, ``(T_q,)``, or "visible", the number of
            keys that the query sees (at least 1). A tensor with B = T_q entries is read as ``(B,)``. Beware
            of a sequence's own length: it tells each position how long its future is.
        alpha: Scale of the scores.
        mask: Which pairs are seen; None is causal.
        bias: Relative attention bias, or None.
        deterministic: Ask for the same bits in every run, gradients included. The reference on a CPU always
            gives them, and refuses elsewhere.
        backend: "auto" or a name in ``BACKENDS``. "auto" takes the environment variable GR_HSTU_BACKEND if
            set.

    Returns:
        ``(T_q, H, d_v)``, the dtype of ``q``.

    Raises:
        ValueError: An argument is wrong; the message starts with its name. What the tensors hold (offsets,
            counts) is looked at on the CPU only, where it costs no synchronisation.
    """
    mask = Mask() if mask is None else mask
    _check_tensors(q, k, v, q_offsets, kv_offsets)
    _check_mask(mask, q_offsets)
    _check_bias(bias, q, k)
    _check_divisor(divisor, q, q_offsets)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len < 0:
        raise ValueError(f"max_seq_len must be an integer >= 0, got {max_seq_len!r}")
    if q_offsets.device.type == "cpu":
        _check_offsets("q_offsets", q_offsets, q.shape[0])
        if kv_offsets is not None:
            _check_offsets("kv_offsets", kv_offsets, k.shape[0])
        _check_lengths(q_offsets, kv_offsets, max_seq_len, mask)
    if deterministic and q.device.type != "cpu":
        raise ValueError("deterministic must be False off the CPU: the reference adds table gradients atomically there")
    assert choose_backend(backend) == "reference"
    with torch.autocast(q.device.type, enabled=False):  # the dtype of q decides, not the surroundings
        return hstu_attention_reference(
            q,
            k,
            v,
            q_offsets,
            kv_offsets,
            max_seq_len=max_seq_len,
            divisor=divisor,
            alpha=alpha,
            mask=mask,
            bias=bias,
        )


def choose_backend(backend: str = "auto") -> str:
    """The backend to run: the argument, else the environment variable, else the best one there is."""
    name, source = backend, "backend"
    if name == "auto":
        name, source = (
            os.environ.get(ENVIRONMENT_VARIABLE, "auto"),
            f"the environment variable {ENVIRONMENT_VARIABLE}",
        )
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor | None) -> None:
    named = (("q", q), ("k", k), ("v", v), ("q_offsets", q_offsets), ("kv_offsets", kv_offsets))
    for name, tensor in named:
        if not isinstance(tensor, Tensor) and (name != "kv_offsets" or tensor is not None):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    for name, tensor in named[:3]:
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (T, H, d), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be a float tensor of the dtype of q ({q.dtype}), got {tensor.dtype}")
        if tensor.shape[1] != q.shape[1]:
            raise ValueError(f"{name} must have the {q.shape[1]} heads of q, got {tensor.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the last dimension of q ({q.shape[2]}), got {k.shape[2]}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have as many tokens as k ({k.shape[0]}), got {v.shape[0]}")
    if kv_offsets is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"kv_offsets must be given where k has {k.shape[0]} tokens and q has {q.shape[0]}")
    for name, tensor in (("k", k), ("v", v), ("q_offsets", q_offsets), ("kv_offsets", kv_offsets)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {tensor.device}")
    for name, offsets in (("q_offsets", q_offsets), ("kv_offsets", kv_offsets)):
        if offsets is None:
            continue
        if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be (B+1,) integers, got {tuple(offsets.shape)} of {offsets.dtype}")
        if offsets.shape != q_offsets.shape:
            raise ValueError(f"{name} must have the {q_offsets.shape[0]} entries of q_offsets, got {offsets.shape[0]}")


def _check_mask(mask: Mask, q_offsets: Tensor) -> None:
    for name in ("window", "full_tail", "target_group"):
        value = getattr(mask, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"mask.{name} must be None or an integer >= 1, got {value!r}")
    batch = q_offsets.shape[0] - 1
    for name in ("num_contextual", "num_targets"):
        counts = getattr(mask, name)
        if counts is None:
            continue
        if not isinstance(counts, Tensor):
            raise ValueError(f"mask.{name} must be a tensor of ({batch},) integers, got {type(counts).__name__}")
        if counts.shape != (batch,) or counts.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"mask.{name} must be ({batch},) integers, got {tuple(counts.shape)} of {counts.dtype}")
        if counts.device != q_offsets.device:
            raise ValueError(f"mask.{name} must be on the device of q ({q_offsets.device}), got {counts.device}")


def _check_bias(bias: RelativeBias | None, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    heads = q.shape[1]
    for name in ("position_table", "time_table"):
        table = getattr(bias, name)
        if table is None:
            continue
        shared, per_head = table.dim() == 1, table.dim() == 2 and table.shape[0] == heads
        if not (shared or per_head) or table.shape[-1] < 1 or not table.is_floating_point():
            raise ValueError(
                f"bias.{name} must be (K,) or ({heads}, K) floats, got {tuple(table.shape)} of {table.dtype}"
            )
        if table.device != q.device:
            raise ValueError(f"bias.{name} must be on the device of q ({q.device}), got {table.device}")
    if bias.position_table is not None and bias.position_table.shape[-1] % 2 == 0:
        raise ValueError(f"bias.position_table must have 2P-1 entries, got {bias.position_table.shape[-1]}")
    if bias.position_ids not in ("index", "target_clamped"):
        raise ValueError(f"bias.position_ids must be 'index' or 'target_clamped', got {bias.position_ids!r}")
    if not bias.bucket_width > 0:
        raise ValueError(f"bias.bucket_width must be positive, got {bias.bucket_width!r}")
    if bias.time_table is None:
        return
    for name, tokens in (("query_times", q.shape[0]), ("key_times", k.shape[0])):
        times = getattr(bias, name)
        if times is None or times.shape != (tokens,) or times.dtype != torch.int64 or times.device != q.device:
            got = "None" if times is None else f"{tuple(times.shape)} of {times.dtype} on {times.device}"
            raise ValueError(f"bias.{name} must be ({tokens},) int64 seconds on the device of q, got {got}")


def _check_divisor(divisor: Divisor, q: Tensor, q_offsets: Tensor) -> None:
    if isinstance(divisor, Tensor):
        batch = q_offsets.shape[0] - 1
        if divisor.dim() != 1 or divisor.shape[0] not in (batch, q.shape[0]) or divisor.device != q.device:
            raise ValueError(
                f"divisor must be a number, ({batch},), ({q.shape[0]},) or 'visible', "
                f"got {tuple(divisor.shape)} on {divisor.device}"
            )
        if divisor.dtype == torch.bool or divisor.is_complex():
            raise ValueError(f"divisor must hold real numbers, got {divisor.dtype}")
        if divisor.device.type == "cpu" and not bool((divisor.isfinite() & (divisor > 0)).all()):
            raise ValueError("divisor must hold positive finite numbers only")
    elif isinstance(divisor, str):
        if divisor != "visible":
            raise ValueError(f"divisor must be a number, a tensor or 'visible', got {divisor!r}")
    elif isinstance(divisor, bool) or not isinstance(divisor, int | float) or not 0 < divisor < math.inf:
        raise ValueError(f"divisor must be a positive number, a tensor or 'visible', got {divisor!r}")


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
