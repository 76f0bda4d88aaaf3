"""``gr-train CONFIG [--field value ...]``: prepares data, trains, judges and reports, or takes up where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gr import config as configs
from gr.errors import UserError, run_cli

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
    from gr.training.run_config import RunConfig

    path, overrides = find_config(argv[0]), argv[1:]
    printing = "--print-config" in overrides
    config = configs.load(RunConfig, path, [word for word in overrides if word != "--print-config"])
    if printing:
        print(configs.dump(config), end="")
        return 0
    with process(config.device) as ctx:
        results: dict[str, Any] | None = run(config, ctx, ["gr-train", *argv])
        if results is None:
            return 0
        if ctx.is_main:
            print_summary(results, Path(config.runs) / config.name)
        return 1 if results["audit"] else 0


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
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
