"""All customers' statistics as inline SVG: one dot per customer up to two thousand, a histogram beyond.

Colours come from classes in the page's style sheet, so that the picture suits light mode, dark mode and print.
"""

import html
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from smark_jax import _foreign
from smark_jax.report import words

MAX_DOTS = 2_000
_WIDTH, _LEFT, _RIGHT = 560, 40, 14
_STRIP, _BARS = 72, 120  # heights of the plotting area
_CHARACTER = 8.2  # width of a bold character on a phone, where the style sheet makes text largest
_LINE = 17
_LABELS = 12  # the most accused named in the picture; the table names all of them
_NAME = 24  # the most characters of a name in the picture
_BINS = 72


class _Frame(NamedTuple):
    """The plotting area: its top edge and height, and the statistics at its left and right edge."""

    top: int
    height: int
    low: float
    high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low) / (self.high - self.low) * (_WIDTH - _LEFT - _RIGHT)

    @property
    def floor(self) -> int:
        return self.top + self.height


class _Label(NamedTuple):
    """A name in the picture: its text, the x of its diamond, the x of its centre, and its line counted from below."""

    text: str
    x: float
    centre: float
    line: int


def statistics(
    values: Float[np.ndarray, " N"],
    accused: Bool[np.ndarray, " N"],
    names: list[str],
    threshold: float,
    description: str,
) -> str:
    """The picture as an ``<svg>`` element.

    Args:
      values: every customer's statistic T, signed and finite, shape [N], N at least 1.
      accused: who is accused, shape [N].
      names: of the accused, in the order of ``values``; escaped here.
      threshold: the absolute T at which a customer acting alone is accused; infinite when nobody can be.
      description: what the picture shows, for readers who cannot see it.
    """
    reach = threshold if math.isfinite(threshold) else 4.0
    ends = min(float(values.min()), -reach), max(float(values.max()), reach)
    margin = 0.06 * (ends[1] - ends[0])
    many = len(values) > MAX_DOTS
    low, high = ends[0] - margin, ends[1] + margin
    labels = _labels(values[accused], names, low, high)
    top = 10 + _LINE * max((label.line + 1 for label in labels), default=0)
    frame = _Frame(top, _BARS if many else _STRIP, low, high)
    body = _histogram(values[~accused], frame) if many else _dots(values[~accused], frame)
    parts = [_thresholds(threshold, frame), body, _accused(values[accused], names, labels, frame), _axis(frame)]
    height = frame.floor + 38
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{html.escape(description)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _placed(x: float, text: str) -> tuple[float, float]:
    """The centre of a text, as near to x as the picture's edges allow, and half of the text's width."""
    half = _CHARACTER * len(text) / 2 + 3
    return min(max(x, half), _WIDTH - half), half


def _thresholds(threshold: float, frame: _Frame) -> str:
    if not math.isfinite(threshold):
        return ""
    parts = []
    for sign, edge in ((-1, _LEFT), (1, _WIDTH - _RIGHT)):
        x = frame.x(sign * threshold)
        left, width = min(x, edge), abs(edge - x)
        parts.append(
            f'<rect x="{left:.1f}" y="{frame.top}" width="{width:.1f}" height="{frame.height}" class="zone"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.floor}" class="limit"/>'
        )
        label = words.number(sign * threshold)
        if sign > 0:  # only one label has the word, so that the two labels never overlap
            label = f"threshold {label}"
        parts.append(_text(_placed(x, label)[0], frame.floor + 31, label, "limit-label"))
    return "".join(parts)


def _dots(values: Float[np.ndarray, " n"], frame: _Frame) -> str:
    """Draws all dots as one path: about 12 bytes per dot instead of the 60 of a circle element."""
    spread = np.random.default_rng(0).uniform(
        0.2, 0.8, len(values)
    )  # random heights, only so that dots do not hide one another
    points = "".join(
        f"M{frame.x(value):.1f} {frame.top + part * frame.height:.1f}h0"
        for value, part in zip(values.tolist(), spread.tolist(), strict=True)
    )
    size = 5 if len(values) <= 200 else 3
    return f'<path d="{points}" class="dots" stroke-width="{size}"/>' if points else ""


def _histogram(values: Float[np.ndarray, " n"], frame: _Frame) -> str:
    """Draws bars, and the normal curve expected by chance, on a log scale that shows one customer beside millions."""
    counts, edges = np.histogram(values, _BINS, (frame.low, frame.high))
    top = math.ceil(math.log10(max(10, counts.max()) + 1) * 2) / 2
    # The bar of one customer rises a little above the floor; an empty bar stays on it.
    unit = (frame.height - 4) / (top + 0.3)

    def height(number: float) -> float:
        return max(0.0, math.log10(number) + 0.3) * unit if number > 0 else 0.0

    step = frame.x(edges[1]) - frame.x(edges[0])
    bars = "".join(
        f'<rect x="{frame.x(edge) + 0.5:.1f}" y="{frame.floor - height(n):.1f}" width="{step - 1:.1f}" '
        f'height="{height(n):.1f}"/>'
        for edge, n in zip(edges[:-1].tolist(), counts.tolist(), strict=True)
        if n
    )
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{frame.floor - height(10**k):.1f}" '
        f'y2="{frame.floor - height(10**k):.1f}" class="grid"/>'
        + _text(_LEFT - 6, frame.floor - height(10**k) + 4, words.power(k) if k > 3 else f"{10**k:,}", "tick", "end")
        for k in range(int(top) + 1)
    )
    width = float(edges[1] - edges[0])
    bell = [
        (frame.x(t), height(len(values) * width * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)))
        for t in np.linspace(frame.low, frame.high, 200).tolist()
    ]
    points = " ".join(f"{x:.1f},{frame.floor - y:.1f}" for x, y in bell if y > 0)
    return f'{grid}<g class="bars">{bars}</g><polyline points="{points}" class="chance"/>'


def _labels(values: Float[np.ndarray, " k"], names: list[str], low: float, high: float) -> list[_Label]:
    """Places names for the strongest accused, each on the lowest of three lines on which it overlaps no other."""
    frame = _Frame(0, 0, low, high)
    taken, labels = [-math.inf] * 3, []
    strongest = np.argsort(-np.abs(values))[:_LABELS]
    for place in strongest[np.argsort(values[strongest])].tolist():
        text = _foreign.clean(names[place], _NAME)
        x = frame.x(float(values[place]))
        centre, half = _placed(x, text)
        line = next((k for k in range(3) if taken[k] < centre - half), None)
        if line is not None:
            taken[line] = centre + half
            labels.append(_Label(text, x, centre, line))
    return labels


def _accused(values: Float[np.ndarray, " k"], names: list[str], labels: list[_Label], frame: _Frame) -> str:
    middle = frame.top + frame.height / 2
    heights = [frame.top - 8 - _LINE * label.line for label in labels]
    leaders = "".join(
        f'<line x1="{label.x:.1f}" x2="{label.x:.1f}" y1="{y + 3}" y2="{middle:.0f}" class="leader"/>'
        for label, y in zip(labels, heights, strict=True)
    )
    diamonds = "".join(
        f'<path d="M{frame.x(value):.1f} {middle - 6:.1f}l6 6l-6 6l-6 -6z" class="accused">'
        f"<title>{html.escape(_foreign.clean(name))}: T = {words.number(value)}</title></path>"
        for value, name in zip(values.tolist(), names, strict=True)
    )
    texts = "".join(
        _text(label.centre, y, label.text, "accused-label") for label, y in zip(labels, heights, strict=True)
    )
    return leaders + diamonds + texts


def _axis(frame: _Frame) -> str:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**9) if (frame.high - frame.low) / s <= 14)
    parts = [f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{frame.floor}" y2="{frame.floor}" class="axis"/>']
    for value in range(math.ceil(frame.low / step) * step, math.floor(frame.high) + 1, step):
        x = frame.x(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.floor}" y2="{frame.floor + 4}" class="axis"/>')
        parts.append(_text(x, frame.floor + 16, str(value).replace("-", "−"), "tick"))
    return "".join(parts)
