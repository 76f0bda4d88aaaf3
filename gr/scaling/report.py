"""``report.html`` and ``report.md`` of a table: laws, what was held out, the checklist, every figure. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.files import write_text
from gr.scaling.fit import OBJECTIVE
from gr.scaling.frontier import compare
from gr.scaling.law import MOST, REFINED
from gr.scaling.plots import Figure, between, figures, write_figures
from gr.scaling.study_fits import read_fits

Fits = dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]


@dataclass
class Section:
    """A heading with what stands under it.

    Attributes:
        title: The heading.
        lines: Paragraphs.
        head: Names of the table's columns; empty: no table.
        rows: Its rows, as text.
        figures: Drawn below.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def write_report(table: Path, folder: Path, samples: int = 200) -> list[Path]:
    """Writes both reports and the figures, each with its CSV.

    Args:
        table: ``runs.csv``; fits beside it are taken if they are of this table.
        folder: Where to.
        samples: Bootstrap samples of a fit that is made here.

    Returns:
        What was written.
    """
    fits = read_fits(table, samples)
    sections = [_held_out(fits), _laws(fits), *([_multipliers(fits)] if len(fits) > 1 else [])]
    for name, one in fits.items():
        sections.append(Section(f"Figures of {name}" if name else "Figures", figures=figures(name, one)))
    sections += [_steps(fits), _checklist(fits), _excluded(fits)]
    drawn = [figure for section in sections for figure in section.figures]
    paths = write_figures(drawn, folder)
    title = f"Scaling of {', '.join(fits)}" if "" not in fits else "A scaling study"
    write_text(folder / "report.md", markdown(title, sections))
    write_text(folder / "report.html", html(title, sections))
    return [folder / "report.html", folder / "report.md", *paths]


def _name(variant: str) -> str:
    return variant or "all runs"


def _range(interval: list[float] | None, digits: int = 4) -> str:
    return "-" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _held_out(fits: Fits) -> Section:
    head = ["model", "budget", "what", "seen", "predicted", "95 % interval", "off"]
    section = Section("What was held out", head=head)
    for variant, (_, fitted) in fits.items():
        for row in fitted["held_out"]:
            start = [_name(variant), f"{row['budget']:.2e}"]
            off = f"{100 * row['relative_error']:+.2f} %"
            section.rows.append([*start, "loss", f"{row['loss']:.4f}", f"{row['predicted']:.4f}",
                                 _range(row["run_interval"]), off])  # fmt: skip
            for name, said in row["quality"].items():
                section.rows.append([*start, name, f"{said['seen']:.4f}", f"{said['predicted']:.4f}",
                                     _range(said["interval"]), f"{said['error']:+.4f}"])  # fmt: skip
    if not section.rows:
        section.head = []
        section.lines = ["Nothing was held out: no statement here was checked on a run that the fit had not seen."]
    return section


def _laws(fits: Fits) -> Section:
    section = Section(
        "Laws",
        ["L(N, D) = E + A N^-alpha + B D^-beta; intervals are of the bootstrap by run."],
        ["model", "method", "E", "alpha", "beta", "runs"],
    )
    for variant, (_, fitted) in fits.items():
        bounds = fitted["intervals"] or {}
        law = fitted["surface"]
        values = dict(zip(("E", "alpha", "beta"), (law["floor"], *law["exponents"]), strict=True))
        shown = [f"{value:.4f}" + (f" ({_range(bounds[name], 3)})" if bounds else "") for name, value in values.items()]
        section.rows.append([_name(variant), "log-sum-exp, Huber", *shown, str(fitted["runs"])])
        for way, raw in fitted["projected"].items():
            method = f"variable projection, {way}"
            numbers = [f"{value:.4f}" for value in (raw["floor"], *raw["exponents"])]
            section.rows.append([_name(variant), method, *numbers, str(fitted["runs"])])
        line = fitted["line"]
        if line:
            section.lines.append(
                f"{_name(variant)}, best of each budget: L(C) = {line['floor']:.4f} + {line['factors'][0]:.4g} "
                f"C^-{line['exponents'][0]:.4f}."
            )
        if fitted["optimum"]:
            section.lines.append(
                f"{_name(variant)}, minima of parabolas: N* grows as C^{fitted['optimum']['n']:.3f}, D* as "
                f"C^{fitted['optimum']['tokens']:.3f}; parabolas are biased where the exponents differ."
            )
        noise = fitted["noise"]
        seeds = "unknown" if noise["seed"] is None else f"{100 * noise['seed']:.2f} %"
        section.lines.append(
            f"{_name(variant)}: a loss moves by {seeds} with the seed, and lies {100 * noise['scatter']:.2f} % about "
            f"the law; condition number {fitted['condition']:.3g}, largest correlation of two parameters "
            f"{fitted['correlation']:.3f}."
        )
        section.lines += [f"{_name(variant)}: {note}." for note in fitted["notes"]]
    return section


def _multipliers(fits: Fits) -> Section:
    section = Section("Compute for the same loss", head=["model", "loss", "times the compute", "95 % interval"])
    first, *others = fits
    for other in others:
        try:
            rows = compare(fits[first][1], fits[other][1])
        except UserError as error:
            section.lines.append(f"{first} and {other}: {error}.")
            continue
        section.rows += [[f"{other} against {first}", f"{row['loss']:.4f}", f"{row['multiplier']:.3g}",
                          _range(row["interval"], 2)] for row in rows]  # fmt: skip
    if not section.rows:
        section.head = []
    else:
        section.figures = between(fits)
    return section


def _steps(fits: Fits) -> Section:
    section = Section("One step ahead", ["What the law of all smaller budgets said of each budget's best run."],
                      ["model", "budget", "seen", "predicted", "off"])  # fmt: skip
    for variant, (_, fitted) in fits.items():
        for row in fitted["step_ahead"]:
            numbers = [f"{row['budget']:.2e}", f"{row['loss']:.4f}", f"{row['predicted']:.4f}"]
            section.rows.append([_name(variant), *numbers, f"{100 * row['relative_error']:+.2f} %"])
    return section


def _seen(rows: list[dict[str, Any]], name: str) -> str:
    found = sorted({str(row[name]) for row in rows if row.get(name) not in (None, "")})
    return ", ".join(found) or "not in the table"


def _largest(rows: list[dict[str, Any]], name: str) -> str:
    try:
        return f"{max(float(row[name]) for row in rows):.2f}"
    except (KeyError, TypeError, ValueError):
        return "not in the table"


def _checklist(fits: Fits) -> Section:
    """The questions of (Mis)Fitting (Li et al. 2025, arXiv 2502.18969), as far as a table can answer them."""
    rows = [row for mine, _ in fits.values() for row in mine]
    fitted = [one for _, one in fits.values()]
    samples = {len(one["bootstrap"]) for one in fitted}
    budgets = ", ".join(f"{budget:.2e}" for budget in sorted({b for one in fitted for b in one["budgets"]}))
    held = ", ".join(sorted({f"{row['budget']:.2e}" for one in fitted for row in one["held_out"]})) or "nothing"
    answers = {
        "What is N": "the column n_encoder: what the encoder's products multiply with, neither tables nor biases",
        "What is D": "the column tokens: tokens read in training, repeats counted",
        "What is C": "the column model_flops: three times the forward products of the real lengths, scores included; "
        "6 N D is not assumed",
        "Which checkpoints": "the last of each finished schedule; no point lies inside a schedule",
        "Budgets fitted": budgets,
        "Held out": held,
        "Runs": f"{len(rows)}, recipe {_seen(rows, 'recipe')}",
        "Tuning at each size": "the recipe's formulas; how they came about stands in gr/scaling/recipe.py",
        "Seeds": _seen(rows, "seed"),
        "Data": f"log {_seen(rows, 'data_hash')}; at most {_largest(rows, 'epochs')} passes",
        "Judged": f"evaluation {_seen(rows, 'eval_hash')}, the same targets for every run",
        "Objective": OBJECTIVE,
        "Starts": f"4500 on a grid, the best {REFINED} refined; exponents from 0 to {MOST:g}, E below the least loss",
        "Optimiser": "scipy.optimize.least_squares, trust region reflective, analytic Jacobian",
        "Weights": "none",
        "Uncertainty": f"bootstrap by run and by seed, {', '.join(map(str, sorted(samples)))} samples; the interval "
        "of a run adds the scatter about the law and its error one step ahead",
    }
    return Section("Checklist", head=["question", "answer"], rows=[[*pair] for pair in answers.items()])


def _excluded(fits: Fits) -> Section:
    rows = [[_name(variant), run, why] for variant, (_, one) in fits.items() for run, why in one["excluded"]]
    if not rows:
        return Section("Left out", ["No run of the table was left out."])
    return Section("Left out", head=["model", "run", "reason"], rows=rows)


def markdown(title: str, sections: list[Section]) -> str:
    """The report for a repository or a paper's appendix; figures are linked."""
    out = [f"# {title}", ""]
    for section in sections:
        out += [f"## {section.title}", ""]
        for line in section.lines:
            out += [line, ""]
        if section.head:
            out += ["| " + " | ".join(section.head) + " |", "|" + "---|" * len(section.head)]
            out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            out.append("")
        for figure in section.figures:
            caption = figure.title.replace("\n", "; ")
            stem = f"figures/{figure.name}"
            out += [f"![{caption}]({stem}.svg)", "", f"[{figure.name}.csv]({stem}.csv)", ""]
    return "\n".join(out)


def html(title: str, sections: list[Section]) -> str:
    """One file, no scripts, nothing loaded from anywhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gr.scaling", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    drawn = {figure.name: figure.svg.split("?>", 1)[1].split(">", 1)[1] for s in sections for figure in s.figures}
    return environment.get_template("report.html.j2").render(title=title, sections=sections, drawn=drawn)
