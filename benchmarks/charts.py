"""Charts as SVG, written by hand: bars and lines with their numbers beside them.

Each has a ground of its own, so that it can be read on any page, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
_LABELS, _ROW, _HEAD, _MARGIN = 210, 22, 30, 16
_STYLE = """<style>
.ground{fill:#ffffff}.text{fill:#1f2328}.soft{fill:#59636e}.own{fill:#1a7f64}.other{fill:#9aa4af}.grid{stroke:#d1d9e0}
.line0{stroke:#1a7f64;fill:none}.line1{stroke:#8250df;fill:none}.dot0{fill:#1a7f64}.dot1{fill:#8250df}
text{font:13px system-ui,sans-serif}.title{font-weight:600;font-size:15px}
@media(prefers-color-scheme:dark){.ground{fill:#0d1117}.text{fill:#e6edf3}.soft{fill:#9198a1}.own{fill:#3fb68f}
.other{fill:#5b6673}.grid{stroke:#30363d}.line0{stroke:#3fb68f}.line1{stroke:#ab7df8}.dot0{fill:#3fb68f}
.dot1{fill:#ab7df8}}
</style>"""


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    own: bool = False  # keyreel's
    note: str = ""  # stands behind the number


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0:
        return "0"
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}"


def bars(title: str, panels: Sequence[tuple[str, Sequence[Bar]]], unit: str) -> str:
    """Horizontal bars; each panel has a heading, and all share one scale."""
    most = max(bar.value for _, panel in panels for bar in panel)
    room = WIDTH - _LABELS - _MARGIN - 150
    parts, y = [], _MARGIN + 34
    for heading, panel in panels:
        parts.append(_text(_MARGIN, y + 14, heading, "soft"))
        y += _HEAD
        for bar in panel:
            long = max(room * bar.value / most, 1.5)
            said = f"{number(bar.value)} {unit}{'  ' + bar.note if bar.note else ''}"
            parts += [
                _text(_LABELS - 8, y + 14, bar.label, "text", anchor="end"),
                f'<rect class="{"own" if bar.own else "other"}" x="{_LABELS}" y="{y + 2}" width="{long:.1f}" '
                f'height="{_ROW - 6}" rx="2"/>',
                _text(_LABELS + long + 7, y + 14, said, "text"),
            ]
            y += _ROW
        y += 8
    return _page(title, parts, y + _MARGIN)


def lines(title: str, across: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Curves over a common axis, both axes logarithmic, each point with its number."""
    points = [point for _, curve in series for point in curve]
    (left, right), (low, high) = (
        (math.log(min(values)), math.log(max(values))) for values in zip(*points, strict=True)
    )
    high = max(high, low + math.log(2))  # a level curve is drawn level, not as noise
    top, bottom, first, last = _MARGIN + 84, 340, _MARGIN + 60, WIDTH - 60

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            first + (last - first) * (math.log(x) - left) / max(right - left, 1e-9),
            bottom - (bottom - top) * (math.log(y) - low) / (high - low),
        )

    parts = [f'<line class="grid" x1="{first}" y1="{bottom + 24}" x2="{last}" y2="{bottom + 24}"/>']
    for x in sorted({x for x, _ in points}):
        parts.append(_text(place(x, math.exp(low))[0], bottom + 42, f"{x:g}", "soft", anchor="middle"))
    parts.append(_text(last, bottom + 60, across, "soft", anchor="end"))
    for n, (name, curve) in enumerate(series):
        at = [place(x, y) for x, y in curve]
        parts.append(_text(_MARGIN + 260 * n + 18, _MARGIN + 46, name, "text"))
        parts.append(f'<circle class="dot{n}" cx="{_MARGIN + 260 * n + 6}" cy="{_MARGIN + 41}" r="5"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline class="line{n}" stroke-width="2" points="{path}"/>')
        for (x, y), (_, value) in zip(at, curve, strict=True):
            parts.append(f'<circle class="dot{n}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
            parts.append(_text(x, y - 9 if n == 0 else y + 19, number(value), "text", anchor="middle"))
    return _page(title, parts, bottom + 60 + _MARGIN)


def _text(x: float, y: float, said: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _page(title: str, parts: Sequence[str], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    )
    ground = f'<rect class="ground" width="{WIDTH}" height="{height:.0f}" rx="8"/>'
    named = f'<text class="text title" x="{_MARGIN}" y="{_MARGIN + 14}">{escape(title)}</text>'
    return "\n".join([head, _STYLE, ground, named, *parts, "</svg>\n"])
