"""Small charts as inline SVG, for the report.

Written by hand instead of drawn with matplotlib: no import of a second, sharp text at any zoom, colours that
follow the reader's light or dark setting (through CSS variables ``--s0`` ... of the page), hover texts, and a
title and description for screen readers. Every text that comes from data is escaped.

Line charts scale with their box. Bars are laid out in percent, so that their labels stay HTML text of normal
size on a phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["COLOURS", "Series", "bar", "colour", "legend", "line_chart", "nice_ticks", "stacked_bar"]

COLOURS = 14
"""Number of colours that the page's style defines; more series repeat them."""
_WIDTH, _HEIGHT = 380, 235
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 38


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for legend and hover text.
        points: (x, y), x ascending; points that are not finite are left out and break the line.
        colour: number of the colour.
        dashed: draw dashes.
        band: (x, low, high) around the line, for instance the spread over clients.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def colour(number: int) -> str:
    """The CSS value of a colour."""
    return f"var(--s{number % COLOURS})"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover ``[low, high]``, about ``count`` of
    them.

    Args:
        low: smallest value, finite.
        high: largest value, finite, not below ``low``.
        count: wanted number of steps.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-30:  # nothing to tell apart
        pad = abs(low) / 10 if abs(low) > 1e-30 else 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str,
    y_format: Callable[[float], str],
    tick_format: Callable[[float], str] | None = None,
    x_name: str = "round",
    y_limits: tuple[float, float] | None = None,
) -> Markup:
    """Lines over whole-numbered x, with axes, grid, hover texts and bands.

    Args:
        series: the lines; a line needs at least one finite point to be seen.
        title: what is shown, for screen readers; different for each chart of a page.
        description: the same in a sentence with the main numbers, for screen readers.
        x_label: text under the axis.
        y_format: writes a y value.
        tick_format: writes a y value at the axis; ``y_format`` by default.
        x_name: what one x is called in hover texts.
        y_limits: values that the axis must not go beyond, for instance (0, 1) for shares.

    Returns:
        An ``<svg>`` element, or a sentence where no point is finite.
    """
    finite = [[(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)] for line in series]
    xs = [x for points in finite for x, _ in points]
    ys = [y for points in finite for _, y in points]
    ys += [y for line in series for _, low, high in line.band for y in (low, high) if math.isfinite(y)]
    if not xs:
        return Markup('<p class="none">No measurements.</p>')
    y_ticks = nice_ticks(min(ys), max(ys))
    if y_limits is not None:
        y_ticks = [tick for tick in y_ticks if y_limits[0] - 1e-9 <= tick <= y_limits[1] + 1e-9] or list(
            y_limits
        )
    y_low, y_high = min(y_ticks + ys), max(y_ticks + ys)
    x_low, x_high = min(xs), max(xs)
    x_step = max(1, round(nice_ticks(0, max(1.0, x_high - x_low), 6)[1]))
    x_ticks = [
        x for x in range(math.ceil(x_low), math.floor(x_high) + 1) if x % x_step == 0 or x_high - x_low < 1
    ]

    def sx(x: float) -> float:
        span = x_high - x_low
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - x_low) / span if span else 0.5)

    def sy(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (y - y_low) / ((y_high - y_low) or 1))

    parts = [_open_svg(title, description)]
    for tick in y_ticks:
        y = sy(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = escape((tick_format or y_format)(tick))
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{sx(tick):.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for line in series:
        parts.append(_band(line, sx, sy))
    for line in series:
        parts.append(_line(line, sx, sy))
    for line, points in zip(series, finite, strict=True):
        for x, y in points:
            hover = escape(f"{line.name}, {x_name} {x:g}: {y_format(y)}")
            at, radius = f'cx="{sx(x):.1f}" cy="{sy(y):.1f}"', 2.6 if len(points) <= 40 else 1.4
            parts.append(f'<g class="dot"><title>{hover}</title><circle class="hit" {at} r="9"/>')
            parts.append(f'<circle {at} r="{radius}" style="fill:{colour(line.colour)}"/></g>')
    parts.append("</svg>")
    return Markup("".join(parts))


def legend(entries: Sequence[tuple[str, int]]) -> Markup:
    """Names with their colours, as an HTML list that wraps.

    Args:
        entries: (name, number of the colour).
    """
    items = "".join(
        '<li><svg width="12" height="12" aria-hidden="true">'
        f'<rect width="12" height="12" rx="3" style="fill:{colour(number)}"/></svg>{escape(name)}</li>'
        for name, number in entries
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def bar(
    share: float, *, hover: str, number: int = 0, marker: float | None = None, height: int = 16
) -> Markup:
    """One horizontal bar.

    Args:
        share: length in [0, 1] of the box; anything above zero is drawn at least two pixels long.
        hover: hover text.
        number: number of the colour.
        marker: place of a thin upright line, in [0, 1], to compare with.
        height: in pixels.
    """
    length = 100 * min(max(share, 0.0), 1.0)
    text = escape(hover)
    parts = [
        f'<svg class="bar" width="100%" height="{height}" role="img" aria-label="{text}"><title>{text}</title>'
        f'<rect class="track" width="100%" height="{height}" rx="4"/>'
    ]
    if length > 0:
        # the second rectangle keeps a sliver visible where the first is thinner than a pixel
        parts.append(f'<rect width="{length:.3f}%" height="{height}" rx="4" style="fill:{colour(number)}"/>')
        parts.append(f'<rect width="2" height="{height}" style="fill:{colour(number)}"/>')
    if marker is not None:
        place = 100 * min(max(marker, 0.0), 1.0)
        parts.append(f'<line class="marker" x1="{place:.3f}%" x2="{place:.3f}%" y1="0" y2="{height}"/>')
    parts.append("</svg>")
    return Markup("".join(parts))


def stacked_bar(
    values: Sequence[float], names: Sequence[str], *, total: float, label: str, height: int = 22
) -> Markup:
    """One horizontal bar made of coloured parts.

    Args:
        values: size of each part, ``(n,)``, not negative; parts of size zero are left out.
        names: name of each part, ``(n,)``; part ``i`` has colour ``i``.
        total: the value that fills the box.
        label: what the bar is, for screen readers and hover texts.
        height: in pixels.
    """
    spoken = f"{label}: " + ", ".join(
        f"{name} {value:,.0f}" for name, value in zip(names, values, strict=True) if value
    )
    parts = [f'<svg class="bar" width="100%" height="{height}" role="img" aria-label="{escape(spoken)}">']
    parts.append(f'<rect class="track" width="100%" height="{height}" rx="4"/>')
    at = 0.0
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        if value <= 0 or total <= 0:
            continue
        width = 100 * value / total
        parts.append(
            f'<rect class="part" x="{at:.3f}%" width="{width:.3f}%" height="{height}" style="fill:{colour(number)}">'
            f"<title>{escape(f'{label}, {name}: {value:,.0f}')}</title></rect>"
        )
        at += width
    parts.append("</svg>")
    return Markup("".join(parts))


def _open_svg(title: str, description: str) -> str:
    name = "chart-" + re.sub(r"[^a-z0-9]+", "-", title.lower()) + "-"  # the same bytes for the same run
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(description)}</desc>'
    )


def _band(line: Series, sx: Callable[[float], float], sy: Callable[[float], float]) -> str:
    points = [(x, low, high) for x, low, high in line.band if math.isfinite(low) and math.isfinite(high)]
    if len(points) < 2:
        return ""
    upper = [f"{sx(x):.1f},{sy(high):.1f}" for x, _, high in points]
    lower = [f"{sx(x):.1f},{sy(low):.1f}" for x, low, _ in reversed(points)]
    return f'<polygon class="band" points="{" ".join(upper + lower)}" style="fill:{colour(line.colour)}"/>'


def _line(line: Series, sx: Callable[[float], float], sy: Callable[[float], float]) -> str:
    path, pen_down = [], False
    for x, y in line.points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{sx(x):.1f} {sy(y):.1f}")
        pen_down = True
    dash = ' stroke-dasharray="6 5"' if line.dashed else ""
    return f'<path class="line" d="{" ".join(path)}" style="stroke:{colour(line.colour)}"{dash}/>'
