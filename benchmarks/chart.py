"""Two small charts as SVG: answers per second by server, and the latency curve under offered load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLORS = ("#1f6feb", "#d4720b", "#2e8b57", "#8250df", "#c2255c", "#57606a")
#: From few to many, for what has an order.
SHADES = ("#9ecbff", "#4a9eff", "#1f6feb", "#0a3d91", "#05204a")
FONT = "font-family='system-ui,sans-serif'"


def bars(title: str, series: Mapping[str, Mapping[str, float]]) -> str:
    """Horizontal bars: a group for each name, in it a bar for each key of its values. Shades show
    the keys' order."""
    names = list(series)
    keys = list(dict.fromkeys(key for values in series.values() for key in values))
    top, left, width, bar, gap = 56, 170, 480, 14, 14
    group = bar * len(keys) + gap
    height = top + group * len(names) + 16
    most = max((value for values in series.values() for value in values.values()), default=1.0) or 1.0
    out = [_open(left + width + 90, height), _text(12, 24, title, size=15, weight="600")]
    for index, key in enumerate(keys):
        x = left - 150 + index * 140
        out.append(f"<rect x='{x}' y='36' width='11' height='11' fill='{SHADES[index % len(SHADES)]}'/>")
        out.append(_text(x + 16, 46, key))
    for row, name in enumerate(names):
        y = top + row * group
        out.append(_text(left - 10, y + group / 2, name, anchor="end"))
        for index, key in enumerate(keys):
            value = series[name].get(key)
            if value is None:
                continue
            length = max(1.0, value / most * width)
            at = y + index * bar
            out.append(
                f"<rect x='{left}' y='{at}' width='{length:.1f}' height='{bar - 2}' "
                f"fill='{SHADES[index % len(SHADES)]}'/>"
            )
            out.append(_text(left + length + 6, at + bar - 3, f"{value:,.0f}", size=11))
    return "\n".join([*out, "</svg>\n"])


def curves(
    title: str, x_title: str, y_title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, log: bool
) -> str:
    """Lines over a common x axis; with `log` the y axis is logarithmic."""
    left, top, width, height = 74, 64, 560, 280
    points = [point for line in lines.values() for point in line]
    most_x = _round_up(max((x for x, _ in points), default=1.0))
    most_y = _round_up(max((y for _, y in points), default=1.0))
    least_y = min((y for _, y in points if y > 0), default=1.0)
    low = math.floor(math.log10(least_y)) if log else 0
    high = max(low + 1, math.ceil(math.log10(most_y))) if log else 0

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(y, 10.0**low)) - low) / (high - low) if log else y / most_y
        return left + x / most_x * width, top + height - share * height

    out = [_open(left + width + 40, top + height + 56), _text(12, 24, title, size=15, weight="600")]
    marks = [10.0**power for power in range(low, high + 1)] if log else [most_y * i / 4 for i in range(6)]
    for mark in marks:
        _, y = place(0, mark)
        out.append(f"<line x1='{left}' y1='{y:.1f}' x2='{left + width}' y2='{y:.1f}' stroke='#d0d7de'/>")
        out.append(_text(left - 8, y + 4, f"{mark:,g}" if log else f"{mark:,.0f}", anchor="end", size=11))
    for step in range(6):
        x, y = place(most_x * step / 5, 10.0**low if log else 0)
        out.append(_text(x, top + height + 18, f"{most_x * step / 5:,.0f}", anchor="middle", size=11))
    out.append(_text(left + width / 2, top + height + 42, x_title, anchor="middle"))
    out.append(_text(left, top - 8, y_title, size=11))
    for index, (name, line) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        out.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        out.extend(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{color}'/>" for x, y in placed)
        out.append(f"<rect x='{left + index * 140}' y='34' width='11' height='11' fill='{color}'/>")
        out.append(_text(left + index * 140 + 16, 44, name))
    return "\n".join([*out, "</svg>\n"])


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((step * power for step in (1, 2, 2.5, 5) if step * power >= value), 10 * power)


def _open(width: float, height: float) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' "
        f"width='{width:.0f}' height='{height:.0f}' {FONT}>\n"
        f"<rect width='100%' height='100%' fill='#ffffff'/>"
    )


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "400"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='#24292f'>{escape(text)}</text>"
    )
