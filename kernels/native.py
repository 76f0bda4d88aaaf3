"""Compiles an operator's C++ file once for this processor, and loads it.

The files use no header but the language's own and are called through their C functions, so a build takes seconds and
knows nothing of torch's version. Builds are kept in ``$GR_NATIVE_CACHE`` (default: ``hstu-gr`` in the user's cache
folder) under the hash of all that they depend on. Without a compiler the operators fall back to plain torch: nothing
but speed is lost. ``GR_NATIVE=0`` asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ file, built if need be; None where there is no compiler, with a warning if it fails.

    torch must have been imported before: both must share one OpenMP runtime, and so one set of threads.
    """
    return None if os.environ.get("GR_NATIVE", "1") == "0" else _load(source)


@cache
def _load(source: Path) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        target = _build(compiler, source)
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # half a file, after a full disk: once more
            target.unlink(missing_ok=True)
            return ctypes.CDLL(str(_build(compiler, source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{source.name} could not be built, so plain torch is used, which is slower: {reason}", stacklevel=3
        )
        return None


def _compiler() -> list[str] | None:
    """``$CXX`` with its arguments, or the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]):
        return named
    found = shutil.which("g++") or shutil.which("c++")
    return [found] if found else None


def _build(compiler: list[str], source: Path) -> Path:
    text = source.read_bytes()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (text, version.encode(), " ".join((*compiler, *FLAGS)).encode(), _processor().encode())
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()
    folder = Path(os.environ.get("GR_NATIVE_CACHE") or _cache_folder()).expanduser().resolve()
    target = folder / f"{source.parent.name}-{source.stem}-{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: two processes may build at once, and neither loads half a file.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            built = Path(aside) / target.name
            subprocess.run(
                [*compiler, *FLAGS, str(source), "-o", str(built)], capture_output=True, text=True, check=True
            )
            os.replace(built, target)
    return target


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hstu-gr"


def _processor() -> str:
    """What -march=native looks at: a build for one processor may not run on another that shares the home folder."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split(":")[0].strip() in wanted)


def has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
