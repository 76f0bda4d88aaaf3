"""configs/TUTORIAL.md works as written: each of its blocks is run, in order, on fewer users and with short training."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq

import gr.compare
import gr.inference.cli
from documents import HOMES, ROOT, SHORT, blocks, code_of, run

TUTORIAL = ROOT / "configs" / "TUTORIAL.md"
TEXT = TUTORIAL.read_text(encoding="utf-8")
USERS, FEWER = "users = 2_000\n", "users = 150\n"
TINY = [*SHORT, "--evaluation.baselines=[popularity]"]


def install_commands(folder: Path) -> None:
    """Our commands as programs, as an installation has them, but that training is tiny."""
    folder.mkdir()
    for name in HOMES:
        words = shlex.join([sys.executable, "-c", code_of(name)])
        more = shlex.join(TINY) if name == "gr-train" else ""
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {words} "$@" {more}\n')
        program.chmod(0o755)


def test_every_block_works_as_written_from_top_to_bottom(tmp_path):
    commands, shop = tmp_path / "bin", tmp_path / "shop"
    install_commands(commands)
    shop.mkdir()
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    assert sum(text.count(USERS) for _, text in blocks(TEXT)) == 1
    said = ""
    for kind, text in blocks(TEXT):
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[kind]
        done = run([*program, text.replace(USERS, FEWER)], shop, PATH=path)
        assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        said += done.stdout

    for repair in ("null rows dropped", "duplicate rows dropped", "out of order rows sorted", "items missing"):
        assert repair in said, repair
    for title in ("Gärten Classics No. 1", 'Schach "Blitz" Stories No. 1'):
        assert title in said.split("Your history")[1], title
    for name in ("shop", "shop-no-time"):
        assert (shop / "runs" / name / "report.html").stat().st_size > 10_000
        assert (shop / "runs" / name / "evaluations" / "test-keep" / "results.json").exists()
    assert (shop / "comparison.json").exists()
    assert (shop / "hr_by_history.png").read_bytes().startswith(b"\x89PNG")
    recs = pq.read_table(shop / "recs.parquet")
    assert recs["user_id"].to_pylist() == [f"K-{u:05d}" for u in range(150)]
    assert all(len(set(items)) == 10 for items in recs["items"].to_pylist())


def test_commands_within_its_sentences_have_the_form_that_the_programs_take():
    parsers = {"gr-recommend": gr.inference.cli.parser, "gr-compare": gr.compare.parser}
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    found = [shlex.split(text) for text in re.findall(r"`(gr-(?:recommend|compare) [^`]+)`", prose)]
    assert len(found) >= 3
    for words in found:
        parsers[words[0]]().parse_args(words[1:])


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    for target in links:
        assert (TUTORIAL.parent / target).exists(), target
