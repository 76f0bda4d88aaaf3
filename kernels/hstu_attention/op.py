"""The public operator: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from gr.kernels.hstu_attention import library, native
from gr.kernels.hstu_attention.checks import check_arguments, check_contents
from gr.kernels.hstu_attention.reference import hstu_attention_reference
from gr.kernels.hstu_attention.types import Arguments, Divisor, Mask, RelativeBias

BACKENDS = ("reference", *library.BACKENDS)
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
            smaller the result is undefined (off the CPU that is seen in checked mode only).
        divisor: What a query's sum is divided by: a number, ``(B,)``, ``(T_q,)``, ``(T_q, 1)``, or "visible", the
            number of keys that the query sees (at least 1). Where B = T_q one dimension is read as ``(B,)``, and
            refused if the two readings differ. Beware of a sequence's own length: it tells each position how long
            its future is.
        alpha: Scale of the scores.
        mask: Which pairs are seen; None is causal.
        bias: Relative attention bias, or None.
        deterministic: Ask for the same bits in every run, gradients included. On a CPU every backend always gives
            them; elsewhere the triton backend does, at the cost of two more products backward and of a pass over v
            and the gradient (README, "Backends"), and the reference refuses.
        backend: "auto" or a name in ``BACKENDS``. "auto" takes the environment variable GR_HSTU_BACKEND if
            set.

    Returns:
        ``(T_q, H, d_v)``, the dtype of ``q``.

    Raises:
        ValueError: An argument is wrong; the message starts with its name. What the tensors hold (offsets,
            counts, divisors) is looked at on the CPU only, where it costs no synchronisation; the environment variable
            GR_CHECKED=1 has everything looked at on every device, values included.
    """
    call = Arguments(
        q=q,
        k=k,
        v=v,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        max_seq_len=max_seq_len,
        divisor=divisor,
        alpha=alpha,
        mask=Mask() if mask is None else mask,
        bias=bias,
        deterministic=deterministic,
    )
    check_arguments(call)
    name = choose_backend(backend, q.device.type, q.dtype)
    if deterministic and q.device.type != "cpu" and name != "triton":
        raise ValueError("deterministic must be False off the CPU for the reference: it adds gradients atomically")
    if name != "reference":
        return library.call(call, name)
    if not torch.compiler.is_compiling():
        check_contents(call)
    with torch.autocast(q.device.type, enabled=False):  # the dtype of q decides, not the surroundings
        return hstu_attention_reference(call)


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def choose_backend(backend: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend to run: the argument, else the environment variable, else the fastest that has been run there.

    Raises:
        ValueError: There is no such backend, or not for this type of device, this dtype or this machine.
    """
    name, source = backend, "backend"
    if name == "auto":
        name, source = os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"the environment variable {ENVIRONMENT_VARIABLE}"
    if name == "auto":
        if device != "cpu":
            return "reference"  # triton by name only, until its kernels have run on a GPU
        return "native" if dtype != torch.float64 and native.library() is not None else "cpu"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if name != "reference" and device != "cpu" and (name, device) != ("triton", "cuda"):
        known = "auto, triton or reference" if device == "cuda" else "auto or reference"
        raise ValueError(f"{source} must be {known} on {device}, got {name!r}")
    if name in ("native", "triton") and dtype == torch.float64:
        raise ValueError(f"{source} must be auto, cpu or reference for float64, got {name!r}")
    if name == "triton" and not has_triton():
        raise ValueError(f"{source} must be auto or reference where triton is not installed, got 'triton'")
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{source} must be another than 'triton' on a CPU, unless TRITON_INTERPRET=1 is set")
    if name == "native" and native.library() is None:
        raise ValueError(f"{source} must be auto, cpu or reference where nothing can be compiled, got 'native'")
    return name


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler (over a second).
choose_backend._dynamo_marked_constant = True
