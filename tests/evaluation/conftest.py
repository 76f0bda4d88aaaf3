"""Small logs for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from gr.data.store import EventStore


@pytest.fixture
def make_store() -> Callable[..., EventStore]:
    """Builds a store in memory from lists of items, one list a user; times are 100 s apart."""

    def build(users: list[list[int]], num_items: int, times: bool = True, actions: bool = False) -> EventStore:
        lengths = np.array([len(user) for user in users], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        columns = {"item_id": np.array([item for user in users for item in user], dtype=np.int64)}
        if times:
            columns["timestamp"] = np.concatenate([np.arange(n, dtype=np.int64) * 100 + 1000 for n in lengths])
        if actions:
            columns["action"] = columns["item_id"] % 2
        titles = pa.table({"item_id": np.arange(num_items), "title": [f"item {i}" for i in range(num_items)]})
        manifest = {"content_hash": "0" * 12, "caveats": [], "repairs": {}, "source": "test"}
        return EventStore(
            offsets,
            columns,
            num_items,
            2 if actions else 0,
            manifest,
            pa.array(np.arange(len(users))),
            titles,
        )

    return build


@pytest.fixture
def random_users() -> Callable[..., list[list[int]]]:
    """Random histories with repeats, skewed towards low item numbers."""

    def draw(num_users: int, num_items: int, seed: int = 0, shortest: int = 3, longest: int = 9) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        weight = 1.0 / np.arange(1, num_items + 1)
        lengths = rng.integers(shortest, longest + 1, num_users)
        return [rng.choice(num_items, n, p=weight / weight.sum()).tolist() for n in lengths]

    return draw
