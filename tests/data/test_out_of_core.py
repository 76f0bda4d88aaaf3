"""A log cut into buckets of any size makes the same store, and that store is what a few lines of Python make."""

from __future__ import annotations

import json
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data.buckets import repeated
from gr.data.out_of_core import prepare_log
from gr.data.raw import RawLog, Rules
from gr.data.store import EventStore, read_store
from gr.errors import UserError
from random_logs import raw_rows

NAMES = ("user_id", "item_id", "timestamp", "position", "action")
RULES = st.builds(
    Rules,
    duplicates=st.sampled_from(["drop", "keep"]),
    core=st.sampled_from(["once", "iterated"]),
    min_user_events=st.integers(1, 5),
    min_item_events=st.integers(1, 5),
)


def raw_log(rows: list[tuple], batch: int) -> RawLog:
    """Rows as a source would hand them over, ``batch`` of them at a time."""

    def batches() -> Iterator[pa.Table]:
        for lo in range(0, len(rows), batch):
            columns = zip(*rows[lo : lo + batch], strict=True)
            yield pa.table({name: pa.array(values) for name, values in zip(NAMES, columns, strict=True)})

    return RawLog("folder/log.x", {name: name for name in NAMES}, batches())


def prepared(rows: list[tuple], rules: Rules, batch: int, bucket_rows: int) -> EventStore:
    """The store; nothing else is left in its folder."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            prepare_log(raw_log(rows, batch), rules, Path(folder, "store"), bucket_rows=bucket_rows)
        finally:
            left = [p.name for p in Path(folder).iterdir()]
        assert left == ["store"]
        return read_store(Path(folder, "store"))


def events(store: EventStore) -> dict[Any, list[tuple]]:
    """User -> rows (item, time, action) as stored."""
    items = store.items["item_id"].to_pylist()
    found: dict[Any, list[tuple]] = {}
    for place, user in enumerate(store.user_ids.to_pylist()):
        span = slice(store.offsets[place], store.offsets[place + 1])
        item, time, action = (store.columns[name][span].tolist() for name in ("item_id", "timestamp", "action"))
        found[user] = [(items[i], t, store.manifest["actions"][a]) for i, t, a in zip(item, time, action, strict=True)]
    return found


def oracle(rows: list[tuple], rules: Rules) -> dict[Any, list[tuple]]:
    """The same in plain Python."""
    number = all(str(int(row[1])) == row[1] for row in rows if row[1].isdigit()) and all(r[1].isdigit() for r in rows)
    rows = [(u, int(i) if number else i, t, p, float(a)) for u, i, t, p, a in rows]
    if rules.duplicates == "drop":
        rows = list(dict.fromkeys(rows))
    for again in (False, True) if rules.core == "once" else (False,) * len(rows):
        users, items = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
        least = 1 if again else rules.min_item_events
        rows = [r for r in rows if users[r[0]] >= rules.min_user_events and items[r[1]] >= least]
    found: dict[Any, list[tuple]] = {}
    for user, item, time, _, action in sorted(rows, key=lambda r: (r[0], r[2], r[3])):
        found.setdefault(user, []).append((item, time, action))
    return found


@settings(max_examples=150, deadline=None)
@given(rows=raw_rows(), rules=RULES, batch=st.integers(1, 40), bucket_rows=st.integers(1, 30))
def test_buckets_of_any_size_make_what_plain_python_makes(
    rows: list[tuple], rules: Rules, batch: int, bucket_rows: int
) -> None:
    right = oracle(rows, rules)
    if not any(len(events) >= 2 for events in right.values()):
        with pytest.raises(UserError, match="lower them|no user has 2 events"):
            prepared(rows, rules, len(rows), len(rows))
        return
    one = prepared(rows, rules, len(rows), len(rows))
    cut = prepared(rows, rules, batch, bucket_rows)
    assert events(one) == right
    assert list(events(one)) == sorted(right)
    assert one.items["item_id"].to_pylist() == sorted({event[0] for row in right.values() for event in row})
    assert cut.manifest == one.manifest
    for name in one.columns:
        np.testing.assert_array_equal(cut.columns[name], one.columns[name])
    assert cut.user_ids.equals(one.user_ids) and cut.items.equals(one.items)


def test_one_text_at_the_very_end_makes_every_id_text() -> None:
    rows = [(n % 3, str(n % 11), n, 0, "1") for n in range(200)] + [(0, "7a", 200, 0, "1")]
    store = prepared(rows, Rules(), batch=7, bucket_rows=50)
    assert store.items["item_id"].type == pa.string()
    assert store.items["item_id"].to_pylist() == sorted([*map(str, range(11)), "7a"])
    assert [event[0] for event in events(store)[1]] == [str(n % 11) for n in range(1, 200, 3)]


def test_an_iterated_core_ends_where_every_count_suffices() -> None:
    # A chain: dropping item 9 makes user 4 rare, which makes item 8 rare, and so on; counting once stops early.
    chain = [(user, str(item), 0, 0, "1") for user in range(5) for item in (5 + user, 6 + user)]
    core = [(user, item, 0, 0, "1") for user in (10, 11) for item in ("1", "2")]
    rules = {"min_user_events": 2, "min_item_events": 2}
    assert set(events(prepared(chain + core, Rules(core="iterated", **rules), 3, 4))) == {10, 11}
    assert len(events(prepared(chain + core, Rules(core="once", **rules), 3, 4))) > 2


def test_rows_are_equal_only_if_every_column_is() -> None:
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 12, 5000), rng.integers(-3, 3, 5000), rng.integers(0, 9, 5000)]
    seen: set[tuple] = set()
    right = [row in seen or seen.add(row) is not None for row in zip(*(c.tolist() for c in columns), strict=True)]
    assert repeated(columns).tolist() == right


def test_repairs_are_counted_over_all_buckets() -> None:
    rows = [(u, str(i % 7), 100 - i if u == 3 else i, 0, "1") for i in range(20) for u in range(6)]
    rows += rows[:10] + [(9, "1", 1, 0, "1"), (None, "1", 1, 0, "1"), (1, None, 1, 0, "1")]
    store = prepared(rows, Rules(), batch=5, bucket_rows=8)
    assert store.manifest["repairs"] == {
        "null_rows_dropped": 2,
        "duplicate_rows_dropped": 10,
        "out_of_order_rows_sorted": 19,
        "one_event_users_not_evaluated": 1,
    }
    assert store.manifest["counts"] == {"rows_read": 133, "users": 7, "items": 7, "events": 121}


def test_a_wrong_value_far_down_leaves_no_file_behind(tmp_path: Path) -> None:
    rows = [(n % 3, "1", str(n), 0, "1") for n in range(100)] + [(0, "1", "soon", 0, "1")]
    with pytest.raises(UserError, match="column 'timestamp' holds 'soon' in row 101"):
        prepare_log(raw_log(rows, 7), Rules(), tmp_path / "store", bucket_rows=5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_no_file_behind(tmp_path: Path) -> None:
    """A limit on file sizes makes the system refuse the write, as a full disk does."""
    rows = [(n % 50, str(n % 11), n, 0, "1") for n in range(20_000)]
    log = raw_log(rows, 5000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="temporary files beside .*store could not be written") as caught:
            prepare_log(log, Rules(), tmp_path / "store", bucket_rows=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_small_log_needs_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gr.data.spill.Scratch.file", lambda _: pytest.fail("a file was asked for"))
    prepare_log(raw_log([(1, "1", 1, 0, "1"), (1, "2", 2, 0, "2")], 1), Rules(), tmp_path / "store")
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["counts"]["events"] == 2


def test_shuffled_ties_lose_the_order_of_the_file_and_nothing_else() -> None:
    rows = [(user, str(item), item // 10, 0, "1") for user in range(40) for item in range(30)]
    one = prepared(rows, Rules(ties="shuffled"), batch=1200, bucket_rows=1200)
    for again in (prepared(rows, Rules(ties="shuffled"), 7, 50), prepared(rows[::-1], Rules(ties="shuffled"), 7, 50)):
        np.testing.assert_array_equal(one.columns["item_id"], again.columns["item_id"])
    kept = prepared(rows, Rules(), batch=1200, bucket_rows=1200)
    assert (one.manifest["ties"], kept.manifest["ties"]) == ("shuffled", "file")
    for user, right in events(kept).items():
        assert sorted(events(one)[user]) == sorted(right)
        assert [time for _, time, _ in events(one)[user]] == [time for _, time, _ in right]
    ids = one.columns["item_id"].reshape(40, 3, 10)
    rising = (np.diff(ids, axis=2) > 0).mean()
    assert 0.4 < rising < 0.6 and len({tuple(row) for row in ids[:, 0].tolist()}) == 40  # each user in an own order
