"""Line charts over whole numbers whose lines carry their names at their right end, for a page and for a phone."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trigger_opt.report.markup import Child, Html, tag
from trigger_opt.report.svg import Axis, Point, ticks
from trigger_opt.report.words import number

# Less, and the halo of one label covers the foot of the one above.
_LABEL_HEIGHT = 16.0
_LETTER = 7.3
_LEFT, _TOP, _BOTTOM = 44.0, 26.0, 38.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """An interval drawn upright at `x`."""

    x: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class NamedLine:
    """A line and its names: the whole one, and one short enough for a phone; `style` is its CSS class."""

    name: str
    short: str
    style: str
    points: list[Point]
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What lines are drawn in.

    Attributes:
        low, high: the value axis holds them, and the data too where it goes further.
        digits: of the last value, written behind each line's name.
        chosen: where on the axis below a mark stands; None for none. chosen_name: what is written there.
        width, height: pixels, on a wide screen.
    """

    x_label: str
    y_label: str
    low: float
    high: float
    digits: int = 2
    chosen: float | None = None
    chosen_name: str = ""
    width: float = 1020.0
    height: float = 300.0


def labelled_charts(lines: Sequence[NamedLine], frame: Frame) -> list[Html]:
    """The chart in two widths, of which CSS shows one: scaled down to a phone, labels could not be read.

    Points and intervals that are not finite are left out, and so are lines without a point.
    """
    finite = [_finite(line) for line in lines]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return []
    names = {"wide": [line.name for line in drawn], "narrow": [line.short for line in drawn]}
    return [
        tag("figure", _chart(drawn, frame, names["wide"], frame.width), class_="chart wide"),
        tag("figure", _chart(drawn, frame, names["narrow"], min(frame.width, 370.0)), class_="chart narrow"),
    ]


def _finite(line: NamedLine) -> NamedLine:
    return NamedLine(
        name=line.name,
        short=line.short,
        style=line.style,
        points=[p for p in line.points if math.isfinite(p.y)],
        spans=[s for s in line.spans if math.isfinite(s.low) and math.isfinite(s.high)],
    )


def _chart(lines: Sequence[NamedLine], frame: Frame, names: Sequence[str], width: float) -> Html:
    labels = [f"{name} {number(line.points[-1].y, frame.digits)}" for name, line in zip(names, lines, strict=True)]
    xs = [p.x for line in lines for p in line.points]
    ys = [p.y for line in lines for p in line.points] + [
        y for line in lines for s in line.spans for y in (s.low, s.high)
    ]
    y_ticks = ticks(min(frame.low, *ys), max(frame.high, *ys), max(2, int(frame.height // 60)))
    end = width - _LETTER * max(map(len, labels)) - 20
    x_axis = Axis(low=min(xs), high=max(max(xs), min(xs) + 1), start=_LEFT, end=end)
    y_axis = Axis(low=y_ticks[0], high=y_ticks[-1], start=frame.height - _BOTTOM, end=_TOP)
    parts: list[Child] = [
        _text(4.0, 11.0, frame.y_label, "axis", "start"),
        _text((_LEFT + end) / 2, frame.height - 4, frame.x_label, "axis", "middle"),
        *_scales(x_axis, y_axis, y_ticks),
        *_chosen(frame, x_axis, y_axis),
        *(_path(line, x_axis, y_axis) for line in lines),
        *_names(lines, labels, x_axis, y_axis),
    ]
    size = {"viewBox": f"0 0 {width:g} {frame.height:g}", "width": f"{width:g}", "height": f"{frame.height:g}"}
    said = f"{frame.y_label} against {frame.x_label}; at the right end: {'; '.join(labels)}"
    return tag("svg", *parts, **size, role="img", aria_label=said)


def _scales(x_axis: Axis, y_axis: Axis, y_ticks: Sequence[float]) -> list[Html]:
    parts = []
    for y in y_ticks:
        parts.append(_line(x_axis.start, y_axis(y), x_axis.end, y_axis(y), "grid"))
        parts.append(_text(x_axis.start - 7, y_axis(y) + 4, number(y, 10).rstrip("0").rstrip("."), "tick", "end"))
    room = max(2, int((x_axis.end - x_axis.start) // 40))
    for x in whole_ticks(x_axis.low, x_axis.high, room):
        at = x_axis(float(x))
        parts.append(_line(at, y_axis.start, at, y_axis.start + 4, "grid"))
        parts.append(_text(at, y_axis.start + 17, f"{x:,}", "tick", "middle"))
    return parts


def whole_ticks(low: float, high: float, count: int) -> list[int]:
    """Whole numbers within [low, high], at most about `count`: the first, and then round ones."""
    first, last = math.ceil(low), math.floor(high)
    steps = (m * 10**power for power in itertools.count() for m in (1, 2, 5))
    step = next(s for s in steps if s * count >= last - first)
    return [first, *(x for x in range(step * (first // step + 1), last + 1, step) if x - first >= step / 2)]


def _chosen(frame: Frame, x_axis: Axis, y_axis: Axis) -> list[Html]:
    if frame.chosen is None:
        return []
    x = x_axis(frame.chosen)
    late = x > (x_axis.start + x_axis.end) / 2
    text = _text(x - 5 if late else x + 5, y_axis.start - 6, frame.chosen_name, "tick halo", "end" if late else "start")
    return [_line(x, y_axis.start, x, y_axis.end, "grid dashed"), text]


def _path(line: NamedLine, x_axis: Axis, y_axis: Axis) -> Html:
    points = " ".join(f"{x_axis(p.x):.1f},{y_axis(p.y):.1f}" for p in line.points)
    last = line.points[-1]
    spans = [_line(x_axis(s.x), y_axis(s.low), x_axis(s.x), y_axis(s.high), "span") for s in line.spans]
    # Single points are where a line of one point, and the points of an interval, would not be seen.
    seen = line.points if line.spans else [last]
    dots = [tag("circle", cx=f"{x_axis(p.x):.1f}", cy=f"{y_axis(p.y):.1f}", r="3", class_="end") for p in seen]
    drawn = tag("polyline", points=points, class_=f"line {line.style}")
    return tag("g", tag("title", line.name), *spans, drawn, *dots, class_=line.style)


def _names(lines: Sequence[NamedLine], labels: Sequence[str], x_axis: Axis, y_axis: Axis) -> list[Html]:
    """Names right of the lines' ends, from the highest down; one that had to make room is led to its line."""
    order = sorted(range(len(lines)), key=lambda i: -lines[i].points[-1].y)
    ends = [y_axis(lines[i].points[-1].y) for i in order]
    parts = []
    for i, end, height in zip(order, ends, _apart(ends, y_axis.start), strict=True):
        if abs(height - end) > 1:
            x = x_axis(lines[i].points[-1].x)
            parts.append(_line(x + 4, end, x_axis.end + 12, height, f"leader {lines[i].style}"))
        parts.append(_text(x_axis.end + 14, height + 4, labels[i], f"final {lines[i].style}", "start"))
    return parts


def _apart(heights: Sequence[float], lowest: float) -> list[float]:
    """Rising pixel heights, moved as little as leaves a label's height between them, down first and then up again."""
    moved, above = [], -math.inf
    for height in heights:
        above = max(height, above + _LABEL_HEIGHT)
        moved.append(above)
    below = lowest
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], below)
        below = moved[i] - _LABEL_HEIGHT
    return moved


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _text(x: float, y: float, text: str, class_: str, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, text_anchor=anchor)
