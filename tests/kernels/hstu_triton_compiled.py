"""Compiles the Triton kernels of HSTU attention for sm_80 and sm_90, without a GPU: no spills, matrix units used.

Run as a program, in a process without TRITON_INTERPRET, by test_hstu_attention_triton.py: a JSON line a kernel.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gr.kernels.hstu_attention import triton_kernels
from gr.kernels.hstu_attention.triton_tiles import Key, choose

HALVES = ("q", "k", "v", "grad", "out", "d_k", "d_v")
FLOATS = ("position", "time_table")
DOUBLES = ("d_position", "d_time")
LONGS = ("q_offsets", "k_offsets", "num_contextual", "num_targets", "edges", "query_times", "key_times")
ALIGNED = ("q", "k", "v", "grad", "out", "d_k", "d_v")


def figures(name: str, architecture: int, dim: int, bias: bool) -> dict[str, int | str]:
    """What one kernel compiles to, bfloat16, causal, with a clamped position table and a time table or without."""
    kernel = triton_kernels.key_kernel if name == "backward" else triton_kernels.query_kernel
    tile = choose(Key(architecture, name, True, dim, bias))
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    values = {
        "CAUSAL": True, "DIVISOR": "number", "CLAMPED_IDS": bias, "STEPS": 7 if bias else 0, "FAST": True,
        "PRECISION": "ieee", "D_QK": dim, "D_V": dim, "BLOCK_QK": dim, "BLOCK_V": dim, **sizes,
    }  # fmt: skip
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for absent in ("num_contextual", "window", "full_tail", "group"):
        values[absent] = None
    if name == "forward":
        values["grad"] = None
    if not bias:
        values |= dict.fromkeys(("num_targets", *FLOATS, *DOUBLES, "edges", "query_times", "key_times"))
    values = {argument: value for argument, value in values.items() if argument in kernel.arg_names}
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        kind = "i32"
        if argument in values:
            kind = "constexpr"
        elif argument in HALVES:
            kind = "*bf16"
        elif argument in FLOATS:
            kind = "*fp32"
        elif argument in DOUBLES:
            kind = "*fp64"
        elif argument in LONGS:
            kind = "*i64"
        elif argument in ("divisor", "half_alpha"):
            kind = "fp32"
        signature[argument] = kind
        if argument in ALIGNED and kind != "constexpr" or argument.endswith(("_token", "_head")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "kernel": name, "architecture": architecture, "dim": dim, "bias": bias,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)), "products": len(re.findall(r"\bHG?MMA\b", code)),
        "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    names = ("forward", "backward_query", "backward")
    for choice in itertools.product(names, (80, 90), (64, 128), (False, True)):
        print(json.dumps(figures(*choice)))
        sys.stdout.flush()
