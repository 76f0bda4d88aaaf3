"""Amazon's review files of both years and forms become stores; a wrong one is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from gr.data import text_blocks
from gr.data.amazon import Amazon, AmazonConfig
from gr.data.prepare import prepare
from gr.data.store import EventStore
from gr.data.table import ItemTableConfig
from gr.errors import UserError
from local_server import names, serve

DAY = 86_400
# (user, item, rating, time): user A1... has two events on one day, in this order.
EVENTS = [
    ("A3QWERTYUIOPA2", "B000000009", 5.0, 3 * DAY),
    ("A1ASDFGHJKLZ01", "B000000007", 4.0, 2 * DAY),
    ("A1ASDFGHJKLZ01", "0000031887", 3.0, 2 * DAY),
    ("A3QWERTYUIOPA2", "0000031887", 5.0, 1 * DAY),
]
SEQUENCES = {
    "A1ASDFGHJKLZ01": ["B000000007", "0000031887"],
    "A3QWERTYUIOPA2": ["0000031887", "B000000009"],
}


def json_lines() -> bytes:
    rows = [
        {"reviewerID": u, "asin": i, "helpful": [0, 1], "reviewText": 'a "b"\n::,', "overall": r, "unixReviewTime": t}
        for u, i, r, t in EVENTS
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv(year: int) -> bytes:
    rows = [(u, i, r, t) if year == 2014 else (i, u, r, t) for u, i, r, t in EVENTS]
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def load(path: Path, **fields) -> EventStore:
    return prepare(AmazonConfig(name="Beauty", path=str(path), **fields), path.parent / "cache")


def sequences(store: EventStore) -> dict[str, list[str]]:
    ids = np.array(store.items["item_id"].to_pylist())
    parts = np.split(ids[store.columns["item_id"]], store.offsets[1:-1])
    return {user: part.tolist() for user, part in zip(store.user_ids.to_pylist(), parts, strict=True)}


@pytest.mark.parametrize("year", [2014, 2018])
@pytest.mark.parametrize("form", ["5core", "ratings"])
@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_each_year_and_form_gives_the_same_sequences(year: int, form: str, packed: bool, tmp_path: Path) -> None:
    data = json_lines() if form == "5core" else csv(year)
    (tmp_path / "reviews").write_bytes(gzip.compress(data) if packed else data)
    store = load(tmp_path / "reviews", year=year, form=form, ratings=True)
    assert sequences(store) == SEQUENCES
    assert store.columns["timestamp"].tolist() == [2 * DAY, 2 * DAY, DAY, 3 * DAY]
    assert [store.manifest["actions"][a] for a in store.columns["action"]] == [4, 3, 5, 5]


@pytest.mark.parametrize("form", ["5core", "ratings"])
def test_the_cutting_into_blocks_does_not_matter(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews").write_bytes(json_lines() if form == "5core" else csv(2014))
    blocks = text_blocks.line_blocks
    monkeypatch.setattr(text_blocks, "line_blocks", lambda stream, what: blocks(stream, what, 11))
    assert sequences(load(tmp_path / "reviews", form=form)) == SEQUENCES


def test_titles_come_from_a_table_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "reviews").write_bytes(json_lines())
    (tmp_path / "meta.csv").write_text("asin,title\nB000000009,Soap\n0000031887,Brush\nB000000001,Unseen\n")
    store = load(tmp_path / "reviews", items=ItemTableConfig(path=str(tmp_path / "meta.csv"), id="asin"))
    assert store.items["title"].to_pylist() == ["Brush", "B000000007", "Soap"]


def test_a_category_is_downloaded_and_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(gzip.compress(json_lines()), monkeypatch) as site:
        config = AmazonConfig(name="Beauty", url=site.remote("reviews_Beauty_5.json.gz").url)
        assert sequences(prepare(config, tmp_path / "cache")) == SEQUENCES
        assert len(site.asked) == 1
    assert names(tmp_path / "cache" / "downloads") == ["manifest.json", "reviews_Beauty_5.json.gz"]


def test_without_a_path_the_address_is_the_publishers() -> None:
    def url(**fields) -> str:
        return Amazon(AmazonConfig(**fields)).remote.url

    stanford = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
    ucsd = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/"
    assert url(name="Beauty") == stanford + "reviews_Beauty_5.json.gz"
    assert url(name="Beauty", form="ratings") == stanford + "ratings_Beauty.csv"
    assert url(name="All_Beauty", year=2018) == ucsd + "All_Beauty_5.json.gz"
    assert url(name="All_Beauty", year=2018, form="ratings") == ucsd + "All_Beauty.csv"


@pytest.mark.parametrize(
    ("name", "year", "match"),
    [("Beautty", 2014, "no category of 2014; did you mean Beauty?"), ("Beauty", 2018, "did you mean .*_Beauty?")],
)
def test_a_category_that_is_none_is_refused_before_the_network(name: str, year: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        AmazonConfig(name=name, year=year)  # type: ignore[arg-type]


GOOD = json_lines()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (GOOD + b'{"reviewerID": "A", \n', 'line 5 is not JSON in UTF-8: b\'{"reviewerID"'),
        (GOOD + b"[1, 2]\n", "line 5 is not a JSON object"),
        (
            GOOD.replace(b'"unixReviewTime": 259200', b'"unixReviewTime": "soon"'),
            "line 1 has unixReviewTime 'soon', whi",
        ),
        (GOOD.replace(b'"asin"', b'"parent"'), "no line from 1 to 4 has a field 'asin'"),
        (GOOD.replace(b"B000000007", b"B\xff00000007"), "line 2 is not JSON"),
    ],
)
def test_a_bad_json_line_is_named(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(data)
    with pytest.raises(UserError, match=match) as caught:
        load(tmp_path / "reviews.json")
    assert "reviews.json" in str(caught.value) and "\n" not in str(caught.value)


def test_lines_that_lack_a_field_are_counted_and_dropped(tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(GOOD + b'{"reviewerID": "A1ASDFGHJKLZ01", "unixReviewTime": 5}\n')
    store = load(tmp_path / "reviews.json")
    assert sequences(store) == SEQUENCES and store.manifest["repairs"]["null_rows_dropped"] == 1


@pytest.mark.parametrize(("year", "right"), [(2014, 2018), (2018, 2014)])
def test_ratings_of_the_other_year_are_noticed(year: int, right: int, tmp_path: Path) -> None:
    """They have users and items the other way round, which nothing later would notice."""
    (tmp_path / "ratings.csv").write_bytes(csv(right))
    with pytest.raises(UserError, match=f"the wrong way round; set data.year: {right}"):
        load(tmp_path / "ratings.csv", form="ratings", year=year)


def test_the_other_form_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(csv(2014))
    with pytest.raises(UserError, match="holds no JSON lines, so data.form '5core' is wrong; set 'ratings'"):
        load(tmp_path / "file")
    (tmp_path / "file").write_bytes(GOOD)
    with pytest.raises(UserError, match="holds JSON lines, so data.form 'ratings' is wrong; set '5core'"):
        load(tmp_path / "file", form="ratings")


def test_a_cut_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "reviews.json.gz").write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(UserError, match=r"reviews\.json\.gz was cut short or damaged \(Compressed file ended before"):
        load(tmp_path / "reviews.json.gz")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist; data.path names a file such as reviews_Beauty_5.json"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder; data.path names a file such as"):
        load(tmp_path)
