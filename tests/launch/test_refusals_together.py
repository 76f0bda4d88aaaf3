"""What processes cannot do together they refuse together: one sentence, status 2, nobody waits, nothing overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gr.distributed import process
from gr.distributed.network import check_reachable, free_port
from gr.errors import UserError
from tiny_runs import environment, train_process, write

GONE_WITHIN_S = 100  # a hang would last ten minutes; the processes themselves take seconds


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_processes_with_different_configs_refuse_before_they_write(tmp_path, monkeypatch) -> None:
    write(tmp_path, evaluation={"baselines": []})
    port = str(free_port())
    started = []
    for rank in (0, 1):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**environment(), **{name: str(value) for name, value in where.items()}}
        command = [sys.executable, "-m", "gr.train", "tiny.yaml", "--device", "cpu", "--seed", str(rank)]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=GONE_WITHIN_S)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    for text in said:
        assert "process 1 has config" in text and "same command, config file and data" in text, said
        assert "Traceback" not in text and text.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_a_batch_has_users_are_refused_and_a_run_is_left_as_it_was(tmp_path) -> None:
    write(tmp_path, evaluation={"baselines": []}, device="cpu")
    one = ("tiny.yaml", "--train.batching.batch_size", "1", "--train.max_steps", "2")
    first = train_process(tmp_path, *one, "--train.schedule.warmup_steps", "0", "--train.checkpoint_every_steps", "1")
    _, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    for name in ("artifact.json", "results.json", "report.html"):  # as if it had been stopped: there is work to do
        for path in (tmp_path / "runs").rglob(name):
            path.unlink()
    before = contents(tmp_path / "runs")
    command = [sys.executable, "-m", "gr.launch.cli", "torchrun", "--nproc", "2", "--max-restarts", "3", *one]
    done = subprocess.run(
        [*command, "--train.schedule.warmup_steps", "0", "--train.checkpoint_every_steps", "1"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=GONE_WITHIN_S,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    sentences = [line for line in done.stderr.splitlines() if "batch_size is 1" in line]
    assert len(sentences) == 2, done.stderr  # one of each process, and no restart repeats it
    assert contents(tmp_path / "runs") == before


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
