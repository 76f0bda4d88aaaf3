"""Amazon reviews of 2014 and 2018: the public ratings CSVs and 5-core JSON lines, downloaded or at hand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from gr.data import archives, download, text_blocks
from gr.data.out_of_core import prepare_log
from gr.data.raw import RawLog, Rules
from gr.data.table import ItemTableConfig, read_items
from gr.errors import UserError

TERMS = (
    "Amazon reviews are published by J. McAuley's group (UCSD) for research, with citation of their papers; "
    "the reviews remain Amazon's and their writers', so do not redistribute them"
)
_FOLDERS = {
    2014: "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
    2018: "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/",
}
_FILES = {
    (2014, "5core"): "reviews_{}_5.json.gz",
    (2014, "ratings"): "ratings_{}.csv",
    (2018, "5core"): "{}_5.json.gz",
    (2018, "ratings"): "{}.csv",
}
# The files have no header line. In 2018 the publisher turned the first two columns round.
_CSV_FIELDS = {2014: ("user", "item", "rating", "timestamp"), 2018: ("item", "user", "rating", "timestamp")}
_JSON_FIELDS = {
    "reviewerID": pa.string(), "asin": pa.string(), "unixReviewTime": pa.int64(), "overall": pa.float64()
}  # fmt: skip
_BOTH = (
    "Automotive", "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry",
    "Digital_Music", "Electronics", "Grocery_and_Gourmet_Food", "Home_and_Kitchen", "Kindle_Store",
    "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games",
)  # fmt: skip
_ONLY_2014 = (
    "Amazon_Instant_Video", "Apps_for_Android", "Baby", "Beauty", "Health_and_Personal_Care",
)  # fmt: skip
_ONLY_2018 = (
    "AMAZON_FASHION", "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Gift_Cards",
    "Industrial_and_Scientific", "Luxury_Beauty", "Magazine_Subscriptions", "Prime_Pantry", "Software",
)  # fmt: skip
CATEGORIES = {2014: _BOTH + _ONLY_2014, 2018: _BOTH + _ONLY_2018}
_ASIN = re.compile(r"^[0-9A-Z]{10}$").pattern


@dataclass(frozen=True, kw_only=True)
class AmazonConfig(Rules):
    """One category of reviews. Times are days (2014: 00:00 UTC); events of a day keep the order of the file.

    Attributes:
        name: Category as in the publisher's file name, for instance ``Beauty`` (2014) or ``All_Beauty`` (2018).
        year: 2014 (to July 2014) or 2018 (to October 2018).
        form: ``5core``: JSON lines of users and items with 5 reviews or more; ``ratings``: all of them, as CSV.
        path: The file at hand, gzipped or not; ``None``: it is downloaded into the cache.
        url: Another place to download the same file from.
        ratings: Keeps the rating of each event as its action.
        items: Table of titles; the files have only ids.
    """

    kind: str = "amazon"
    name: str
    year: Literal[2014, 2018] = 2014
    form: Literal["5core", "ratings"] = "5core"
    path: str | None = None
    url: str | None = None
    ratings: bool = False
    items: ItemTableConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = CATEGORIES[self.year]
        if self.path is None and self.url is None and self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=1) or [n for n in known if self.name in n]
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"name {self.name!r} is no category of {self.year}; {hint}one of {', '.join(sorted(known))}, or name a "
                "file at hand in path"
            )


class Amazon:
    """The source of ``kind: amazon``."""

    def __init__(self, config: AmazonConfig) -> None:
        self.config = config
        file = _FILES[config.year, config.form].format(config.name)
        self.remote = download.Remote(config.url or _FOLDERS[config.year] + file, TERMS)
        self.downloads = Path("cache/downloads")

    def locate(self, downloads: Path) -> None:
        """Tells where downloads lie; nothing is read yet."""
        self.downloads = downloads

    def fingerprint(self) -> str:
        """sha256 over the file's content and the item table's; downloads it if it was never seen.

        Raises:
            UserError: A file is not there, or the download failed.
        """
        items = [Path(self.config.items.path)] if self.config.items else []
        for path in items:
            archives.check_exists(path, "a CSV or Parquet table of titles")
        if self.config.path is None:
            return download.pinned_sha256(self.remote, self.downloads) + archives.sha256(items)
        return archives.sha256([self._file(), *items])

    def prepare(self, folder: str | Path) -> None:
        """Writes the store of this category into ``folder``.

        Raises:
            UserError: The download failed, or the file is damaged or of another form (see ``read``).
        """
        prepare_log(self.read(), self.config, Path(folder))

    def read(self) -> RawLog:
        """The log, its events not yet read.

        Raises:
            UserError: No file, or one of another form, year or encoding, or cut short; mostly only when the batches
                are read.
        """
        path = self._file()
        if self.config.form == "ratings":
            names = {"user_id": "user", "item_id": "item", "timestamp": "timestamp", "action": "rating"}
        else:
            names = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime", "action": "overall"}
        if not self.config.ratings:
            del names["action"]
        items = None if self.config.items is None else read_items(self.config.items)
        return RawLog(source=path.name, names=names, batches=self._batches(path, names), items=items)

    def _batches(self, path: Path, names: dict[str, str]) -> Iterator[pa.Table]:
        with archives.open_maybe_gzip(path) as stream:
            blocks = text_blocks.line_blocks(stream, str(path))
            first = next(blocks, b"")
            is_json = first.lstrip()[:1] == b"{"
            if is_json != (self.config.form == "5core"):
                found, right = ("JSON lines", "5core") if is_json else ("no JSON lines", "ratings")
                raise UserError(f"{path} holds {found}, so data.form {self.config.form!r} is wrong; set {right!r}")
            whole = _with_first(first, blocks)
            if is_json:
                yield from text_blocks.json_lines(whole, str(path), _JSON_FIELDS, names)
                return
            fields = _CSV_FIELDS[self.config.year]
            for number, table in enumerate(text_blocks.delimited(whole, str(path), ",", fields, names)):
                if number == 0:
                    self._check_year(path, table)
                yield table

    def _check_year(self, path: Path, table: pa.Table) -> None:
        """Users and items change places between the years; Amazon's item ids have 10 characters, most users' 13 or
        14."""
        looks = {
            name: pc.mean(pc.match_substring_regex(table[name], _ASIN)).as_py() or 0 for name in table.column_names
        }
        if looks["user_id"] > 0.9 and looks["item_id"] < 0.5:
            first = {name: table[name][0].as_py() for name in ("user_id", "item_id")}
            other = 2018 if self.config.year == 2014 else 2014
            raise UserError(
                f"{path}: read as of {self.config.year}, its first row has user {first['user_id']!r} and item "
                f"{first['item_id']!r}, which are the wrong way round; set data.year: {other}"
            )

    def _file(self) -> Path:
        if self.config.path is None:
            return download.fetch(self.remote, self.downloads)
        path = Path(self.config.path)
        archives.check_exists(path, f"a file such as {self.remote.name}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; data.path names a file such as {self.remote.name}")
        return path


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
