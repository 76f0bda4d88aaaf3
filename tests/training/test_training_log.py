"""metrics.jsonl after a resume, TensorBoard beside it, and what a person sees."""

from __future__ import annotations

import io
import json
import sys

import pytest

from gr.errors import UserError
from gr.training.log import MetricsLog, trim_metrics
from gr.training.prefetch import prefetch
from gr.training.progress import Progress, format_time
from tiny_training import tiny_config, tiny_trainer


def test_lines_after_the_resumed_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 1.0}, {"step": 4, "evaluation": {"mrr": 0.1}}, {"step": 5, "loss": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    assert trim_metrics(path, 4) == 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    assert trim_metrics(path, 4) == 0 and trim_metrics(tmp_path / "absent", 1) == 0
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2 is damaged"):
        trim_metrics(path, 4)


def test_numbers_without_a_json_form_become_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", None, 0, print)
    log.write({"step": 1, "evaluation": {"ne": float("nan"), "mrr": 0.5}})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "evaluation": {"ne": None, "mrr": 0.5},
    }


def test_tensorboard_holds_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(epochs=1, log_every_steps=4, tensorboard=True)
    tiny_trainer(tmp_path, config, evaluate=lambda model: {"mrr": 0.25}).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/mrr")] == [(8, 0.25)]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert [s for s, _ in found] == [4, 8] and [v for _, v in found] == pytest.approx([v for _, v in losses])


def test_without_tensorboard_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    notes = []
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0, notes.append)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert notes == ["TensorBoard is not installed; metrics.jsonl holds the same numbers"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream=stream)
        progress.start("train", 0, 10)
        progress.step(10, 10, 0, 1.5, 1000.0, 0.1)
        progress.note("epoch 1  mrr 0.5")
        progress.close()
    assert "10/10" in terminal.getvalue() and "loss 1.5000" in terminal.getvalue()
    assert file.getvalue() == "epoch 1  mrr 0.5\n"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = Progress(enabled=False, stream=stream)
    progress.start("train", 0, 10)
    progress.note("anything")
    assert stream.getvalue() == ""


def test_durations_read_naturally():
    assert [format_time(s) for s in (4.6, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 5 min"]


def test_prefetching_keeps_order_and_surfaces_errors_where_they_belong():
    def make(number):
        if number == 3:
            raise KeyError("three")
        return number * number

    with prefetch(make, [(n,) for n in range(3)]) as values:
        assert list(values) == [0, 1, 4]
    with prefetch(make, [(n,) for n in range(5)]) as values:
        assert [next(values) for _ in range(3)] == [0, 1, 4]
        with pytest.raises(KeyError):
            next(values)
    with prefetch(make, []) as values:
        assert list(values) == []
