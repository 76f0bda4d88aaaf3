"""Files that are whole or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gr.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path``, of this process alone: what was written there becomes ``path`` if the block ends well.

    Raises:
        OSError: ``path`` is as it was, and nothing is left beside it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls ``write(file)`` on a file aside, flushes it to disk and renames it to ``path``, whose folder is made.

    Raises:
        UserError: The disk is full, or anything else the system objects to; ``path`` is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} cannot be saved: {reason}; make room or choose another folder, then run again"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Holds a file's lock, in a folder that is made; the system lets go when this process dies.

    Raises:
        UserError: ``taken``: another process holds it; or the file cannot be written.
    """
    import fcntl  # which not every system has

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  held open as long as the lock
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}; choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut; some file systems have no such call and need none."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def summed(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file's content."""
    size = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return size, crc32


def first_damage(folder: Path, sums: Mapping[str, Sequence[int]], part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the first file of a folder that is not as it was written, in words; ``None``: all are.

    Args:
        folder: Where they are.
        sums: Name in the folder -> [bytes, crc32].
        part: Of the files, sorted by name, number ``part`` and every ``parts``-th from there are read.
        parts: Among how many the work is shared.
    """
    for name in sorted(sums)[part::parts]:
        try:
            size, crc32 = summed(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if size != sums[name][0]:
            return f"{name} has {size} bytes of {sums[name][0]}"
        if crc32 != sums[name][1]:
            return f"{name} has changed"
    return None
