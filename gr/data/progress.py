"""A progress bar in bytes, on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(name: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the bytes just done; it draws nothing where stderr is no terminal.

    Args:
        name: Shown before the bar.
        total: Bytes in all; ``None`` if unknown.
        done: Bytes done before.
    """
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda size: bar.advance(task, size)
