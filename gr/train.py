"""``gr-train CONFIG [--field value ...]``: prepares data, trains, judges and reports, or takes up where it stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr import config as configs
from gr.errors import LOST, STOPPED, UserError, run_cli

if TYPE_CHECKING:
    from gr.training.run_config import RunConfig

STATUS_VARIABLE = "GR_STATUS_FILE"
AGREED = (0, 1, STOPPED)
"""Ends that all processes of a run reach together."""
USAGE = """usage: gr-train CONFIG [--field value ...]

  CONFIG            a YAML file; configs/ holds the ones that come with hstu-gr
  --a.b value       overrides field b of part a, for instance --train.epochs 3 --seed 1
  --print-config    prints the whole config, defaults included, and leaves

The same command again resumes, or prints the result of a finished run. Exit status: 0 done, 1 done but the leak audit
found something, 2 a mistake, 3 asked to stop (SIGTERM, SIGUSR1, Ctrl-C) and saved, 4 lost the other processes."""


def main(argv: list[str]) -> int:
    """Returns an exit status: 0 done, 1 done but the leak audit found something, 3 stopped and saved."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    from gr.distributed.process import process
    from gr.recipes.retrieval import run
    from gr.recipes.summary import print_summary

    config = load_config(argv)
    if "--print-config" in argv:
        print(configs.dump(config), end="")
        return 0
    _listen()
    try:
        with process(config.device, timeout_s=config.timeout_s) as ctx:
            results: dict[str, Any] | None = run(config, ctx, ["gr-train", *argv])
            if results is None:
                return STOPPED
            if ctx.is_main:
                print_summary(results, Path(config.runs) / config.name)
            return 1 if results["audit"] else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished stage", file=sys.stderr, flush=True)
        return STOPPED


def _listen() -> None:
    """Training has handlers of its own, which save first; in all other stages what is done is on disk already."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    place = os.environ.get(STATUS_VARIABLE)
    if place:  # only now: whom the launcher finds here understands its signals
        Path(f"{place}.pid{os.environ.get('LOCAL_RANK', '0')}").write_text(str(os.getpid()))


def load_config(argv: list[str]) -> RunConfig:
    """The config that the arguments of ``gr-train`` name."""
    from gr.training.run_config import RunConfig

    overrides = [word for word in argv[1:] if word != "--print-config"]
    return configs.load(RunConfig, find_config(argv[0]), overrides)


def find_config(name: str) -> Path:
    """A file, or one of the installed configs (``configs/quickstart.yaml`` works outside a checkout, too)."""
    path = Path(name)
    if path.exists():
        return path
    installed = Path(__file__).parent / "configs" / path.name
    if installed.exists() and path.parent in (Path("."), Path("configs")):
        return installed
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{name!r} is not a config; give a .yaml file, for instance configs/quickstart.yaml")
    return path


def cli() -> int:
    """Console entry point; leaves its status where a launcher asks for it.

    Launchers take every other status than 0 for an accident, end the other processes and start all again. So under a
    launcher an end that all reach together is 0, and a process that is started again after a mistake leaves at once.
    """
    place = Path(os.environ[STATUS_VARIABLE]) if os.environ.get(STATUS_VARIABLE) else None
    if place is not None and place.exists():
        return int(place.read_text() or 2)
    status = run_cli(main)
    if threading.current_thread() is threading.main_thread():  # saved: nothing is left to interrupt
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    if status == LOST:
        sys.stdout.flush()
        os._exit(LOST)  # other threads may wait for those who are gone
    if place is None:
        return status
    if os.environ.get("LOCAL_RANK", "0") == "0" or status == 2:
        place.write_text(str(status))
    return 0 if status in AGREED else status


if __name__ == "__main__":
    raise SystemExit(cli())
