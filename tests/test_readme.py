"""README's commands work as written: each is run, in order, on a world small enough for a test."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import render

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]
SHORT = ["--train.max_steps=4", "--train.schedule.warmup_steps=0", "--train.tensorboard=false"]
SMALL = ["--data.num_users=200", *SHORT, "--evaluation.baselines=[popularity]"]


def shrunk(command: str) -> list[str]:
    """The words of a command, with overrides that make a training run tiny; everything else as written."""
    words = shlex.split(command)
    if words[0] in ("gr-train", "gr-launch") and "--print-config" not in words:
        words += SHORT if "my-data.yaml" in command else SMALL
    return words


def execute(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    start = {"gr-recommend": "from gr.inference.cli import cli", "gr-train": "from gr.train import cli"}
    code = start.get(words[0], "from gr.launch.cli import cli") + "; raise SystemExit(cli())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words[1:]], cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )


def write_events(folder: Path) -> None:
    """The log whose first lines README shows, and enough others to learn from."""
    shown = next(text for kind, text in BLOCKS if kind == "csv")
    more = [f"v{u},Film {(u * 5 + i * 3) % 11},{1_700_000_000 + 60 * i + u}" for u in range(30) for i in range(6)]
    (folder / "events.csv").write_text(shown + "\n".join(more) + "\n")


def test_every_command_works_as_written(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_events(tmp_path)
    ran = 0
    for command in COMMANDS:
        if command in ("make test", ". .venv/bin/activate"):
            continue  # the first is what runs this test; the second has no output to check
        command = {"make train": "gr-train configs/quickstart.yaml"}.get(command, command)
        done = execute(shrunk(command), tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 9
    for name in ("quickstart", "no-time", "sasrec", "paper-loss", "two", "my-data"):
        assert (tmp_path / "runs" / name / "report.html").exists(), name
    for kind, text in BLOCKS:
        if kind == "python":
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr[-2000:]


@pytest.mark.parametrize("target", ["setup", "train", "test", "test-all", "lint", "bench"])
def test_make_targets_expand_to_what_readme_says(target):
    """`make train` and `make test` are checked as Make would run them; their commands run above, or are this run."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = {"train": "gr-train configs/quickstart.yaml", "test": "-m pytest -n", "test-all": '-m ""'}
    assert wanted.get(target, "") in done.stdout


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_figures_are_those_that_were_measured():
    """`python -m benchmarks.readme` writes them; a hand that changes one is noticed here."""
    assert render(README) == README
