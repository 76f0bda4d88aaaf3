"""``gr-launch LAUNCHER [options] CONFIG [overrides...]``: start one training run as several processes.

    gr-launch torchrun --nproc 8 configs/quickstart.yaml --seed 2
    gr-launch torchrun --nproc 2 --dry-run configs/quickstart.yaml     # print the command, run nothing

Options of the launcher stand before CONFIG; what follows CONFIG belongs to the training command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from gr.errors import Parser, UserError, run_cli
from gr.launch import torchrun
from gr.train import load_config

LAUNCHERS = ("torchrun",)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gr-launch torchrun", description="Train in N processes on this machine.")
    parser.add_argument("--nproc", type=int, help="processes (default: one a GPU, or 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and run nothing")
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="handed on to the training command")
    return parser


def main(argv: list[str]) -> int:
    """Checks the config, as each process would, and runs the command.

    Raises:
        UserError: Unknown launcher, bad option, or no such config file.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 2
    launcher, *rest = argv
    if launcher not in LAUNCHERS:
        raise UserError(f"gr-launch: unknown launcher {launcher!r}; there is {', '.join(LAUNCHERS)}")
    options = _parser().parse_args(rest)
    load_config([options.config, *options.overrides])  # a mistake is told once, here, and not by every process
    command = torchrun.build(
        options.config,
        options.overrides,
        nproc=torchrun.default_nproc() if options.nproc is None else options.nproc,
        cores=os.cpu_count() or 1,
        env=os.environ,
    )
    if options.dry_run:
        print(f"OMP_NUM_THREADS={command.env['OMP_NUM_THREADS']} {shlex.join(command.argv)}")
        return 0
    return torchrun.execute(command)


def cli() -> int:
    """Entry point of ``gr-launch``."""
    return run_cli(main)


if __name__ == "__main__":
    sys.exit(cli())
