"""``gr-train CONFIG [--field value ...]``: prepares data, trains, judges and reports, or takes up where it stopped."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr import config as configs
from gr.errors import UserError, run_cli

if TYPE_CHECKING:
    from gr.training.run_config import RunConfig

STATUS_VARIABLE = "GR_STATUS_FILE"
USAGE = """usage: gr-train CONFIG [--field value ...]

  CONFIG            a YAML file; configs/ holds the ones that come with hstu-gr
  --a.b value       overrides field b of part a, for instance --train.epochs 3 --seed 1
  --print-config    prints the whole config, defaults included, and leaves

The same command again resumes, or prints the result of a finished run."""


def main(argv: list[str]) -> int:
    """Returns an exit status: 0 done or stopped and saved, 1 finished but the leak audit found something."""
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
    # Training has handlers of its own, which save first; in all other stages what is done is on disk already.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with process(config.device) as ctx:
            results: dict[str, Any] | None = run(config, ctx, ["gr-train", *argv])
            if results is None:
                return 0
            if ctx.is_main:
                print_summary(results, Path(config.runs) / config.name)
            return 1 if results["audit"] else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished stage", file=sys.stderr, flush=True)
        return 0


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
    """Console entry point; leaves its status where a launcher asks for it."""
    status = run_cli(main)
    place = os.environ.get(STATUS_VARIABLE)
    if place and os.environ.get("RANK", "0") == "0":
        Path(place).write_text(str(status))
    return status


if __name__ == "__main__":
    raise SystemExit(cli())
