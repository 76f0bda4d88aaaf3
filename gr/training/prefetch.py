"""The next batch is made while this one is learned from; batches are pure, so results do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def prefetch(make: Callable[..., T], keys: Iterable[tuple]) -> Iterator[Iterator[T]]:
    """Yields an iterator over ``make(*key)`` that is always one ahead, in a thread of its own.

    An exception in ``make`` is raised by the ``next`` that would have returned its result.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        yield _ahead(pool, make, keys)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, make: Callable[..., T], keys: Iterable[tuple]) -> Iterator[T]:
    pending: Future[T] | None = None
    for key in keys:
        upcoming = pool.submit(make, *key)
        if pending is not None:
            yield pending.result()
        pending = upcoming
    if pending is not None:
        yield pending.result()
