"""A worker is killed with SIGKILL; the launcher starts all again, and the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tiny_runs import ROOT, TINY, WORLD

OURS = Path(__file__).parent
ENCODER = {**TINY["model"]["encoder"], "kind": "killing:KillingHSTU"}
CONFIG = {
    **TINY,
    "data": {**WORLD, "num_users": 200},
    "model": {**TINY["model"], "encoder": ENCODER},
    "train": {**TINY["train"], "checkpoint_every_steps": 2, "batching": {"batch_size": 32}},
    "evaluation": {"baselines": []},
    "device": "cpu",
}
KILL_AT = 6  # of seven steps an epoch: the last checkpoint is two steps old, or four if its writer was not done


def launch(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    path = os.pathsep.join([str(ROOT), str(OURS)])
    return subprocess.run(
        [sys.executable, "-m", "gr.launch.cli", *options, "tiny.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch(folder, "torchrun", "--nproc", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("torchrun",),
        ("ray", "--cpus", "0.5"),
        pytest.param(("deepspeed",), marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0],
)
def test_a_killed_worker_leaves_no_trace(undisturbed, tmp_path, options) -> None:
    mark = tmp_path / "killed"
    folder = tmp_path / "run"
    argv = (options[0], "--nproc", "2", "--max-restarts", "2", *options[1:])
    done = launch(folder, *argv, KILL_MARK=str(mark), KILL_AT=str(KILL_AT))
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert mark.exists() and re.search(r"resuming from step [24]\b", said), said
    found, expected = (torch.load(f / "runs" / "tiny" / "best.pt")["model"] for f in (folder, undisturbed))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    metrics = [json.loads((f / "runs" / "tiny" / "results.json").read_text())["metrics"] for f in (folder, undisturbed)]
    assert metrics[0] == metrics[1]
    assert not (folder / "runs" / ".ray").exists()
