"""README's commands work as written: each is run, in order, on a world small enough for a test."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.readme import render
from documents import ROOT, SHORT, blocks, execute, run

README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)
REAL = "On real data"
CHANGE = "Change something"
SCALING = "What more compute would buy"
SMALL = ["--data.num_users=200", *SHORT, "--evaluation.baselines=[popularity]"]


FILES = {"ml-1m_": "tiny-ml-1m.zip", "ml-100k_": "tiny-ml-100k.zip", "beauty_": "tiny-beauty.json"}
"""Configs whose logs are downloaded, and the small files that take the download's place here."""


def write_public_logs(folder: Path) -> None:
    """Logs as GroupLens and Amazon's publisher lay them out, of 30 users."""
    titles = {1: "Toy Story (1995)", 6: "Heat (1995)"} | {i: f"Film {i} (1990)" for i in (2, 3, 4, 5, 7, 8, 9, 10, 11)}
    events = [(u, 1 + (u * 5 + i * 3) % 11, 978_300_000 + 60 * i + u) for u in range(1, 31) for i in range(6)]
    with zipfile.ZipFile(folder / "tiny-ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "".join(f"{u}::{i}::4::{t}\n" for u, i, t in events))
        archive.writestr("ml-1m/movies.dat", "".join(f"{i}::{title}::Drama\n" for i, title in titles.items()))
    with zipfile.ZipFile(folder / "tiny-ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in events))
        archive.writestr("ml-100k/u.item", "".join(f"{i}|{title}{'|0' * 22}\n" for i, title in titles.items()))
    rows = [{"reviewerID": f"A{u}", "asin": f"B{i:09d}", "overall": 5.0, "unixReviewTime": t} for u, i, t in events]
    (folder / "tiny-beauty.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shrunk(command: str) -> list[str]:
    """The words of a command, with overrides that make a training run tiny; everything else as written."""
    words = shlex.split(command)
    if words[0] in ("gr-train", "gr-launch") and "--print-config" not in words:
        at_hand = [f"--data.path={path}" for config, path in FILES.items() if config in command]
        words += [*SHORT, *at_hand] if at_hand or "my-data.yaml" in command else SMALL
    if words[0] == "gr-prepare":
        words += [f"--data.path={path}" for config, path in FILES.items() if config in command]
    return words


def write_events(folder: Path) -> None:
    """The log whose first lines README shows, and enough others to learn from."""
    shown = next(text for kind, text in BLOCKS if kind == "csv")
    more = [f"v{u},Film {(u * 5 + i * 3) % 11},{1_700_000_000 + 60 * i + u}" for u in range(30) for i in range(6)]
    (folder / "events.csv").write_text(shown + "\n".join(more) + "\n")


def commands_of(*headings: str) -> list[str]:
    """Commands of README's parts under a heading; without one: of those no other test names."""
    parts = {part.splitlines()[0]: part for part in re.split(r"^## ", README, flags=re.MULTILINE)}
    others = [part for name, part in parts.items() if name not in (REAL, CHANGE, SCALING)]
    chosen = [parts[name] for name in headings] or others
    shown = [text for kind, text in blocks("\n".join(chosen)) if kind == "bash"]
    return [line for text in shown for line in text.splitlines() if line.strip()]


def run_all(commands: list[str], folder: Path) -> int:
    (folder / "configs").symlink_to(ROOT / "configs")
    ran = 0
    for command in commands:
        if command in ("make test", ". .venv/bin/activate"):
            continue  # the first is what runs this test; the second has no output to check
        command = {"make train": "gr-train configs/quickstart.yaml"}.get(command, command)
        done = execute(shrunk(command), folder)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        ran += 1
    return ran


def test_every_command_works_as_written(tmp_path):
    write_events(tmp_path)
    assert run_all(commands_of(), tmp_path) >= 4
    for name in ("quickstart", "my-data"):
        assert (tmp_path / "runs" / name / "report.html").exists(), name
    for kind, text in BLOCKS:
        if kind == "python":
            done = run([sys.executable, "-c", text], tmp_path, timeout=120)
            assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr[-2000:]


def test_every_changed_run_works_as_written(tmp_path):
    assert run_all(commands_of(CHANGE), tmp_path) >= 5
    for name in ("no-time", "sasrec", "paper-loss", "two"):
        assert (tmp_path / "runs" / name / "report.html").exists(), name


def test_a_scaling_study_works_as_written(tmp_path):
    assert run_all(commands_of(SCALING), tmp_path) == 6
    assert (tmp_path / "runs" / "next.yaml").exists()


def test_every_command_on_real_data_works_as_written_with_a_file_at_hand(tmp_path):
    write_public_logs(tmp_path)
    assert run_all(commands_of(REAL), tmp_path) >= 9
    for name in ("ml-1m_hstu-s0", "ml-1m_sasrec-s0", "beauty_hstu-s0", "ml-100k_hstu-temporal-s0"):
        assert (tmp_path / "runs" / name / "report.html").exists(), name
    assert (tmp_path / "recommendations.parquet").exists()


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
