"""A real Slurm on this machine, as two virtual nodes: a job is warned, saves, requeues itself and resumes.

    python -m benchmarks.launch.slurm --steps 600 --minutes 2           (as root, Linux)

Needs the programs of Debian's ``slurm-wlm`` and ``munge`` and no running Slurm. All state lies in a temporary folder;
the nodes' names are known only in a mount namespace of this program's own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.launch.common import CONFIG, environment, gr_launch, overrides, weights_hash
from benchmarks.written import write_page

INSIDE = "GR_BENCH_INSIDE"
WARN_S = 45
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=17000
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
MinJobAge=600
KillWait=5
SlurmdParameters=config_overrides
NodeName=fake[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=fake[0-1] Default=YES MaxTime=60 State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """The daemons, with SLURM_CONF set; ended afterwards."""
    os.chmod(folder, 0o755)
    (folder / "state").mkdir()
    for i in (0, 1):
        (folder / f"spool-fake{i}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    hosts = folder / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 fake0 fake1\n")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)  # in our own mount namespace
    munged = ["munged", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
    munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--foreground", "--force"]
    keeper = subprocess.Popen(munged, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "munge.sock").exists():
            assert keeper.poll() is None, (folder / "munged.log").read_text()
            time.sleep(0.1)
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "fake0"], ["slurmd", "-N", "fake1"]):
            subprocess.run(command, check=True)
        while "idle" not in shell("sinfo -h -o %T"):
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scontrol", "shutdown"], stdout=subprocess.DEVNULL)
        time.sleep(2)
        keeper.terminate()
        keeper.wait()


def shell(command: str) -> str:
    """What a command prints."""
    return subprocess.run(command.split(), capture_output=True, text=True).stdout


def field(job: str, name: str) -> str:
    """Of ``scontrol show job``."""
    found = re.search(rf"\b{name}=(\S+)", shell(f"scontrol show job {job}"))
    return found.group(1) if found else ""


def prove(folder: Path, steps: int, minutes: int) -> list[tuple[str, str]]:
    """Submits, watches and compares; rows of the result."""
    launch = ("slurm", "--nnodes", "2", "--nproc", "1", "--time", str(minutes), "--warn", str(WARN_S))
    submit = gr_launch(*launch, CONFIG, *overrides("batch", steps))
    said = subprocess.run(submit, cwd=folder, env=environment(), capture_output=True, text=True, check=True).stdout
    job = said.split()[-1]
    begin, states = time.monotonic(), []
    while True:
        state = field(job, "JobState")
        if not states or states[-1] != state:
            states.append(state)
            print(f"{time.monotonic() - begin:5.0f} s  {state}", flush=True)
        if state == "PENDING" and field(job, "Restarts") != "0":
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], stderr=subprocess.DEVNULL)
        if state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", ""):
            break
        time.sleep(1)
    log = next(folder.glob(f"*-{job}.out")).read_text()
    restarts = int(field(job, "Restarts"))
    saved, resumed = (re.findall(rf"{word} (?:at|from) step (\d+)", log) for word in ("saved", "resuming"))
    assert states[-1] == "COMPLETED" and restarts >= 1 and saved and saved == resumed, (states, restarts, log[-3000:])
    seconds = time.monotonic() - begin
    direct = gr_launch("torchrun", "--nproc", "2", CONFIG, *overrides("direct", steps))
    subprocess.run(direct, cwd=folder, env=environment(), capture_output=True, check=True)
    hashes = [weights_hash(folder / "runs" / name) for name in ("batch", "direct")]
    assert hashes[0] == hashes[1], hashes
    return [
        ("Slurm", shell("sinfo --version").strip() + ", two virtual nodes on one machine"),
        ("job", f"`gr-launch {' '.join(launch)} configs/quickstart.yaml ...`, {steps} steps, gloo, fp32"),
        ("states", " ".join(states)),
        ("requeued", f"{restarts} times by itself; saved at and resumed from steps {', '.join(saved)}"),
        ("end", f"{seconds:.0f} s after submission, weights {hashes[0]}"),
        ("undisturbed", f"`gr-launch torchrun --nproc 2`: weights {hashes[1]}: bit-identical"),
    ]


def main() -> None:
    """Runs itself again where names and mounts are its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=int, default=2, help="time limit of the job")
    options = parser.parse_args()
    for program in ("slurmctld", "slurmd", "munged", "unshare"):
        if shutil.which(program) is None:
            sys.exit(f"error: {program} was not found; apt-get install slurm-wlm munge")
    if INSIDE not in os.environ:
        again = ["unshare", "--mount", sys.executable, "-m", "benchmarks.launch.slurm", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env={**os.environ, INSIDE: "1"}).returncode)
    with tempfile.TemporaryDirectory() as name, slurm(Path(name)):
        work = Path(name) / "work"
        work.mkdir()
        rows = prove(work, options.steps, options.minutes)
    command = f"python -m benchmarks.launch.slurm --steps {options.steps} --minutes {options.minutes}"
    write_page("slurm", command, rows)


if __name__ == "__main__":
    main()
