"""``gr-scaling plan | run | status | collect STUDY.yaml`` and ``gr-scaling fit | predict RUNS.csv``."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from gr.errors import Parser, UserError, run_cli

SCALES_TRIED = 4  # times the largest scale of the study


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
    fit = commands.add_parser("fit", help="fits L(N, D) and the compute line to a table; needs no torch")
    fit.add_argument("runs", metavar="RUNS.csv")
    fit.add_argument("--variant", help="which of the table's models")
    fit.add_argument("--bootstrap", type=int, default=200, help="samples (200)")
    predict = commands.add_parser("predict", help="the best size for a budget, and its loss; needs no torch")
    predict.add_argument("runs", metavar="RUNS.csv")
    predict.add_argument("--flops", type=float, required=True, help="the budget in model FLOPs")
    predict.add_argument("--study", metavar="STUDY.yaml", help="chooses among what its recipe can make")
    predict.add_argument("--config", metavar="OUT.yaml", help="writes the chosen run for gr-train; with --study")
    return parse


def main(argv: list[str]) -> int:
    """Parses and does."""
    args, rest = parser().parse_known_args(argv)
    if rest and args.command == "fit":
        raise UserError(f"unknown argument {rest[0]!r}; see gr-scaling fit --help")
    if args.command == "fit":
        return _fit(args)
    if args.command == "predict":
        return _predict(args, rest)
    return _study(args, rest)


def _study(args: argparse.Namespace, overrides: list[str]) -> int:
    from gr.scaling.design import load_study
    from gr.scaling.store import mean_rate, run_dir
    from gr.scaling.table import collect

    study, path = load_study(args.study, overrides)
    if args.command == "collect":
        table, count = collect(study.folder)
        print(f"{count} runs: {table}")
        return 0
    from gr.scaling.driver import run_plan
    from gr.scaling.plan import assumed_rate, make_plan
    from gr.scaling.recipe import find_recipe

    plan = make_plan(study, path)
    if args.command == "run":
        outcome = run_plan(study, plan.specs)
        print(f"{len(outcome.ran)} ran, {outcome.already} were done, {len(outcome.failed)} failed: {study.folder}")
        return 130 if outcome.stopped else int(bool(outcome.failed))
    print("run           state      variant     scale   budget  steps epochs  encoder parameters  seconds")
    for spec in plan.specs:
        rate = mean_rate(study.folder, spec.variant, spec.scale) or assumed_rate(study)[0]
        seconds = f"{spec.cost / rate:.1f}" if rate else "?"
        state, at = run_dir(study.folder, spec.run_id).state(), spec.planned
        held = "  held out" if spec.holdout else ""
        print(
            f"{spec.run_id}  {state:<9}  {spec.variant:<10} {spec.scale:>6g} {spec.budget:>8.2e} {at['steps']:>6} "
            f"{at['epochs']:>6.2f} {at['n_encoder']:>19} {seconds:>8}{held}"
        )
    if args.command == "plan":
        for name in dict.fromkeys(spec.recipe for spec in plan.specs):
            print(f"recipe {name}: {find_recipe(name).chosen}")
        for out in plan.rejected:
            cell = f"{out.variant} scale {out.cell.scale:g} at {out.cell.budget:g} seed {out.seed}"
            print(f"left out: {cell}: {out.reason}")
        print(f"{len(plan.specs)} runs, {sum(spec.cost for spec in plan.specs):.3g} model FLOPs; rate at first: "
              f"{assumed_rate(study)[1]}")  # fmt: skip
    return 0


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fit(args: argparse.Namespace) -> int:
    from gr.scaling.fit import fit_runs
    from gr.scaling.store import write_json
    from gr.scaling.table import read_runs

    if args.bootstrap < 0:
        raise UserError(f"--bootstrap is {args.bootstrap}; it must be at least 0")
    table = Path(args.runs)
    rows, excluded = read_runs(table, args.variant)
    found = fit_runs(rows, args.bootstrap)
    out = table.with_name("fits.json")
    write_json(out, {"table": _hash(table), "variant": args.variant, "excluded": excluded, **found})
    law, bounds = found["surface"], found["intervals"] or {}
    print(f"L(N, D) = E + A N^-alpha + B D^-beta over {found['runs']} runs of {len(found['budgets'])} budgets")
    for name, value in zip(("E", "alpha", "beta"), (law["floor"], *law["exponents"]), strict=True):
        print(f"  {name:<6} {value:.4f}" + (f"  [{bounds[name][0]:.4f}, {bounds[name][1]:.4f}]" if bounds else ""))
    print(f"  A {law['factors'][0]:.4g}  B {law['factors'][1]:.4g}  objective {law['objective']:.4g}")
    if found["line"]:
        line = found["line"]
        print(f"L(C) = {line['floor']:.4f} + {line['factors'][0]:.4g} C^-{line['exponents'][0]:.4f}")
    for row in found["held_out"]:
        print(f"held out {row['run_id']}  {row['budget']:.2e}  loss {row['loss']:.4f}  predicted {row['predicted']:.4f}"
              f"{_range(row['interval'])}  {100 * row['relative_error']:+.2f} %")  # fmt: skip
    for run_id, why in excluded:
        print(f"excluded {run_id}: {why}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(out)
    return 0


def _range(interval: list[float] | None) -> str:
    return f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _predict(args: argparse.Namespace, overrides: list[str]) -> int:
    from gr.scaling.fit import predict
    from gr.scaling.table import read_fit

    table = Path(args.runs)
    fits = table.with_name("fits.json")
    fitted = read_fit(fits)
    if not table.is_file() or fitted["table"] != _hash(table):
        raise UserError(f"{fits} is not of {table} as it is now; run gr-scaling fit {table} again")
    if args.study is None and (args.config or overrides):
        raise UserError(f"{'--config' if args.config else overrides[0]} needs --study STUDY.yaml")
    if args.flops <= 0:
        raise UserError(f"--flops is {args.flops:g}; it must be above 0")
    specs: list[Any] = _feasible(args, overrides, fitted) if args.study else []
    sizes = [(spec.planned["n_encoder"], spec.planned["tokens"]) for spec in specs] or None
    found = predict(fitted, args.flops, sizes)
    print(f"at {args.flops:.3g} model FLOPs: N {found['n_encoder']:.4g}, D {found['tokens']:.4g} tokens, "
          f"loss {found['loss']:.4f}{_range(found['interval'])}")  # fmt: skip
    if found["line"] is not None:
        print(f"the compute line says {found['line']:.4f}")
    print(f"{args.flops / max(fitted['budgets']):.3g} times the largest fitted budget")
    if found["at_end"]:
        print("note: that is the end of the sizes looked at; the law names no best size within them")
    if specs:
        spec = specs[found["index"]]
        print(f"scale {spec.scale:g}: {spec.planned['steps']} steps, {spec.planned['epochs']:.2f} epochs")
        if args.config:
            from gr.scaling.plan import write_config

            write_config(spec, Path(args.config))
            print(f"gr-train {args.config}")
    return 0


def _feasible(args: argparse.Namespace, overrides: list[str], fitted: dict[str, Any]) -> list[Any]:
    """Runs of whole scales at the budget."""
    from gr.scaling.design import Cell, load_study
    from gr.scaling.plan import open_bench, plan_run

    study, path = load_study(args.study, overrides)
    name = fitted["variant"] or next(iter(study.variants))
    if name not in study.variants:
        raise UserError(f"{args.study} has no variant {name!r}; give the study of the table")
    bench = open_bench(study, path, name)
    most = int(SCALES_TRIED * max(study.design.scales))
    cells = [Cell(scale=scale, budget=args.flops) for scale in range(1, most + 1)]
    return [plan_run(study, bench, cell, 0, limited=False) for cell in cells]


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
