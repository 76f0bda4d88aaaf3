"""CSV and Parquet logs become stores without a guess, a float or a silent loss."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from gr import config as configs
from gr.data.prepare import prepare
from gr.data.sources import SOURCES
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import NO_TIMES, EventStore
from gr.data.table import ItemTableConfig, TableConfig


def write(path: Path, columns: dict) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pacsv.write_csv(table, path)
    return path


def load(path: Path, **fields) -> EventStore:
    return prepare(TableConfig(path=str(path), **fields), path.parent / "cache")


def sequences(store: EventStore) -> dict[object, list[object]]:
    """Original user -> original items in stored order."""
    names = store.items["item_id"].to_pylist()
    rows = np.split(store.columns["item_id"], store.offsets[1:-1])
    return {u: [names[i] for i in row] for u, row in zip(store.user_ids.to_pylist(), rows, strict=True)}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_events_are_sorted_by_user_and_time(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"log{suffix}",
        {"user_id": [2, 1, 2, 1, 1], "item_id": [30, 10, 20, 11, 12], "timestamp": [9, 5, 3, 4, 6]},
    )
    store = load(path)
    assert sequences(store) == {1: [11, 10, 12], 2: [20, 30]}
    assert store.columns["timestamp"].tolist() == [4, 5, 6, 3, 9]
    assert store.manifest["repairs"]["out_of_order_rows_sorted"] == 2
    assert store.items["title"].to_pylist() == ["10", "11", "12", "20", "30"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ids_beyond_float_precision_survive(tmp_path: Path, suffix: str) -> None:
    ids = [2**24 + 1, 2**31 + 1, 2**53 + 1, 2**62 + 1]
    path = write(
        tmp_path / f"log{suffix}",
        {"user_id": [2**53 + 1] * 4 + [2**53] * 4, "item_id": ids * 2, "timestamp": list(range(8))},
    )
    store = load(path)
    assert sequences(store) == {2**53: ids, 2**53 + 1: ids}
    assert store.items["item_id"].type == pa.int64()


def test_ids_with_leading_zeros_stay_text_and_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"user_id": ["a"] * 3, "item_id": ["7", "007", "NA"], "timestamp": [1, 2, 3]})
    assert sequences(load(path)) == {"a": ["7", "007", "NA"]}


def test_ids_above_int64_stay_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.parquet",
        {"user_id": [1, 1], "item_id": pa.array([2**63 + 1, 5], pa.uint64()), "timestamp": [1, 2]},
    )
    assert sequences(load(path)) == {1: [str(2**63 + 1), "5"]}


def test_ids_beyond_int64_in_a_csv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user_id,item_id,timestamp\n1,{2**64},1\n1,{2**64 + 1},2\n1,5,3\n")
    assert sequences(load(path)) == {1: [str(2**64), str(2**64 + 1), "5"]}


def test_dense_ids_do_not_depend_on_row_order(tmp_path: Path) -> None:
    columns = {"user_id": ["b", "a", "b", "a"], "item_id": ["y", "z", "x", "y"], "timestamp": [1, 2, 3, 4]}
    one = load(write(tmp_path / "one.csv", columns))
    two = load(write(tmp_path / "two.csv", {name: values[::-1] for name, values in columns.items()}))
    assert one.manifest["content_hash"] == two.manifest["content_hash"]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([10, 20], [10, 20]),
        ([10.0, 20.0], [10, 20]),
        (["10.0", "2e1"], [10, 20]),
        (["1970-01-01", "1970-01-02"], [0, 86400]),
        (["1970-01-01T00:00:10", "1970-01-01T00:00:20.5"], [10, 20]),
        (["1970-01-01T00:00:10Z", "1970-01-01T01:00:20+01:00"], [10, 20]),
        (pa.array([-1500, 20_000], pa.timestamp("ms")), [-2, 20]),
        (pa.array([0, 2], pa.date32()), [0, 172_800]),
    ],
)
def test_times_come_as_seconds(tmp_path: Path, values: object, seconds: list[int]) -> None:
    path = write(tmp_path / "log.parquet", {"user_id": [1, 1], "item_id": [1, 2], "timestamp": values})
    assert load(path).columns["timestamp"].tolist() == seconds
    if isinstance(values, list):
        path = write(tmp_path / "log.csv", {"user_id": [1, 1], "item_id": [1, 2], "timestamp": values})
        assert load(path).columns["timestamp"].tolist() == seconds


def test_milliseconds_sort_before_they_are_rounded(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [5900, 5100]})
    store = load(path, timestamp_unit="ms")
    assert sequences(store) == {1: [2, 1]}
    assert store.columns["timestamp"].tolist() == [5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_a_stable_sort_decides_what_is_held_out(tmp_path: Path, seed: int) -> None:
    """With every time tied, the last row of the file is a user's last event."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 20, 600), np.arange(600)
    path = write(tmp_path / "log.csv", {"user_id": users, "item_id": items, "timestamp": np.zeros(600, int)})
    store = load(path)
    split = make_split(LeaveOneOutConfig(), store)
    held = store.columns["item_id"][store.offsets[split.test.user] + split.test.position]
    assert held.tolist() == [items[users == u].max() for u in range(20)]


def test_a_position_breaks_ties_in_time(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        {"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": [5, 5, 4], "place": [8, 7, 9]},
    )
    assert sequences(load(path)) == {1: [3, 1, 2]}
    assert sequences(load(path, position="place")) == {1: [3, 2, 1]}


def test_a_log_with_positions_alone_has_no_times(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"user_id": [1] * 3, "item_id": [1, 2, 3], "position": [2, 0, 1]})
    store = load(path, caveats=("a sample",))
    assert sequences(store) == {1: [2, 3, 1]}
    assert not store.has_times
    assert store.manifest["caveats"] == ["a sample", NO_TIMES]


def test_actions_are_coded_in_the_order_of_their_values(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        {"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": [1, 2, 3], "rating": ["10", "9.5", "2"]},
    )
    store = load(path, action="rating")
    assert store.columns["action"].tolist() == [2, 1, 0]
    assert store.num_actions == 3 and store.manifest["actions"] == [2.0, 9.5, 10.0]


@pytest.mark.parametrize(("rule", "kept"), [("drop", 3), ("keep", 5)])
def test_duplicate_rows_are_dropped_or_kept_and_counted(tmp_path: Path, rule: str, kept: int) -> None:
    path = write(
        tmp_path / "log.csv",
        {"user_id": [1] * 5, "item_id": [1, 1, 2, 1, 1], "timestamp": [1, 1, 2, 1, 3]},
    )
    store = load(path, duplicates=rule)
    assert store.num_events == kept
    assert store.manifest["repairs"].get("duplicate_rows_dropped", 0) == 5 - kept


def test_null_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n1,1,1\n1,,2\n,3,3\n1,4,\n1,5,5\n2,6,6\n")
    store = load(path)
    assert sequences(store) == {1: [1, 5], 2: [6]}
    assert store.manifest["repairs"]["null_rows_dropped"] == 3
    assert store.manifest["repairs"]["one_event_users_not_evaluated"] == 1
    assert store.manifest["counts"]["rows_read"] == 6


def test_rare_items_and_users_are_counted_once_then_users_again(tmp_path: Path) -> None:
    # Item 9 is rare. Users 1 and 2 have 2 events each; user 2 falls below 2 once item 9 is gone.
    path = write(
        tmp_path / "log.csv",
        {"user_id": [1, 1, 2, 2, 3], "item_id": [1, 2, 1, 9, 2], "timestamp": [1, 2, 3, 4, 5]},
    )
    store = load(path, min_user_events=2, min_item_events=2)
    assert sequences(store) == {1: [1, 2]}
    assert store.manifest["repairs"]["rare_rows_dropped"] == 3


LOG = {"user_id": [1, 1, 2, 1, 2], "item_id": [5, 6, 5, 7, 8], "timestamp": [3, 1, 2, 3, 2]}


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.parquet", "log.pq", "log.txt"])
def test_every_form_of_a_log_makes_the_same_store(tmp_path: Path, name: str) -> None:
    right = load(write(tmp_path / "right.parquet", LOG)).manifest["content_hash"]
    path, fields = tmp_path / name, {}
    if name.startswith("log.p"):
        pq.write_table(pa.table(LOG), path, row_group_size=2)
    else:
        separator = {"log.tsv": "\t", "log.txt": ";"}.get(name, ",")
        rows = [list(LOG), *zip(*LOG.values(), strict=True)]
        text = "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        fields = {"delimiter": ";"} if name == "log.txt" else {}
    assert load(path, **fields).manifest["content_hash"] == right


def test_a_folder_or_a_pattern_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    right = load(write(tmp_path / "right.parquet", LOG)).manifest["content_hash"]
    folder = tmp_path / "events"
    folder.mkdir()
    for name, rows in (("b", slice(2, 5)), ("a", slice(0, 2))):
        write(folder / f"{name}.parquet", {column: values[rows] for column, values in LOG.items()})
    (folder / "_SUCCESS").touch()
    for path in (folder, folder / "*.parquet"):
        store = load(path)
        assert store.manifest["content_hash"] == right and store.manifest["counts"]["rows_read"] == 5


def test_a_latin_1_csv_is_read_where_the_config_says_so(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("user_id,item_id,timestamp\n1,caf\u00e9,1\n1,th\u00e9,2\n".encode("latin-1"))
    assert sequences(load(path, encoding="latin-1")) == {1: ["caf\u00e9", "th\u00e9"]}


def test_a_quoted_field_may_hold_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp\n1,"a\nb",1\n1,c,2\n')
    assert sequences(load(path)) == {1: ["a\nb", "c"]}


def test_a_csv_without_header_and_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "u.tsv"
    path.write_text("1\t5\t3\t100\n1\t6\t4\t99\n")
    store = load(path, names=("user_id", "item_id", "rating", "timestamp"), action="rating")
    assert sequences(store) == {1: [6, 5]}
    assert store.manifest["actions"] == [3, 4]


@pytest.mark.parametrize(("candidates", "known"), [("log", [5, 6]), ("all", [4, 5, 6])])
def test_titles_come_from_the_item_table(tmp_path: Path, candidates: str, known: list[int]) -> None:
    log = write(tmp_path / "log.csv", {"user_id": [1, 1], "item_id": [6, 5], "timestamp": [1, 2]})
    table = write(tmp_path / "items.csv", {"id": [4, 5], "name": ["four", "five"], "year": ["1", "2"]})
    items = ItemTableConfig(str(table), id="id", title="name", columns=("year",), candidates=candidates)
    store = load(log, items=items)
    assert store.items["item_id"].to_pylist() == known
    titles = dict(zip(known, store.items["title"].to_pylist(), strict=True))
    assert titles[5] == "five" and titles[6] == "6"
    assert store.items["year"].to_pylist()[-1] is None
    assert sequences(store) == {1: [6, 5]}
    assert store.manifest["repairs"]["items_missing_in_item_table"] == 1
    assert store.manifest["counts"].get("items_without_events") == (1 if candidates == "all" else None)


def test_a_config_names_the_source_by_kind() -> None:
    config, _ = configs.find(SOURCES, "table", "data")
    assert configs.from_dict(config, {"kind": "table", "path": "x.csv"}) == TableConfig(path="x.csv")
