"""Forward and backward of a few small batches, nothing else: what the sanitizer watches.

python -m benchmarks.gpu_check.small DEVICE BACKEND
"""

from __future__ import annotations

import sys

from benchmarks.gpu_check import bare

WATCHED = ("edges-64", "all-edges-64", "long-128", "all-short-64")
"""Of the correctness slice: several tiles a row, all masks and biases, short rows and long ones."""


def main(device: str, backend: str) -> None:
    """In float16, as the kernels are by themselves and in their deterministic form where they have it."""
    bare.install()
    import torch

    from benchmarks.gpu_check.correctness import by_shape, shapes

    some = shapes(dry=True)
    if device == "cuda":
        some += [shape for shape in shapes(dry=False) if shape.name in WATCHED]
    for shape in some:
        for deterministic in (False, True):
            try:
                by_shape(shape, torch.float16, backend, device, deterministic=deterministic)
            except ValueError as error:
                if not str(error).startswith("deterministic"):
                    raise
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
