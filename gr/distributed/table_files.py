"""Tables that own their optimizer, on disk: one folder in the layout of torch.distributed.checkpoint.

Each rank writes the shards it holds; whoever reads takes what it needs, so the number of ranks and the division may be
others than those that wrote. A folder is written aside and renamed; the file that names it, with the size and checksum
of each of its files, is written last and makes it part of a checkpoint. Every rank must see the folder.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr.distributed.process import ProcessContext, all_gather_object, main_only_errors, raise_together
from gr.errors import UserError
from gr.files import summed

Files = dict[str, Sequence[int]]
SUFFIX = ".tables"


def save_tables(tables: Any, folder: Path, ctx: ProcessContext, sums: bool = True) -> Files:
    """Writes rows, and sums of squares if asked for; a collective.

    Returns:
        Name -> [bytes, crc32] of each file, for the file that makes the folder part of a checkpoint.

    Raises:
        UserError: On every rank, if any could not write.
    """
    import torch.distributed.checkpoint as dcp

    aside = folder.with_name(folder.name + ".tmp")
    with main_only_errors(ctx) as main:
        if main:
            with _told(folder, "cannot be saved", "make room or choose another run folder, then run again"):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
    error = None
    try:
        with _told(folder, "cannot be saved", "make room or choose another run folder, then run again"):
            writer = dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
            dcp.save(tables.saved(sums), storage_writer=writer, no_dist=ctx.world == 1)
    except UserError as found:
        error = found
    raise_together(error, ctx)
    mine = [path for path in sorted(aside.iterdir()) if _reader(path, ctx.world) == ctx.rank]
    parts = all_gather_object({path.name: summed(path) for path in mine}, ctx)
    with main_only_errors(ctx) as main:
        if main:
            with _told(folder, "cannot be saved", "choose another run folder, then run again"):
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
    return {name: seen for part in parts for name, seen in part.items()}


def load_tables(tables: Any, folder: Path, files: Files, ctx: ProcessContext, sums: bool = True) -> None:
    """Reads into tables divided as they are now; a collective.

    Raises:
        UserError: On every rank: a file is missing or not what was written, or the tables are of another model.
    """
    import torch.distributed.checkpoint as dcp

    error = None
    try:
        for name, seen in files.items():
            path = folder / name
            if _reader(path, ctx.world) != ctx.rank:
                continue
            if not path.exists():
                raise UserError(f"checkpoint {folder} is damaged ({name} is missing); delete it and what names it")
            if summed(path) != tuple(seen):
                raise UserError(f"checkpoint {folder} is damaged ({name} changed); delete it and what names it")
    except UserError as found:
        error = found
    raise_together(error, ctx)
    try:
        with _told(folder, "cannot be read", "use the config it was trained with"):
            state = tables.saved(sums)
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=ctx.world == 1)
            tables.restored(state)
    except UserError as found:
        error = found
    raise_together(error, ctx)


def _reader(path: Path, world: int) -> int:
    """The rank that sums a file up: by its number in ``__<rank>_<n>.distcp``, so that the work is shared."""
    number = path.name.strip("_").partition("_")[0]
    return int(number) % world if number.isdigit() else 0


@contextmanager
def _told(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Failures of the file system and of torch's checkpoints as one sentence."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # torch 2.13 warns that a process alone has no group, which is what no_dist says.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
            yield
    except (OSError, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        causes = list(getattr(error, "failures", {}).values())
        first = causes[0][0] if causes else error
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0][:120] if str(first) else repr(first)
        raise UserError(f"{folder} {what}: {reason}; {advice}") from None
