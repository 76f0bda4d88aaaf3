"""The one file that comes out of a check, and what identifies the code that was checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.plan import Kept, failed

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("gr", "kernels")


def code() -> str:
    """A hash of everything that is checked: a result of other code is none of this code's."""
    found = hashlib.sha256()
    for path in sorted(path for part in CHECKED for path in (ROOT / part).rglob("*")):
        if path.suffix in (".py", ".cpp") and path.is_file():
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


class Report:
    """Written anew after each slice, so that whatever ends the command leaves what was done.

    Args:
        out: The file.
        names: Slices that were asked for.
        device: "cuda" or "cpu".
        kept: The results.
    """

    def __init__(self, out: Path, names: list[str], device: str, kept: Kept) -> None:
        from benchmarks.kernels import device as devices
        from gr.training.environment import describe

        self._out, self._names, self._kept = out, names, kept
        self._head: dict[str, Any] = {
            "environment": describe(["benchmarks.gpu_check"]),
            "device": device,
            "code": kept.code,
        }
        if device == "cuda":
            self._head["clocks_before"] = devices.clocks()
        self._counts: dict[str, int] = {}

    def write(self) -> int:
        """Writes it aside and renames; the exit status that it means so far."""
        planned, results = self._kept.planned(), self._kept.results()
        found: dict[str, Any] = {}
        self._counts = dict.fromkeys(("done", "failed", "cannot", "left"), 0)
        for name in self._names:
            units = {key: result for (slice_, key), result in results.items() if slice_ == name}
            wrong = [key for key, result in units.items() if failed(result)]
            cannot = {key: result["cannot"] for key, result in units.items() if "cannot" in result}
            left = {key: "its turn did not come" for key in planned.get(name, []) if key not in units}
            left |= {key: result["left"] for key, result in units.items() if "left" in result}
            if name not in planned:
                left["all"] = "its turn did not come"
            rest = {key: result for key, result in units.items() if key not in left and key not in cannot}
            found[name] = {"failed": wrong, "left": left, "cannot": cannot, "units": rest}
            for word, some in (("failed", wrong), ("cannot", cannot), ("left", left)):
                self._counts[word] += len(some)
            self._counts["done"] += len(rest) - len(wrong)
        status = 1 if self._counts["failed"] else 3 if self._counts["left"] else 0
        data = self._head | {"status": status, "counts": self._counts, "slices": found, "tiles": _tiles()}
        aside = self._out.with_suffix(".tmp")
        aside.write_text(json.dumps(data, indent=1), encoding="utf-8")
        aside.replace(self._out)
        return status

    def told(self) -> str:
        """For people."""
        told = ", ".join(f"{count} {word}" for word, count in self._counts.items())
        return told + (" (--resume goes on)" if self._counts["left"] else "")


def _tiles() -> Any:
    """What the tuner has found so far: the file that the operator reads."""
    path = Path(os.environ.get("GR_HSTU_TILES", ""))
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
