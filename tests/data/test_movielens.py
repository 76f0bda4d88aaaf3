"""GroupLens' zips become stores: every layout, and every way in which a zip can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gr.data import movielens, text_blocks
from gr.data.movielens import LAYOUTS, MovieLens, MovieLensConfig
from gr.data.prepare import prepare
from gr.data.store import EventStore
from gr.errors import UserError
from local_server import Site, names, serve

# (user, movie, rating, time) in the order of the file; user 2's times tie and run backwards.
EVENTS = [(2, 30, 4, 50), (2, 10, 5, 50), (1, 20, 3, 10), (1, 30, 1, 20), (2, 20, 2, 40)]
TITLES = {10: "Amélie (2001)", 20: "One, Two: Three (1961)", 30: "M (1931)", 40: "Nobody Rated This (1999)"}
GENRES = {10: "Comedy|Romance", 20: "Comedy", 30: "Crime|Film-Noir|Thriller", 40: "Drama"}


def files(name: str) -> dict[str, bytes]:
    """The two files of a set in GroupLens' layout."""
    if name in ("ml-20m", "ml-latest-small"):
        ratings = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.5,{t}" for u, i, r, t in EVENTS)]
        movies = ["movieId,title,genres", *(f'{i},"{title}",{GENRES[i]}' for i, title in TITLES.items())]
        return {"ratings.csv": encode(ratings), "movies.csv": encode(movies)}
    if name == "ml-1m":
        ratings = [f"{u}::{i}::{r}::{t}" for u, i, r, t in EVENTS]
        movies = [f"{i}::{title}::{GENRES[i]}" for i, title in TITLES.items()]
        return {"ratings.dat": encode(ratings), "movies.dat": encode(movies, "latin-1")}
    ratings = [f"{u}\t{i}\t{r}\t{t}" for u, i, r, t in EVENTS]
    movies = []
    for i, title in TITLES.items():
        flags = "|".join("1" if g in GENRES[i].split("|") else "0" for g in movielens.GENRES_100K)
        movies.append(f"{i}|{title}|01-Jan-1995||http://us.imdb.com/x|{flags}")
    return {"u.data": encode(ratings), "u.item": encode(movies, "latin-1")}


def encode(lines: list[str], encoding: str = "utf-8") -> bytes:
    return ("\n".join(lines) + "\n").encode(encoding)


def make_zip(path: Path, name: str, folder: str | None = None, **changed: bytes | None) -> Path:
    """A zip of GroupLens' layout; ``changed`` replaces files (``ratings``, ``movies``) or leaves them out."""
    layout = LAYOUTS[name]
    content = files(name) | {"README": b"terms\n"}
    for key, data in changed.items():
        content[getattr(layout, key)] = data  # type: ignore[assignment]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in content.items():
            if data is not None:
                archive.writestr(f"{name if folder is None else folder}/{file}".lstrip("/"), data)
    return path


def load(path: Path, name: str, cache: Path, **fields) -> EventStore:
    return prepare(MovieLensConfig(name=name, path=str(path), **fields), cache)


def sequences(store: EventStore) -> dict[int, list[int]]:
    ids = np.array(store.items["item_id"].to_pylist())
    parts = np.split(ids[store.columns["item_id"]], store.offsets[1:-1])
    return {user: part.tolist() for user, part in zip(store.user_ids.to_pylist(), parts, strict=True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_zip_of_each_set_becomes_its_sequences_titles_and_genres(name: str, tmp_path: Path) -> None:
    store = load(make_zip(tmp_path / "any.zip", name), name, tmp_path / "cache")
    assert sequences(store) == {1: [20, 30], 2: [20, 30, 10]}  # the tie keeps the order of the file
    assert store.columns["timestamp"].tolist() == [10, 20, 40, 50, 50]
    assert store.items.to_pydict() == {
        "item_id": list(TITLES), "title": list(TITLES.values()), "genres": list(GENRES.values())
    }  # fmt: skip
    assert store.num_actions == 0 and store.manifest["source"] == "any.zip"


def test_ratings_and_candidates_are_the_users_choice(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-1m")
    store = load(path, "ml-1m", tmp_path / "cache", ratings=True, candidates="log", caveats=("rebuilt",))
    assert store.items["item_id"].to_pylist() == [10, 20, 30] and store.manifest["caveats"] == ["rebuilt"]
    assert store.manifest["actions"] == [1, 2, 3, 4, 5] and store.columns["action"].tolist() == [2, 0, 1, 3, 4]


@pytest.mark.parametrize("folder", ["", "ml-1m"])
def test_a_zip_without_folder_and_an_extracted_one_give_the_same_store(folder: str, tmp_path: Path) -> None:
    zipped = make_zip(tmp_path / "any.zip", "ml-1m", folder="")
    place = tmp_path / "out" / folder
    place.mkdir(parents=True)
    for file, data in files("ml-1m").items():
        (place / file).write_bytes(data)
    stores = [load(path, "ml-1m", tmp_path / "cache") for path in (zipped, tmp_path / "out")]
    assert stores[0].manifest["content_hash"] == stores[1].manifest["content_hash"]
    (place / "ratings.dat").write_bytes(files("ml-1m")["ratings.dat"] + b"1::10::4::99\n")
    assert load(tmp_path / "out", "ml-1m", tmp_path / "cache").num_events == len(EVENTS) + 1


def test_movies_converted_to_utf8_keep_their_accents(tmp_path: Path) -> None:
    movies = files("ml-1m")["movies.dat"].decode("latin-1").encode()
    store = load(make_zip(tmp_path / "any.zip", "ml-1m", movies=movies), "ml-1m", tmp_path / "cache")
    assert store.items["title"].to_pylist() == list(TITLES.values())


@pytest.mark.parametrize("name", ["ml-1m", "ml-20m"])
def test_the_cutting_into_blocks_does_not_matter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "any.zip", name)
    whole = load(path, name, tmp_path / "one").manifest["content_hash"]
    blocks = text_blocks.line_blocks
    for size in (1, 7, 30):
        monkeypatch.setattr(text_blocks, "line_blocks", lambda stream, what, size=size: blocks(stream, what, size))
        assert load(path, name, tmp_path / str(size)).manifest["content_hash"] == whole


def test_a_zip_unlike_the_published_one_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-1m")
    store = load(path, "ml-1m", tmp_path / "cache")
    assert store.manifest["input_note"] == "any.zip is not byte for byte the ml-1m.zip that GroupLens published"
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(LAYOUTS, "ml-1m", dataclasses.replace(LAYOUTS["ml-1m"], md5=md5))
    assert "input_note" not in load(path, "ml-1m", tmp_path / "other").manifest


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    with serve(make_zip(tmp_path / "served.zip", "ml-latest-small").read_bytes(), monkeypatch) as site:
        yield site


def test_a_set_is_downloaded_into_the_cache_and_its_store_outlives_the_zip(site: Site, tmp_path: Path) -> None:
    config = MovieLensConfig(name="ml-latest-small", url=site.remote("ml-latest-small.zip").url)
    store = prepare(config, tmp_path / "cache")
    assert store.num_events == len(EVENTS)
    assert names(tmp_path / "cache" / "downloads") == ["manifest.json", "ml-latest-small.zip"]
    (tmp_path / "cache" / "downloads" / "ml-latest-small.zip").unlink()
    assert prepare(config, tmp_path / "cache").folder == store.folder and len(site.asked) == 1


def test_a_zip_that_is_not_grouplens_own_is_not_taken_for_it(site: Site, tmp_path: Path) -> None:
    config = MovieLensConfig(name="ml-100k", url=site.remote("ml-100k.zip").url)
    with pytest.raises(UserError, match=f"has md5 {hashlib.md5(site.body).hexdigest()}.*prints 0e33842e24a9c977be4e"):
        prepare(config, tmp_path / "cache")
    assert names(tmp_path / "cache" / "downloads") == []


def test_without_a_path_the_address_is_grouplens_own() -> None:
    urls = [MovieLens(MovieLensConfig(name=name)).remote.url for name in LAYOUTS]  # type: ignore[arg-type]
    assert urls == [f"https://files.grouplens.org/datasets/movielens/{name}.zip" for name in LAYOUTS]


def refused(path: Path, match: str, name: str = "ml-1m") -> None:
    cache = path.parent / "cache"
    with pytest.raises(UserError, match=match) as caught:
        load(path, name, cache)
    assert "\n" not in str(caught.value) and list(cache.iterdir()) == []


def test_a_file_that_is_no_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "any.zip").write_bytes(b"<html>moved</html>" * 9)
    refused(tmp_path / "any.zip", r"any\.zip is not a zip \(and no folder\)")


def test_a_zip_cut_short_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-1m")
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, r"any\.zip is a zip that was cut short or damaged")


def test_a_zip_with_a_flipped_byte_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-1m")
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("ml-1m/ratings.dat").header_offset + len("ml-1m/ratings.dat") + 30 + 20
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    refused(path, r"ml-1m/ratings\.dat in .*any\.zip was cut short or damaged")


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.zip does not exist; data.path names ml-1m.zip of GroupLens or the"):
        load(tmp_path / "nowhere.zip", "ml-1m", tmp_path / "cache")
    (tmp_path / "any.zip").touch()
    with pytest.raises(UserError, match="any.zip is empty"):
        load(tmp_path / "any.zip", "ml-1m", tmp_path / "cache")


def test_another_layout_is_answered_with_what_was_sought_and_what_is_there(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-100k")
    with pytest.raises(
        UserError,
        match=r"has no ml-1m/ratings\.dat, which GroupLens' ml-1m has; it has ml-100k/README, ml-100k/u\.data, "
        r"ml-100k/u\.item; it looks like ml-100k, so set data\.name",
    ):
        load(path, "ml-1m", tmp_path / "cache")
    only = make_zip(tmp_path / "only.zip", "ml-1m", movies=None)
    with pytest.raises(UserError, match=r"has no ml-1m/movies\.dat.*it has ml-1m/README, ml-1m/ratings\.dat$"):
        load(only, "ml-1m", tmp_path / "cache")


def test_two_files_of_ratings_are_one_too_many(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", "ml-1m", folder="a")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b/ratings.dat", files("ml-1m")["ratings.dat"])
    with pytest.raises(UserError, match=r"has 2 files ratings\.dat \(a/ratings\.dat, b/ratings\.dat\)"):
        load(path, "ml-1m", tmp_path / "cache")


def test_a_csv_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    movies = files("ml-20m")["movies.csv"].decode().encode("latin-1")
    path = make_zip(tmp_path / "any.zip", "ml-20m", movies=movies)
    with pytest.raises(UserError, match=r"movies\.csv in .*any\.zip: line 2 is not UTF-8 text \(byte 0xe9\)"):
        load(path, "ml-20m", tmp_path / "cache")
    refused(make_zip(tmp_path / "b.zip", "ml-1m", ratings=b"1::2::3::4\n1::\xff::3::4\n"), "line 2 is not UTF-8 text")


@pytest.mark.parametrize(
    ("name", "file", "data", "match"),
    [
        (
            "ml-20m",
            "ratings",
            b"userId,movieId,rating\n1,2,3\n",
            "has no column 'timestamp'; its columns are userId, mo",
        ),
        ("ml-20m", "movies", b"movieId,name,genres\n1,a,b\n", "has no column 'title'; its columns are movieId, name"),
        ("ml-1m", "ratings", b"1::10::5::7\n1::20::5\n", r"line 2, '1::20::5', has 3 fields; 4 with '::' between"),
        ("ml-1m", "ratings", b"1::10::5::7\n1::2\t0::5::8\n", "line 2 has a tab in it"),
        ("ml-1m", "movies", b"10::A (1)::Drama\n20::B\n", r"line 2, b?'20::B', is not id::title::genres"),
        ("ml-100k", "movies", b"10|A|B\n", r"line 1, '10|A|B', is not 24 fields"),
        ("ml-1m", "movies", b"\n", "has no movies"),
        ("ml-1m", "ratings", b"1::10::5::7\n1::20::5::soon\n", "'timestamp' holds 'soon'"),
    ],
)
def test_missing_columns_and_fields_are_named(name: str, file: str, data: bytes, match: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "any.zip", name, **{file: data})
    with pytest.raises(UserError, match=match):
        load(path, name, tmp_path / "cache")


def test_a_rule_that_leaves_nothing_and_an_unknown_name_are_refused() -> None:
    from gr import config as configs

    with pytest.raises(UserError, match="name is 'ml-1'; did you mean 'ml-1m'"):
        configs.from_dict(MovieLensConfig, {"name": "ml-1"})
    with pytest.raises(UserError, match="min_user_events is 0"):
        dataclasses.replace(MovieLensConfig(name="ml-1m"), min_user_events=0)
