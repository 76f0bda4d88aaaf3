"""However a run is interrupted, resuming it gives what an undisturbed run would have given, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gr.errors import UserError
from gr.training.checkpoint import find_checkpoint
from gr.training.config import EarlyStoppingConfig
from gr.training.phase import Hooks, Phase
from gr.training.signals import ASKING, ask_to_stop
from tiny_training import TinyLoader, TinyModel, same, tiny_config, tiny_trainer, weights

ROOT = Path(__file__).resolve().parents[2]

MEASURED = {"seconds", "tokens_per_s", "step_s", "achieved_tflops", "mfu", "imbalance", "padding", "memory_gib"} | {
    "ranks"
}
"""Fields of a line that are of this process, not of what was learned."""


class Boom(Exception):
    """An accident."""


def at(epoch: int, index: int, action):
    """A loader event that happens once, when the batch is first asked for."""
    fired = []

    def event(e: int, i: int) -> None:
        if (e, i) == (epoch, index) and not fired:
            fired.append(True)
            action()

    return event


def accident():
    raise Boom


def measure(model) -> dict[str, float]:
    """A metric that moves up and down with the weights."""
    return {"ndcg@10": float(model.linear.weight.abs().sum()), "loss": 1.0}


def undisturbed(tmp_path, config, **kwargs):
    trainer = tiny_trainer(tmp_path / "undisturbed", config, **kwargs)
    result = trainer.fit()
    return weights(trainer.model), result, deterministic_lines(tmp_path / "undisturbed")


def deterministic_lines(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_accident_at_any_step_leaves_no_trace_after_resume(tmp_path, accumulate):
    config = tiny_config(checkpoint_every_steps=3, accumulate=accumulate)
    expected, result, lines = undisturbed(tmp_path, config, evaluate=measure)
    for number, where in enumerate([(0, 1), (0, 4), (1, 0), (2, 7)]):
        folder = tmp_path / f"run{number}"
        with pytest.raises(Boom):
            loader = TinyLoader(event=at(*where, accident))
            tiny_trainer(folder, config, evaluate=measure, loader=loader).fit()
        trainer = tiny_trainer(folder, config, evaluate=measure)
        again = trainer.fit()
        assert same(weights(trainer.model), expected)
        assert deterministic_lines(folder) == lines
        assert (again.step, again.loss, again.total.tokens) == (result.step, result.loss, result.total.tokens)


def test_resume_is_exact_with_bf16_schedule_and_early_stopping(tmp_path):
    config = tiny_config(
        epochs=6,
        precision="bf16",
        checkpoint_every_steps=5,
        early_stopping=EarlyStoppingConfig("loss", patience=3),
    )
    expected, result, lines = undisturbed(tmp_path, config, evaluate=measure)
    assert result.status == "done" and result.best_step == 8 and result.step == 32
    with pytest.raises(Boom):
        tiny_trainer(tmp_path / "run", config, evaluate=measure, loader=TinyLoader(event=at(2, 5, accident))).fit()
    trainer = tiny_trainer(tmp_path / "run", config, evaluate=measure)
    assert trainer.fit().best_step == 8
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines


def test_a_finished_run_resumes_to_the_same_result_without_a_step(tmp_path):
    config = tiny_config()
    expected, result, _ = undisturbed(tmp_path, config)
    trainer = tiny_trainer(tmp_path / "undisturbed", config, loader=TinyLoader(event=at(0, 0, accident)))
    assert trainer.fit() == result and same(weights(trainer.model), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, capsys, number):
    config = tiny_config()
    expected, _, lines = undisturbed(tmp_path, config)
    handlers = [signal.getsignal(n) for n in ASKING]
    loader = TinyLoader(event=at(1, 3, lambda: os.kill(os.getpid(), number)))
    stopped = tiny_trainer(tmp_path / "run", config, loader=loader).fit()
    assert stopped.status == "stopped" and 8 <= stopped.step < 16
    assert f"saved at step {stopped.step}; the same command resumes" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in ASKING] == handlers
    trainer = tiny_trainer(tmp_path / "run", config)
    assert trainer.fit().status == "done"
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines


def test_training_in_a_thread_stops_when_it_is_asked_to(tmp_path):
    config = tiny_config()
    expected, _, lines = undisturbed(tmp_path, config)
    results = []
    trainer = tiny_trainer(tmp_path / "run", config, loader=TinyLoader(event=at(1, 3, ask_to_stop)))
    thread = threading.Thread(target=lambda: results.append(trainer.fit()))
    thread.start()
    thread.join()
    assert results[0].status == "stopped" and 8 <= results[0].step < 16
    trainer = tiny_trainer(tmp_path / "run", config)
    assert trainer.fit().status == "done"
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines


def test_a_signal_drops_a_running_evaluation_which_is_done_again(tmp_path):
    config = tiny_config()
    expected, _, lines = undisturbed(tmp_path, config, evaluate=measure)

    def long_evaluation(model):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("evaluation went on after the signal")

    stopped = tiny_trainer(tmp_path / "run", config, evaluate=long_evaluation).fit()
    assert (stopped.status, stopped.step) == ("stopped", 8)
    trainer = tiny_trainer(tmp_path / "run", config, evaluate=measure)
    trainer.fit()
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines


SCRIPT = """
import os, signal, sys
from gr.errors import run_cli
from tiny_training import TinyLoader, tiny_config, tiny_trainer
folder, epoch, index, number = sys.argv[1], *map(int, sys.argv[2:])
def event(e, i):
    if (e, i) == (epoch, index):
        os.kill(os.getpid(), number)
def main(argv):
    result = tiny_trainer(folder, tiny_config(checkpoint_every_steps=2), loader=TinyLoader(event=event)).fit()
    return 0 if result.status in ("done", "stopped") else 1
sys.exit(run_cli(main))
"""


def run_script(folder, epoch, index, number) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-c", SCRIPT, str(folder), str(epoch), str(index), str(int(number))]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def test_a_killed_process_resumes_bit_identically(tmp_path):
    threads = torch.get_num_threads()
    where = random.Random(11)
    done = run_script(tmp_path / "run", where.randrange(3), where.randrange(8), signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    config = tiny_config(checkpoint_every_steps=2)
    expected, _, lines = undisturbed(tmp_path, config)
    trainer = tiny_trainer(tmp_path / "run", config)
    trainer.fit()
    assert torch.get_num_threads() == threads
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines


def test_a_terminated_process_exits_with_status_zero(tmp_path):
    done = run_script(tmp_path / "run", 1, 2, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert "the same command resumes" in done.stdout
    assert find_checkpoint(tmp_path / "run" / "checkpoints").path is not None


def test_a_save_that_fails_leaves_the_previous_checkpoint_whole(tmp_path):
    config = tiny_config(checkpoint_every_steps=3)
    expected, _, _ = undisturbed(tmp_path, config)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = at(0, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard)))
    try:
        with pytest.raises(UserError, match=r"step-00000006.tmp/state.pt cannot be saved: File too large"):
            tiny_trainer(tmp_path / "run", config, loader=TinyLoader(event=limit)).fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003"]
    trainer = tiny_trainer(tmp_path / "run", config)
    trainer.fit()
    assert same(weights(trainer.model), expected)


def test_phases_freeze_parameters_run_hooks_and_resume_in_the_right_one(tmp_path):
    calls = []
    hooks = Hooks(
        before_phase=lambda model: calls.append("phase"),
        before_epoch=lambda model, epoch: calls.append(epoch),
    )
    phases = [
        Phase("tables", lambda model: [model.table.weight], epochs=1, hooks=hooks),
        Phase("head", lambda model: model.linear.parameters(), max_steps=11),
    ]
    start = weights(TinyModel())
    snapshots = {}
    first = Phase(
        "tables",
        phases[0].parameters,
        epochs=1,
        hooks=Hooks(after_step=lambda model, context: snapshots.update({context.step: weights(model)})),
    )
    config = tiny_config()
    expected, result, lines = undisturbed(tmp_path, config, phases=[first, phases[1]])
    assert result.step == 8 + 11
    assert torch.equal(snapshots[7]["linear.weight"], start["linear.weight"])
    assert torch.equal(expected["table.weight"], snapshots[7]["table.weight"])
    assert not torch.equal(expected["linear.weight"], start["linear.weight"])
    with pytest.raises(Boom):
        tiny_trainer(tmp_path / "run", config, phases=phases, loader=TinyLoader(event=at(1, 2, accident))).fit()
    assert calls == ["phase", 0]
    trainer = tiny_trainer(tmp_path / "run", config, phases=phases)
    trainer.fit()
    assert calls == ["phase", 0]
    assert same(weights(trainer.model), expected) and deterministic_lines(tmp_path / "run") == lines
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
