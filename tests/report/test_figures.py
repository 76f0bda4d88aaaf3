"""Figures follow the theme, keep their text, and draw what they are given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from gr.report.figures import Bar, bars, compact, curve, thin

ROWS = [Bar("HSTU", 0.4, 0.38, 0.42, accent=True), Bar("a <b> & $c$", 0.2, 0.19, 0.21)]


def widths(svg: str) -> list[float]:
    """Lengths of the filled bars, from their paths."""
    found = []
    for path in re.findall(r'<path d="([^"]*z\s*)"', svg):
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", path)]
        found.append(max(xs) - min(xs))
    return found


def test_bars_are_in_proportion_to_their_means():
    long, short = widths(bars("b", "t", ROWS, ceiling=0.44))
    assert long / short == pytest.approx(2.0, rel=1e-3)


def test_svg_is_well_formed_with_text_as_text_and_no_colour_of_its_own():
    for svg in (
        bars("b", 'a "title" <', ROWS, 0.44),
        curve("c", "t", [1, 2], [3.0, 4.0], ceiling=5.0, mark=2),
    ):
        ElementTree.fromstring(svg)
        colours = re.findall(r"#[0-9a-fA-F]{6}\b", svg)
        assert colours == [] and "var(--accent)" in svg
        assert "font-family" not in svg and "xmlns" not in svg
    texts = [e.text.strip() for e in ElementTree.fromstring(bars("b", "t", ROWS, 0.44)).iter("text")]
    assert {"HSTU", "0.400", "a <b> & $c$", "ceiling 0.440"} <= set(texts)


def test_ids_carry_the_figures_name_so_that_figures_share_a_page():
    ids = [set(re.findall(r'id="([^"]*)"', curve(n, "t", [1, 2], [3.0, 4.0]))) for n in ("one", "two")]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1.0, float("nan"), 3.0], [1e-9, 1e9]])
def test_curves_of_one_point_no_range_or_gaps_are_drawn(values):
    svg = curve("c", "t", range(len(values)), values, zero=True)
    assert "nan" not in svg and "<path" in svg


def test_bars_of_nothing_but_zeros_are_drawn():
    assert "0.000" in bars("b", "t", [Bar("x", 0.0, 0.0, 0.0)])


def test_thinning_keeps_the_mean_and_short_curves():
    points = [(float(i), float(i * i % 7)) for i in range(1000)]
    assert thin(points[:50]) == points[:50]
    short = thin(points, 100)
    assert len(short) == 100
    assert sum(y for _, y in short) / 100 == pytest.approx(sum(y for _, y in points) / 1000)


def test_ticks_are_short():
    assert [compact(v) for v in (0, 12, 1200, 5e6, 2.5e9)] == ["0", "12", "1.2k", "5M", "2.5G"]
