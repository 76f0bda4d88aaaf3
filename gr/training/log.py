"""metrics.jsonl, the lasting record, and TensorBoard beside it where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.files import write_text


def trim_metrics(path: Path, step: int) -> int:
    """Drops lines after ``step``, and a last line cut short by a kill: they will be written again.

    Returns:
        How many lines were dropped.

    Raises:
        UserError: A line before the last one is not JSON.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = []
    for number, line in enumerate(lines):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if number + 1 < len(lines):
                raise UserError(f"{path} line {number + 1} is damaged; delete that line to resume") from None
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))
    return len(lines) - len(kept)


class MetricsLog:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only rank 0 has one.

    Args:
        path: metrics.jsonl.
        tensorboard: Folder of event files; ``None``: none are written.
        step: What happened after this step is forgotten in both.
        note: Called with one sentence if TensorBoard is absent.
    """

    def __init__(self, path: Path, tensorboard: Path | None, step: int, note: Callable[[str], None]) -> None:
        trim_metrics(path, step)
        self._path = path
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        self._writer = _summary_writer(tensorboard, step, note) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """One line, on disk at once. Numbers in it (and in its nested groups) go to TensorBoard too."""
        try:
            self._file.write(json.dumps(_finite(line)) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}; make room, then run again") from None
        if self._writer:
            for name, value in line.items():
                group = value.items() if isinstance(value, dict) else [("", value)]
                for key, number in group:
                    if isinstance(number, (int, float)) and name not in ("step", "epoch"):
                        tag = f"{name}/{key}" if key else f"train/{name}"
                        self._writer.add_scalar(tag, float(number), line["step"])

    def close(self) -> None:
        """Closes both."""
        self._file.close()
        if self._writer:
            self._writer.close()


def _finite(value: Any) -> Any:
    """NaN and infinity have no JSON; they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(folder: Path, step: int, note: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note("TensorBoard is not installed; metrics.jsonl holds the same numbers")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
