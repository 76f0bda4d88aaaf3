"""A log is prepared once; a changed file or config is prepared anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gr.data.prepare import prepare
from gr.data.table import Table, TableConfig
from gr.errors import UserError

TEXT = "user_id,item_id,timestamp\n1,1,1\n1,2,2\n1,3,3\n"


@pytest.fixture
def config(tmp_path: Path) -> TableConfig:
    (tmp_path / "log.csv").write_text(TEXT)
    return TableConfig(path=str(tmp_path / "log.csv"))


def test_the_second_call_reads_the_cache(tmp_path: Path, config: TableConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, tmp_path / "cache")
    monkeypatch.setattr(Table, "prepare", lambda *_: pytest.fail("prepared twice"))
    second = prepare(config, tmp_path / "cache")
    assert first.folder == second.folder and first.folder.name.startswith("table-")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_a_changed_file_or_config_is_prepared_anew(tmp_path: Path, config: TableConfig) -> None:
    folders = {prepare(config, tmp_path / "cache").folder}
    folders.add(prepare(dataclasses.replace(config, duplicates="keep"), tmp_path / "cache").folder)
    (tmp_path / "log.csv").write_text(TEXT + "1,4,4\n")
    store = prepare(config, tmp_path / "cache")
    assert store.num_events == 4
    assert len(folders | {store.folder}) == 3


def test_a_process_that_was_first_wins(tmp_path: Path, config: TableConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes prepare at once: the second finds the folder there when it renames its own."""
    slow = Table.prepare

    def beaten(self: Table, folder: Path) -> None:
        slow(self, folder)
        monkeypatch.setattr(Table, "prepare", slow)
        prepare(config, tmp_path / "cache")

    monkeypatch.setattr(Table, "prepare", beaten)
    store = prepare(config, tmp_path / "cache")
    assert store.num_events == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, config: TableConfig) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config, tmp_path / "log.csv" / "cache")
