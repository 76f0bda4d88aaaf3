"""The Triton backend in its interpreter: bfloat16 mended, memory poisoned, tiles and forms of the test's choice."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter as module

from gr.kernels.hstu_attention import triton_tiles
from gr.kernels.hstu_attention.triton_tiles import Tile
from hstu_cases import OPTIONS, Case, compare, covering_array

# What the kernels decide by, beside what the definition is called with.
CHOICES: dict[str, tuple] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "longest": (3, 16, 17, 40),
    "width": (1, 8, 9, 64, 85),  # of heads: 8 gives 16 columns, which no block pads; 85 pads 170 and 255 to 256
    "size": ((16, 32), (32, 16), (16, 16)),
    "form": ("packed", "split", "atomic"),
    "deterministic": (False, True),
}


@dataclass(frozen=True)
class Choice:
    """A case of the operator and how the kernels run it."""

    case: Case
    dtype: torch.dtype
    longest: int
    width: int
    size: tuple[int, int]
    form: str
    deterministic: bool

    @property
    def id(self) -> str:
        words = (self.case.id, str(self.dtype)[6:], self.longest, self.width, *self.size, self.form)
        return "-".join(map(str, words)) + "-deterministic" * self.deterministic


def choices() -> list[Choice]:
    """All pairs of options and choices."""
    both = OPTIONS | {f"kernel_{name}": values for name, values in CHOICES.items()}
    return [_choice(row) for row in covering_array(both, seed=2, tries=3)]


def product() -> list[Choice]:
    """Every mask with every bias; dtypes, dims, lengths and forms take turns, so that neighbours differ."""
    names = ("causal", "window", "contextual", "targets", "position", "time")
    rest = {name: values for name, values in OPTIONS.items() if name not in names}
    rest |= {f"kernel_{name}": values for name, values in CHOICES.items()}
    rest |= {"kernel_longest": (3, 17, 33), "kernel_size": ((16, 32), (32, 16))}
    draw, turns, found = random.Random(3), {name: [] for name in rest}, []
    for row in itertools.product(*(OPTIONS[name] for name in names)):
        for name, values in rest.items():
            turns[name] = turns[name] or draw.sample(values, len(values))
        others = {name: turn.pop() for name, turn in turns.items()}
        found.append(_choice(dict(zip(names, row, strict=True)) | others))
    return found


def _choice(row: dict[str, Any]) -> Choice:
    case = Case(**{name: row[name] for name in OPTIONS})
    return Choice(case, **{name: row[f"kernel_{name}"] for name in CHOICES})


def check(choice: Choice) -> None:
    """As :func:`hstu_cases.compare`, with memory poisoned."""
    form = choice.form
    if choice.deterministic and form == "atomic" or choice.case.form == "delta" and form == "packed":
        form = "split"  # what the library would do
    packed = max(16, 1 << choice.longest.bit_length())
    with blocks(*choice.size, packed=packed, form=form), poisoned():
        shape = {"longest": choice.longest, "batch": 4 if choice.longest > 16 else 7, "width": choice.width}
        compare(choice.case, choice.dtype, "triton", deterministic=choice.deterministic, **shape)


@contextmanager
def mended() -> Iterator[None]:
    """Mends bfloat16, which the interpreter keeps as bits in uint16: products multiply the bits, casts truncate.

    Here products of bfloat16 are made in float32, and float32 is rounded to the nearest, ties to even.
    """
    builder = module.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return module.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return module.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), to.scalar)
        return cast(self, source, to)

    with (
        mock.patch.object(builder, "create_dot", create_dot),
        mock.patch.object(builder, "cast_impl", cast_impl),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # some scores are meant to overflow
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten is full of NaN, or of a large integer: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def blocks(block_m: int, block_n: int, packed: int = 16, form: str | None = None) -> Iterator[None]:
    """Tiles of this size, whatever the table says; ``form``: how gradients are made (None: the library chooses)."""
    with ExitStack() as stack:
        for kernel in triton_tiles.KERNELS:
            size = (packed, packed) if kernel.endswith("_packed") else (block_m, block_n)
            stack.enter_context(triton_tiles.forced(kernel, Tile(*size, 4, 1)))
        if form is not None:
            stack.enter_context(mock.patch.object(triton_tiles, "form_of", lambda *_: form))
        yield
