"""``gr-prepare`` prepares once, says what it made, and ends as ``gr-train`` does on a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gr import prepare
from gr.data.prepare import prepare as prepare_data
from gr.data.table import TableConfig
from gr.errors import run_cli

LOG = "user_id,item_id,timestamp\n1,1,1\n1,1,1\n1,2,9\n2,2,5\n2,1,4\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text(LOG)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"cache: {tmp_path / 'cache'}\ndata: {{kind: table, path: {tmp_path / 'none.csv'}, caveats: [made up]}}\n"
    )
    return path


def test_it_prepares_once_and_prints_what_there_is(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config), "--data.path", str(tmp_path / "log.csv")]
    assert run_cli(prepare.main, command) == 0
    first = capsys.readouterr().out
    (folder,) = (tmp_path / "cache").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert first.splitlines() == [
        f"prepared: {folder}",
        "  source    log.csv",
        "  users     2",
        "  items     2",
        "  events    4",
        "  repairs   duplicate rows dropped 1, out of order rows sorted 1",
        "  caveat    made up",
        f"  content   {manifest['content_hash']}",
    ]
    assert run_cli(prepare.main, command) == 0
    assert capsys.readouterr().out == first.replace("prepared:", "already prepared:")


def test_training_finds_what_it_prepared(config: Path, tmp_path: Path) -> None:
    assert run_cli(prepare.main, [str(config), "--data.path", str(tmp_path / "log.csv")]) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    store = prepare_data(TableConfig(path=str(tmp_path / "log.csv"), caveats=("made up",)), tmp_path / "cache")
    assert store.folder == folder


def test_a_mistake_is_one_sentence_and_status_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(prepare.main, [str(config)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "none.csv does not exist" in said and said.count("\n") == 1
    assert run_cli(prepare.main, [str(config), "--data.pth", "x"]) == 2
    assert "did you mean data.path?" in capsys.readouterr().err


def test_a_damaged_prepared_folder_is_one_sentence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config), "--data.path", str(tmp_path / "log.csv")]
    run_cli(prepare.main, command)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "manifest.json").write_text("{")
    assert run_cli(prepare.main, command) == 2
    assert f"prepared data {folder} is incomplete" in capsys.readouterr().err


def test_without_a_config_it_tells_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(prepare.main, []) == 2 and run_cli(prepare.main, ["--help"]) == 0
    assert "usage: gr-prepare CONFIG" in capsys.readouterr().out
