"""gr-launch builds exactly the command it says, and refuses what it cannot do in one sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gr.errors import UserError
from gr.launch import cli, torchrun


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("name: run\n")
    return str(path)


def test_command_runs_the_training_module_under_torchrun() -> None:
    command = torchrun.build("a.yaml", ["--seed", "2"], nproc=2, cores=8, env={"HOME": "/h"}, python="py")
    expected = "py -m torch.distributed.run --standalone --nproc-per-node=2 -m gr.train a.yaml --seed 2"
    assert list(command.argv) == expected.split()
    assert command.env == {"HOME": "/h", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(("cores", "nproc", "threads"), [(8, 3, "2"), (2, 8, "1"), (1, 1, "1")])
def test_threads_are_dealt_out_and_never_zero(cores: int, nproc: int, threads: str) -> None:
    assert torchrun.build("a", [], nproc=nproc, cores=cores, env={}).env["OMP_NUM_THREADS"] == threads


def test_a_thread_count_the_user_set_is_kept() -> None:
    command = torchrun.build("a", [], nproc=2, cores=8, env={"OMP_NUM_THREADS": "7"})
    assert command.env["OMP_NUM_THREADS"] == "7"


def test_no_processes_are_refused() -> None:
    with pytest.raises(UserError, match="--nproc 0.*1 or more"):
        torchrun.build("a", [], nproc=0, cores=8, env={})


def test_dry_run_prints_the_command_and_hands_on_what_follows_the_config(config, capsys, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(torchrun, "execute", lambda command: pytest.fail("a dry run must start nothing"))
    assert cli.main(["torchrun", "--nproc", "2", "--dry-run", config, "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("OMP_NUM_THREADS=3 ")
    assert printed.rstrip().endswith(f"--nproc-per-node=2 -m gr.train {config} --seed 5")


def test_a_launch_executes_what_was_built(config, monkeypatch) -> None:
    ran: list[tuple[str, ...]] = []

    def execute(command: torchrun.Command) -> None:
        ran.append(command.argv)
        raise SystemExit(0)

    monkeypatch.setattr(torchrun, "execute", execute)
    with pytest.raises(SystemExit):
        cli.main(["torchrun", "--nproc", "1", config, "--seed=3"])
    assert ran[0][-2:] == (config, "--seed=3")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["abacus", "a.yaml"], "unknown launcher 'abacus'"),
        (["torchrun", "--nproc", "two", "a.yaml"], "invalid int value: 'two'"),
        (["torchrun"], "config"),
        (["torchrun", "--nproc", "1", "nowhere.yaml"], "config nowhere.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(argv, sentence, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gr-launch", *argv])
    assert cli.cli() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def execute_python(code: str, **env: str) -> int:
    return torchrun.execute(torchrun.Command((sys.executable, "-c", code), {**os.environ, **env}))


def test_the_status_that_rank_0_left_is_returned_and_else_the_launchers_own(capfd) -> None:
    assert execute_python("import os, sys; sys.exit(int(os.environ['N']))", N="7") == 7
    left = (
        "import os, sys\n"
        "print('error: told by the worker', file=sys.stderr, flush=True)\n"
        "open(os.environ['GR_STATUS_FILE'], 'w').write('2')\n"
        "print('Traceback (most recent call last)\\n  of the launcher', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    assert execute_python(left) == 2
    assert capfd.readouterr().err == "error: told by the worker\n"


def test_a_traceback_of_a_worker_that_left_no_status_is_shown(capfd) -> None:
    assert execute_python("raise RuntimeError('ours')") == 1
    assert "RuntimeError: ours" in capfd.readouterr().err
