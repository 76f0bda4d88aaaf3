"""Each kind of bad input is one sentence that says what would be right."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.prepare import prepare
from gr.data.table import ItemTableConfig, TableConfig
from gr.errors import UserError

HEAD = "user_id,item_id,timestamp\n"
GOOD = HEAD + "1,1,1\n1,2,2\n"


def refusal(path: Path, **fields) -> str:
    cache = path.parent / "cache"
    with pytest.raises(UserError) as caught:
        prepare(TableConfig(path=str(path), **fields), cache)
    assert not cache.exists() or list(cache.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message and path.parent.name in message
    return message


def csv(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_missing_file(tmp_path: Path) -> None:
    csv(tmp_path, GOOD)
    assert "does not exist; did you mean" in refusal(tmp_path / "lgo.csv")


def test_a_folder_without_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "log.csv").mkdir()
    csv(tmp_path / "log.csv", GOOD)
    assert "is not a file, and as a folder it holds no .parquet file" in refusal(tmp_path / "log.csv")


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    assert "matches no file" in refusal(tmp_path / "*.parquet")


def test_the_row_named_is_that_of_its_own_file(tmp_path: Path) -> None:
    csv(tmp_path, GOOD, "a.csv")
    csv(tmp_path, GOOD, "b.csv")
    csv(tmp_path, HEAD + "1,1,1\n1,1,soon\n", "c.csv")
    message = refusal(tmp_path / "*.csv")
    assert "c.csv: column 'timestamp' holds 'soon' in row 2 " in message


def test_files_whose_times_are_of_two_types(tmp_path: Path) -> None:
    for name, kind in (("a", pa.timestamp("ms")), ("b", pa.int64())):
        columns = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": pa.array([1, 2], kind)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    assert "b.parquet: column 'timestamp' is of type int64, unlike in the files before" in refusal(tmp_path)


@pytest.mark.parametrize(("delimiter", "named"), [(";", "';'"), ("\t", r"'\t'"), ("|", "'|'")])
def test_another_delimiter(tmp_path: Path, delimiter: str, named: str) -> None:
    message = refusal(csv(tmp_path, GOOD.replace(",", delimiter)))
    assert f"looks separated by {named}, so set data.delimiter: {named}" in message


def test_a_delimiter_of_two_characters() -> None:
    with pytest.raises(UserError, match="delimiter is '::'; it must be one ASCII character"):
        TableConfig(path="x.csv", delimiter="::")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((GOOD + "1,caf\u00e9,3\n").encode("latin-1"), "column 'item_id' is not UTF-8 text (byte 0xe9 in line 4)"),
        (GOOD.replace("user_id", "us\u00e9r").encode("latin-1"), "its header is not UTF-8 text (byte 0xe9 in line 1)"),
    ],
)
def test_another_encoding(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "log.csv").write_bytes(data)
    message = refusal(tmp_path / "log.csv")
    assert reason in message and "set data.encoding: latin-1" in message


def test_a_wide_encoding(tmp_path: Path) -> None:
    for text in (GOOD, GOOD[:-1]):
        (tmp_path / "log.csv").write_bytes(text.encode("utf-16"))
        assert "is UTF-16 text; save it as UTF-8" in refusal(tmp_path / "log.csv")


@pytest.mark.parametrize("case", ["cut", "barely begun", "not gzip"])
def test_a_broken_gz(tmp_path: Path, case: str) -> None:
    whole = gzip.compress(GOOD.encode() * 50, mtime=0)
    data = {"cut": whole[:-12], "barely begun": whole[:9], "not gzip": b"1,2"}[case]
    (tmp_path / "log.csv.gz").write_bytes(data)
    assert "cannot be read as a CSV" in refusal(tmp_path / "log.csv.gz")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    message = refusal(csv(tmp_path, GOOD, "log.xlsx"))
    assert "'.xlsx'" in message and ".parquet" in message


@pytest.mark.parametrize(("text", "reason"), [("", "is empty"), (HEAD, "has no rows"), (HEAD + "1,,1\n", "every row")])
def test_an_empty_file(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(csv(tmp_path, text))


def test_a_missing_column(tmp_path: Path) -> None:
    message = refusal(csv(tmp_path, "user,item_id,timestamp\n1,1,1\n"))
    assert "no column 'user_id'; did you mean 'user'?" in message


def test_a_misspelt_column_name(tmp_path: Path) -> None:
    assert "did you mean 'timestamp'?" in refusal(csv(tmp_path, GOOD), timestamp="timestmap")


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    assert "2 columns 'item_id'" in refusal(csv(tmp_path, "user_id,item_id,item_id,timestamp\n1,1,1,1\n"))


def test_neither_times_nor_positions(tmp_path: Path) -> None:
    message = refusal(csv(tmp_path, "user_id,item_id,when\n1,1,1\n1,2,2\n"))
    assert "times are never invented" in message and "`position`" in message and "when" in message


def test_text_in_a_time_column(tmp_path: Path) -> None:
    rows = "".join(f"1,{i},{i}\n" for i in range(1, 100)) + "1,100,soon\n1,101,101\n"
    message = refusal(csv(tmp_path, HEAD + rows))
    assert "'timestamp' holds 'soon' in row 100" in message


def test_the_row_named_counts_dropped_rows_too(tmp_path: Path) -> None:
    assert "'soon' in row 3" in refusal(csv(tmp_path, HEAD + "1,1,1\n,1,1\n1,1,soon\n"))


def test_a_time_that_is_no_whole_second(tmp_path: Path) -> None:
    assert "holds '2.5' in row 2" in refusal(csv(tmp_path, HEAD + "1,1,1.0\n1,1,2.5\n"))


def test_a_date_among_dates_that_is_none(tmp_path: Path) -> None:
    assert "'2024-02-31' in row 2" in refusal(csv(tmp_path, HEAD + "1,1,2024-02-01\n1,1,2024-02-31\n"))


def test_milliseconds_taken_for_seconds(tmp_path: Path) -> None:
    assert "timestamp_unit: ms" in refusal(csv(tmp_path, HEAD + "1,1,1700000000000\n1,2,1700000000001\n"))


@pytest.mark.parametrize("time", [10**12, -(10**12), 2**63 - 1, -(2**63)])
def test_an_absurd_time(tmp_path: Path, time: int) -> None:
    message = refusal(csv(tmp_path, HEAD + f"1,1,1\n1,2,{time}\n"))
    assert f"holds {time} in row 2" in message and "beyond the year 5000 or before -1000" in message


def test_a_time_beyond_int64(tmp_path: Path) -> None:
    assert f"holds '{2**63}' in row 2" in refusal(csv(tmp_path, HEAD + f"1,1,1\n1,2,{2**63}\n"))


def test_times_with_a_zone_in_some_rows_only(tmp_path: Path) -> None:
    rows = "1,1,2024-02-01T00:00:00\n1,1,2024-02-01T00:00:00Z\n"
    assert "with a zone in every row or in none" in refusal(csv(tmp_path, HEAD + rows))


def test_a_fractional_or_textual_position(tmp_path: Path) -> None:
    assert "'b' in row 2" in refusal(csv(tmp_path, "user_id,item_id,position\n1,1,0\n1,2,b\n"))


def test_a_time_column_of_a_wrong_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [True]}), tmp_path / "log.parquet")
    assert "is of type bool" in refusal(tmp_path / "log.parquet")


def test_floating_point_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1], "item_id": [1.0], "timestamp": [1]}), tmp_path / "log.parquet")
    assert "2**53" in refusal(tmp_path / "log.parquet")


def test_a_ragged_csv(tmp_path: Path) -> None:
    assert "cannot be read as a CSV" in refusal(csv(tmp_path, GOOD + "1,2\n"))


def test_a_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1, 2]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "truncated or corrupt" in refusal(path)


def test_no_user_with_two_events(tmp_path: Path) -> None:
    assert "no user has 2 events" in refusal(csv(tmp_path, HEAD + "1,1,1\n2,2,2\n"))


def test_nothing_left_after_the_minimum(tmp_path: Path) -> None:
    assert "lower them" in refusal(csv(tmp_path, GOOD), min_item_events=5)


def test_a_free_text_column_taken_for_actions(tmp_path: Path) -> None:
    rows = "".join(f"1,{i},{i},review {i}\n" for i in range(5000))
    assert "at most 4096" in refusal(csv(tmp_path, "user_id,item_id,timestamp,text\n" + rows), action="text")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("item_id,titel\n1,a\n", "did you mean 'titel'?"),
        ("item_id,title\n1,a\n1,b\n", "names 1 items twice"),
        ("item_id,title\n8,a\n", "none of the log's items"),
        ("item_id,title\n,a\n", "an empty id in 1 rows"),
        ("item_id,title\n", "has no rows of data"),
        ("item_id;title\n1;a\n", "data.delimiter: ';'"),
    ],
)
def test_a_wrong_item_table(tmp_path: Path, text: str, reason: str) -> None:
    table = csv(tmp_path, text, "items.csv")
    assert reason in refusal(csv(tmp_path, GOOD), items=ItemTableConfig(str(table)))


def test_an_impossible_minimum() -> None:
    with pytest.raises(UserError, match="min_user_events is 0"):
        TableConfig(path="x.csv", min_user_events=0)
