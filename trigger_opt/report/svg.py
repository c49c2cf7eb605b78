"""Interval plots, bars and line charts as inline SVG, coloured by the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trigger_opt.records import Rate
from trigger_opt.report.markup import Child, Html, tag
from trigger_opt.report.words import interval, number, of, percent

COLOURS = 6
_INTERVAL_WIDTH, _INTERVAL_HEIGHT, _INTERVAL_PAD = 200.0, 18.0, 6.0
_BAR_WIDTH, _BAR_HEIGHT = 90.0, 12.0
_LABEL_WIDTH, _LABEL_HEIGHT = 44.0, 13.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a line, in data units."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named line of a chart; `colour` keeps it recognisable from one chart to the next."""

    name: str
    colour: int
    points: list[Point]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear axis: data from `low` to `high` drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def interval_plot(rate: Rate) -> Html:
    """The proportion as a dot on its Wilson interval, on a line from 0 to 100 %; only the line when n is 0."""
    axis = Axis(low=0.0, high=1.0, start=_INTERVAL_PAD, end=_INTERVAL_WIDTH - _INTERVAL_PAD)
    middle = _INTERVAL_HEIGHT / 2
    parts = [_line(axis(0.0), middle, axis(1.0), middle, "grid")]
    parts += [_line(axis(x), middle - 4, axis(x), middle + 4, "grid") for x in (0.0, 0.5, 1.0)]
    if rate.n:
        parts.append(_line(axis(rate.low), middle, axis(rate.high), middle, "interval"))
        parts.append(tag("circle", cx=_px(axis(rate.value)), cy=_px(middle), r="4.5", class_="dot"))
    said = f"{of(rate)}, {percent(rate)}, 95 % interval {interval(rate)}"
    return _svg(_INTERVAL_WIDTH, _INTERVAL_HEIGHT, said, parts)


def interval_scale() -> Html:
    """The axis under a column of interval plots."""
    axis = Axis(low=0.0, high=1.0, start=_INTERVAL_PAD, end=_INTERVAL_WIDTH - _INTERVAL_PAD)
    anchors = {0.0: "start", 0.5: "middle", 1.0: "end"}
    shifts = {0.0: -_INTERVAL_PAD, 0.5: 0.0, 1.0: _INTERVAL_PAD}
    labels = [_text(axis(x) + shifts[x], 11.0, f"{100 * x:.0f} %", "tick", anchors[x]) for x in anchors]
    return _svg(_INTERVAL_WIDTH, 14.0, "scale from 0 to 100 percent", labels)


def bar(value: float, low: float, high: float) -> Html:
    """A bar from zero to `value` on a scale from `low` to `high`, which contains zero; empty when not finite."""
    parts = []
    if math.isfinite(value) and high > low:
        axis = Axis(low=low, high=high, start=1.0, end=_BAR_WIDTH - 1)
        left, right = sorted((axis(0.0), axis(value)))
        kind = "bar" if value >= 0 else "bar negative"
        parts.append(tag("rect", x=_px(left), y="2", width=_px(right - left), height="8", class_=kind))
        parts.append(_line(axis(0.0), 0.0, axis(0.0), _BAR_HEIGHT, "grid"))
    return _svg(_BAR_WIDTH, _BAR_HEIGHT, number(value), parts)


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, *, width: float, height: float, as_percent: bool = False
) -> Html:
    """A line chart with labelled axes; each line's last value is written at its end.

    `lines` have at least one finite point each. `as_percent` draws shares on a fixed scale from 0 to 100 %.
    """
    xs = [p.x for line in lines for p in line.points]
    ys = [0.0, 1.0] if as_percent else [p.y for line in lines for p in line.points]
    # Lines that all begin late would be squeezed against the right edge by an axis from zero.
    x_low = min(xs) if min(xs) > max(xs) / 2 else 0.0
    x_ticks = ticks(x_low, max(*xs, x_low + 1), max(3, int(width // 130)))
    y_ticks = ticks(min(ys), max(ys), max(2, int(height // 55)))
    x_axis = Axis(low=x_ticks[0], high=max(*xs, x_ticks[1]), start=52.0, end=width - 52)
    y_axis = Axis(low=y_ticks[0], high=y_ticks[-1], start=height - 38, end=22.0)
    titles = [
        _text(4.0, 11.0, y_label, "axis", "start"),
        _text((x_axis.start + x_axis.end) / 2, height - 4, x_label, "axis", "middle"),
    ]
    drawn = [_path(line, x_axis, y_axis) for line in lines]
    parts = [
        *titles,
        *_scale_y(x_axis, y_axis, y_ticks, as_percent),
        *_scale_x(x_axis, y_axis, x_ticks),
        *drawn,
        *_end_labels(lines, x_axis, y_axis, as_percent),
    ]
    return _svg(width, height, f"{y_label} against {x_label}", parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that enclose [low, high]; at least two."""
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def line_class(index: int) -> str:
    """The CSS class of the line drawn `index`-th: six colours, then the same dashed."""
    dashed = " dashed" if index // COLOURS % 2 else ""
    return f"line c{index % COLOURS}{dashed}"


def _scale_y(x_axis: Axis, y_axis: Axis, values: list[float], as_percent: bool) -> list[Html]:
    grid = [_line(x_axis.start, y_axis(y), x_axis.end, y_axis(y), "grid") for y in values]
    labels = [_text(x_axis.start - 7, y_axis(y) + 4, _value(y, as_percent), "tick", "end") for y in values]
    return grid + labels


def _scale_x(x_axis: Axis, y_axis: Axis, values: list[float]) -> list[Html]:
    bottom = y_axis.start
    shown = [x for x in values if x <= x_axis.high]
    marks = [_line(x_axis(x), bottom, x_axis(x), bottom + 4, "grid") for x in shown]
    return marks + [_text(x_axis(x), bottom + 17, f"{x:,.10g}", "tick", "middle") for x in shown]


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> Html:
    points = " ".join(f"{_px(x_axis(p.x))},{_px(y_axis(p.y))}" for p in line.points)
    last = line.points[-1]
    dot = tag("circle", cx=_px(x_axis(last.x)), cy=_px(y_axis(last.y)), r="3", class_=f"end c{line.colour % COLOURS}")
    return tag("g", tag("title", line.name), tag("polyline", points=points, class_=line_class(line.colour)), dot)


def _end_labels(lines: Sequence[Line], x_axis: Axis, y_axis: Axis, as_percent: bool) -> list[Html]:
    """Last values right of each line's end, pushed down where one would cover another."""
    taken: list[Point] = []
    labels = []
    for line in sorted(lines, key=lambda line: -line.points[-1].y):
        last = line.points[-1]
        x, y = x_axis(last.x) + 7, y_axis(last.y) + 4
        for other in sorted((p for p in taken if abs(p.x - x) < _LABEL_WIDTH), key=lambda p: p.y):
            y = other.y + _LABEL_HEIGHT if abs(other.y - y) < _LABEL_HEIGHT else y
        taken.append(Point(x=x, y=y))
        labels.append(_text(x, y, _value(last.y, as_percent, final=True), f"final c{line.colour % COLOURS}", "start"))
    return labels


def _value(value: float, as_percent: bool, final: bool = False) -> str:
    if as_percent:
        return f"{100 * value:.0f} %"
    return number(value) if final else number(value, 10).rstrip("0").rstrip(".")


def _svg(width: float, height: float, said: str, parts: Sequence[Child]) -> Html:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return tag("svg", *parts, **size, role="img", aria_label=said)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2), class_=class_)


def _text(x: float, y: float, text: str, class_: str, anchor: str) -> Html:
    return tag("text", text, x=_px(x), y=_px(y), class_=class_, text_anchor=anchor)


def _px(value: float) -> str:
    return f"{value:.1f}"
