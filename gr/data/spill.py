"""Rows that do not fit in memory: kept there while they are few, in temporary Arrow files when they are many."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from gr.errors import UserError


class Scratch:
    """A temporary folder beside the place where a store will stand, made when first needed.

    As a context manager it is removed however its block is left.
    """

    def __init__(self, folder: Path) -> None:
        self.beside = folder
        self._path: Path | None = None
        self._files = 0

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def file(self) -> Path:
        """A new file's path.

        Raises:
            UserError: The place cannot be written.
        """
        try:
            if self._path is None:
                self.beside.parent.mkdir(parents=True, exist_ok=True)
                self._path = Path(tempfile.mkdtemp(prefix=f".{self.beside.name}.sort-", dir=self.beside.parent))
        except OSError as error:
            raise self.failed(error) from None
        self._files += 1
        return self._path / f"{self._files:06d}.arrow"

    def failed(self, error: OSError) -> UserError:
        """The one sentence about a full disk and its like."""
        return UserError(
            f"temporary files beside {self.beside} could not be written or read ({error}); sorting a log takes "
            "about 40 bytes of disk a row there while it lasts"
        )


class Spill:
    """Tables appended and read again in the same order.

    The first ``in_memory`` rows stay in memory; once there are more, everything goes to disk. All tables have
    the same columns; where a column's type changes, a new file begins.
    """

    def __init__(self, scratch: Scratch, in_memory: int) -> None:
        self.rows = 0
        self._scratch = scratch
        self._in_memory = in_memory
        self._held: list[pa.Table] = []
        self._files: list[Path] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._sink: pa.NativeFile | None = None
        self._schema: pa.Schema | None = None

    def append(self, table: pa.Table) -> None:
        """Adds rows.

        Raises:
            UserError: The disk is full.
        """
        self.rows += table.num_rows
        self._held.append(table)
        if self.rows > self._in_memory:
            try:
                for held in self._held:
                    self._write(held)
            except OSError as error:
                raise self._scratch.failed(error) from None
            self._held = []

    def finish(self) -> None:
        """Closes the file being written, if there is one."""
        writer, sink, self._writer, self._sink, self._schema = self._writer, self._sink, None, None, None
        try:
            if writer is not None:
                writer.close()
            if sink is not None:
                sink.close()
        except OSError as error:
            raise self._scratch.failed(error) from None

    def read(self) -> Iterator[pa.Table]:
        """The tables; those on disk in batches as they were written."""
        self.finish()
        yield from self._held
        try:
            for path in self._files:
                # Not mapped into memory: mapped pages would count as this process's memory.
                with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                    for batch in reader:
                        yield pa.Table.from_batches([batch])
        except OSError as error:
            raise self._scratch.failed(error) from None

    def remove(self) -> None:
        """Gives memory and disk back."""
        self.finish()
        self._held = []
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files = []

    def _write(self, table: pa.Table) -> None:
        if table.schema != self._schema:
            self.finish()
            path = self._scratch.file()
            self._files.append(path)
            self._schema = table.schema
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_stream(self._sink, table.schema)
        assert self._writer is not None
        self._writer.write_table(table)


class Distinct:
    """The distinct values of a column that comes in parts, with how often each was seen."""

    _MOST_PENDING = 1 << 22

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._text = False
        self._pending = 0  # values added since the last merge

    def add(self, values: pa.Array) -> pa.Array:
        """Counts int64 or text values; returns them, as text if any so far was text."""
        if self._text:
            values = values.cast(pa.string())
        self._text = pa.types.is_string(values.type)
        seen, counts = values.value_counts().flatten()
        self._parts.append(pa.table({"id": seen, "n": counts}))
        self._pending += len(seen)
        if self._pending > self._MOST_PENDING:
            self._merge()
        return values

    def sorted(self) -> tuple[pa.Array, pa.Array]:
        """((n,) the distinct values in order, (n,) int64 their counts)."""
        table = self._merge().sort_by("id")
        return table["id"].combine_chunks(), table["n"].combine_chunks()

    def _merge(self) -> pa.Table:
        if self._text:
            self._parts = [part.set_column(0, "id", part["id"].cast(pa.string())) for part in self._parts]
        both = pa.concat_tables(self._parts)
        merged = both.group_by("id", use_threads=False).aggregate([("n", "sum")]).rename_columns(["id", "n"])
        self._parts, self._pending = [merged], 0
        return merged
