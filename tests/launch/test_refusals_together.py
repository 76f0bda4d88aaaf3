"""What processes cannot do together they refuse together: one sentence, status 2, nobody waits, nothing overwritten."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from gr.distributed import process
from gr.distributed.network import check_reachable, free_port
from gr.errors import UserError
from gr.launch.torchrun import Nodes
from tiny_runs import TINY, environment, run_here, write

GONE_WITHIN_S = 30  # after the first sentence, on a machine of our own
MARK = "GR_TEST_MARK"
SHORT = [
    *("--train.batching.batch_size", "1", "--train.max_steps", "2", "--train.schedule.warmup_steps", "0"),
    *("--train.checkpoint_every_steps", "1"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told_and_gone(started: list[subprocess.Popen[str]], mark: str) -> list[str]:
    """What each process said on stderr; fails if one of them, or of those it started, outlives the sentence."""
    said = []
    for one in started:
        lines = [one.stderr.readline()]
        while lines[-1] and "error: " not in lines[-1]:
            lines.append(one.stderr.readline())
        said.append("".join(lines))
    end = time.monotonic() + GONE_WITHIN_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    said = [text + one.communicate(timeout=end - time.monotonic())[1] for text, one in zip(said, started, strict=True)]
    while left := marked(mark):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.1)
    return said


def marked(mark: str) -> list[str]:
    """Processes of this machine whose environment bears the mark (Linux)."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(f"{place.name} {(place / 'cmdline').read_bytes()!r}")
    return found


def launch(folder: Path, *words: str, **env: str) -> tuple[int, str]:
    """(exit status, stderr) of ``gr-launch``, which and whose workers were gone in time."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "gr.launch.cli", *words]
    one = subprocess.Popen(
        command, cwd=folder, env={**environment(), MARK: mark, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    (said,) = told_and_gone([one], mark)
    assert "Traceback" not in said, said
    return one.returncode, said


def test_processes_with_different_configs_refuse_before_they_write(tmp_path) -> None:
    write(tmp_path, evaluation={"baselines": []})
    port = str(free_port())
    started = []
    for rank in (0, 1):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**environment(), MARK: str(tmp_path), **{name: str(value) for name, value in where.items()}}
        command = [sys.executable, "-m", "gr.train", "tiny.yaml", "--device", "cpu", "--seed", str(rank)]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = told_and_gone(started, str(tmp_path))
    assert [process.returncode for process in started] == [2, 2], said
    for text in said:
        assert "process 1 has config" in text and "same command, config file and data" in text, said
        assert "Traceback" not in text and text.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def stopped_run(folder: Path, name: str, model: dict[str, Any]) -> None:
    """A run with a checkpoint, as if it had been stopped: there is work to do."""
    run_here(folder, "--name", name, "--device", "cpu", *SHORT, model=model, evaluation={"baselines": []})
    config = folder / "runs" / name / "config.yaml"
    config.write_text(config.read_text().replace(f"{folder}/", ""))  # where the launcher's processes say they are
    for done in ("artifact.json", "results.json", "report.html"):
        for path in (folder / "runs" / name).rglob(done):
            path.unlink()
    write(folder, evaluation={"baselines": []})


TWO = ("torchrun", "--nproc", "2", "--max-restarts", "3", "tiny.yaml", "--device", "cpu", *SHORT)


def test_more_processes_than_a_batch_has_users_are_refused_and_a_run_is_left_as_it_was(tmp_path) -> None:
    stopped_run(tmp_path, "tiny", TINY["model"])
    before = contents(tmp_path / "runs")
    status, said = launch(tmp_path, *TWO)
    # One of each process, unless the first to leave had the other ended before it spoke; no restart repeats it.
    assert status == 2 and said.count("batch_size is 1") in (1, 2), said
    assert contents(tmp_path / "runs") == before


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_and_left_as_it_was(tmp_path) -> None:
    stopped_run(tmp_path, "tiny", TINY["model"])
    stopped_run(tmp_path, "other", {**TINY["model"], "dim": 12})
    tiny, other = (tmp_path / "runs" / name for name in ("tiny", "other"))
    (tiny / "best.pt").unlink()
    shutil.rmtree(tiny / "checkpoints")
    shutil.copytree(other / "checkpoints", tiny / "checkpoints")
    before = contents(tmp_path / "runs")
    status, said = launch(tmp_path, "torchrun", "--nproc", "1", "tiny.yaml", "--device", "cpu", *SHORT)
    assert status == 2 and "is of another model" in said, said
    assert contents(tmp_path / "runs") == before


@pytest.mark.slow
def test_a_plan_that_so_many_processes_cannot_have_is_refused_by_all(tmp_path) -> None:
    stopped_run(tmp_path, "tiny", TINY["model"])
    before = contents(tmp_path / "runs")
    columns = [f"--distributed.tables.{word}" for word in ("optimizer.kind", "kind", "sharding")]
    words = [word for pair in zip(columns, ("adagrad", "sharded", "column_wise"), strict=True) for word in pair]
    size = ("--model.dim", "10", "--train.batching.batch_size", "64", "--name", "columns")
    status, said = launch(tmp_path, *TWO, *size, *words)
    assert status == 2 and said.count("has 10 columns, which 2 ranks cannot share") == 2, said
    shutil.rmtree(tmp_path / "runs" / "columns", ignore_errors=True)
    assert contents(tmp_path / "runs") == before


def test_a_meeting_place_that_cannot_be_is_refused_in_time(tmp_path) -> None:
    import socket

    assert max(process._MEETING_PATIENCE_S, Nodes().wait_s) < GONE_WITHIN_S
    write(tmp_path)
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        nodes = ("torchrun", "--nnodes", "2", "--nproc", "1", "--rdzv", place)
        status, said = launch(tmp_path, *nodes, "tiny.yaml")
        assert status == 2 and "cannot be listened on" in said, said
    status, said = launch(tmp_path, *nodes, "--node-rank", "1", "--wait", "0.2", "tiny.yaml")
    assert status == 2 and "cannot be reached" in said, said
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_and_a_store_that_nobody_keeps_are_told_in_one_sentence(monkeypatch) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        with pytest.raises(UserError, match="port .* cannot be listened on"):
            process.start("cpu", rank=0, world=2)
    monkeypatch.setattr(process, "_MEETING_PATIENCE_S", 0.1)
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\) for 0.1 s"):
        process.start("cpu", rank=1, world=2)
    with pytest.raises(UserError, match=r"name of the meeting place no-such-host.invalid:5 is unknown"):
        check_reachable("no-such-host.invalid", 5, 0.1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="MASTER_PORT='' must name where rank 0 listens"):
        process.start("cpu", rank=1, world=2)


def test_only_what_collectives_say_of_lost_peers_becomes_peer_lost() -> None:
    lost = process._as_lost(RuntimeError("[/a/gloo/pair.cc:553] Connection closed by peer [10.0.0.1]:5"))
    assert "lost the other processes" in str(lost) and isinstance(lost, process.PeerLost)
    ours = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert process._as_lost(ours) is ours
