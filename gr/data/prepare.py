"""Prepares a log once: the prepared folder is named by a key of its config and its input, and found again by
it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gr import config as configs
from gr.data.sources import SOURCES
from gr.data.store import FORMAT, EventStore, read_store
from gr.errors import UserError


def prepare(source: Any, cache_dir: str | Path) -> EventStore:
    """The store of a source's config, prepared now or read from the cache.

    Args:
        source: A config of SOURCES.
        cache_dir: Prepared data go to ``<cache_dir>/<kind>-<key>``, downloads to ``<cache_dir>/downloads``.

    Raises:
        UserError: Bad input (see the source), or a damaged or unwritable cache.
    """
    return read_store(ensure_prepared(source, cache_dir)[0])


def ensure_prepared(source: Any, cache_dir: str | Path) -> tuple[Path, bool]:
    """(the store's folder, whether it was prepared now); no more of the store is read than was written.

    Several processes may call this at once: each prepares under a name of its own, the first to finish
    renames its folder, the others read that one.

    Raises:
        UserError: As ``prepare``, but for a damaged store, which only a reader notices.
    """
    builder = configs.build(SOURCES, source)
    cache = Path(cache_dir).expanduser()
    if hasattr(builder, "locate"):
        builder.locate(cache / "downloads")
    final = cache / f"{_safe(source.kind)}-{content_key(source, builder)}"
    if final.exists():
        return final, False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".preparing-", dir=cache))
    except OSError as error:
        raise UserError(f"cache folder {cache} cannot be written: {error}") from None
    try:
        builder.prepare(staging / "store")
        os.rename(staging / "store", final)
    except OSError as error:
        if not final.exists():  # else another process was first, with the same content
            raise UserError(f"prepared data {final} could not be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final, True


def content_key(source: Any, builder: Any) -> str:
    """12 hex digits from the source's config, its input's fingerprint and the store's format."""
    fingerprint = builder.fingerprint() if hasattr(builder, "fingerprint") else ""
    text = json.dumps([FORMAT, configs.to_dict(source), fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _safe(kind: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in kind)
