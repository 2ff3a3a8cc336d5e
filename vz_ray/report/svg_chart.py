"""Line charts as inline SVG.

Colors are CSS classes `s1` to `s5`, so charts follow the page's dark or light scheme. The size suits cards
of 340 px, so text is readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vz_ray.report.markup import escape, figure, format_percent, legend

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
_MAX_POINTS = 240
_SMALLEST = 1e-300
"""Smallest value with a decade that a double can represent."""


@dataclass(frozen=True, slots=True)
class ChartSeries:
    """Line or single point of a chart.

    Attributes:
        name: Legend text.
        points: `(x, y)`, ascending x.
        color: Color class, 1 to 5.
        markers: Draw a dot per point.
        whiskers: `(low, high)` of each point.
        dashed: Draw a dashed line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 1
    markers: bool = False
    whiskers: Sequence[tuple[float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Linear or logarithmic mapping from values, `low` to `high`, to pixels, `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if high == low:
            return (self.start + self.end) / 2
        scaled = math.log(max(value, self.low)) if self.log else value
        return self.start + (scaled - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    every = max(1, len(exponents) // 5)
    return [10.0**e for e in exponents[::every]]


def tick_label(value: float, as_percent: bool = False) -> str:
    """Format the label of a tick."""
    if as_percent:
        return f"{100 * value:.0f}%"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def downsample(points: Sequence[tuple[float, float]], max_points: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `max_points` points, each the mean of a chunk of equal size."""
    if len(points) <= max_points:
        return list(points)
    size = math.ceil(len(points) / max_points)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _y_range(values: Sequence[float], as_percent: bool, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.0001))
    if as_percent:
        return 0.0, 1.0
    low = min(0.0, low)
    high = high if high - low > _SMALLEST else low + 1.0
    return low, high + 0.05 * (high - low)


def _axes(x: AxisScale, y: AxisScale, x_ticks: Sequence[float], as_percent: bool, x_label: str) -> str:
    parts = []
    for value in _decades(y.low, y.high) if y.log else ticks(y.low, y.high):
        position = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{position:.1f}" y2="{position:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{position + 4:.1f}">{tick_label(value, as_percent)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for value in x_ticks:
        parts.append(f'<text class="mid" x="{x(value):.1f}" y="{floor + 15}">{tick_label(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle:.0f}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    return "".join(parts)


def _whiskers(series: ChartSeries, x: AxisScale, y: AxisScale) -> str:
    return "".join(
        f'<line class="whisker" x1="{x(px):.1f}" x2="{x(px):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        for (px, _), (low, high) in zip(series.points, series.whiskers, strict=True)
    )


def _dots(series: ChartSeries, x: AxisScale, y: AxisScale, as_percent: bool) -> str:
    """Render a dot with a tooltip per point; without markers, dots are invisible hover targets."""
    visible = series.markers or len(series.points) == 1
    css_class, radius = ("dot", 4) if visible else ("dot hover-target", 6)
    return "".join(
        f'<circle class="{css_class}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="{radius}">'
        f"<title>{escape(series.name)}: {_format_value(py, as_percent)} at {tick_label(px)}</title></circle>"
        for px, py in series.points
    )


def _format_value(value: float, as_percent: bool) -> str:
    return format_percent(value) if as_percent else f"{value:.4g}"


def _render_series(series: ChartSeries, x: AxisScale, y: AxisScale, as_percent: bool) -> str:
    path = ""
    if len(series.points) > 1:
        coordinates = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in series.points)
        path = f'<polyline class="line" points="{coordinates}"/>'
    whiskers = _whiskers(series, x, y) if series.whiskers else ""
    return f'<g class="{_classes(series)}">{path}{whiskers}{_dots(series, x, y, as_percent)}</g>'


def _classes(series: ChartSeries) -> str:
    return f"s{series.color} dashed" if series.dashed else f"s{series.color}"


def line_chart(
    title: str,
    series: Sequence[ChartSeries],
    *,
    x_label: str = "step",
    as_percent: bool = False,
    y_log: bool = False,
    x_log: bool = False,
    x_ticks: Sequence[float] = (),
) -> str:
    """Render a `<figure>`; return an empty string if no series has a point.

    Args:
        title: Title with unit.
        series: Lines. Empty series and non-finite values (on a logarithmic axis: non-positive) are omitted.
        x_label: Label of the x axis.
        as_percent: Values are fractions; the axis ranges from 0 to 100%.
        y_log: Logarithmic y axis.
        x_log: Logarithmic x axis.
        x_ticks: Ticks of the x axis. Default: chosen automatically.
    """
    visible = [cleaned for s in series if (cleaned := _drop_invalid(s, y_log)).points]
    if not visible:
        return ""
    xs = [px for s in visible for px, _ in s.points]
    ys = [py for s in visible for _, py in s.points] + [v for s in visible for pair in s.whiskers for v in pair]
    low, high = _y_range(ys, as_percent, y_log)
    x = AxisScale(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT - 6, x_log)
    y = AxisScale(low, high, HEIGHT - BOTTOM, TOP, y_log)
    marks = list(x_ticks) or [v for v in ticks(x.low, x.high) if v == int(v)]
    body = _axes(x, y, marks, as_percent, x_label) + "".join(_render_series(s, x, y, as_percent) for s in visible)
    names = legend((_classes(s), s.name) for s in visible) if len(visible) > 1 else ""
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return figure(title, names + picture)


def _drop_invalid(series: ChartSeries, positive: bool) -> ChartSeries:
    """Remove points that cannot be drawn; downsample series without whiskers."""
    valid = [math.isfinite(py) and (py > _SMALLEST or not positive) for _, py in series.points]
    points = [point for point, is_valid in zip(series.points, valid, strict=True) if is_valid]
    if not series.whiskers:
        return replace(series, points=downsample(points))
    whiskers = [pair for pair, is_valid in zip(series.whiskers, valid, strict=True) if is_valid]
    return replace(series, points=points, whiskers=whiskers)
