"""CSV and Parquet files as batches of columns, and one sentence for each way in which a file can be wrong."""

from __future__ import annotations

import codecs
import difflib
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from gr.errors import UserError

Encoding = Literal["utf-8", "latin-1"]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")
_LIKELY = {";": "';'", "\t": r"'\t'", "|": "'|'", ",": "','", ":": "':'"}
_CSV_BLOCK = 16 << 20
_PARQUET_ROWS = 1 << 20


@dataclass(frozen=True)
class Format:
    """How a CSV is written; Parquet knows itself.

    Attributes:
        names: Column names of a file without a header line.
        delimiter: One character; ``None``: by suffix.
        encoding: Of its text.
    """

    names: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: Encoding = "utf-8"

    def options(self, suffix: str) -> tuple[pacsv.ReadOptions, pacsv.ParseOptions]:
        """Arrow's options."""
        delimiter = self.delimiter or _SEPARATORS[suffix]
        encoding = "utf8" if self.encoding == "utf-8" else self.encoding
        read = pacsv.ReadOptions(column_names=list(self.names) or None, block_size=_CSV_BLOCK, encoding=encoding)
        return read, pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def list_files(path: str, form: Format) -> list[Path]:
    """The files of one file's path, a folder of Parquet files or a pattern such as ``events/*.parquet``, sorted.

    Raises:
        UserError: Nothing is there, or a file is not of a known kind.
    """
    here = Path(path)
    if here.is_dir():
        files = sorted(f for f in here.iterdir() if f.is_file() and _suffix(f) in _PARQUET and f.name[0] not in "._")
        if not files:
            raise UserError(f"{path} is not a file, and as a folder it holds no .parquet file")
    elif any(c in path for c in "*?[") and not here.exists():
        start = next(i for i, part in enumerate(here.parts) if any(c in part for c in "*?["))
        files = sorted(f for f in Path(*here.parts[:start]).glob(str(Path(*here.parts[start:]))) if f.is_file())
        if not files:
            raise UserError(f"{path} matches no file")
    else:
        files = [here]
    for file in files:
        check_file(file, form)
    return files


def check_file(path: Path, form: Format) -> str:
    """The file's kind by its suffix.

    Raises:
        UserError: Missing, not a file, empty, or of an unknown suffix.
    """
    suffix = _suffix(path)
    if suffix not in _SEPARATORS and suffix not in _PARQUET and form.delimiter is None:
        raise UserError(
            f"{path} has the suffix {suffix or '(none)'!r}; a log is .csv, .tsv (each also .gz), .parquet or .pq, "
            "or any text file with data.delimiter named"
        )
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path} does not exist{hint}")
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one CSV or Parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return suffix


def column_names(path: Path, form: Format) -> list[str]:
    """Names of a file's columns.

    Raises:
        UserError: The file cannot be read.
    """
    suffix = check_file(path, form)
    if form.names and suffix not in _PARQUET:
        return list(form.names)
    try:
        if suffix in _PARQUET:
            return pq.read_schema(path).names
        with pacsv.open_csv(path, *form.options(suffix)) as reader:
            return reader.schema.names
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _unreadable(path, suffix, error) from None


def read(path: Path, wanted: tuple[str, ...], form: Format) -> Iterator[pa.RecordBatch]:
    """Some columns of a file in batches; a CSV's as text, with empty fields as nulls.

    Raises:
        UserError: A column is missing or stands twice, or the file cannot be read.
    """
    present = column_names(path, form)
    suffix = _suffix(path)
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            hint = "" if suffix in _PARQUET else _other_delimiter(path, present) or hint
            raise UserError(f"{path} has no column {column!r}; {hint}its columns are {', '.join(present)}")
        if present.count(column) > 1:
            raise UserError(f"{path} has {present.count(column)} columns {column!r}; rename all but one")
    distinct = list(dict.fromkeys(wanted))
    try:
        yield from _parquet(path, distinct) if suffix in _PARQUET else _csv(path, suffix, distinct, form)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _unreadable(path, suffix, error, present) from None


def _parquet(path: Path, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    # Without pre-buffering and with a read buffer, a row group of any size is read page by page.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
            yield batch.select(wanted)


def _csv(path: Path, suffix: str, wanted: list[str], form: Format) -> Iterator[pa.RecordBatch]:
    convert = pacsv.ConvertOptions(
        column_types={column: pa.string() for column in wanted},
        include_columns=wanted,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    with pacsv.open_csv(path, *form.options(suffix), convert) as reader:
        yield from reader


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def _other_delimiter(path: Path, present: list[str]) -> str:
    """A hint where one column's name holds what looks like several."""
    if len(present) != 1:
        return ""
    found = max(_LIKELY, key=present[0].count)
    if not present[0].count(found):
        return ""
    return f"its header looks separated by {_LIKELY[found]}, so set data.delimiter: {_LIKELY[found]}; "


def _unreadable(path: Path, suffix: str, error: Exception, present: list[str] | None = None) -> UserError:
    reason = " ".join(str(error).split())
    if suffix in _PARQUET:
        return UserError(f"{path} cannot be read as a Parquet file (truncated or corrupt): {reason}")
    if _start(path) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return UserError(f"{path} is UTF-16 text; save it as UTF-8")
    if isinstance(error, UnicodeError) or "invalid UTF8" in reason:
        column = re.search(r"column #(\d+)", reason)
        name = f"column {present[int(column[1])]!r}" if column and present else "its header"
        return UserError(
            f"{path}: {name} is not UTF-8 text{_first_wrong_byte(path)}; set data.encoding: latin-1 if that is "
            "what it is, or save the file as UTF-8"
        )
    return UserError(f"{path} cannot be read as a CSV file: {reason}")


def _first_wrong_byte(path: Path) -> str:
    """Where a file stops being UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with _open(path) as file:
        while block := file.read(1 << 20):
            waiting = decoder.getstate()[0]
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                whole = waiting + block
                line += whole[: error.start].count(b"\n")
                return f" (byte 0x{whole[error.start]:02x} in line {line})"
            line += block.count(b"\n")
    return ""


def _start(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read(2)
    except (OSError, EOFError, zlib.error):  # a broken .gz
        return b""


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
