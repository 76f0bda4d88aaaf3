"""``gr-scaling plan | run | status | collect STUDY.yaml``, ``fit | predict | compare | plot | report RUNS.csv`` and
``selftest``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gr.errors import Parser, UserError, run_cli
from gr.scaling import fit_cli

if TYPE_CHECKING:
    from gr.scaling.design import Study
    from gr.scaling.store import RunSpec

STUDY_COMMANDS = ("plan", "run", "status", "collect")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(prog="gr-scaling", description="Scaling studies of gr-train's models.", allow_abbrev=False)
    commands = parse.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, about in (
        ("plan", "prints every run and its price; runs nothing"),
        ("run", "does what is not done; the same command goes on after a stop"),
        ("status", "prints where every run stands"),
        ("collect", "writes runs.csv and timings.csv"),
    ):
        study = commands.add_parser(name, help=about, description=about, epilog="Further arguments are overrides.")
        study.add_argument("study", metavar="STUDY.yaml")
        if name == "run":
            study.add_argument("--only", metavar="RUN_ID", action="append", help="a run of the plan; may be repeated")
            study.add_argument("--dry-run", action="store_true", help="prints what would be started; writes nothing")
    selftest = commands.add_parser("selftest", help="plans, runs, fits and predicts a tiny study; under a minute")
    selftest.add_argument("--out", metavar="FOLDER", help="keeps its files there")
    fit_cli.add_commands(commands)
    return parse


def main(argv: list[str]) -> int:
    """Parses and does."""
    args, rest = parser().parse_known_args(argv)
    if rest and args.command not in (*STUDY_COMMANDS, "predict"):
        raise UserError(f"unknown argument {rest[0]!r}; see gr-scaling {args.command} --help")
    if args.command in STUDY_COMMANDS:
        return _study(args, rest)
    if args.command == "selftest":
        from gr.scaling.selftest import selftest

        return selftest(args.out)
    return fit_cli.run(args, rest)


def _study(args: argparse.Namespace, overrides: list[str]) -> int:
    from gr.scaling.design import load_study
    from gr.scaling.store import nearest_rate, run_dir, seen_rates, spent_flops
    from gr.scaling.table import collect

    study, path = load_study(args.study, overrides)
    if args.command == "collect":
        table, count = collect(study.folder)
        print(f"{count} runs: {table}")
        return 0
    from gr.scaling.driver import run_plan
    from gr.scaling.plan import assumed_rate, make_plan
    from gr.scaling.recipe import find_recipe

    print(f"planning {study.name}: its logs are prepared where they are not yet, and the batches of every run counted",
          file=sys.stderr, flush=True)  # fmt: skip
    plan = make_plan(study, path)
    if args.command == "run":
        specs = _chosen(plan.specs, args.only)
        if args.dry_run or study.executor == "print":
            return _print(study, specs, args.dry_run)
        outcome = run_plan(study, specs)
        print(f"{len(outcome.ran)} ran, {outcome.already} were done, {len(outcome.failed)} failed: {study.folder}")
        return 130 if outcome.stopped else int(bool(outcome.failed))
    print("run           state      variant     scale   budget  steps epochs length  encoder parameters  seconds")
    seen = seen_rates(study.folder)
    for spec in plan.specs:
        rate = nearest_rate(seen, spec) or assumed_rate(study)[0]
        seconds = f"{spec.cost / rate:.1f}" if rate else "?"
        folder = run_dir(study.folder, spec.run_id)
        state, at = folder.state(), spec.planned
        held = "  held out" if spec.holdout else ""
        print(
            f"{spec.run_id}  {state:<9}  {spec.variant:<10} {spec.scale:>6g} {spec.budget:>8.2e} {at['steps']:>6} "
            f"{at['epochs']:>6.2f} {spec.config['layout']['max_events']:>6} {at['n_encoder']:>19} {seconds:>8}{held}"
        )
        why = folder.reason()
        if why:
            print(f"              {why}")
    if args.command == "plan":
        for name in dict.fromkeys(spec.recipe for spec in plan.specs):
            print(f"recipe {name}: {find_recipe(name).chosen}")
        for out in plan.rejected:
            print(f"left out: {out.variant} {out.cell.title} seed {out.seed}: {out.reason}")
        print(f"{len(plan.specs)} runs, {sum(spec.cost for spec in plan.specs):.3g} model FLOPs; rate at first: "
              f"{assumed_rate(study)[1]}")  # fmt: skip
        if study.limits.total_flops is not None:
            print(f"{spent_flops(study.folder):.3g} model FLOPs are spent; limits.total_flops is "
                  f"{study.limits.total_flops:g}")  # fmt: skip
    return 0


def _chosen(specs: list[RunSpec], only: list[str] | None) -> list[RunSpec]:
    unknown = [name for name in only or [] if all(spec.run_id != name for spec in specs)]
    if unknown:
        raise UserError(f"--only {unknown[0]}: the plan has no such run; gr-scaling plan lists them")
    return [spec for spec in specs if only is None or spec.run_id in only]


def _print(study: Study, specs: list[RunSpec], dry: bool) -> int:
    """What is not done: a command a run, Slurm's script if the study says so; comments are for the shell."""
    from gr.scaling.driver import check_total, unfinished
    from gr.scaling.executors import command
    from gr.scaling.slurm_executor import script
    from gr.scaling.store import run_dir

    check_total(study, specs)
    todo = unfinished(study, specs)
    for spec in todo:
        folder = run_dir(study.folder, spec.run_id)
        if not dry:
            folder.write_spec(spec)
        print(f"# {spec.title}")
        path = folder.path.absolute()
        print(script(path, study.resources) if study.executor == "slurm" else command(path, study.resources))
    print(f"# {len(todo)} to do, {len(specs) - len(todo)} done")
    return 0


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
