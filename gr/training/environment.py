"""What a run ran on, for ``env.json``: enough to repeat it, nothing that identifies a person or a folder."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("numpy", "pyarrow", "triton", "torchrec", "deepspeed", "ray")


def describe(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, machine, commit and command line, as JSON-ready data.

    Args:
        argv: The command; defaults to ``sys.argv``.
    """
    info: dict[str, Any] = {
        "command": command_line(sys.argv if argv is None else argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES if _version(name)},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return {**info, **git_state()}


def command_line(argv: Sequence[str]) -> str:
    """The command without the working folder and the program's own, and with the home folder as ``~``."""
    words = [Path(argv[0]).name if argv else ""]
    for word in argv[1:]:
        words.append(word.replace(f"{Path.cwd()}{os.sep}", "").replace(str(Path.home()), "~"))
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    """``shlex.quote``, which alone would quote every word with a tilde."""
    return word if shlex.quote(word.replace("~", "")) == word.replace("~", "") else shlex.quote(word)


def cpu_model() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state(root: Path | None = None) -> dict[str, Any]:
    """{"git_commit", "git_dirty"} of the checkout this package runs from; empty if it runs from none."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {
            "git_commit": commit,
            "git_dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def commit_label(about: Mapping[str, Any]) -> str:
    """The commit that ``describe`` told of, with a plus where files differed from it."""
    return about.get("git_commit", "unknown") + ("+" if about.get("git_dirty") else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
