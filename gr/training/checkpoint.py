"""Checkpoints that are whole or absent: a folder each, written aside, flushed to disk and renamed.

::

    checkpoints/step-00000040/state.pt      weights, optimizer, where training stands
                              tables/       tables that own their optimizer (gr.distributed.table_files)
                              files.json    bytes and crc32 of each of these files
                step-00000040.tmp/          being written, or cut off: never read, removed by the next save
                step-00000040.old/          there only if a process died while it put another in this one's place
                step-00000040.damaged/      set aside by a run that went on from the one before
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gr.distributed.process import ProcessContext, broadcast_object, raise_together
from gr.errors import UserError
from gr.files import first_damage, sync_folder, write_atomic, write_json

STATE = "state.pt"
TABLES = "tables"
SUMS = "files.json"
_NAME = re.compile(r"step-(\d+)(\.old)?")


@dataclass(frozen=True)
class Found:
    """What ``find_checkpoint`` saw.

    Attributes:
        path: The newest whole checkpoint's folder; ``None``: there is none at all.
        damaged: Newer ones, and what is wrong with them.
    """

    path: Path | None = None
    damaged: Mapping[Path, str] = field(default_factory=dict)


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


def save_torch(path: Path, payload: Any) -> tuple[int, int]:
    """``torch.save``, atomic, with the system's own reason when it fails.

    Returns:
        (bytes, crc32) of the file.
    """
    seen = (0, 0)

    def write(file: BinaryIO) -> None:
        nonlocal seen
        stream = _Stream(file)
        torch.save(payload, stream)
        if stream.error is not None:
            raise stream.error
        seen = (stream.size, stream.crc32)

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
        raise UserError(f"checkpoint {path} is damaged ({reason}); delete it and run gr-train again") from None


def aside_of(folder: Path, step: int) -> Path:
    """Where the files of a checkpoint are written, until ``commit``."""
    return folder / f"step-{step:08d}.tmp"


def begin(aside: Path) -> None:
    """Makes the folder ``aside_of`` names, empty; what was cut off before is removed.

    Raises:
        UserError: The system objects.
    """
    try:
        for cut_off in aside.parent.glob("step-*.tmp"):
            shutil.rmtree(cut_off)
        aside.mkdir(parents=True)
    except OSError as error:
        raise _unsaved(aside, error) from None


def commit(aside: Path, sums: Mapping[str, Sequence[int]], keep_last: int) -> Path:
    """Makes what ``begin`` made a checkpoint; removes all but the ``keep_last`` newest.

    Args:
        aside: The folder, all files in it flushed to disk.
        sums: Each file's name in it -> (bytes, crc32).
        keep_last: At least 1.

    Raises:
        UserError: The system objects; the checkpoints are as they were.
    """
    path = aside.with_suffix("")
    old = path.with_suffix(".old")
    write_json(aside / SUMS, {"files": sums})
    try:
        if path.exists():  # a step is saved again when a stop came between it and its evaluation
            _remove(old)
            path.rename(old)
        aside.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise _unsaved(path, error) from None
    _remove(old)
    for spare in _checkpoints(path.parent)[keep_last:]:
        _remove(spare)
    return path


def discard(aside: Path) -> None:
    """Gives up what ``begin`` made: a full disk gets its room back."""
    shutil.rmtree(aside, ignore_errors=True)


def find_checkpoint(folder: Path, ctx: ProcessContext | None = None) -> Found:
    """The newest checkpoint that is whole, every byte of it read by one rank; a collective, changes nothing.

    Raises:
        UserError: On every rank: there are checkpoints, and none is whole.
    """
    ctx = ctx or ProcessContext()
    damaged: dict[Path, str] = {}
    for path in broadcast_object(_checkpoints(folder), ctx):
        wrong = _damage(path, ctx)
        try:
            raise_together(None if wrong is None else UserError(wrong), ctx)
        except UserError as error:
            damaged[path] = str(error)
        else:
            return Found(path, damaged)
    if damaged:
        words = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged.items())
        raise UserError(f"no checkpoint in {folder} is whole ({words}); move that folder away to start again")
    if any(folder.glob("step-*.pt")):
        raise UserError(
            f"{folder} holds checkpoints of an earlier version (step-*.pt), which this one does not read; "
            "choose another run folder"
        )
    return Found()


def set_aside(damaged: Path) -> Path:
    """Renames a damaged checkpoint, so that it neither counts nor is in the way, and can still be looked at.

    Raises:
        UserError: The system objects.
    """
    number, kept = 1, damaged.with_suffix(".damaged")
    while kept.exists():
        number += 1
        kept = damaged.with_suffix(f".damaged{number}")
    try:
        damaged.rename(kept)
    except OSError as error:
        raise UserError(f"damaged checkpoint {damaged} cannot be renamed: {error.strerror or error}") from None
    return kept


def _damage(path: Path, ctx: ProcessContext) -> str | None:
    """What this rank finds wrong with its share of a checkpoint's files."""
    try:
        sums = {name: (int(size), int(crc32)) for name, (size, crc32) in _read_sums(path).items()}
        if STATE not in sums:
            return f"{SUMS} does not name {STATE}"
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SUMS} is unreadable"
    return first_damage(path, sums, ctx.rank, ctx.world)


def _remove(path: Path) -> None:
    """Renames first: what is half removed is no checkpoint, and goes with the next save."""
    gone = path.with_name(path.name + ".tmp")
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone)


def _read_sums(path: Path) -> dict[str, Any]:
    return json.loads((path / SUMS).read_text(encoding="utf-8"))["files"]


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    named = [(int(match[1]), match[2] is None, path) for match, path in found if match]
    return [path for *_, path in sorted(named, reverse=True)]


def _unsaved(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{path} cannot be saved: {reason}; make room or choose another run folder, then run again")
