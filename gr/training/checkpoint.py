"""Checkpoints that are whole or absent: written aside, flushed to disk, renamed, and only then pointed at."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gr.errors import UserError
from gr.files import summed, write_atomic, write_json

POINTER = "last.json"


class _Stream:
    """A file for ``torch.save`` that remembers the first OSError, sums up what passed, and never raises.

    An exception inside torch's C++ writer ends up as a RuntimeError without the reason (disk full, file too
    large), or as a warning from its destructor; kept here, it can be told.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self.size += size
        self.crc32 = zlib.crc32(data, self.crc32)
        return size

    def flush(self) -> None:
        """Part of the file protocol; flushing happens once, at the end."""


def save_torch(path: Path, payload: Any) -> dict[str, int]:
    """``torch.save``, atomic, with the system's own reason when it fails.

    Returns:
        {"bytes", "crc32"} of the file.
    """
    seen: dict[str, int] = {}

    def write(file: BinaryIO) -> None:
        stream = _Stream(file)
        torch.save(payload, stream)
        if stream.error is not None:
            raise stream.error
        seen.update(bytes=stream.size, crc32=stream.crc32)

    write_atomic(path, write)
    return seen


def load_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """``torch.load`` of tensors and plain data only.

    Raises:
        UserError: Missing or damaged.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # damage shows as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"checkpoint {path} is damaged ({reason}); {_advice(path)}") from None


def save_checkpoint(folder: Path, step: int, payload: dict[str, Any], keep_last: int) -> Path:
    """Writes ``step-XXXXXXXX.pt``, points ``last.json`` at it, removes all but the ``keep_last`` newest.

    The folders ``step-XXXXXXXX.tables`` of those removed go with them.
    """
    path = folder / f"step-{step:08d}.pt"
    seen = save_torch(path, payload)
    write_json(folder / POINTER, {"step": step, "file": path.name, **seen})
    for old in _all_checkpoints(folder)[:-keep_last]:
        if old != path:
            old.unlink(missing_ok=True)
    named = {p.stem for p in _all_checkpoints(folder)}
    for tables in folder.glob("step-*.tables*"):
        if tables.name.partition(".")[0] not in named:
            shutil.rmtree(tables, ignore_errors=True)
    return path


def remove_folders(parent: Path, pattern: str, keep: str) -> None:
    """Removes the folders of a pattern but one."""
    for path in parent.glob(pattern):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from: what ``last.json`` names, or the newest one if that was removed by hand.

    Raises:
        UserError: ``last.json`` is unreadable, or names a file whose size or content is not what was written.
    """
    pointer = folder / POINTER
    checkpoints = _all_checkpoints(folder)
    newest = checkpoints[-1] if checkpoints else None
    if not pointer.exists():
        return newest
    try:
        last = json.loads(pointer.read_text(encoding="utf-8"))
        path = folder / last["file"]
        expected = (last["bytes"], last["crc32"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{pointer} is damaged; delete it to resume from the newest checkpoint beside it") from None
    if not path.exists():
        return newest
    if (found := summed(path)) != expected:
        reason = f"{found[0]} bytes of {expected[0]}" if found[0] != expected[0] else "its content changed"
        raise UserError(f"checkpoint {path} is damaged ({reason}); {_advice(path)}")
    return path


def _advice(path: Path) -> str:
    others = [p.name for p in _all_checkpoints(path.parent) if p != path]
    return f"delete it to resume from {others[-1]}" if others else "delete it to start again"


def _all_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
