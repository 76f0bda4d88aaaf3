"""The figures of a study from its table and its fits, each beside the CSV it was drawn from. No torch.

Colours are budgets, dashed is a law where runs were fitted, dotted where it is extrapolated, hollow is held out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gr.errors import UserError
from gr.files import write_text
from gr.scaling.bootstrap import spread
from gr.scaling.fit import any_sizes, told
from gr.scaling.frontier import Price, best_size, compare
from gr.scaling.isoflop import envelope
from gr.scaling.law import law_of
from gr.scaling.study_fits import read_fits
from gr.scaling.table import csv_text

PETAFLOP_DAY = 1e15 * 86400
COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d", "#888888")


@dataclass
class Figure:
    """A drawn figure and what it was drawn from.

    Attributes:
        name: Of its files.
        title: For people.
        rows: Plain rows; the CSV.
        paint: Draws the rows on axes, or on an array of them.
        panels: Axes side by side.
    """

    name: str
    title: str
    rows: list[dict[str, Any]]
    paint: Callable[[Any, list[dict[str, Any]]], None] = field(repr=False)
    panels: int = 1

    @cached_property
    def svg(self) -> str:
        """Deterministic bytes."""
        import matplotlib
        from matplotlib import figure as canvas

        settings = {"svg.hashsalt": self.name, "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                    "axes.spines.right": False, "axes.titlesize": 10, "legend.fontsize": 7}  # fmt: skip
        with matplotlib.rc_context(settings):
            figure = canvas.Figure(figsize=(5.2 + 2.4 * (self.panels - 1), 3.6), layout="constrained")
            axes = figure.subplots(1, self.panels)
            self.paint(axes, self.rows)
            if self.panels > 1:
                figure.suptitle(self.title, fontsize=10)
                axes = axes[0]
            else:
                axes.set_title(self.title)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "gr-scaling"})
        return out.getvalue()

    def table(self) -> str:
        """The CSV."""
        return csv_text(self.rows)


def draw(table: Path, folder: Path, samples: int = 200, names: Sequence[str] | None = None) -> list[Path]:
    """Writes the figures of a table into ``folder/figures``.

    Args:
        table: ``runs.csv``; fits beside it are taken if they are of this table.
        folder: Where to.
        samples: Bootstrap samples of a fit that is made here.
        names: Of figures, with or without their model's; ``None``: all.

    Returns:
        The SVGs.

    Raises:
        UserError: This table has no figure of a name.
    """
    fits = read_fits(table, samples)
    made = [figure for name, one in fits.items() for figure in figures(name, one)] + between(fits)
    if names is not None:
        unknown = [name for name in names if not any(_is(figure, name, fits) for figure in made)]
        if unknown:
            raise UserError(f"{table} has no figure {unknown[0]!r}; it has {', '.join(figure.name for figure in made)}")
        made = [figure for figure in made if any(_is(figure, name, fits) for name in names)]
    return write_figures(made, folder)


def _is(figure: Figure, name: str, models: Iterable[str]) -> bool:
    return figure.name == name or figure.name in {f"{model}_{name}" for model in models if model}


def write_figures(made: list[Figure], folder: Path) -> list[Path]:
    """The SVG and the CSV of each."""
    paths = []
    for figure in made:
        path = folder / "figures" / f"{figure.name}.svg"
        write_text(path, figure.svg)
        write_text(path.with_suffix(".csv"), figure.table())
        paths.append(path)
    return paths


def figures(variant: str, study: tuple[list[dict[str, Any]], dict[str, Any]]) -> list[Figure]:
    """The figures of one model; each takes what there is, so that a small study has fewer."""
    rows, fitted = study
    mark = f"{variant}_" if variant else ""
    noise = fitted["noise"]["seed"]
    seeds = "one seed a size" if noise is None else f"a seed moves a loss by {100 * noise:.2g} %"
    makers = (_loss_compute, _isoflop, _optimum, _predicted, _residuals, _corner, _shares, _contours, _lengths, _speed)
    made = [maker(rows, fitted) for maker in makers]
    made += [_quality(rows, fitted, metric) for metric in fitted["quality"]]
    whose = f"{variant or 'all runs'}; {seeds}"
    return [replace(one, name=mark + one.name, title=f"{one.title}\n{whose}") for one in made if one is not None]


def _point(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = ("run_id", "budget", "n_encoder", "tokens", "model_flops", "loss")
    return {"kind": "held out" if row["holdout"] else "run", **{name: row[name] for name in names}, **more}


def _columns(rows: list[dict[str, Any]], *names: str) -> list[list[float]]:
    return [[row[name] for row in rows] for name in names]


def _colours(rows: list[dict[str, Any]]) -> dict[float, str]:
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    return {budget: COLOURS[i % len(COLOURS)] for i, budget in enumerate(budgets)}


def _scatter(axes: Any, rows: list[dict[str, Any]], x: str, y: str, label: bool = True) -> None:
    for budget, colour in _colours(rows).items():
        for kind, face in (("run", colour), ("held out", "none")):
            mine = [row for row in rows if row.get("budget") == budget and row["kind"] == kind]
            if mine:
                name = f"{budget:.1e} FLOPs" + (" (held out)" if kind == "held out" else "")
                axes.scatter([row[x] for row in mine], [row[y] for row in mine], s=22, facecolors=face,
                             edgecolors=colour, label=name if label else None)  # fmt: skip


def _curve(axes: Any, rows: list[dict[str, Any]], x: str, y: str, label: str) -> None:
    for kind, dashes in (("law", "--"), ("extrapolated", ":")):
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            axes.plot([row[x] for row in mine], [row[y] for row in mine], dashes, color="#333333", linewidth=1,
                      label=f"{label} ({kind})")  # fmt: skip
            if "low" in mine[0]:
                axes.fill_between([row[x] for row in mine], [row["low"] for row in mine],
                                  [row["high"] for row in mine], color="#333333", alpha=0.12, linewidth=0)  # fmt: skip


def _log(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _days(axes: Any) -> None:
    second = axes.secondary_xaxis("top", functions=(lambda c: c / PETAFLOP_DAY, lambda d: d * PETAFLOP_DAY))
    second.set_xlabel("petaFLOP/s-days", fontsize=7)
    second.tick_params(labelsize=7)


def _frontier_curve(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> list[dict[str, Any]]:
    """The law's best loss along compute, to ten times what was run."""
    law, price, sizes = law_of(fitted["surface"]), Price(fitted["price"]), any_sizes(fitted)
    laws = [law_of(raw) for raw in fitted["bootstrap"]]
    seen = [row["budget"] for row in rows]
    found = []
    for budget in np.geomspace(min(seen), 10 * max(seen), 41):
        n, d, loss = best_size(law, price, float(budget), sizes)
        kind = "law" if budget <= 1.001 * max(fitted["budgets"]) else "extrapolated"
        row = {"kind": kind, "model_flops": float(budget), "n_encoder": n, "tokens": d, "loss": loss}
        if laws:
            row["low"], row["high"] = spread([float(one(n, d)) for one in laws])
        found.append(row)
    return found


def _loss_compute(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    front = {row["run_id"] for row in envelope([row for row in rows if not row["holdout"]])}
    data = [_point(row, on_envelope=int(row["run_id"] in front)) for row in rows] + _frontier_curve(rows, fitted)

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        runs = [row for row in data if row["kind"] in ("run", "held out")]
        _scatter(axes, runs, "model_flops", "loss")
        on = sorted((row for row in runs if row["on_envelope"]), key=lambda row: row["model_flops"])
        axes.plot([row["model_flops"] for row in on], [row["loss"] for row in on], color="#999999", linewidth=0.8,
                  label="envelope of finished runs")  # fmt: skip
        _curve(axes, data, "model_flops", "loss", "L(N*, D*)")
        _log(axes, "model FLOPs", "held-out loss (nats)")
        _days(axes)

    return Figure("loss_compute", "Loss against compute", data, paint)


def _isoflop(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    data = [_point(row) for row in rows]
    for row in fitted["parabolas"]:
        if "coefficients" not in row:
            continue
        logs = np.log([one["n_encoder"] for one in rows if one["budget"] == row["budget"]])
        for x in np.linspace(logs.min(), logs.max(), 30):
            data.append({"kind": "parabola", "budget": row["budget"], "n_encoder": float(np.exp(x)),
                         "loss": float(np.polyval(row["coefficients"], x))})  # fmt: skip
        if row["why"] is None:
            data.append({"kind": "minimum", "budget": row["budget"], "n_encoder": row["n_best"],
                         "loss": row["loss_best"]})  # fmt: skip

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        runs = [row for row in data if row["kind"] in ("run", "held out")]
        _scatter(axes, runs, "n_encoder", "loss")
        colours = _colours(runs)
        for budget, colour in colours.items():
            mine = [row for row in data if row["kind"] == "parabola" and row["budget"] == budget]
            axes.plot(*_columns(mine, "n_encoder", "loss"), "--", color=colour, linewidth=1)
        for row in data:
            if row["kind"] == "minimum":
                axes.plot(row["n_encoder"], row["loss"], "x", color=colours[row["budget"]])
        _log(axes, "encoder parameters N", "held-out loss (nats)")

    return Figure("isoflop", "Loss against size at each budget, x: minimum", data, paint)


def _optimum(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    data = [{"kind": "parabola", "model_flops": row["budget"], "n_encoder": row["n_best"], "tokens": row["tokens_best"]}
            for row in fitted["parabolas"] if row["why"] is None] + _frontier_curve(rows, fitted)  # fmt: skip

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        for name, colour, label in (("n_encoder", COLOURS[0], "N*"), ("tokens", COLOURS[2], "D*")):
            mine = [row for row in data if row["kind"] == "parabola"]
            axes.plot([row["model_flops"] for row in mine], [row[name] for row in mine], "o", color=colour,
                      label=f"{label} by parabola")  # fmt: skip
            for kind, dashes in (("law", "--"), ("extrapolated", ":")):
                mine = [row for row in data if row["kind"] == kind]
                axes.plot([row["model_flops"] for row in mine], [row[name] for row in mine], dashes, color=colour,
                          label=f"{label} by L(N, D), {kind}")  # fmt: skip
        axes.set_yscale("log")
        _log(axes, "model FLOPs", "parameters, tokens")

    return Figure("optimum", "Best size and tokens for a budget", data, paint)


def _predicted(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    law = law_of(fitted["surface"])
    held = {row["run_id"]: row["run_interval"] for row in fitted["held_out"]}
    data = []
    for row in rows:
        said = float(law(row["n_encoder"], row["tokens"]))
        low, high = held.get(row["run_id"]) or (said, said)
        data.append(_point(row, predicted=said, low=low, high=high))

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        _scatter(axes, data, "loss", "predicted")
        for row in data:
            if row["high"] > row["low"]:
                axes.plot([row["loss"]] * 2, [row["low"], row["high"]], color="#333333", linewidth=0.8)
        ends = [min(row["loss"] for row in data), max(row["loss"] for row in data)]
        axes.plot(ends, ends, "--", color="#333333", linewidth=0.8)
        axes.set_xlabel("loss seen")
        axes.set_ylabel("loss by L(N, D)")

    return Figure("predicted", "Predicted and seen; hollow: held out, with its interval", data, paint)


def _residuals(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    law = law_of(fitted["surface"])
    data = [_point(row, residual=float(np.log(row["loss"] / law(row["n_encoder"], row["tokens"])))) for row in rows]

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        names = (("n_encoder", "encoder parameters N"), ("tokens", "tokens D"), ("model_flops", "model FLOPs"))
        for one, (name, label) in zip(axes, names, strict=True):
            _scatter(one, data, name, "residual", label=one is axes[0])
            one.axhline(0, color="#333333", linewidth=0.8)
            _log(one, label, "log loss, seen - law" if one is axes[0] else "")

    return Figure("residuals", "What the law leaves over", data, paint, panels=3)


def _corner(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure | None:
    data = [{"kind": way, "E": raw["floor"], "alpha": raw["exponents"][0], "beta": raw["exponents"][1]}
            for way in ("bootstrap", "seed_bootstrap") for raw in fitted[way]]  # fmt: skip
    if not data:
        return None

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        names = (("bootstrap", COLOURS[0], "by run"), ("seed_bootstrap", COLOURS[1], "by seed"))
        for one, (x, y) in zip(axes, (("alpha", "beta"), ("E", "alpha"), ("E", "beta")), strict=True):
            for kind, colour, label in names:
                mine = [row for row in data if row["kind"] == kind]
                if mine:
                    one.scatter(*_columns(mine, x, y), s=5, color=colour, label=label)
            one.set_xlabel(x)
            one.set_ylabel(y)

    return Figure("bootstrap", "Laws of resampled runs", data, paint, panels=3)


def _contours(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure:
    law = law_of(fitted["surface"])
    data = [_point(row) for row in rows]
    n, d = (np.geomspace(min(x), max(x), 25).tolist() for x in _columns(rows, "n_encoder", "tokens"))
    data += [{"kind": "law at", "n_encoder": x, "tokens": y, "loss": float(law(x, y))} for y in d for x in n]
    data += [row for row in _frontier_curve(rows, fitted) if row["kind"] == "law"]

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        grid = [row for row in data if row["kind"] == "law at"]
        side = round(len(grid) ** 0.5)
        x, y, z = (np.array([row[k] for row in grid]).reshape(side, side) for k in ("n_encoder", "tokens", "loss"))
        drawn = axes.contour(x, y, z, levels=12, colors="#999999", linewidths=0.6)
        axes.clabel(drawn, fontsize=6)
        _scatter(axes, [row for row in data if row["kind"] in ("run", "held out")], "n_encoder", "tokens", label=False)
        best = [row for row in data if row["kind"] == "law"]
        axes.plot([row["n_encoder"] for row in best], [row["tokens"] for row in best], "--", color="#333333",
                  linewidth=1, label="best size")  # fmt: skip
        axes.set_yscale("log")
        _log(axes, "encoder parameters N", "tokens D")

    return Figure("contours", "L(N, D), runs and the best sizes", data, paint)


def _shares(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure | None:
    names = ("flops_dense", "flops_attention", "flops_head")
    data, seen = [], set()
    for row in sorted(rows, key=lambda row: row["n_encoder"]):
        try:
            parts = [float(row[name]) for name in names]
        except (KeyError, TypeError, ValueError):
            return None
        if row["n_encoder"] not in seen:
            seen.add(row["n_encoder"])
            shares = {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}
            data.append({"kind": "size", "n_encoder": row["n_encoder"], **shares})

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        places, below = np.arange(len(data)), np.zeros(len(data))
        for name, colour in zip(names, COLOURS, strict=False):
            height = np.array([row[name] for row in data])
            axes.bar(places, height, bottom=below, color=colour, label=name.removeprefix("flops_"))
            below += height
        axes.set_xticks(places, [f"{row['n_encoder']:.2g}" for row in data])
        axes.set_xlabel("encoder parameters N")
        axes.set_ylabel("share of model FLOPs")

    return Figure("flop_shares", "Where the FLOPs go", data, paint)


def _lengths(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure | None:
    """Nothing unless histories of several lengths were read."""
    if len({row["max_events"] for row in rows if row.get("max_events")}) < 2 or not all(
        row.get("pairs") for row in rows
    ):
        return None
    data = [_point(row, attended=float(row["pairs"]) / row["tokens"]) for row in rows]
    term = fitted.get("terms", {}).get("length")
    if term is not None:
        law, ends = law_of(term["law"]), [f(row["attended"] for row in data) for f in (min, max)]
        for budget in fitted["budgets"]:
            best = min((row for row in data if row["budget"] == budget), key=lambda row: row["loss"])
            for x in np.geomspace(*ends, 30).tolist():
                said = float(law(best["n_encoder"], best["tokens"], x))
                data.append({"kind": "law", "budget": budget, "attended": x, "loss": said})

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        runs = [row for row in data if row["kind"] != "law"]
        _scatter(axes, runs, "attended", "loss")
        for budget, colour in _colours(runs).items():
            mine = [row for row in data if row["kind"] == "law" and row["budget"] == budget]
            axes.plot(*_columns(mine, "attended", "loss"), "--", color=colour, linewidth=1)
        _log(axes, "mean attended history", "held-out loss (nats)")

    return Figure("length", "Loss against length; the law at each budget's best size", data, paint)


def _speed(rows: list[dict[str, Any]], fitted: dict[str, Any]) -> Figure | None:
    """Nothing without the study's ``timings.csv``."""
    data = []
    for row in rows:
        try:
            seconds, steps = float(row["train_seconds"]), float(row["steps"])
        except (KeyError, TypeError, ValueError):
            return None
        mfu = row.get("mfu") or ""
        data.append(_point(row, flops_per_s=row["model_flops"] / seconds, step_ms=1e3 * seconds / steps, mfu=mfu))

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        name, label = ("mfu", "MFU") if all(row["mfu"] for row in data) else ("flops_per_s", "model FLOP/s")
        axes.scatter([row["n_encoder"] for row in data], [float(row[name]) for row in data], s=22, color=COLOURS[0],
                     label=label)  # fmt: skip
        other = axes.twinx()
        other.scatter(*_columns(data, "n_encoder", "step_ms"), s=22, marker="x", color=COLOURS[2])
        other.set_ylabel("milliseconds a step (x)")
        _log(axes, "encoder parameters N", label)

    return Figure("speed", "Speed against size", data, paint)


def _quality(rows: list[dict[str, Any]], fitted: dict[str, Any], metric: str) -> Figure:
    data = [_point(row, value=row[metric]) for row in rows if metric in row]
    for row in _frontier_curve(rows, fitted):
        said = told(fitted, row["model_flops"], row["n_encoder"], row["tokens"])[metric]
        low, high = said["interval"]
        data.append({**row, "value": said["predicted"], "low": low, "high": high})

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        _scatter(axes, [row for row in data if row["kind"] in ("run", "held out")], "model_flops", "value")
        _curve(axes, data, "model_flops", "value", fitted["quality"][metric]["form"])
        _log(axes, "model FLOPs", metric)
        _days(axes)

    return Figure(f"quality_{metric.replace('@', '')}", f"{metric} against compute", data, paint)


def between(fits: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]) -> list[Figure]:
    """Compute multipliers of every model against the first; nothing with one model or no loss in common."""
    data = []
    names = list(fits)
    for other in names[1:]:
        try:
            for row in compare(fits[names[0]][1], fits[other][1]):
                low, high = row["interval"] or (row["multiplier"],) * 2
                high = row["multiplier"] if high is None else high  # no upper end: the CSV of compare says so
                data.append({"model": other, "of": names[0], "loss": row["loss"], "multiplier": row["multiplier"],
                             "low": low, "high": high})  # fmt: skip
        except UserError:
            continue
    if not data:
        return []

    def paint(axes: Any, data: list[dict[str, Any]]) -> None:
        for i, row in enumerate(data):
            axes.bar(i, row["multiplier"], color=COLOURS[0])
            axes.plot([i, i], [row["low"], row["high"]], color="#333333", linewidth=1)
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_xticks(range(len(data)), [f"{row['model']}\nloss {row['loss']:.3f}" for row in data])
        axes.set_ylabel(f"times the compute of {names[0]}")

    return [Figure("multiplier", "Compute for the same loss", data, paint)]
