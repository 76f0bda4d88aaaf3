"""gr-launch builds exactly the command it says, and refuses what it cannot do in one sentence."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr.distributed.network import free_port, interface_of
from gr.errors import STOPPED, UserError
from gr.launch import cli, deepspeed, run, torchrun


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("name: run\n")
    return str(path)


def test_command_runs_the_training_module_under_torchrun() -> None:
    command = torchrun.build("a.yaml", ["--seed", "2"], nproc=2, cores=8, env={"HOME": "/h"}, python="py")
    expected = "py -m torch.distributed.run --standalone --nproc-per-node=2 -m gr.train a.yaml --seed 2"
    assert list(command.argv) == expected.split()
    assert command.env == {"HOME": "/h", "OMP_NUM_THREADS": "4", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


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
    monkeypatch.setattr(cli, "execute", lambda *_: pytest.fail("a dry run must start nothing"))
    assert cli.main(["torchrun", "--nproc", "2", "--dry-run", config, "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("OMP_NUM_THREADS=3 ")
    assert printed.rstrip().endswith(f"--nproc-per-node=2 -m gr.train {config} --seed 5")


def test_a_launch_executes_what_was_built(config, monkeypatch) -> None:
    ran: list[tuple[str, ...]] = []

    def execute(command: run.Command) -> None:
        ran.append(command.argv)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "execute", execute)
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
        (["torchrun", "--max-restarts", "-1", "CONFIG"], "--max-restarts -1: must be 0 or more"),
        (["torchrun", "--nnodes", "2", "CONFIG"], "--nnodes 2 needs --rdzv HOST:PORT"),
        (["torchrun", "--nnodes", "3:2", "--rdzv", "localhost:1", "CONFIG"], "--nnodes 3:2: must be a number"),
        (["torchrun", "--nnodes", "2", "--rdzv", "localhost", "CONFIG"], "'localhost' must be HOST:PORT"),
        (["torchrun", "--nnodes", "2", "--node-rank", "2", "--rdzv", "localhost:1", "CONFIG"], "--node-rank 2"),
        (
            ["torchrun", "--nnodes", "2", "--node-rank", "1", "--wait", "0.1", "--rdzv", "127.0.0.1:CLOSED", "CONFIG"],
            "cannot be reached (Connection refused) for 0.1 s",
        ),
        (["torchrun", "--nnodes", "2", "--rdzv", "127.0.0.1:TAKEN", "CONFIG"], "port TAKEN of this machine cannot"),
        (["deepspeed", "--port", "TAKEN", "CONFIG"], "port TAKEN of this machine cannot"),
        (["deepspeed", "--hostfile", "nowhere", "CONFIG"], "hostfile nowhere does not exist"),
        (["ray", "--cpus", "0", "CONFIG"], "--cpus 0: each process needs"),
        (["ray", "--address", "nowhere", "CONFIG"], "--address 'nowhere': must be HOST:PORT"),
        (["slurm", "--time", "soon", "CONFIG"], "--time soon: must be minutes"),
        (["slurm", "--sbatch", "--qos=low", "CONFIG"], "expected one argument"),
        (["slurm", "--warn", "0", "CONFIG"], "--warn 0: must be at least 1 second"),
        (["slurm", "CONFIG"], "sbatch was not found"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(argv, sentence, config, taken, capsys, monkeypatch) -> None:
    said_as = {"CONFIG": config, "TAKEN": str(taken), "CLOSED": str(free_port())}

    def filled(text: str) -> str:
        for word, value in said_as.items():
            text = text.replace(word, value)
        return text

    monkeypatch.setattr(sys, "argv", ["gr-launch", *map(filled, argv)])
    monkeypatch.setenv("PATH", os.path.dirname(config))  # no sbatch
    assert cli.cli() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and filled(sentence) in said and said.count("\n") == 1


def execute_python(code: str, restarts: int = 0, **env: str) -> int:
    return run.execute(run.Command((sys.executable, "-c", code), {**os.environ, **env}), restarts)


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


def test_a_machine_among_several_names_itself_and_its_way_to_the_others() -> None:
    """torchrun would ask the host name, which containers share and which may be a loop-back address."""
    nodes = torchrun.Nodes("2:4", 1, "127.0.0.1:29511", survive_s=90)
    command = torchrun.build("a", [], nproc=8, cores=8, env={}, max_restarts=5, nodes=nodes)
    expected = (
        "--nnodes=2:4 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29511 --local-addr=127.0.0.1 "
        "--rdzv-conf=is_host=0,timeout=90,read_timeout=90 --nproc-per-node=8 --max-restarts=5 -m gr.train a"
    )
    assert shlex.join(command.argv).endswith(expected)
    assert command.env["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1")
    assert interface_of("192.0.2.1") is None


def test_deepspeed_gets_a_port_of_its_own_or_the_hostfile(tmp_path: Path) -> None:
    alone = deepspeed.build("a.yaml", ["--seed", "2"], nproc=2, cores=8, env={}, python="py")
    at = alone.argv.index("--master_port") + 1
    assert int(alone.argv[at]) > 1023 and alone.env == {"OMP_NUM_THREADS": "4"}
    assert shlex.join(alone.argv).endswith("--no_local_rank --module gr.train a.yaml --seed 2")
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2\n")
    several = deepspeed.build("a", [], nproc=2, cores=8, env={}, hostfile=str(hosts))
    assert f"--hostfile {hosts} --num_gpus 2 --master_port 29500" in shlex.join(several.argv)


CRASHES_TWICE = """
import os, pathlib, sys
tries = pathlib.Path(os.environ["TRIES"])
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) > 2:
    pathlib.Path(os.environ["GR_STATUS_FILE"]).write_text(os.environ["LAST"])
os._exit(9)
"""


@pytest.mark.parametrize(("restarts", "last", "status", "tries"), [(2, "0", 0, 3), (1, "0", 9, 2), (5, "2", 2, 3)])
def test_a_launcher_without_restarts_of_its_own_is_begun_again_until_an_end_is_told(
    tmp_path, restarts, last, status, tries
) -> None:
    log = tmp_path / "tries"
    assert execute_python(CRASHES_TWICE, restarts, TRIES=str(log), LAST=last) == status
    assert len(log.read_text()) == tries


SAVES = """
import os, pathlib, signal, sys
place = os.environ["GR_STATUS_FILE"]
def save(number, frame):
    pathlib.Path(place).write_text("3")
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(place + ".pid0").write_text(str(os.getpid()))
os.kill(os.getppid(), int(os.environ["SEND"]))
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_gr_launch_reaches_the_worker_as_a_wish_to_save(number) -> None:
    before = signal.getsignal(number)
    assert execute_python(SAVES, 3, SEND=str(int(number))) == STOPPED
    assert signal.getsignal(number) == before


def test_a_slurm_script_is_what_a_shell_runs_and_requeues_only_what_was_stopped(config, tmp_path, capsys) -> None:
    """The script itself, with stand-ins for Slurm's programs: the signal reaches the step, the status decides."""
    argv = ["slurm", "--nnodes", "2", "--nproc", "4", "--time", "1-02:00:00", "--warn", "90", "--gpus"]
    assert cli.main([*argv, "--sbatch", "partition=gpu", "--dry-run", config, "--name", "a-run", "--seed=5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=a-run\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n")
    for option in ("requeue", "signal=B:USR1@90", "time=1-02:00:00", "gpus-per-node=4", "partition=gpu"):
        assert f"#SBATCH --{option}\n" in text
    stand_ins = {
        # The step: shows its command, says that it is there, waits for the signal, ends as it is told.
        "srun": 'trap \'exit "$ENDS"\' USR1\necho "srun: $*"\n[ "$SENT" = no ] && exit "$ENDS"\n'
        "kill -USR1 $PPID\nwhile :; do read -t 1 <> <(:); done\n",
        "scontrol": 'case $1 in show) echo node7; echo node8;; requeue) echo "requeued $2";; esac\n',
        "sleep": "exit 0\n",
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text("#!/bin/bash\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    for sent, ends in (("yes", STOPPED), ("no", 0), ("no", 2), ("yes", 1)):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "10042", "SLURM_JOB_NODELIST": "node[7-8]"}
        env |= {"ENDS": str(ends), "SENT": sent}
        done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == ends, (sent, ends, done)
        assert ("requeued 10042" in done.stdout) == (ends == STOPPED), (sent, ends, done)
        assert f"{sys.executable} -m gr.launch.cli torchrun --nproc 4 --max-restarts 3 --nnodes" in done.stdout
        assert f"{config} --name a-run --seed=5" in done.stdout
