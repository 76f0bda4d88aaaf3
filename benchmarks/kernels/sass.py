"""What ptxas made of a kernel: registers, spills, and what its loops are made of. Read with the wheel's cuobjdump.

``LOCAL`` of the resource usage stays 0 where registers spill (seen with the ptxas of triton 3.7.1): stack and LDL/STL
instructions are what tells. Counts are of the code as it stands, so a loop's counts are those of one trip.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

WARP, WARPGROUP = 32, 128

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WARP_SHAPES = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}
"""Multiply-adds of one warp's HMMA by the shape in its name."""


@dataclass(frozen=True)
class Loop:
    """A loop with tensor-core or special-function instructions that holds no other such loop.

    Attributes:
        instructions: Of one trip, by the first word of their name, and special functions by name, "MUFU.TANH" for
            instance, too; a small loop inside counts as one trip of its own.
        multiply_adds: By tensor cores in one trip of a whole program.
    """

    instructions: Counter[str]
    multiply_adds: int

    def total(self) -> int:
        """Instructions of one trip that a warp issues."""
        return sum(count for name, count in self.instructions.items() if "." not in name)


@dataclass(frozen=True)
class Usage:
    """A kernel's machine code in numbers.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread; more than 0 is a spill or an array that is no register.
        spills: LDL and STL instructions.
        instructions: Of the whole kernel, as a loop's.
        loops: Innermost loops with tensor-core or special-function instructions, in their order.
    """

    registers: int
    stack: int
    spills: int
    instructions: Counter[str]
    loops: tuple[Loop, ...]

    @property
    def tensor(self) -> int:
        """Tensor-core instructions: HGMMA of a warp group, HMMA of a warp."""
        return self.instructions["HGMMA"] + self.instructions["HMMA"]


def tool(name: str) -> str:
    """A program of the CUDA toolkit from the triton wheel."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def read(cubin: bytes, num_warps: int) -> Usage:
    """Disassembles a kernel of ``num_warps`` warps."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_run(flag, file.name) for flag in ("-res-usage", "-sass"))
    return parse(usage, code, num_warps)


def _run(flag: str, path: str) -> str:
    return subprocess.run([tool("cuobjdump"), flag, path], capture_output=True, text=True, check=True).stdout


def parse(usage: str, code: str, num_warps: int) -> Usage:
    """The same from cuobjdump's two answers (``-res-usage``, ``-sass``)."""
    resources = _USAGE.search(usage)
    assert resources, f"cuobjdump says nothing of registers: {usage!r}"
    lines = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(code)]
    assert lines, "cuobjdump shows no instructions"
    names = _counts([name for _, name, _ in lines])
    found = {}
    for first, last in _loops(lines):
        body = [name for address, name, _ in lines if first <= address <= last]
        products = sum(multiply_adds(name, num_warps) for name in body)
        words = _counts(body)
        if products or words["MUFU"]:
            found[first, last] = Loop(words, products)
    loops = [found[place] for place in _innermost(list(found))]
    registers, stack = int(resources[1]), int(resources[2])
    return Usage(registers, stack, names["LDL"] + names["STL"], names, tuple(loops))


def _counts(names: list[str]) -> Counter[str]:
    special = Counter(".".join(name.split(".")[:2]) for name in names if name.startswith("MUFU"))
    return Counter(name.split(".")[0] for name in names) + special


def multiply_adds(name: str, num_warps: int) -> int:
    """Multiply-adds of a program's warps in one tensor-core instruction; 0 for any other.

    ``HGMMA.64x128x16.F32.BF16`` is one warp group's, ``HMMA.16816.F32.BF16`` one warp's.
    """
    words = name.split(".")
    if words[0] == "HGMMA":
        m, n, k = (int(size) for size in words[1].split("x"))
        return m * n * k * num_warps * WARP // WARPGROUP
    if words[0] == "HMMA":
        return _WARP_SHAPES[words[1]] * num_warps
    return 0


def _loops(lines: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) addresses of every backward branch; the endless one after the end is none."""
    found = []
    for address, name, operands in lines:
        if name.split(".")[0] == "BRA" and (target := re.search(r"0x([0-9a-f]+)\s*$", operands.strip())):
            first = int(target[1], 16)
            if first < address:
                found.append((first, address))
    return found


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    return sorted({loop for loop in loops if not any(holds(loop, other) for other in loops)})
