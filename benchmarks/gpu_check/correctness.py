"""Every backend against the definition in float64, on the device: options, shapes, poisoned memory, determinism.

The cases are those of the tests (all pairs of options), taken from their file as plain data, and some shapes at the
edges of tiles. A backend must come as near to float64 as the definition does in the same dtype (twice its error), or to
4 units in the last place of the largest value. While it runs, memory that nobody has written holds NaN.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.plan import Context, Result, Results, Unit, failed
from benchmarks.kernels.hstu_attention import AttentionCase, make, run
from gr.kernels.hstu_attention import choose_backend, op

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASES_FILE = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "hstu_cases.py"
EDGES = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 300)
SHORT = (0, 1, 2, 7, 15, 16, 17, 20, 3, 31, 32, 5, 33, 1, 48, 63, 64)
LONG = (700, 0, 513, 1, 640)
TINY = (0, 17, 3)
MASK = {"window": 40, "full_tail": 7, "context": 3, "targets": 20}
BIAS = {"position": True, "time": True}


@dataclass(frozen=True)
class Shape:
    """A case and the lengths of its rows: those at the edges of tiles.

    Attributes:
        case: Of the benchmarks.
        sizes: In place of its law's.
    """

    case: AttentionCase
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The case's."""
        return self.case.name


@cache
def cases() -> ModuleType:
    """The tests' cases; the file needs torch alone."""
    spec = importlib.util.spec_from_file_location("hstu_cases", CASES_FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["hstu_cases"] = module
    spec.loader.exec_module(module)
    return module


def backends(device: str, dtype: torch.dtype) -> list[str]:
    """Those that run there, the definition left out."""
    found = []
    for name in op.BACKENDS:
        with contextlib.suppress(ValueError):
            if name != "reference":
                found.append(choose_backend(name, device, dtype))
    return found


def units(context: Context) -> Iterator[Unit]:
    """A dtype at a time, that of the figures first: shapes, which are what people run, all pairs of options, bits."""
    device, names = context.device, list(DTYPES)
    if context.dry:
        names = ["float16"]  # the interpreter multiplies bfloat16 wrongly
    # The interpreter takes about a second a case; elsewhere it is compiling.
    chosen = cases().CASES[:1] if context.dry else cases().CASES
    size = {"longest": 5, "batch": 4, "width": 8} if context.dry else {"longest": 130, "batch": 6, "width": 16}
    for backend, name in [(backend, dtype) for dtype in names for backend in _tested(context, DTYPES[dtype])]:
        todo: dict[str, Computed] = {each.name: partial(by_shape, each, device=device) for each in shapes(context.dry)}
        todo |= {case.id: partial(by_options, case, size, device=device) for case in chosen}
        for key, computed in todo.items():
            yield Unit(f"{backend}/{name}/{key}", partial(held, computed, backend, name), about_s=20)
        for shape in shapes(context.dry)[: 1 if context.dry else None]:
            if shape.case.dim_qk in (16, 64, 128):
                key = f"{backend}/{name}/deterministic/{shape.name}"
                yield Unit(key, partial(deterministic, shape, device, backend, name), about_s=20)


def _tested(context: Context, dtype: torch.dtype) -> list[str]:
    found = backends(context.device, dtype)
    return [name for name in found if name == "triton"] if context.dry and "triton" in found else found


def shapes(dry: bool) -> list[Shape]:
    """Row lengths at the edges of tiles, short and long ones, the widths of heads, with and without bias and masks."""

    def shape(name: str, dim_qk: int, dim_v: int = 0, sizes: tuple[int, ...] = EDGES, **more: Any) -> Shape:
        case = AttentionCase(
            name=f"{name}-{dim_qk}", family=name, device="none", rows=len(sizes), longest=max(sizes), heads=2,
            dim_qk=dim_qk, dim_v=dim_v or dim_qk, **more,
        )  # fmt: skip
        return Shape(case, sizes)

    if dry:
        return [shape("edges", 16, sizes=TINY), shape("all-edges", 16, sizes=TINY, **BIAS, **MASK)]
    found = [shape("edges", dim) for dim in (128, 64)]
    found += [shape(name, 128, sizes=sizes) for name, sizes in (("long", LONG), ("short", SHORT))]
    found += [shape("bias-edges", dim, **BIAS) for dim in (128, 64)]
    found += [shape("composed-edges", 128, **MASK), shape("all-edges", 64, **BIAS, **MASK)]
    found += [shape("all-long", 128, sizes=LONG, **BIAS, **MASK), shape("all-short", 64, sizes=SHORT, **BIAS, **MASK)]
    return [*found, shape("edges", 256), shape("edges", 32), shape("bias-edges", 50, **BIAS), shape("edges", 96, 40)]


Computed = Callable[[torch.dtype, str], dict[str, Tensor]]
"""(dtype, backend) -> the output and every gradient, by name."""


def by_options(case: Any, size: dict[str, int], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """A case of the tests."""
    return cases().by_name(case.arguments(dtype, device=device, **size), backend)


def by_shape(
    shape: Shape, dtype: torch.dtype, backend: str, device: str, deterministic: bool = False
) -> dict[str, Tensor]:
    """A shape of this file; values are bfloat16's, so that all dtypes get the same numbers."""
    inputs = make(shape.case, device, torch.bfloat16, 0, sizes=np.asarray(shape.sizes)).to(dtype)
    out = run(inputs, backend, deterministic)
    gradients = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad)
    return {"out": out.detach(), **dict(zip(inputs.leaves, gradients, strict=True))}


def held(results: Computed, backend: str, name: str) -> Result:
    """A backend's error as a share of what is allowed."""
    dtype = DTYPES[name]
    exact, own = results(torch.float64, "reference"), results(dtype, "reference")
    with poisoned():
        got = results(dtype, backend)
    worst, tensor = 0.0, "out"
    for part, truth in exact.items():
        if got[part].shape != truth.shape or got[part].dtype != own[part].dtype:
            return {"ok": False, "say": f"{part} has the wrong shape or dtype"}
        scale = _largest(truth)
        allowed = max(2 * _largest(own[part] - truth), 4 * torch.finfo(dtype).eps * scale)
        error = _largest(got[part].to(truth.dtype) - truth)
        share = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
        if not share <= worst:  # NaN too
            worst, tensor = share, part
        if share != share:
            break
    right = bool(worst <= 1)
    return {"ok": right, "worst": worst, "tensor": tensor, "say": f"{worst:.2f} of the error allowed, in {tensor}"}


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def deterministic(shape: Shape, device: str, backend: str, name: str) -> Result:
    """The deterministic form twice, with other memory in between: the same bits."""
    results = partial(by_shape, shape, DTYPES[name], backend, device, deterministic=True)
    try:
        first = results()
    except ValueError as error:
        if not str(error).startswith("deterministic"):
            raise
        return {"cannot": str(error)}
    with poisoned():
        second = results()
    other = [part for part, values in first.items() if not torch.equal(values, second[part])]
    return {"ok": not other, "say": f"two runs differ in {', '.join(other)}" if other else "two runs are bit-equal"}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch fills memory that it allocates and nobody initialises with NaN (integers: the largest)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


def red(kept: Results, backend: str, dtype: str) -> list[str]:
    """Keys of this slice at which a backend failed in a dtype: its figures are then refused.

    Whatever failed in another dtype stands in the same report.
    """
    own = [(key, result) for (name, key), result in kept.items() if name == "correctness"]
    return [key for key, result in own if key.startswith(f"{backend}/{dtype}/") and failed(result)]


def refusal(kept: Results, backend: str, dtype: str) -> Result | None:
    """What a unit answers instead of figures while the operator's checks are red, or were not made at all."""
    wrong = red(kept, backend, dtype)
    if wrong:
        return {"left": f"figures are refused: {backend} failed {len(wrong)} checks in {dtype}, first {wrong[0]}"}
    checked = [key for name, key in kept if name == "correctness" and key.startswith(f"{backend}/{dtype}/")]
    return None if checked else {"left": f"figures are refused: {backend} was not checked in {dtype}"}
