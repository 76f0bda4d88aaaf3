"""Tables that own their optimizer, on disk: one folder in the layout of torch.distributed.checkpoint.

Each rank writes the shards it holds; whoever reads takes what it needs, so the number of ranks and the division may be
others than those that wrote. A file that names the folder, with the size and checksum of each of its files, is written
last and makes it part of a checkpoint. Every rank must see the folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr.distributed.process import ProcessContext, all_gather_object, is_lost, main_only_errors, raise_together
from gr.errors import UserError
from gr.files import summed, sync_folder

Files = dict[str, tuple[int, int]]
_ADVICE = "make room or choose another run folder, then run again"


def rows_alone(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What tables' ``saved()`` gives, without what only training needs."""
    return {name: value for name, value in saved.items() if name.endswith("/rows")}


def write_tables(saved: Mapping[str, Any], folder: Path, ctx: ProcessContext) -> Files:
    """Writes what tables' ``saved()`` gave into a folder that is made for it; a collective.

    Returns:
        On every rank: name -> (bytes, crc32) of each file, for the file that names the folder.

    Raises:
        UserError: On every rank, if any could not write.
    """
    import torch.distributed.checkpoint as dcp

    with main_only_errors(ctx) as main:
        if main:
            with _told(folder, "cannot be saved", _ADVICE):
                folder.mkdir(parents=True)
    error, mine = None, {}
    try:
        with _told(folder, "cannot be saved", _ADVICE):
            writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
            dcp.save(dict(saved), storage_writer=writer, no_dist=ctx.world == 1, process_group=ctx.group)
            mine = {path.name: summed(path) for path in folder.iterdir() if _writer(path) == ctx.rank}
            sync_folder(folder)
    except UserError as found:
        error = found
    raise_together(error, ctx)
    return {name: seen for part in all_gather_object(mine, ctx) for name, seen in part.items()}


def load_tables(tables: Any, folder: Path, ctx: ProcessContext, sums: bool = True) -> None:
    """Reads into tables divided as they are now; a collective. That the files are whole is known by now.

    Raises:
        UserError: On every rank: a file cannot be read, or the tables are of another model.
    """
    import torch.distributed.checkpoint as dcp

    error = None
    try:
        with _told(folder, "cannot be read", "use the config it was trained with"):
            state = tables.saved(sums)
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=ctx.world == 1)
            tables.restored(state)
    except UserError as found:
        error = found
    raise_together(error, ctx)


def _writer(path: Path) -> int:
    """The rank that wrote a file: its number in ``__<rank>_<n>.distcp``; the rest is rank 0's."""
    number = path.name.strip("_").partition("_")[0]
    return int(number) if number.isdigit() else 0


@contextmanager
def _told(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Failures of the file system and of torch's checkpoints as one sentence."""
    from torch.distributed.checkpoint.api import CheckpointException

    # torch 2.13 warns that a process alone has no group, which is what no_dist says. For good: ``catch_warnings`` in a
    # thread would undo what another thread does meanwhile.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        yield
    except (OSError, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        if is_lost(error):
            raise
        causes = list(getattr(error, "failures", {}).values())
        first = causes[0][0] if causes else error
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0][:120] if str(first) else repr(first)
        raise UserError(f"{folder} {what}: {reason}; {advice}") from None
