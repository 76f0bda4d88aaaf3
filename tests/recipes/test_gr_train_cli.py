"""``gr-train`` as users run it: killed, stopped, misused, short of disk, on two processes."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gr.evaluation.saved_ranks import load_ranks
from gr.training.checkpoint import load_torch
from tiny_runs import TINY, WORLD, environment, train, train_process, write

SLOWER = {**WORLD, "num_users": 1500}  # enough steps for an accident to happen in


def weights(folder, name="tiny"):
    return load_torch(folder / "runs" / name / "best.pt")["model"]


def wait_for_step(folder, step, process):
    """Returns once metrics.jsonl holds ``step``; the run logs every step."""
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and re.search(rf'"step": {step}\b', path.read_text()):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)  # leaves the processor to the run
    pytest.fail(f"no step {step}: {process.communicate(timeout=5)}")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder, data=SLOWER)
    status, out, err = train(folder, "tiny.yaml", "--train.checkpoint_every_steps", "7")
    assert status == 0, err
    return folder, out


def test_the_summary_names_model_baselines_ceiling_audit_and_report(undisturbed):
    _, out = undisturbed
    for words in ("HSTU", "Popularity", "Markov", "best possible", "best without times", "leak audit: nothing found",
                  "report: runs/tiny/report.html", "gr-recommend runs/tiny"):  # fmt: skip
        assert words in out, out


def test_sigkill_at_a_random_step_then_the_same_command_gives_bit_identical_weights(undisturbed, tmp_path):
    step = int(np.random.default_rng().integers(3, 40))
    write(tmp_path, data=SLOWER)
    arguments = ("tiny.yaml", "--train.checkpoint_every_steps", "7")
    process = train_process(tmp_path, *arguments)
    wait_for_step(tmp_path, step, process)
    process.kill()
    process.communicate(timeout=60)
    status, out, err = train(tmp_path, *arguments)
    assert status == 0, (step, err)
    assert same(weights(tmp_path), weights(undisturbed[0])), f"killed at step {step}"
    results = [json.loads((f / "runs" / "tiny" / "results.json").read_text()) for f in (tmp_path, undisturbed[0])]
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.mark.parametrize("step", [10, 30])  # before the first validation, and after it, when best.pt exists
def test_sigterm_saves_exits_with_3_and_the_same_command_resumes(undisturbed, tmp_path, step):
    write(tmp_path, data=SLOWER)
    process = train_process(tmp_path, "tiny.yaml")
    wait_for_step(tmp_path, step, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and re.search(r"saved at step \d+; the same command resumes", out + err), (out, err)
    assert not (tmp_path / "runs" / "tiny" / "results.json").exists()
    status, _, err = train(tmp_path, "tiny.yaml")
    assert status == 0, err
    assert same(weights(tmp_path), weights(undisturbed[0]))


def test_a_full_disk_during_a_save_is_one_sentence_and_leaves_no_half_file(tmp_path):
    write(tmp_path)
    status, _, err = train(tmp_path, "tiny.yaml", "--train.epochs", "1")
    assert status == 0, err
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    limit = max(path.stat().st_size for path in checkpoints.glob("*/*")) // 2

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, _, err = train(tmp_path, "tiny.yaml", "--name", "full", preexec_fn=small_files)
    assert status == 2, err
    assert err.strip().splitlines()[-1].startswith("error: ") and "saved" in err and "Traceback" not in err
    left = [p.name for p in (tmp_path / "runs" / "full").rglob("*") if p.is_file()]
    assert not [name for name in left if name.endswith((".pt", ".tmp"))], left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.yaml",), "absent.yaml does not exist"),
        (("tiny.yaml", "--train.epoch", "3"), "did you mean train.epochs?"),
        (("tiny.yaml", "--model.encoder.kind", "hstuu"), "did you mean 'hstu'?"),
        (("tiny.yaml", "--train.epochs", "0"), "epochs is 0; it must be at least 1"),
        (("tiny.yaml", "--data.num_users", "many"), "data.num_users is 'many'"),
        (("tiny.yaml", "--layout.kind", "added"), "reads actions"),
        (("nonsense",), "'nonsense' is not a config"),
        (("tiny.yaml", "--model.encoder.causal", "false"), "model.encoder.causal is false"),
        (("tiny.yaml", "--model.encoder.backend", "cudnn"), "encoder.backend: backend must be one of auto, reference"),
        (("tiny.yaml", "--model.encoder.alpha", ".nan"), "encoder.alpha must be a finite number"),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_status_2(tmp_path, capsys, monkeypatch, arguments, words):
    from gr.errors import run_cli
    from gr.train import main

    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_cli(main, list(arguments)) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_gr_launch_stops_resumes_and_refuses_like_gr_train(tmp_path):
    """Two processes through gr-launch: SIGTERM saves and gives 3, the same command resumes, a mistake gives 2."""
    # Long enough that the signal, through three processes on a busy machine, comes before the end.
    write(tmp_path, data=SLOWER, train={**TINY["train"], "epochs": 8})
    launch = ["-m", "gr.launch.cli", "torchrun", "--nproc", "2", "tiny.yaml"]
    process = subprocess.Popen(
        [sys.executable, *launch],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path, 30, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 3 and "the same command resumes" in out + err, (out, err)
    assert "Traceback" not in err
    status, out, err = train_process_with(tmp_path, launch[:-1], "tiny.yaml")
    assert status == 0 and "resuming from step" in out + err, (out, err)
    status, _, err = train_process_with(tmp_path, launch[:-1], "tiny.yaml", "--seed", "-1")
    assert status == 2 and err.count("\n") == 1 and "seed is -1" in err
    log = {"kind": "table", "path": "absent.csv"}  # found out by the workers, after the launch
    write(tmp_path, data=log)
    status, _, err = train_process_with(tmp_path, launch[:-1], "tiny.yaml", "--name", "other")
    assert status == 2 and "error: " in err and "absent.csv" in err and "Traceback" not in err


def test_help_and_print_config_do_what_they_say(tmp_path, capsys, monkeypatch):
    from gr.train import main

    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--help"]) == 0 and "usage: gr-train CONFIG" in capsys.readouterr().out
    assert main(["tiny.yaml", "--print-config", "--seed", "9"]) == 0
    assert "seed: 9" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_two_processes_with_64_sequences_each_learn_and_rank_as_one_with_128(tmp_path):
    """50 steps without dropout: loss to 1e-5, weights to 1e-4; one checkpoint gives every user one rank."""
    write(tmp_path, data={**WORLD, "num_users": 1300})
    changes = {
        "train.batching.batch_size": 128,
        "train.epochs": 5,
        "train.max_steps": 50,
        "train.optimizer.lr": 0.003,
        "train.early_stopping": "null",
        "model.encoder.dropout": 0.0,
        "model.preprocessor.dropout": 0.0,
        "objective.kind": "sampled_softmax",
        "objective.num_negatives": 32,
    }
    common = ("tiny.yaml", *(f"--{field}={value}" for field, value in changes.items()))
    status, _, err = train(tmp_path, *common, "--name", "one")
    assert status == 0, err
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gr.train")
    two = train_process_with(tmp_path, launch, *common, "--name", "two")
    assert two[0] == 0, two

    def losses(name):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    np.testing.assert_allclose(losses("two"), losses("one"), rtol=1e-5)
    assert len(losses("one")) == 50
    a, b = weights(tmp_path, "one"), weights(tmp_path, "two")
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-4)

    # The same weights, judged by one process and by two: bit-identical ranks.
    run_two = tmp_path / "runs" / "two"
    first = load_ranks(run_two / "ranks_test.parquet")
    (run_two / "stages" / "evaluate" / "artifact.json").unlink()
    status, _, err = train(tmp_path, *common, "--name", "two")
    assert status == 0, err
    again = load_ranks(run_two / "ranks_test.parquet")
    np.testing.assert_array_equal(first.better, again.better)
    np.testing.assert_array_equal(first.tied, again.tied)


def train_process_with(folder, launch, *arguments):
    done = subprocess.run(
        [sys.executable, *launch, *arguments], cwd=folder, env=environment(), capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr
