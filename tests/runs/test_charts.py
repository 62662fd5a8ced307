"""Charts: places worked out from the data, every text escaped, well-formed for every input."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.runs.charts import Series, bar, legend, line_chart, nice_ticks, stacked_bar

NUMBER = st.floats(-1e6, 1e6, allow_subnormal=False)
NASTY = "<script>alert('&\")</script>"


def draw(series: Sequence[Series], limits: tuple[float, float] | None = None) -> ET.Element:
    svg = line_chart(
        series, title="A", description="B", x_label="round", y_format=lambda y: f"{y:.4g}", y_limits=limits
    )
    return ET.fromstring(svg)


def dots(svg: ET.Element) -> list[tuple[float, float]]:
    circles = [c for c in svg.iter("circle") if c.get("class") != "hit"]
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(2, 8))
def test_ticks_are_round_and_cover(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 2 * count + 4
    step = ticks[1] - ticks[0]
    slack = 1e-6 * max(step, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    if span > 1e-6 * max(1.0, abs(low)):
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-3


def test_ticks_of_shares() -> None:
    assert nice_ticks(0.698, 0.931) == pytest.approx([0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
    assert nice_ticks(0, 0) == pytest.approx([-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6])
    assert nice_ticks(2e-15, 7e-15) == pytest.approx(
        [2e-15, 3e-15, 4e-15, 5e-15, 6e-15, 7e-15], rel=1e-9, abs=0
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), NUMBER), min_size=1, max_size=12, unique_by=lambda p: p[0]))
def test_points_stand_where_the_data_is(points: list[tuple[int, float]]) -> None:
    points = sorted(points)
    svg = draw([Series("s", [(float(x), y) for x, y in points])])
    placed = dots(svg)
    assert len(placed) == len(points)
    assert all(0 <= x <= 380 and 0 <= y <= 235 for x, y in placed)
    # an affine map: equal steps in data are equal steps on paper, y upside down
    x0, x1 = points[0][0], points[-1][0]
    if x1 > x0:
        scale = (placed[-1][0] - placed[0][0]) / (x1 - x0)
        assert scale > 0
        for (x, _), (px, _) in zip(points, placed, strict=True):
            assert px == pytest.approx(placed[0][0] + scale * (x - x0), abs=0.11)
    ys = [y for _, y in points]
    if max(ys) > min(ys):
        at_low, at_high = placed[ys.index(min(ys))][1], placed[ys.index(max(ys))][1]
        assert at_low >= at_high
        for y, (_, py) in zip(ys, placed, strict=True):
            share = (y - min(ys)) / (max(ys) - min(ys))
            assert py == pytest.approx(at_low + share * (at_high - at_low), abs=0.16)


def test_axis_labels_stand_at_their_values() -> None:
    svg = draw([Series("s", [(0, 0.2), (10, 0.9)])], limits=(0, 1))
    ticks = {t.text: float(t.attrib["y"]) - 4 for t in svg.iter("text") if t.get("text-anchor") == "end"}
    lines = sorted(float(g.attrib["y1"]) for g in svg.iter("line") if g.get("class") == "grid")
    assert sorted(ticks.values()) == pytest.approx(lines, abs=0.11)
    low, high = ticks["0.2"], ticks["0.8"]
    (_, y0), (_, y1) = dots(svg)
    assert y0 == pytest.approx(low, abs=0.11)
    assert y1 == pytest.approx(high + (high - low) / 0.6 * 0.1, abs=0.2)


def test_hover_texts_and_description() -> None:
    svg = draw([Series("Federated", [(1, 0.5), (2, 0.75)])])
    titles = [t.text for t in svg.iter("title")]
    assert titles == ["A", "Federated, round 1: 0.5", "Federated, round 2: 0.75"]
    ids = svg.attrib["aria-labelledby"].split()
    assert {e.get("id") for e in svg.iter() if e.tag in ("title", "desc") and e.get("id")} == set(ids)
    assert svg.attrib["role"] == "img"


def test_gaps_break_the_line() -> None:
    svg = draw([Series("s", [(1, 1.0), (2, math.nan), (3, 2.0), (4, 3.0)])])
    [path] = svg.iter("path")
    assert re.sub(r"[\d. ]", "", path.attrib["d"]) == "MML"
    assert len(dots(svg)) == 3


def test_bands_and_dashes() -> None:
    svg = draw([Series("s", [(1, 1.0), (2, 2.0)], band=[(1, 0.5, 1.5), (2, 1.0, 4.0)], dashed=True)])
    [polygon] = svg.iter("polygon")
    assert len(polygon.attrib["points"].split()) == 4
    [path] = svg.iter("path")
    assert "stroke-dasharray" in path.attrib


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)], [(math.inf, 1.0)]])
def test_nothing_to_draw(points: list[tuple[float, float]]) -> None:
    text = line_chart([Series("s", points)], title="A", description="B", x_label="x", y_format=str)
    assert text == '<p class="none">No measurements.</p>'


@pytest.mark.parametrize("points", [[(1.0, 1.0)], [(0.0, 0.0), (1.0, 0.0)], [(1.0, -3.0), (2.0, -3.0)]])
def test_flat_and_single(points: list[tuple[float, float]]) -> None:
    assert all(math.isfinite(x) and math.isfinite(y) for x, y in dots(draw([Series("s", points)])))


def test_same_input_same_bytes() -> None:
    def once() -> str:
        return line_chart([Series("s", [(1, 2.0)])], title="A b", description="c", x_label="x", y_format=str)

    assert once() == once()


def test_data_cannot_break_out() -> None:
    parts = [
        line_chart(
            [Series(NASTY, [(1, 2.0)])],
            title=NASTY,
            description=NASTY,
            x_label=NASTY,
            y_format=lambda _: NASTY,
        ),
        legend([(NASTY, 1)]),
        bar(0.5, hover=NASTY),
        stacked_bar([1, 2], [NASTY, "x"], total=3, label=NASTY),
    ]
    for part in parts:
        assert "<script" not in part
        root = ET.fromstring(part)
        allowed = {
            "svg",
            "title",
            "desc",
            "line",
            "text",
            "path",
            "g",
            "circle",
            "ul",
            "li",
            "rect",
            "polygon",
        }
        assert {e.tag for e in root.iter()} <= allowed


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 3))
def test_stacked_parts_fill_their_share(values: list[int], spare: int) -> None:
    total = max(1, sum(values) * spare)
    svg = ET.fromstring(stacked_bar(values, [f"n{k}" for k in range(len(values))], total=total, label="c"))
    parts = [r for r in svg.iter("rect") if r.get("class") == "part"]
    assert len(parts) == sum(value > 0 for value in values)
    at = 0.0
    for rect, value in zip(parts, [v for v in values if v], strict=True):
        width = float(rect.attrib["width"].rstrip("%"))
        assert float(rect.attrib["x"].rstrip("%")) == pytest.approx(at, abs=0.02)
        assert width == pytest.approx(100 * value / total, abs=0.001)
        at += width


@pytest.mark.parametrize(("share", "width"), [(0.25, "25.000%"), (1.7, "100.000%"), (1e-9, "0.000%")])
def test_bar_length(share: float, width: str) -> None:
    rects = list(ET.fromstring(bar(share, hover="h", marker=0.4)).iter("rect"))
    assert rects[1].attrib["width"] == width
    assert rects[2].attrib["width"] == "2"  # a sliver stays visible
    assert len(list(ET.fromstring(bar(0.0, hover="h")).iter("rect"))) == 1
