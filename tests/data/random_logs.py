"""Small random logs for property tests, as a hypothesis strategy."""

from __future__ import annotations

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from gr.data.layout import LayoutConfig
from gr.data.split import LeaveOneOutConfig, PaperConfig, Split, TemporalConfig, make_split
from gr.data.store import EventStore, memory_store
from gr.errors import UserError

SPLIT_CONFIGS = [
    LeaveOneOutConfig(),
    LeaveOneOutConfig(min_train_events=3),
    PaperConfig(),
    TemporalConfig(),
    TemporalConfig(valid_fraction=0.0, test_fraction=0.3),
    TemporalConfig(valid_time=30, test_time=60),
]


@st.composite
def logs(draw: st.DrawFn) -> EventStore:
    """A log of 1 to 12 users with 1 to 9 events; items repeat, times tie."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return memory_store(
        [rng.integers(0, 15, n) for n in lengths],
        [np.sort(rng.integers(0, 100, n)) for n in lengths],
        [rng.integers(0, 3, n) for n in lengths],
        num_items=15,
    )


@st.composite
def split_logs(draw: st.DrawFn) -> tuple[EventStore, Split]:
    """A log with a split that fits it."""
    store, config = draw(logs()), draw(st.sampled_from(SPLIT_CONFIGS))
    try:
        return store, make_split(config, store)
    except UserError:
        assume(False)
        raise


@st.composite
def raw_rows(draw: st.DrawFn) -> list[tuple[object, str, int, int, str]]:
    """2 to 60 rows (user, item, time, position, action) with repeats and ties; user 0 has two events at least.

    Users are integers; items are text, in half of the logs all of them numbers.
    """
    row = st.tuples(
        st.integers(0, 6),
        st.sampled_from(["0", "3", "20", "100"] if draw(st.booleans()) else ["0", "20", "020", "7a", "B"]),
        st.integers(-2, 4),
        st.integers(0, 1),
        st.sampled_from(["1", "10", "2.5"]),
    )
    some = draw(st.lists(row, min_size=2, max_size=60))
    return [(0, "0", 0, 0, "1"), *some, (0, "0", 1, 0, "1")]


layouts = st.builds(
    LayoutConfig, kind=st.sampled_from(["items", "interleaved", "added"]), max_events=st.integers(1, 12)
)
