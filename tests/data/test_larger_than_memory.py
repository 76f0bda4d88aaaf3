"""A log may be larger than memory: what is done with it takes memory that goes with users, items and blocks."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data import negatives
from gr.data import split as splits
from gr.data import store as stores
from gr.data.batch import JaggedBatch
from gr.data.layout import LayoutConfig
from gr.data.loader import BatchingConfig, TrainLoader
from gr.data.negatives import NegativesConfig, make_sampler
from gr.data.split import LeaveOneOutConfig, PaperConfig, TemporalConfig, make_split, ordered, training_counts
from gr.data.store import Chunk, EventStore, read_store, write_store
from gr.evaluation import audit
from gr.evaluation.baselines import TrainingStatistics

USERS, EVENTS, ITEMS = 300, 600_000, 40
BLOCK = 5_000


def write(folder: Path, users: int, events: int, items: int) -> Path:
    """A log of users with like numbers of events."""
    rng = np.random.default_rng(0)
    offsets = np.arange(users + 1) * (events // users)
    times = np.sort(rng.integers(0, 10**8, (users, events // users)), axis=1).ravel()
    columns = {"item_id": rng.integers(0, items, events), "timestamp": times}
    table = pa.table({"item_id": np.arange(items), "title": [str(item) for item in range(items)]})
    return write_store(folder, [Chunk(pa.array(np.arange(users)), offsets, columns)], table, {"source": "large"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("large") / "log", USERS, EVENTS, ITEMS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_READ_BYTES", BLOCK)
    monkeypatch.setattr(negatives, "_LARGEST_TABLE", 0)  # else as much as the log, up to 128 MiB
    monkeypatch.setattr(splits, "BINS", 256)  # else 2 MiB whatever the log
    for module in (splits, audit):
        monkeypatch.setattr(module, "BLOCK_EVENTS", BLOCK)


def some_batches(store: EventStore, kind: str) -> list[Any]:
    split = make_split(LeaveOneOutConfig(), store)
    sampler = make_sampler(NegativesConfig(kind, 4), store, split)
    loader = TrainLoader(store, split, LayoutConfig("items", 20), BatchingConfig(16), sampler, 0, rank=1, world=2)
    return [loader.batch(epoch, 1) for epoch in range(2)]


def statistics(store: EventStore) -> list[Any]:
    found = TrainingStatistics(store, make_split(PaperConfig(), store))
    return [found.counts, found.pairs(1).toarray(), found.pairs(3).toarray()]


WORK: dict[str, Callable[[EventStore], Any]] = {
    "read": lambda store: store,
    "leave_one_out": lambda store: make_split(LeaveOneOutConfig(), store),
    "temporal": lambda store: make_split(TemporalConfig(), store),
    "training_counts": lambda store: training_counts(store, make_split(PaperConfig(), store)),
    "popularity": lambda store: some_batches(store, "popularity"),
    "in_batch": lambda store: some_batches(store, "in_batch"),
    "statistics": statistics,
    "repeats": lambda store: audit.repeats(store, make_split(PaperConfig(), store).test),
}


@pytest.mark.parametrize("work", WORK)
def test_nothing_holds_a_column_of_the_log(folder: Path, small_blocks: None, work: str) -> None:
    WORK[work](read_store(folder))  # what is imported or compiled once is not of the log
    tracemalloc.start()
    try:
        WORK[work](read_store(folder))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < EVENTS, f"{peak / EVENTS:.1f} bytes an event; a column has 8"


@pytest.mark.parametrize("work", [name for name in WORK if name not in ("read", "leave_one_out")])
def test_blocks_do_not_change_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    store = read_store(write(tmp_path / "log", 37, 37 * 60, ITEMS))
    whole = arrays(WORK[work](store))
    assert len(whole) and sum(array.size for array in whole) > 30
    for size in (1, 100, 500):
        for module in (splits, audit):
            monkeypatch.setattr(module, "BLOCK_EVENTS", size)
        for one, other in zip(arrays(WORK[work](store)), whole, strict=True):
            np.testing.assert_array_equal(one, other)


def arrays(found: Any) -> list[np.ndarray]:
    """Every array within."""
    if dataclasses.is_dataclass(found):
        return arrays([getattr(found, field.name) for field in dataclasses.fields(found)])
    if isinstance(found, Mapping):
        return arrays(list(found.values()))
    if isinstance(found, list):
        return [array for each in found for array in arrays(each)]
    return [np.asarray(found)] if isinstance(found, np.ndarray | torch.Tensor) else []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**61), 2**61) | st.integers(0, 9), min_size=1, max_size=50), st.data())
def test_an_ordered_value_is_that_of_sorting(values: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "BLOCK_EVENTS", 7)
        patch.setattr(splits, "BINS", 4)
        assert ordered(np.array(values), place) == sorted(values)[place]


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("tokens", [0, 300])
def test_a_mapped_log_gives_the_same_global_batches_to_1_2_and_3_ranks_from_any_place(
    folder: Path, kind: str, tokens: int
) -> None:
    """Against a log in memory, whose batches the loader's own tests look at."""
    mapped = read_store(folder)
    inside = dataclasses.replace(mapped, columns={name: np.array(values) for name, values in mapped.columns.items()})
    batching = BatchingConfig(0 if tokens else 48, tokens)

    def loader(store: EventStore, rank: int = 0, world: int = 1) -> TrainLoader:
        split = make_split(LeaveOneOutConfig(), store)
        sampler = make_sampler(NegativesConfig(kind, 4), store, split)
        return TrainLoader(store, split, LayoutConfig("items", 20), batching, sampler, 5, rank, world)

    whole = loader(inside)
    places = [(epoch, index) for epoch in range(2) for index in range(whole.num_batches(epoch))][::5]
    for ranks in (1, 2, 3):
        for epoch, index in reversed(places):  # a new loader, as a resumed run makes it
            parts = [loader(mapped, rank, ranks).batch(epoch, index) for rank in range(ranks)]
            rows = {user: row for part in parts for user, row in by_user(part).items()}
            assert rows == by_user(whole.batch(epoch, index))
            assert sum(part.num_sequences for part in parts) == len(rows)


def by_user(batch: JaggedBatch) -> dict[int, list[Any]]:
    """Every number of each user's row: a row's labels stand one at each of its tokens."""
    drawn = batch.negatives
    rows = {}
    for place, user in enumerate(batch.rows["sample_key"].tolist()):
        row = slice(int(batch.offsets[place]), int(batch.offsets[place + 1]))
        columns = [*batch.tokens.values(), *batch.index.values(), batch.labels.item_id]
        if drawn.positive_log_q is not None:
            columns.append(drawn.positive_log_q)
        rows[user] = [column[row].tolist() for column in columns]
        rows[user].append((drawn.ids[row] if drawn.ids.dim() == 2 else drawn.ids).tolist())
    return rows
