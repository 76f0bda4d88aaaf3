"""Figures as inline SVG: deterministic bytes, searchable text, colours that follow the page's theme.

Every figure is drawn for one column of about 370 CSS pixels, so that two stand side by side on a screen and
one fills a phone, at the size of the surrounding text in both. Colours are drawn as stand-in hex values and
replaced by CSS variables, so that one SVG serves the light and the dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 370  # CSS pixels
MAX_POINTS = 160  # a curve of one column needs no more, and the file stays small

_INK, _MUTED, _LINE, _BAR, _ACCENT, _CEILING = (
    "#010203",
    "#010204",
    "#010205",
    "#010206",
    "#010207",
    "#010208",
)
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _BAR: "--bar",
    _ACCENT: "--accent",
    _CEILING: "--ceiling",
}


@dataclass(frozen=True)
class Bar:
    """One recommender's score with its interval."""

    label: str
    mean: float
    low: float
    high: float
    accent: bool = False


def bars(name: str, title: str, rows: Sequence[Bar], ceiling: float | None = None) -> str:
    """Horizontal bars with 95 % intervals and, where known, the ceiling as a dashed line.

    Args:
        name: Unique on the page; prefixes every id in the SVG.
        title: For screen readers.
        rows: From top to bottom.
        ceiling: The best that any recommender can expect on this data.
    """
    step, top = 44, 22 if ceiling is not None else 4
    figure, axes = _canvas(top + step * len(rows) + 4, left=1, right=1, top=top, bottom=4)
    largest = max([row.high for row in rows] + [ceiling or 0.0]) or 1.0
    axes.set_xlim(0, largest * WIDTH / (WIDTH - 52))  # the values stand in a column of 52 px, right of every mark
    axes.set_ylim(len(rows) - 0.5 + 0.12, -0.5)
    axes.axis("off")
    for y, row in enumerate(rows):
        colour = _ACCENT if row.accent else _BAR
        axes.barh(y + 0.14, row.mean, height=0.34, color=colour, linewidth=0)
        axes.plot([row.low, row.high], [y + 0.14] * 2, color=_INK, linewidth=1.2, solid_capstyle="butt")
        for end in (row.low, row.high):
            axes.plot([end] * 2, [y + 0.05, y + 0.23], color=_INK, linewidth=1.2, solid_capstyle="butt")
        weight = "bold" if row.accent else "normal"
        _text(axes, 0, y - 0.12, _shorten(row.label), colour=_INK, weight=weight, va="bottom")
        _text(axes, axes.get_xlim()[1], y + 0.15, f"{row.mean:.3f}", colour=_INK, weight=weight, ha="right")
    if ceiling is not None:
        axes.axvline(ceiling, color=_CEILING, linewidth=1.2, dashes=(4, 3))
        _text(
            axes,
            ceiling,
            -0.52,
            f"ceiling {ceiling:.3f}",
            colour=_CEILING,
            va="bottom",
            ha="right" if ceiling > largest / 2 else "left",
        )
    return _svg(figure, name, title)


def curve(
    name: str,
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    ceiling: float | None = None,
    ceiling_label: str = "ceiling",
    markers: bool = False,
    mark: float | None = None,
    zero: bool = False,
    height: int = 210,
) -> str:
    """A line over steps.

    Args:
        name: Unique on the page; prefixes every id in the SVG.
        title: For screen readers.
        x: Steps.
        y: Values; points that are not finite are left out.
        ceiling: A dashed horizontal line.
        ceiling_label: What the dashed line is called.
        markers: A dot at each point, for few points.
        mark: The step whose point is marked with a ring and its value.
        zero: Whether the axis starts at 0.
        height: CSS pixels.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    shown = thin(points)
    figure, axes = _canvas(height, left=46, right=10, top=14, bottom=34)
    axes.plot(
        [p[0] for p in shown],
        [p[1] for p in shown],
        color=_ACCENT,
        linewidth=1.8,
        marker="o" if markers else None,
        markersize=4,
        solid_joinstyle="round",
    )
    values = [p[1] for p in shown] + ([ceiling] if ceiling is not None else [])
    low, high = min(values), max(values)
    pad = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    axes.set_ylim(0 if zero else low - pad, high + pad)
    if ceiling is not None:
        axes.axhline(ceiling, color=_CEILING, linewidth=1.2, dashes=(4, 3))
        axes.annotate(
            f"{ceiling_label} {ceiling:.3f}",
            (1, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=_CEILING,
            parse_math=False,
        )
    if mark is not None and (best := [p for p in points if p[0] == mark]):
        axes.plot(*best[0], marker="o", markersize=9, color=_ACCENT, markerfacecolor="none")
        axes.annotate(
            f"{best[0][1]:.3f}",
            best[0],
            xytext=(0, -10),
            textcoords="offset points",
            ha="center",
            va="top",
            color=_INK,
            weight="bold",
            parse_math=False,
        )
    _style(axes)
    return _svg(figure, name, title)


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Means of ``ceil(n / limit)`` neighbouring points, so that at most ``limit`` remain."""
    size = math.ceil(len(points) / limit) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _canvas(height: int, left: int, right: int, top: int, bottom: int) -> tuple[Any, Any]:
    """A figure of ``WIDTH`` x ``height`` pixels (72 to the inch, so that a point is a pixel) and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    )
    axes.patch.set_visible(False)
    return figure, axes


def _style(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=_MUTED, pad=6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    low, high = axes.get_ylim()
    step = (high - low) / 5
    digits = 0 if step <= 0 else max(0, min(4, 1 - math.floor(math.log10(step))))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: compact(value) if abs(value) >= 1000 else f"{value:.{digits}f}")
    )


def compact(value: float) -> str:
    """1234 -> '1.2k', 5e6 -> '5M': for axis ticks."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.6g}"


def _text(
    axes: Any,
    x: float,
    y: float,
    text: str,
    *,
    colour: str,
    weight: str = "normal",
    va: str = "center",
    ha: str = "left",
) -> None:
    axes.text(x, y, text, color=colour, weight=weight, fontsize=12, va=va, ha=ha, parse_math=False)


def _shorten(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element for an HTML page: no namespaces or metadata, unique ids, themed."""
    from html import escape

    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', svg).group(1)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view}" role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own font
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
