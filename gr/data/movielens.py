"""MovieLens, from GroupLens' zips: downloaded, or at hand as a zip or as the folder it was extracted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv

from gr.data import archives, download, text_blocks
from gr.data.out_of_core import prepare_log
from gr.data.raw import ItemTable, RawLog, Rules
from gr.errors import UserError

URL = "https://files.grouplens.org/datasets/movielens/{}.zip"
TERMS = (
    "MovieLens is GroupLens' (University of Minnesota): research use with acknowledgement; no redistribution and no "
    "commercial use without their permission; the README in the zip has the terms"
)


@dataclass(frozen=True)
class Layout:
    """What GroupLens put into a zip.

    Attributes:
        ratings: File of ratings, text without quotes.
        separator: Between its fields.
        fields: Its columns in order; ``None``: a header line names them.
        movies: File of movies.
        md5: Of the zip, as GroupLens prints it in NAME.zip.md5; latest-small is renewed from time to time.
    """

    ratings: str
    separator: str
    fields: tuple[str, ...] | None
    movies: str
    md5: str | None


FIELDS = ("userId", "movieId", "rating", "timestamp")
LAYOUTS = {
    "ml-100k": Layout("u.data", "\t", FIELDS, "u.item", "0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": Layout("ratings.dat", "::", FIELDS, "movies.dat", "c4d9eecfca2ab87c1945afe126590906"),
    "ml-20m": Layout("ratings.csv", ",", None, "movies.csv", "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-latest-small": Layout("ratings.csv", ",", None, "movies.csv", None),
}


@dataclass(frozen=True, kw_only=True)
class MovieLensConfig(Rules):
    """One of GroupLens' sets.

    Attributes:
        name: Which one.
        path: A zip at hand, whatever its name, or the folder it was extracted to; ``None``: GroupLens' own zip is
            downloaded into the cache.
        url: Another place to download the same zip from.
        ratings: Keeps the rating of each event as its action (for ``layout.kind`` interleaved or added).
        candidates: ``all``: every movie of the set can be recommended, as arXiv 2402.17152's code ranks ML-1M's 3,883;
            ``log``: only those with an event.
    """

    kind: str = "movielens"
    name: Literal["ml-100k", "ml-1m", "ml-20m", "ml-latest-small"]
    path: str | None = None
    url: str | None = None
    ratings: bool = False
    candidates: Literal["log", "all"] = "all"


class MovieLens:
    """The source of ``kind: movielens``."""

    def __init__(self, config: MovieLensConfig) -> None:
        self.config = config
        self.layout = LAYOUTS[config.name]
        self.remote = download.Remote(config.url or URL.format(config.name), TERMS, self.layout.md5)
        self.downloads = Path("cache/downloads")

    def locate(self, downloads: Path) -> None:
        """Tells where downloads lie; nothing is read yet."""
        self.downloads = downloads

    def fingerprint(self) -> str:
        """sha256 of the zip (or of an extracted folder's two files); downloads it if it was never seen.

        Raises:
            UserError: Not there, of another layout, or the download failed.
        """
        if self.config.path is None:
            return download.pinned_sha256(self.remote, self.downloads)
        path = self._file()
        return archives.sha256([path / name for name in self._members(path)] if path.is_dir() else [path])

    def prepare(self, folder: str | Path) -> None:
        """Writes the store of this set into ``folder``.

        Raises:
            UserError: The download failed, or the zip is damaged or of another layout (see ``read``).
        """
        prepare_log(self.read(), self.config, Path(folder))

    def read(self) -> RawLog:
        """The log, its events not yet read.

        Raises:
            UserError: No zip, a cut one, another layout, a missing column or a wrong encoding; that of the ratings
                only when the batches are read.
        """
        path = self._file()
        ratings, movies = self._members(path)
        wanted = {"user_id": "userId", "item_id": "movieId", "timestamp": "timestamp"}
        if self.config.ratings:
            wanted["action"] = "rating"
        with archives.open_member(path, movies) as stream:
            titles = read_movies(stream.read(), f"{movies} in {path}", self.config.name)
        return RawLog(
            source=path.name,
            names=wanted,
            batches=self._batches(path, ratings, wanted),
            items=ItemTable(f"{movies} in {path}", "movieId", titles, self.config.candidates),
            extra=self._note(path),
        )

    def _note(self, path: Path) -> dict[str, object]:
        """Says in the manifest when a file at hand is not the published one: it may be repacked, or rebuilt."""
        right = self.layout.md5
        if self.config.path is None or right is None or (path.is_file() and download.hashes(path)[1] == right):
            return {}
        return {"input_note": f"{path.name} is not byte for byte the {self.config.name}.zip that GroupLens published"}

    def _batches(self, path: Path, ratings: str, wanted: dict[str, str]) -> Iterator[pa.Table]:
        what = f"{ratings} in {path}"
        with archives.open_member(path, ratings) as stream:
            blocks = text_blocks.line_blocks(stream, what)
            yield from text_blocks.delimited(blocks, what, self.layout.separator, self.layout.fields, wanted)

    def _file(self) -> Path:
        if self.config.path is None:
            return download.fetch(self.remote, self.downloads)
        path = Path(self.config.path)
        archives.check_exists(path, f"{self.config.name}.zip of GroupLens or the folder it was extracted to")
        return path

    def _members(self, path: Path) -> tuple[str, str]:
        """The files of ratings and of movies inside ``path``."""
        names = archives.members(path)
        found = {}
        for wanted in (self.layout.ratings, self.layout.movies):
            member = archives.find(path, names, wanted, self.config.name)
            if member is None:
                raise UserError(self._other_layout(path, names, wanted))
            found[wanted] = member
        return found[self.layout.ratings], found[self.layout.movies]

    def _other_layout(self, path: Path, names: list[str], wanted: str) -> str:
        files = {name.rsplit("/", 1)[-1] for name in names}
        fits = [name for name, layout in LAYOUTS.items() if {layout.ratings, layout.movies} <= files]
        hint = f"; it looks like {' or '.join(fits)}, so set data.name" if fits else ""
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
        return (
            f"{path} has no {self.config.name}/{wanted}, which GroupLens' {self.config.name} has; it has {listed}{hint}"
        )


def read_movies(data: bytes, what: str, name: str) -> pa.Table:
    """``item_id``, ``title`` and ``genres`` (joined by ``|``) of a set's movies, all text.

    Args:
        data: The file.
        what: Names it in errors.
        name: The set.

    Raises:
        UserError: A field or column is missing, or the encoding is wrong.
    """
    if LAYOUTS[name].movies.endswith(".csv"):
        return _csv_movies(data, what)
    try:
        text = data.decode()  # some copies were converted; Latin-1 with accents is hardly ever valid UTF-8
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # as GroupLens wrote it
    rows = [_dat_movie, _item_movie][name == "ml-100k"]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = rows(line.rstrip("\r"))
            if row is None:
                right = "24 fields with '|' between them" if name == "ml-100k" else "id::title::genres"
                raise UserError(f"{what}: line {number}, {line[:80]!r}, is not {right}")
            found.append(row)
    if not found:
        raise UserError(f"{what} has no movies")
    return pa.table({key: [row[i] for row in found] for i, key in enumerate(("item_id", "title", "genres"))})


def _dat_movie(line: str) -> tuple[str, str, str] | None:
    movie, first, rest = line.partition("::")
    title, second, genres = rest.rpartition("::")
    return (movie, title, genres) if first and second and movie else None


GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip  # u.genre


def _item_movie(line: str) -> tuple[str, str, str] | None:
    fields = line.split("|")
    if len(fields) != 5 + len(GENRES_100K) or not fields[0]:
        return None
    flags = zip(GENRES_100K, fields[5:], strict=True)
    return fields[0], fields[1], "|".join(genre for genre, flag in flags if flag == "1")


def _csv_movies(data: bytes, what: str) -> pa.Table:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{what}: line {line} is not UTF-8 text (byte {error.object[error.start]:#x}), which GroupLens' file is; "
            "get the original"
        ) from None
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(("movieId", "title", "genres"), pa.string())
            ),
        )
    except pa.ArrowException as error:
        raise UserError(f"{what} cannot be read as CSV: {' '.join(str(error).split())}") from None
    for name in ("movieId", "title", "genres"):
        if name not in table.column_names:
            raise UserError(f"{what} has no column {name!r}; its columns are {', '.join(table.column_names)}")
    return pa.table({"item_id": table["movieId"], "title": table["title"], "genres": table["genres"]})
