"""Large text files as Arrow tables, a block of lines at a time; a bad line is named by its number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from gr.errors import UserError

BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 64 << 20
_JSON_TYPES = {pa.string(): str, pa.int64(): int, pa.float64(): (int, float)}


def line_blocks(stream: BinaryIO, what: str, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Blocks of whole lines; only the last may lack its line break.

    Raises:
        UserError: A line of more than 64 MiB, which no text file has.
    """
    rest = b""
    while data := stream.read(block_bytes):
        end = data.rfind(b"\n") + 1
        if end:
            yield rest + data[:end]
            rest = data[end:]
        else:
            rest += data
            if len(rest) > _LONGEST_LINE:
                raise UserError(f"{what} has no line break in {len(rest)} bytes; it is no text file of one row a line")
    if rest:
        yield rest


def delimited(
    blocks: Iterator[bytes], what: str, separator: str, fields: Sequence[str] | None, wanted: Mapping[str, str]
) -> Iterator[pa.Table]:
    """Columns of unquoted delimited text.

    Args:
        blocks: Of ``line_blocks``.
        what: Names the file in errors.
        separator: One or two characters; two are replaced by a tab, which then must not occur.
        fields: The file's columns; ``None``: its first line names them.
        wanted: Canonical name to the file's.

    Yields:
        Tables with the wanted columns as text under their canonical names; empty fields are nulls.

    Raises:
        UserError: A column or a field is missing, or a line is not UTF-8.
    """
    number = 1
    for block in blocks:
        if fields is None:
            head, _, block = block.partition(b"\n")
            fields = head.decode("utf-8-sig", "replace").rstrip("\r").split(separator)
            number += 1
        for name in wanted.values():
            if name not in fields:
                raise UserError(f"{what} has no column {name!r}; its columns are {', '.join(fields)}")
        if block.strip():
            yield _delimited_block(block, number, what, separator, fields, wanted)
        number += block.count(b"\n")


def json_lines(
    blocks: Iterator[bytes], what: str, fields: Mapping[str, pa.DataType], wanted: Mapping[str, str]
) -> Iterator[pa.Table]:
    """Fields of JSON lines.

    Args:
        blocks: Of ``line_blocks``.
        what: Names the file in errors.
        fields: The file's names and types (string, int64, float64); other fields are passed over.
        wanted: Canonical name to the file's.

    Yields:
        Tables with the wanted columns under their canonical names; a field that a line lacks is a null.

    Raises:
        UserError: A line is no JSON object or has a value of another type, or no line has some field.
    """
    number = 1
    schema = pa.schema([(name, fields[name]) for name in wanted.values()])
    parse = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    for block in blocks:
        if block.strip():
            read = pajson.ReadOptions(block_size=len(block) + 1, use_threads=False)
            try:
                table = pajson.read_json(pa.BufferReader(block), read, parse)
                table.validate(full=True)  # the reader does not look whether text is UTF-8
            except pa.ArrowException as error:
                raise _bad_json(block, number, what, schema, error) from None
            for name in wanted.values():
                if table[name].null_count == table.num_rows:
                    raise UserError(
                        f"{what}: no line from {number} to {number + table.num_rows - 1} has a field {name!r}"
                    )
            yield pa.table({canonical: table[name] for canonical, name in wanted.items()})
        number += block.count(b"\n")


def _delimited_block(
    block: bytes, number: int, what: str, separator: str, fields: Sequence[str], wanted: Mapping[str, str]
) -> pa.Table:
    one = separator
    text = block
    if len(separator) > 1:
        if b"\t" in block:
            line = block.split(b"\t")[0].count(b"\n") + number
            raise UserError(f"{what}: line {line} has a tab in it; {separator!r} separates {', '.join(fields)}")
        one, text = "\t", block.replace(separator.encode(), b"\t")
    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            pacsv.ReadOptions(column_names=list(fields), block_size=len(text) + 1, use_threads=False),
            pacsv.ParseOptions(delimiter=one, quote_char=False),
            pacsv.ConvertOptions(
                column_types=dict.fromkeys(wanted.values(), pa.string()),
                include_columns=list(wanted.values()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        raise _bad_delimited(block, number, what, separator, fields, error) from None
    return table.rename_columns(list(wanted))


def _bad_delimited(
    block: bytes, first: int, what: str, separator: str, fields: Sequence[str], error: Exception
) -> UserError:
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip(b"\r"):
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return UserError(f"{what}: line {number} is not UTF-8 text: {line[:80]!r}")
        found = text.count(separator) + 1
        if found != len(fields):
            return UserError(
                f"{what}: line {number}, {text[:80]!r}, has {found} fields; {len(fields)} with {separator!r} between "
                f"them are right: {', '.join(fields)}"
            )
    return UserError(f"{what} cannot be read: {' '.join(str(error).split())}")


def _bad_json(block: bytes, first: int, what: str, schema: pa.Schema, error: Exception) -> UserError:
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError:
            return UserError(f"{what}: line {number} is not JSON in UTF-8: {line[:80]!r}")
        if not isinstance(row, dict):
            return UserError(f"{what}: line {number} is not a JSON object: {line[:80]!r}")
        for field in schema:
            value = row.get(field.name)
            right = isinstance(value, _JSON_TYPES[field.type]) and not isinstance(value, bool)
            if value is not None and not right:
                return UserError(f"{what}: line {number} has {field.name} {value!r}, which is not of type {field.type}")
    return UserError(f"{what} cannot be read: {' '.join(str(error).split())}")
