"""Charts as inline SVG: they need no script to be seen, printed or read aloud."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 38


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        points: `(x, y)`, x ascending.
        colour: number of one of the page's colours.
        dashed: whether the line is dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A mapping from numbers to pixels along one axis.

    Example:
        >>> Axis(0, 10, 0, 100).place(5), Axis(1, 100, 0, 100, log=True).place(10)
        (50.0, 50.0)
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The position of a number in pixels."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            stride = max(1, -(-(last - first) // 4))
            if last > first:
                return [10.0**i for i in range(first, last + 1, stride)]
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def chart(title: str, series: Sequence[Series], *, x: str = "epoch", log: bool = False) -> str:
    """Lines over a common axis as a figure with a legend.

    Args:
        title: caption of the figure.
        series: the lines; those without a finite point are left out.
        x: what the horizontal axis counts.
        log: whether the vertical axis is logarithmic; values that are not positive are left out.

    Returns:
        HTML; empty if no line is left.
    """
    series = [kept for s in series if (kept := _finite(s, log)).points]
    if not series:
        return ""
    xs = [a for s in series for a, _ in s.points]
    ys = [b for s in series for _, b in s.points]
    across = Axis(*_span(min(xs), max(xs)), _LEFT, _WIDTH - _RIGHT)
    up = Axis(*_room(min(ys), max(ys), log), _HEIGHT - _BOTTOM, _TOP, log)
    lines = "".join(_line(s, across, up) for s in series)
    data = {
        "x": x,
        "series": [
            {"name": s.name, "points": [[_round(a), _round(b)] for a, b in s.points]}
            for s in series
        ],
        "axis": [across.low, across.high, across.start, across.end],
    }
    legend = "".join(
        f'<li class="c{s.colour}{" dashed" if s.dashed else ""}">{escape(s.name)}</li>'
        for s in series
    )
    legend_list = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
    label = f"{title}. " + " ".join(_describe(s, x) for s in series)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(across, up, x)}{lines}"
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" hidden></line></svg>'
        f"{legend_list}<output></output>{data_of(data)}</figure>"
    )


def data_of(values: object) -> str:
    """JSON data for the page's script, escaped so that no text in it can end the element."""
    text = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def number(value: float) -> str:
    """Format a number as briefly as on an axis.

    Example:
        >>> [number(v) for v in (0, 0.25, 12345, 2e6, 0.00002)]
        ['0', '0.25', '12.3k', '2M', '2e-05']
    """
    for size, sign in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e6 if sign == 'M' else 1e3):.3g}{sign}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def histogram(values: "Tensor", bins: int = 80) -> list[tuple[float, float]]:
    """Shares of the values in bins from -1 to 1: `(middle, share)` for each bin.

    Example:
        >>> import torch
        >>> histogram(torch.tensor([-1.0, 0.9, 1.0, 1.0]), bins=2)
        [(-0.5, 0.25), (0.5, 0.75)]
    """
    shares = values.float().clamp(-1, 1).histc(bins, -1, 1) / values.numel()
    return [(-1 + (i + 0.5) * 2 / bins, share) for i, share in enumerate(shares.tolist())]


def _line(series: Series, across: Axis, up: Axis) -> str:
    points = " ".join(f"{across.place(a):.1f},{up.place(b):.1f}" for a, b in series.points)
    kind = f"c{series.colour}{' dashed' if series.dashed else ''}"
    if len(series.points) == 1:  # a line of one point would be invisible
        a, b = points.split(",")
        return f'<circle class="{kind}" cx="{a}" cy="{b}" r="3"></circle>'
    return f'<polyline class="{kind}" points="{points}"></polyline>'


def _grid(across: Axis, up: Axis, x: str) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for tick in up.ticks():
        y = f"{up.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y}">{number(tick)}</text>')
    for tick in across.ticks():
        parts.append(f'<text class="x" x="{across.place(tick):.1f}" y="{floor + 15}">')
        parts.append(f"{number(tick)}</text>")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x name" x="{middle}" y="{_HEIGHT - 5}">{escape(x)}</text>')
    return "".join(parts)


def _describe(series: Series, x: str) -> str:
    (a, first), (b, last) = series.points[0], series.points[-1]
    return (
        f"{series.name}: from {number(first)} at {x} {number(a)} to {number(last)} at "
        f"{x} {number(b)}."
    )


def _finite(series: Series, log: bool) -> Series:
    points = [(a, b) for a, b in series.points if math.isfinite(b) and (b > 0 or not log)]
    return Series(series.name, points, series.colour, series.dashed)


def _span(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _room(low: float, high: float, log: bool) -> tuple[float, float]:
    """Ends of the vertical axis, which starts at zero if that wastes little space."""
    if log:
        return low / 1.3, high * 1.3
    if 0 <= low < 0.6 * high:
        low = 0.0
    space = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - space), high + space


def _round(value: float) -> float:
    return float(f"{value:.5g}")
