"""Slices, the units that they are made of, the time that is left, and the file in which every finished unit is kept.

A unit is the smallest thing that is done or not: it is kept the moment it is done, so a run that is cut off, at any
point, continues with ``--resume`` where it stopped. A slice runs in processes of its own, because a GPU that has seen
an illegal access does nothing right in that process any more, and because a kernel that hangs must be ended from
outside.

A unit's result is a dict for JSON with one of these in it:

- ``say``: done; figures may stand beside it.
- ``ok`` that is false, or ``error``: it failed. It is not tried again, unless told so.
- ``cannot``: why this machine cannot do it. That is no failure.
- ``left``: why it was not done this time (the clock, a refusal); the next call tries again.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Results = dict[tuple[str, str], Result]
"""(slice, key) -> result."""

POISONED = 3
"""A child's exit status after an error that leaves its device unusable."""
PROCESS = "process "
"""Begins the key of what ended a whole process, or kept it from beginning."""
NEVER_ENDED = "began, and never ended"
"""What is kept of a unit while it runs, and stays if its process dies."""


@dataclass(frozen=True)
class Context:
    """What a slice may know.

    Attributes:
        device: "cuda", or "cpu": then sizes are tiny, there are no figures, and what runs shows that the code does.
        deadline: ``time.time()`` after which nothing new begins.
        part: (i, n): this process does every n-th unit beginning with the i-th.
        kept: Results of earlier slices and units.
        folder: Where files beside the report go.
    """

    device: str
    deadline: float
    part: tuple[int, int] = (0, 1)
    kept: Results = field(default_factory=dict)
    folder: Path = Path(".")

    @property
    def dry(self) -> bool:
        """On a CPU."""
        return self.device == "cpu"

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()


@dataclass(frozen=True)
class Unit:
    """One thing to do.

    Attributes:
        key: Unique in its slice.
        run: Gives a result.
        about_s: Seconds that it may take on a GPU; it does not begin with less time left.
    """

    key: str
    run: Callable[[], Result]
    about_s: float = 5.0


@dataclass(frozen=True)
class Slice:
    """A named list of units.

    Attributes:
        name: On the command line and in the report.
        about: One line.
        units: Context -> units, in order of importance.
        share: Of the whole time, at most; what a slice leaves is the later ones'.
        processes: At once. Compiling takes most of the time of small kernels, and each process compiles its own.
    """

    name: str
    about: str
    units: Callable[[Context], Iterable[Unit]]
    share: float
    processes: int = 1


class Kept:
    """An append-only file of results, one JSON line each; several processes may write, a line at a time.

    Args:
        path: The file.
        code: What identifies the code that is checked; results of other code do not count.
    """

    def __init__(self, path: Path, code: str = "") -> None:
        self.path, self.code = path, code

    def read(self) -> list[dict[str, Any]]:
        """All lines of this code; one that was cut off is left out."""
        rows = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if row["code"] == self.code:
                    rows.append(row)
        return rows

    def _append(self, **row: Any) -> None:
        """One write of one line, at the end whoever else writes."""
        data = (json.dumps({"code": self.code, **row}) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)

    def keep(self, name: str, key: str, result: Result) -> None:
        """A result; the last one of a unit is the one that counts."""
        self._append(slice=name, key=key, result=result)

    def plan(self, name: str, keys: list[str]) -> None:
        """What a slice is made of."""
        self._append(slice=name, keys=keys)

    def results(self) -> Results:
        """The last result of each unit."""
        found = {(row["slice"], row["key"]): row["result"] for row in self.read() if "key" in row}
        return {unit: result for unit, result in found.items() if result is not None}

    def planned(self) -> dict[str, list[str]]:
        """The keys that each slice has."""
        return {row["slice"]: row["keys"] for row in self.read() if "keys" in row}

    def forget(self, names: Iterable[str], faults: bool = False) -> None:
        """What is kept of some slices does not count any more; of ``faults``, only those of whole processes."""
        for name, key in self.results():
            if name in names and (not faults or key.startswith(PROCESS)):
                self._append(slice=name, key=key, result=None)


def failed(result: Result) -> bool:
    """Whether a unit's result is a failure."""
    return "error" in result or result.get("ok") is False


def run_slice(part: Slice, context: Context, kept: Kept) -> int:
    """Does the units that are not done yet, while there is time; 0, or ``POISONED``.

    A unit that failed is not tried again: what made the device unusable once would do so again.
    """
    try:
        units = list(part.units(context))
    except Exception as error:
        kept.keep(part.name, f"{PROCESS}{context.part[0]}", {"error": _told(error)})
        print(f"  {part.name}: FAILED: {error}", flush=True)
        return 0
    kept.plan(part.name, [unit.key for unit in units])
    done = kept.results()
    first, step = context.part
    for unit in units[first::step]:
        if "left" not in done.get((part.name, unit.key), {"left": ""}):
            continue
        if context.left_s() < (0 if context.dry else unit.about_s):
            kept.keep(part.name, unit.key, {"left": f"it may take {unit.about_s:g} s, and so much was not left"})
            continue
        ends_by = time.time() + patience_s(unit)
        kept.keep(part.name, unit.key, {"error": NEVER_ENDED, "process": os.getpid(), "ends_by": ends_by})
        begin = time.perf_counter()
        try:
            result, fatal = unit.run(), False
        except Exception as error:
            result, fatal = {"error": _told(error)}, is_fatal(error)
        kept.keep(part.name, unit.key, result | {"unit_s": round(time.perf_counter() - begin, 2)})
        print(f"  {part.name}: {unit.key}: {told(result)}", flush=True)
        if fatal:
            return POISONED
    return 0


def patience_s(unit: Unit) -> float:
    """After this long a unit hangs, and its process is ended."""
    return 30 + 3 * unit.about_s


def is_fatal(error: BaseException) -> bool:
    """Whether nothing more can be had from the device in this process."""
    words = str(error).lower()
    if "out of memory" in words or "out of resource" in words:
        return False
    return type(error).__name__ == "AcceleratorError" or "cuda error" in words or "illegal memory" in words


def told(result: Result) -> str:
    """A result for people."""
    if "error" in result:
        return "FAILED: " + result["error"].splitlines()[0][:300]
    if result.get("ok") is False:
        return "FAILED: " + result.get("say", "wrong")
    for word in ("left", "cannot"):
        if word in result:
            return f"{word}: {result[word]}"
    return result.get("say", "done")


def _told(error: BaseException) -> str:
    """The message first, then where it came from, without this machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__}: {error}\n" + " < ".join(reversed(places[-6:]))
