"""What Linux says of the memory of a process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def memory(pid: int | str = "self", shares: bool = False) -> dict[str, int]:
    """Bytes by the kernel's own names, VmHWM, VmData, RssAnon and RssFile among them; empty if it has ended.

    Args:
        pid: The process.
        shares: Also what counts a shared page in parts, ``Pss``; the kernel walks through all pages for it.
    """
    lines: list[str] = []
    for name in ("status", "smaps_rollup") if shares else ("status",):
        try:
            lines += Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:  # it has just ended
            return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB"))
    return {name: int(rest.split()[0]) * 1024 for name, rest in pairs}


def peak_gib() -> float:
    """Largest resident memory of this process so far.

    ``ru_maxrss`` on Linux starts from what the parent held when it made the process, so ``VmHWM`` comes first.
    """
    found = memory()
    if "VmHWM" in found:
        return found["VmHWM"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
