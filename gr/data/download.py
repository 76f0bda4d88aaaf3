"""Downloads with resume into ``<cache>/downloads``, each file pinned by a hash.

A download grows as ``NAME.part``, with what identifies the server's version of the file (ETag, Last-Modified) beside
it, and is renamed when it is whole. ``manifest.json`` keeps the sha256 with which each file was first seen: a checksum
stands in our code only where the publisher prints one, and everywhere else a file that changes is an error.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from gr import __version__
from gr.data.progress import progress
from gr.errors import UserError
from gr.files import replacing

try:
    import fcntl
except ImportError:  # no such locks on this system: every process then downloads for itself
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 4
TIMEOUT = 60.0
_BLOCK = 1 << 20
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Remote:
    """A file of a publisher.

    Attributes:
        url: http or https.
        terms: One line on what the publisher allows; printed when bytes are requested.
        md5: The publisher's own checksum; ``None`` where none is printed.
    """

    url: str
    terms: str
    md5: str | None = None

    @property
    def name(self) -> str:
        """File name in the downloads folder."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or not self.name.strip("."):
            raise UserError(f"{self.url!r} is not an address of a file; one such as https://host/folder/file.zip is")


class _Again(Exception):
    """An attempt failed in a way that another one may mend."""


def first_seen(folder: Path, name: str) -> str | None:
    """sha256 of a download, from the manifest alone; the file itself need not be there any more."""
    entry = _manifest(folder).get(name)
    return None if entry is None else entry["sha256"]


def pinned_sha256(remote: Remote, folder: Path) -> str:
    """sha256 first seen of a download; it is downloaded now if there is none.

    Raises:
        UserError: As ``fetch``.
    """
    _same_address(remote, folder)
    if first_seen(folder, remote.name) is None:
        fetch(remote, folder)
    return _manifest(folder)[remote.name]["sha256"]


def fetch(
    remote: Remote, folder: Path, *, attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """The file, downloaded unless it is there. Several processes may call this at once: one downloads.

    Args:
        remote: What to download.
        folder: Downloads folder; made if missing.
        attempts: Requests before giving up; between them the wait doubles, from 1 s.
        sleep: Called with these waits.

    Raises:
        UserError: No network, no such file, cut short after all attempts (what came is kept, and the same call
            resumes), not the publisher's checksum, not the content first seen, or no space.
    """
    final = folder / remote.name
    _same_address(remote, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{remote.name}.lock") as locked:
            if final.exists():
                _check(final, final, remote, folder)
                return final
            # Without locks two processes must not write one file, so nothing can be resumed either.
            part = folder / (f"{remote.name}.part" if locked else f"{remote.name}.{os.getpid()}.part")
            _download(remote, part, attempts, sleep)
            _check(part, final, remote, folder)
            os.replace(part, final)
            _state_file(part).unlink(missing_ok=True)
            return final
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk of {folder} is full; free some space, and the same command resumes {remote.name}"
            ) from None
        raise UserError(f"downloads folder {folder} cannot be used: {error}") from None


def _same_address(remote: Remote, folder: Path) -> None:
    """Files are known by their names: one of the same name from elsewhere is another file until a checksum says
    otherwise."""
    entry = _manifest(folder).get(remote.name)
    if entry is not None and entry["url"] != remote.url and remote.md5 is None:
        raise UserError(
            f"{folder / remote.name} came from {entry['url']}, and {remote.url} has a file of the same name; set "
            f"`cache` to another folder, or take {remote.name!r} out of {folder / 'manifest.json'} and delete it"
        )


def _download(remote: Remote, part: Path, attempts: int, sleep: Callable[[float], None]) -> None:
    print(f"downloading {remote.url}\n  {remote.terms}", file=sys.stderr, flush=True)
    reason = ""
    for attempt in range(attempts):
        if attempt:
            sleep(2.0 ** (attempt - 1))
        try:
            _attempt(remote, part)
            return
        except _Again as error:
            reason = str(error)
    kept = part.stat().st_size if part.exists() else 0
    resume = f"{kept} bytes are kept, and the same command resumes" if kept else "the same command tries again"
    raise UserError(f"{remote.url} could not be downloaded ({reason}); {resume}, {_way_out()}") from None


def _attempt(remote: Remote, part: Path) -> None:
    """One request, for what is missing; returns when ``part`` is whole."""
    state = _read_state(part)
    have = part.stat().st_size if part.exists() else 0
    validator = state.get("validator")
    if not validator or state.get("url") != remote.url:
        have = 0  # nothing says that the rest would be of the same file
    if have and have == state.get("total"):
        return
    headers = {"User-Agent": f"hstu-gr/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            have, total = _start(response, have)
            if not have:  # before the state names another version, nothing of the old one may be left
                part.unlink(missing_ok=True)
            _write_state(part, {"url": remote.url, "validator": _validator(response), "total": total})
            _need_space(part.parent, None if total is None else total - have, remote.name)
            with part.open("r+b" if have else "wb") as file:
                file.seek(have)
                file.truncate()
                got = _copy(response, file, have, total, remote.name)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # our part does not fit this file: start again
            part.unlink(missing_ok=True)
            raise _Again("the server has another file now") from None
        if error.code in _RETRIED:
            raise _Again(f"HTTP status {error.code}") from None
        moved = _way_out("the file may have moved")
        raise UserError(f"{remote.url} answers with HTTP status {error.code} ({error.reason}); {moved}") from None
    except urllib.error.URLError as error:
        raise _Again(str(error.reason)) from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Again(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
    if total is not None and got != total:
        raise _Again(f"the connection ended after {got} of {total} bytes")


def _start(response: Any, have: int) -> tuple[int, int | None]:
    """(bytes of ours that stand, size of the whole file or None) by the answer's headers."""
    if response.status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(have):
            raise _Again(f"the server sent bytes {span} where {have}- were asked for")
        return have, int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None  # the whole file: no Range here, or the file has changed


def _copy(response: Any, file: BinaryIO, have: int, total: int | None, name: str) -> int:
    with progress(name, total, have) as advance:
        while block := response.read(_BLOCK):
            file.write(block)
            have += len(block)
            advance(len(block))
    file.flush()
    os.fsync(file.fileno())
    return have


def _validator(response: Any) -> str | None:
    """What If-Range compares; a weak ETag (``W/``) does not promise equal bytes."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _need_space(folder: Path, missing: int | None, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if missing is not None and missing > free:
        raise UserError(
            f"{name} needs {missing} more bytes and the disk of {folder} has {free} free; "
            "free some, or set `cache` to a folder on another disk"
        )


def _check(path: Path, final: Path, remote: Remote, folder: Path) -> None:
    """Compares a whole file with the publisher's checksum and with the one first seen, and keeps the latter."""
    sha256, md5 = hashes(path)
    known = first_seen(folder, remote.name)
    again = f"delete {final} and the same command downloads it again" if path == final else "it was deleted"
    if remote.md5 not in (None, md5):
        if path != final:
            _drop(path)
        raise UserError(
            f"{path} from {remote.url} has md5 {md5}, and its publisher prints {remote.md5}; {again}, {_way_out()}"
        )
    if known not in (None, sha256):
        if path != final:
            _drop(path)
        raise UserError(
            f"{path} from {remote.url} has sha256 {sha256}, and {known} when first seen; {again}; if the publisher has "
            f"changed it and you want the new one, take {remote.name!r} out of {folder / 'manifest.json'} first"
        )
    if known is None:
        with _lock(folder / ".manifest.lock"):
            entry = {"url": remote.url, "bytes": path.stat().st_size, "sha256": sha256}
            entry["first_seen"] = datetime.datetime.now(datetime.UTC).date().isoformat()
            _write_json(folder / "manifest.json", _manifest(folder) | {remote.name: entry})


def hashes(path: Path) -> tuple[str, str]:
    """(sha256, md5) of a file, in hex."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def _way_out(why: str = "") -> str:
    return f"{why + ', so ' if why else 'or '}get it by hand and name it with --data.path FILE"


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_file(part).unlink(missing_ok=True)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and files are pinned anew") from None


def _state_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_state(part: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_file(part).read_text(encoding="utf-8"))
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}  # then the download starts anew


def _write_state(part: Path, state: dict[str, Any]) -> None:
    _write_json(_state_file(part), state)


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds a file's lock, waiting for other processes; ``False`` where the file system has none."""
    with path.open("w") as file:
        try:
            if fcntl is None:
                raise OSError
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
