"""``gr-launch LAUNCHER [options] CONFIG [overrides...]``: start one training run as several processes.

    gr-launch torchrun --nproc 8 --max-restarts 3 configs/quickstart.yaml --seed 2
    gr-launch torchrun --nnodes 2 --node-rank 1 --rdzv node0:29500 --nproc 8 configs/quickstart.yaml
    gr-launch deepspeed --nproc 8 configs/quickstart.yaml
    gr-launch ray --nproc 16 --address node0:6379 configs/quickstart.yaml
    gr-launch slurm --nnodes 2 --nproc 8 --time 4:00:00 configs/quickstart.yaml
    gr-launch torchrun --nproc 2 --dry-run configs/quickstart.yaml     # print what would run, run nothing

Options of the launcher stand before CONFIG; what follows CONFIG belongs to the training command. gr-launch LAUNCHER
--help lists them; launch/README.md tells of several machines. Exit status: that of gr-train, on which see its --help.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from gr.errors import Parser, UserError, run_cli
from gr.launch import deepspeed, ray, slurm, torchrun
from gr.launch.run import Command, execute
from gr.train import load_config

_NPROC = "processes on each machine (default: one a GPU, or 1)"


def _parser(launcher: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"gr-launch {launcher}", description=LAUNCHERS[launcher].__doc__)
    add = parser.add_argument
    add("--nproc", type=int, help=_NPROC if launcher != "ray" else "processes, on however many machines (default: 1)")
    add("--max-restarts", type=int, default=3 if launcher == "slurm" else 0, metavar="N",
        help="how often all processes are started again when one is lost (default: %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="print what would run, and run nothing")
    if launcher == "torchrun":
        add("--nnodes", default="1", help="machines, N or MIN:MAX (default: 1)")
        add("--node-rank", type=int, default=0, help="number of this machine; 0 keeps the meeting place")
        add("--rdzv", default="", metavar="HOST:PORT", help="where machine 0 listens")
        add("--wait", type=float, default=20.0, metavar="S", help="how long to wait for machine 0 (default: 20 s)")
        add("--survive", type=float, default=300.0, metavar="S",
            help="longest cut of the network to outlast (default: 300 s)")  # fmt: skip
    elif launcher == "deepspeed":
        add("--hostfile", default="", help="lines 'host slots=N'; without it this machine alone")
        add("--port", type=int, default=0, help="where rank 0 listens (default: a free one; with a hostfile 29500)")
    elif launcher == "ray":
        add("--address", default=os.environ.get("RAY_ADDRESS", ""), metavar="HOST:PORT",
            help="of a running cluster (default: RAY_ADDRESS, or a Ray of its own on this machine)")  # fmt: skip
        add("--cpus", type=float, default=1.0, help="cores Ray counts for each process (default: 1)")
    else:
        add("--nnodes", type=int, default=1, help="machines (default: 1)")
        add("--time", default="", help="limit, for instance 4:00:00 (default: the partition's)")
        add("--warn", type=int, default=180, metavar="S", help="save so many seconds before it (default: 180)")
        add("--gpus", action="store_true", help="ask for one GPU a process")
        add("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch, for instance partition=gpu")
    add("config", help="the run's YAML file")
    add("overrides", nargs=argparse.REMAINDER, help="handed on to the training command")
    return parser


def _show(command: Command) -> int:
    names = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    ours = [f"{name}={command.env[name]}" for name in names if name in command.env]
    print(*ours, shlex.join(command.argv))
    return 0


def _torchrun(options: argparse.Namespace, config: Any) -> int:
    """torch's elastic launcher, on this machine or on several of which this is one."""
    nodes = torchrun.Nodes(options.nnodes, options.node_rank, options.rdzv, options.wait, options.survive)
    command = torchrun.build(
        options.config,
        options.overrides,
        nproc=torchrun.default_nproc() if options.nproc is None else options.nproc,
        cores=os.cpu_count() or 1,
        env=os.environ,
        max_restarts=options.max_restarts,
        nodes=nodes,
    )
    if options.dry_run:
        return _show(command)
    nodes.meet()
    return execute(command)


def _deepspeed(options: argparse.Namespace, config: Any) -> int:
    """DeepSpeed's launcher, on this machine or on those of a hostfile."""
    torchrun.check_counts(1, options.max_restarts)
    command = deepspeed.build(
        options.config,
        options.overrides,
        nproc=torchrun.default_nproc() if options.nproc is None else options.nproc,
        cores=os.cpu_count() or 1,
        env=os.environ,
        hostfile=options.hostfile,
        port=options.port,
    )
    return _show(command) if options.dry_run else execute(command, options.max_restarts)


def _ray(options: argparse.Namespace, config: Any) -> int:
    """Ray Train, on a Ray of its own or on a running cluster."""
    job = ray.make_job(
        [options.config, *options.overrides],
        config,
        workers=1 if options.nproc is None else options.nproc,
        cpus=options.cpus,
        max_restarts=options.max_restarts,
        address=options.address,
    )
    if options.dry_run:
        print(job.describe())
        return 0
    return ray.execute(job)


def _slurm(options: argparse.Namespace, config: Any) -> int:
    """A batch job that saves before its limit and requeues itself."""
    job = slurm.Job(
        config.name,
        options.nnodes,
        1 if options.nproc is None else options.nproc,
        options.time,
        options.warn,
        options.gpus,
        options.max_restarts,
        tuple(options.sbatch),
    )
    text = slurm.script(job, options.config, options.overrides)
    if options.dry_run:
        print(text, end="")
        return 0
    return slurm.submit(text)


LAUNCHERS = {"torchrun": _torchrun, "deepspeed": _deepspeed, "ray": _ray, "slurm": _slurm}


def main(argv: list[str]) -> int:
    """Checks the config, as each process would, and runs the launcher.

    Raises:
        UserError: Unknown launcher, bad option, or no such config file.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 2
    launcher, *rest = argv
    if launcher not in LAUNCHERS:
        raise UserError(f"gr-launch: unknown launcher {launcher!r}; there is {', '.join(LAUNCHERS)}")
    options = _parser(launcher).parse_args(rest)
    # A mistake is told once, here, and not by every process.
    config = load_config([options.config, *options.overrides])
    return LAUNCHERS[launcher](options, config)


def cli() -> int:
    """Entry point of ``gr-launch``."""
    return run_cli(main)


if __name__ == "__main__":
    sys.exit(cli())
