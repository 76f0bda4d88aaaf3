"""Compiles what a Triton launcher would launch, for a GPU that is not there.

A stand-in for triton's driver names the target, and every launch compiles without running. So the launcher itself
decides on kernels, constants, types and alignment, from ordinary CPU tensors, and what is compiled here is what a GPU
would be given. The interpreter patches triton when kernels are decorated: this works only in a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WARP = 32


@dataclass(frozen=True)
class Compiled:
    """One kernel of one launch.

    Attributes:
        name: The kernel function's name.
        constants: Its compile-time arguments that are plain values, by name.
        num_warps: Warps of a program.
        num_stages: Stages of its pipelines.
        shared: Bytes of shared memory, dynamic and static alike.
        cubin: The machine code.
        seconds: Spent compiling; near 0 out of the cache.
    """

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int
    cubin: bytes = field(repr=False)
    seconds: float = 0.0


class _Driver:
    """What compiling asks of a driver: the target; no device, no launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, WARP)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number for each target: a kernel keeps the target of its first launch by the device's number."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Compiled]]:
    """Within, every launch of a ``triton.jit`` function compiles for sm_``arch`` and is appended to the list.

    Outputs of launches keep whatever was in their memory.

    Args:
        arch: 80 or 90.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET must not be set where kernels are compiled")
    found: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        begin = time.perf_counter()
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_record(self, kernel, args, kwargs, time.perf_counter() - begin))
        return kernel

    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        config._active = before


def _record(function: JITFunction, kernel: Any, args: tuple, kwargs: dict, seconds: float) -> Compiled:
    names = [parameter.name for parameter in function.params]
    given = dict(zip(names, args, strict=False)) | {name: value for name, value in kwargs.items() if name in names}
    plain = (bool, int, float, str, type(None))
    fixed = {
        parameter.name: given[parameter.name]
        for parameter in function.params
        if parameter.is_constexpr and isinstance(given.get(parameter.name, given), plain)
    }
    meta = kernel.metadata
    return Compiled(
        name=function.fn.__name__,
        constants=fixed,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        shared=meta.shared,
        cubin=kernel.asm["cubin"],
        seconds=seconds,
    )
