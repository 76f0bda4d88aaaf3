"""A store on disk is whole or refused, and says the same whatever the chunks that it was written in."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gr.data.store import NO_TIMES, Chunk, read_store, write_store
from gr.errors import UserError

LENGTHS = np.array([3, 1, 0, 4, 2])


def items(count: int) -> pa.Table:
    return pa.table({"item_id": np.arange(count) + 100, "title": [f"item {i}" for i in range(count)]})


def chunks(sizes: list[int]) -> list[Chunk]:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    columns = {"item_id": rng.integers(0, 7, offsets[-1]), "timestamp": np.arange(offsets[-1]) + 2**40}
    users = pa.array([f"u{i}" for i in range(len(LENGTHS))])
    result, lo = [], 0
    for size in sizes:
        part = offsets[lo : lo + size + 1]
        cut = {name: values[part[0] : part[-1]] for name, values in columns.items()}
        result.append(Chunk(users[lo : lo + size], part - part[0], cut))
        lo += size
    return result


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_store(tmp_path / "s", chunks([5]), items(7), {"source": "x", "caveats": ["half of it is made up"]})
    store = read_store(tmp_path / "s")
    (chunk,) = chunks([5])
    np.testing.assert_array_equal(store.lengths, LENGTHS)
    for name, values in chunk.columns.items():
        np.testing.assert_array_equal(store.columns[name], values)
        assert store.columns[name].dtype == np.int64
    assert store.user_ids.to_pylist() == [f"u{i}" for i in range(5)]
    assert store.items["title"][3].as_py() == "item 3"
    assert store.manifest["counts"] == {"users": 5, "items": 7, "events": 10}
    assert store.manifest["caveats"] == ["half of it is made up"]
    assert store.num_items == 7 and store.num_actions == 0 and store.has_times and store.folder == tmp_path / "s"


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1], [2, 3]])
def test_chunks_do_not_change_the_content(tmp_path: Path, sizes: list[int]) -> None:
    write_store(tmp_path / "one", chunks([5]), items(7), {})
    write_store(tmp_path / "two", chunks(sizes), items(7), {})
    for name in ("item_id.npy", "timestamp.npy", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = read_store(tmp_path / "one"), read_store(tmp_path / "two")
    np.testing.assert_array_equal(one.offsets, two.offsets)
    assert one.user_ids.equals(two.user_ids)


def test_columns_are_mapped_and_plain_numpy_files(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", chunks([2, 3]), items(7), {})
    for name, column in read_store(folder).columns.items():
        assert isinstance(column.base.obj, mmap.mmap) and not column.flags.writeable
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), column)


def test_a_log_without_events_is_read(tmp_path: Path) -> None:
    empty = Chunk(pa.array(["a", "b"]), np.zeros(3, np.int64), {"item_id": np.zeros(0, np.int64)})
    store = read_store(write_store(tmp_path / "s", [empty], items(7), {}))
    assert store.num_events == 0 and store.num_users == 2 and store.columns["item_id"].size == 0


def test_another_content_has_another_hash(tmp_path: Path) -> None:
    write_store(tmp_path / "one", chunks([5]), items(7), {})
    other = chunks([5])
    other[0].columns["item_id"][0] ^= 1
    write_store(tmp_path / "two", other, items(7), {})
    hashes = {read_store(tmp_path / name).manifest["content_hash"] for name in ("one", "two")}
    assert len(hashes) == 2


def test_a_log_without_times_says_so(tmp_path: Path) -> None:
    (chunk,) = chunks([5])
    del chunk.columns["timestamp"]
    write_store(tmp_path / "s", [chunk], items(7), {})
    store = read_store(tmp_path / "s")
    assert store.manifest["caveats"] == [NO_TIMES]
    with pytest.raises(UserError, match="time bias needs times"):
        store.require_times("a time bias")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield chunks([5])[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_store(tmp_path / "s", broken(), items(7), {})
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        write_store(tmp_path / "file" / "s", chunks([5]), items(7), {})


@pytest.mark.parametrize("name", ["item_id.npy", "users.parquet", "items.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "longer", "emptied"])
def test_damage_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_store(tmp_path / "s", chunks([5]), items(7), {})
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: -len(content) // 4])
    elif damage == "flipped":
        content[-1 if name.endswith(".npy") else len(content) // 5] ^= 0x01  # a number, or inside the first pages' data
        file.write_bytes(content)
    else:
        file.write_bytes(content + b"and more" if damage == "longer" else b"")
    with pytest.raises(UserError, match=f"{name}.*delete .* prepares it again"):
        read_store(folder)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", chunks([5]), items(7), {})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_store(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="incomplete"):
        read_store(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        read_store(folder)
