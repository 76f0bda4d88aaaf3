"""Files inside a publisher's zip or inside the folder it was extracted to, read as streams."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from gr.errors import UserError

_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_BROKEN = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


def check_exists(path: Path, what: str) -> None:
    """Raises UserError unless there is something at ``path``; ``what`` says what is right."""
    if not path.exists():
        raise UserError(f"{path} does not exist; data.path names {what}")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty; data.path names {what}")


def members(path: Path) -> list[str]:
    """Names of the files in a zip, or in a folder and its subfolders, with ``/``; sorted.

    Raises:
        UserError: Neither a folder nor a whole zip.
    """
    if path.is_dir():
        found = [*path.glob("*"), *path.glob("*/*")]
        return sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            started = file.read(4) == _ZIP
        if started:
            raise UserError(f"{path} is a zip that was cut short or damaged ({error}); get it again") from None
        raise UserError(f"{path} is not a zip (and no folder)") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def find(path: Path, names: list[str], wanted: str, folder: str) -> str | None:
    """The member called ``wanted``, in ``folder`` or in another one if no other member is called so."""
    same = [name for name in names if PurePosixPath(name).name == wanted and not name.startswith("__MACOSX/")]
    inside = [name for name in same if PurePosixPath(name).parent.name == folder]
    if len(same) > 1 and len(inside) != 1:
        raise UserError(f"{path} has {len(same)} files {wanted} ({', '.join(same[:4])}); one is right")
    return (inside or same or [None])[0]


@contextlib.contextmanager
def open_member(path: Path, name: str) -> Iterator[BinaryIO]:
    """A member as a stream of bytes; nothing is extracted.

    Raises:
        UserError: The member is damaged; also while the caller reads.
    """
    with named_damage(f"{name} in {path}"):
        if path.is_dir():
            with (path / name).open("rb") as file:
                yield file
        else:
            with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
                yield stream  # type: ignore[misc]


@contextlib.contextmanager
def open_maybe_gzip(path: Path) -> Iterator[BinaryIO]:
    """A file as a stream of bytes, unpacked where it begins as gzip does, whatever its name.

    Raises:
        UserError: It is damaged; also while the caller reads.
    """
    with named_damage(str(path)), path.open("rb") as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        if packed:
            with gzip.open(file) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield file


@contextlib.contextmanager
def named_damage(what: str) -> Iterator[None]:
    """Turns what the unpackers raise on damaged bytes into one sentence."""
    try:
        yield
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} was cut short or damaged ({reason}); get it again") from None
    except (OSError, RuntimeError) as error:  # the latter: a password, a compression that zipfile does not know
        raise UserError(f"{what} cannot be read: {error}") from None


def sha256(paths: list[Path]) -> str:
    """One sha256 over the contents of files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
