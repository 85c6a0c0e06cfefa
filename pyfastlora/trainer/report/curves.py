"""Curves as SVG: readable without a script; a point says its numbers when the mouse rests on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 28, 12, 36
MOST = 400  # points of a curve; of more, each is the mean of some neighbours

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Points in order of x. marked: drawn as dots on a line, for few that stand far apart."""

    name: str
    points: Sequence[Point]
    marked: bool = False


def chart(title: str, curves: Sequence[Curve], form: Callable[[float], str]) -> str:
    """A picture of the curves over steps; "" where no value is a number. form writes a value."""
    known = [Curve(c.name, [p for p in c.points if math.isfinite(p[1])], c.marked) for c in curves]
    known = [c for c in known if c.points]
    if not known:
        return ""
    every = [p for c in known for p in c.points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), whole=True)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    left, right = (edge(x for x, _ in every) for edge in (min, max))
    low, high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        across = (x - left) / ((right - left) or 1) * (WIDTH - _LEFT - _RIGHT) + _LEFT
        up = (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f}", f"{HEIGHT - _BOTTOM - up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        height = at(left, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height}" class="y">{escape(form(y))}</text>')
    for x in x_ticks:
        if left <= x <= right:
            parts.append(f'<text x="{at(x, low)[0]}" y="{HEIGHT - _BOTTOM + 16}" class="x">{x:.0f}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" class="y">step</text>')
    for n, curve in enumerate(known):
        points = thinned(curve.points)
        places = [at(*p) for p in points]
        parts.append(f'<polyline class="c{n}" points="{" ".join(",".join(p) for p in places)}"/>')
        radius = 3 if curve.marked or len(points) == 1 else 2
        for (x, y), (cx, cy) in zip(points, places, strict=True):
            seen = "dot" if curve.marked or len(points) == 1 else "dot hidden"
            said = escape(f"{curve.name} {form(y)}, step {x:.0f}")
            parts.append(
                f'<circle class="c{n} {seen}" cx="{cx}" cy="{cy}" r="{radius}"><title>{said}</title></circle>'
            )
    names = "".join(f'<span class="c{n}">{escape(c.name)}</span>' for n, c in enumerate(known))
    some = any(len(c.points) > MOST for c in known)
    mean = f"; a point is the mean of up to {_together(known)} records" if some else ""
    caption = f"<figcaption>{escape(title)} <small>{names}{mean}</small></figcaption>"
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST points: means of as many neighbours as that takes."""
    size = math.ceil(len(points) / MOST)
    if size <= 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some four to eight round numbers, the first not above low and the last not below high."""
    if high <= low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _together(curves: Sequence[Curve]) -> int:
    return max(math.ceil(len(c.points) / MOST) for c in curves)
