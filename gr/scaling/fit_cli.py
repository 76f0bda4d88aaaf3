"""``fit``, ``predict``, ``compare``, ``plot`` and ``report``: what works on a table alone and needs no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.scaling.table import fits_path, read_fit, table_hash

SCALES_TRIED = 4  # times the largest scale of the study


def add_commands(commands: Any) -> None:
    """Their command lines."""
    fit = commands.add_parser("fit", help="fits L(N, D) and the compute line to a table; needs no torch")
    predict = commands.add_parser("predict", help="the best size for a budget, and its loss; needs no torch")
    compare = commands.add_parser("compare", help="compute that two models need for one loss; needs no torch")
    plot = commands.add_parser("plot", help="figures of a table, each with its CSV; needs no torch")
    report = commands.add_parser("report", help="report.html and report.md of a table; needs no torch")
    for command in (fit, predict, compare, plot, report):
        command.add_argument("runs", metavar="RUNS.csv")
    compare.add_argument("first")
    compare.add_argument("second")
    for command in (fit, predict):
        command.add_argument("--variant", help="which of the table's models")
    fit.add_argument("--term", action="append", choices=("length", "sparse", "repeats"), default=[],
                     help="a further term of the law, for a design that varies its axis; may be repeated")  # fmt: skip
    for command in (fit, compare, plot, report):
        command.add_argument("--bootstrap", type=int, default=200, help="samples of a fit made here (200)")
    for command in (plot, report):
        command.add_argument("--out", metavar="FOLDER", help="where to (beside the table)")
    plot.add_argument("--figure", action="append", metavar="NAME", help="this one only; may be repeated")
    predict.add_argument("--flops", type=float, required=True, help="the budget in model FLOPs")
    predict.add_argument("--study", metavar="STUDY.yaml", help="chooses among what its recipe can make")
    predict.add_argument("--config", metavar="OUT.yaml", help="writes the chosen run for gr-train; with --study")
    predict.add_argument("--force", action="store_true", help="also from a fit that did not converge")
    predict.add_argument("--save", metavar="OUT.json", help="writes the prediction, to be committed before its run")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Does one of them."""
    if getattr(args, "bootstrap", 0) < 0:
        raise UserError(f"--bootstrap is {args.bootstrap}; it must be at least 0")
    if args.command == "predict":
        return _predict(args, rest)
    if args.command == "fit":
        return _fit(args)
    if args.command == "compare":
        return _compare(args)
    from gr.scaling.plots import draw
    from gr.scaling.report import write_report

    table = Path(args.runs)
    folder = Path(args.out) if args.out else table.parent
    plot = args.command == "plot"
    for path in (
        draw(table, folder, args.bootstrap, args.figure) if plot else write_report(table, folder, args.bootstrap)
    ):
        print(path)
    return 0


def _fit(args: argparse.Namespace) -> int:
    from gr.files import write_json
    from gr.scaling.study_fits import fit_table
    from gr.scaling.terms import describe_term

    table = Path(args.runs)
    _, found = fit_table(table, args.variant, args.bootstrap, args.term)
    out = fits_path(table, args.variant)
    write_json(out, found)
    for line in describe(found):
        print(line)
    for run_id, why in found["excluded"]:
        print(f"excluded {run_id}: {why}")
    for term in found["terms"].values():
        print(describe_term(term))
    for note in [*found["notes"], *(note for term in found["terms"].values() for note in term["notes"])]:
        print(f"note: {note}")
    print(out)
    return 0


def describe(found: dict[str, Any]) -> list[str]:
    """A fit in words."""
    law, bounds = found["surface"], found["intervals"] or {}
    said = [f"L(N, D) = E + A N^-alpha + B D^-beta over {found['runs']} runs of {len(found['budgets'])} budgets"]
    for name, value in zip(("E", "alpha", "beta"), (law["floor"], *law["exponents"]), strict=True):
        said.append(f"  {name:<6} {value:.4f} {_range(bounds.get(name))}".rstrip())
    said.append(f"  A {law['factors'][0]:.4g}  B {law['factors'][1]:.4g}  objective {law['objective']:.4g}")
    other = found["projected"]["huber"]
    said.append(f"by variable projection: E {other['floor']:.4f}  alpha {other['exponents'][0]:.4f}  "
                f"beta {other['exponents'][1]:.4f}")  # fmt: skip
    if found["optimum"]:
        said.append(f"by parabolas: N* ~ C^{found['optimum']['n']:.3f}, D* ~ C^{found['optimum']['tokens']:.3f}")
    if found["line"]:
        line = found["line"]
        said.append(f"L(C) = {line['floor']:.4f} + {line['factors'][0]:.4g} C^-{line['exponents'][0]:.4f}")
    noise = found["noise"]
    seeds = "no cell has two seeds" if noise["seed"] is None else f"{100 * noise['seed']:.2f} % over seeds"
    said.append(f"noise of a run: {seeds}, {100 * noise['scatter']:.2f} % about the law")
    said += [f"one step ahead {row['budget']:.2e}: {100 * row['relative_error']:+.2f} %" for row in found["step_ahead"]]
    for row in found["held_out"]:
        said.append(
            f"held out {row['run_id']}  {row['budget']:.2e}  loss {row['loss']:.4f}  predicted {row['predicted']:.4f}"
            f"{_range(row['run_interval'])}  {100 * row['relative_error']:+.2f} %"
        )
        said += [
            f"  {name} {told['seen']:.4f}  predicted {told['predicted']:.4f}{_range(told['interval'])} ({told['form']})"
            for name, told in row["quality"].items()
        ]
    return said


def _range(interval: list[float] | None) -> str:
    return f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _fresh_fit(table: Path, variant: str | None) -> dict[str, Any]:
    """The fit beside a table.

    Raises:
        UserError: There is none, or it is of another table.
    """
    fits = fits_path(table, variant)
    fitted = read_fit(fits)
    if not table.is_file() or fitted["table"] != table_hash(table):
        raise UserError(f"{fits} is not of {table} as it is now; run gr-scaling fit {table} again")
    return fitted


def _predict(args: argparse.Namespace, overrides: list[str]) -> int:
    from gr.files import write_json
    from gr.scaling.fit import predict

    table = Path(args.runs)
    fitted = _fresh_fit(table, args.variant)
    if not fitted["surface"]["converged"] and not args.force:
        raise UserError(f"the fit of {table} did not converge: these runs do not determine the law, and what it "
                        "predicts means nothing; add sizes or budgets, or take it as it is with --force")  # fmt: skip
    if args.study is None and (args.config or overrides):
        raise UserError(f"{'--config' if args.config else overrides[0]} needs --study STUDY.yaml")
    if args.flops <= 0:
        raise UserError(f"--flops is {args.flops:g}; it must be above 0")
    specs: list[Any] = _feasible(args, overrides, fitted) if args.study else []
    sizes = [(spec.planned["n_encoder"], spec.planned["tokens"]) for spec in specs] or None
    found = predict(fitted, args.flops, sizes)
    print(f"at {args.flops:.3g} model FLOPs: N {found['n_encoder']:.4g}, D {found['tokens']:.4g} tokens, "
          f"loss {found['loss']:.4f}, of a run{_range(found['run_interval'])}")  # fmt: skip
    if found["line"] is not None:
        print(f"the compute line says {found['line']:.4f}")
    for name, told in found["quality"].items():
        print(f"{name} {told['predicted']:.4f}{_range(told['interval'])} ({told['form']})")
    print(f"{args.flops / max(fitted['budgets']):.3g} times the largest fitted budget")
    if found["at_end"]:
        print("note: that is the end of the sizes looked at; the law names no best size within them")
    told: dict[str, Any] = {"flops": args.flops, "table": fitted["table"], "variant": fitted["variant"], **found}
    if specs:
        spec = specs[found["index"]]
        print(f"scale {spec.scale:g}: {spec.planned['steps']} steps, {spec.planned['epochs']:.2f} epochs")
        told |= {"run_id": spec.run_id, "scale": spec.scale}
        if args.config:
            from gr.scaling.plan import write_config

            write_config(spec, Path(args.config))
            print(f"gr-train {args.config}")
    if args.save:
        write_json(Path(args.save), told)
        print(args.save)
    return 0


def _feasible(args: argparse.Namespace, overrides: list[str], fitted: dict[str, Any]) -> list[Any]:
    """Runs of whole scales at the budget."""
    from gr.scaling.cells import Cell
    from gr.scaling.design import load_study
    from gr.scaling.plan import open_bench, plan_run

    study, path = load_study(args.study, overrides)
    name = fitted["variant"] or next(iter(study.variants))
    if name not in study.variants:
        raise UserError(f"{args.study} has no variant {name!r}; give the study of the table")
    bench = open_bench(study, path, name)
    most = int(SCALES_TRIED * max(cell.scale for cell in study.design.cells()))
    cells = [Cell(scale=scale, budget=args.flops) for scale in range(1, most + 1)]
    return [plan_run(study, bench, cell, 0, limited=False) for cell in cells]


def _compare(args: argparse.Namespace) -> int:
    from gr.files import write_json
    from gr.scaling.fit import surface_of
    from gr.scaling.frontier import compare, unreached
    from gr.scaling.study_fits import fit_table
    from gr.scaling.table import read_runs

    table = Path(args.runs)
    names = (args.first, args.second)
    if args.first == args.second:
        raise UserError(f"{args.first} and {args.second} are one model; name two of the table's")
    runs = {name: read_runs(table, name)[0] for name in names}
    for name, rows in runs.items():  # before the minutes that a bootstrap takes
        if not surface_of(rows).converged:
            raise UserError(f"the fit of {name} did not converge: its compute means nothing; add sizes or budgets")
    print(f"fitting {args.first} and {args.second}, {args.bootstrap} bootstrap samples each",
          file=sys.stderr, flush=True)  # fmt: skip
    fits = [fit_table(table, name, args.bootstrap)[1] for name in names]
    rows = compare(fits[0], fits[1])
    for row in rows:
        wide = row["interval"]
        told = f" [{wide[0]:.4f}, without an upper end]" if wide and wide[1] is None else _range(wide)
        print(f"loss {row['loss']:.4f}: {args.second} needs {row['multiplier']:.3g} times the compute of {args.first}"
              f"{told}")  # fmt: skip
        if said := unreached(row, args.first, args.second):
            print(f"note: {said}")
    out = table.with_name(f"compare_{args.first}_{args.second}.json")
    write_json(out, {"table": table_hash(table), "first": args.first, "second": args.second, "rows": rows})
    print(out)
    return 0
