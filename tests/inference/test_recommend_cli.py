"""gr-recommend prints titles as they are, and a mistake is one sentence and exit status 2."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from gr.distributed.process import ProcessContext
from gr.errors import UserError, run_cli
from gr.inference import cli, load
from gr.inference.recommend import Event, HeldOut, Recommendations, Row
from gr.training.weights import write_step

FOUND = Recommendations(
    rows=[Row(1, 4, 14, "[red]Brazil[/red]", 2.5, held_out=True), Row(2, 0, 10, "Alien", 1.25, seen=True)],
    history=[Event(i, f"Film {i}", ago=(12 - i) * 3600) for i in range(12)],
    held_out=HeldOut(4, "[red]Brazil[/red]", 1.5, 1682, "test"),
    user="ann",
    query_time=0,
    notes=["Asked at noon."],
)


def printed(found: Recommendations, **options) -> str:
    out = io.StringIO()
    terminal = {"TERM": "xterm-256color"}  # whatever the tests run in
    cli.show(found, Console(file=out, width=60, highlight=False, _environ=terminal, **options), ["made up"])
    return out.getvalue()


def test_output_shows_history_ranks_and_the_held_out_event():
    text = printed(FOUND)
    assert "User ann" in text and "… 2 earlier" in text and "Film 1 " not in text
    assert "Film 11" in text and "1 hour before" in text
    assert "[red]Brazil[/red]" in text and "2.500" in text and "came next" in text
    assert "ranked 1.5 of 1,682" in " ".join(text.split())
    assert "Asked at noon." in text and "Caveat: made up" in text
    assert "\x1b" not in text and "\x1b" in printed(FOUND, force_terminal=True)


def test_output_of_nothing_says_why():
    text = printed(Recommendations([], [Event(0, "x")], None, None, None, []))
    assert "Your history" in text and "--include-seen" in text and "came next" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--user", "1"], "RUN"),
        (["RUN", "--user", "1", "--history", "x"], "not allowed with"),
        (["RUN", "--user", "1", "--k", "0"], "--k is 0"),
        (["RUN", "--user", "1", "--k", "ten"], "--k"),
        (["RUN", "--user", "1", "--at", "soon"], "'soon' is not a time"),
        (["RUN", "--user", "1", "--usr"], "--usr"),
        (["no-such-run", "--user", "1"], "no-such-run does not exist"),
    ],
)
def test_mistakes_on_the_command_line_exit_2_with_one_sentence(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli(cli.main, argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_folder_without_a_finished_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.yaml"):
        load.load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("# config_hash: 0\nname: x\n")
    with pytest.raises(UserError, match="no finished model"):
        load.load_run(tmp_path)


def test_a_run_goes_by_its_name_and_an_unknown_one_lists_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").touch()
    assert load.resolve_run("demo") == load.resolve_run("runs/demo")
    with pytest.raises(UserError, match=r"there is runs.demo"):
        load.resolve_run("dmeo")


def test_weights_must_be_whole_and_fit(tmp_path):
    model = torch.nn.Linear(2, 3)
    path = tmp_path / "best.pt"
    torch.save({"model": model.state_dict()}, path)
    other = torch.nn.Linear(2, 3)
    load.load_weights(other, path)
    assert torch.equal(other.weight, model.weight)
    assert load.find_weights(tmp_path) == path
    with pytest.raises(UserError, match="is of another model"):
        load.load_weights(torch.nn.Linear(4, 3), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load.load_weights(other, path)
    torch.save({"step": 1}, path)
    with pytest.raises(UserError, match="no model weights"):
        load.load_weights(other, path)


def test_without_a_best_one_the_last_whole_checkpoint_is_taken(tmp_path, capsys):
    for step in (1, 2):
        state = {"model": {}, "optimizer": None, "tables": None}
        write_step(state, tmp_path / "checkpoints", step, {}, 2, ProcessContext())
    last = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    assert load.find_weights(tmp_path) == last and capsys.readouterr().err == ""
    last.write_bytes(b"")
    assert load.find_weights(tmp_path).parent.name == "step-00000001"
    words = r"warning: .*step-00000002 is damaged \(state.pt has 0 bytes of \d+\); the one before is read"
    assert re.search(words, capsys.readouterr().err)
