"""Scores between 0 and 1 as dots on one axis, each with its name beside it, as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from trigger_opt.report.markup import Html, tag
from trigger_opt.report.svg import Axis
from trigger_opt.report.words import clip, number

_PAD, _DOT, _LEVEL = 14.0, 9.0, 16.0
# Widths of a letter of a label, about: there is no ruler here.
_LETTER = 7.0
# Dots nearer than this cover each other, and are stacked.
_NEAR = 8.0
_NAME_LIMIT = 30


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A named score in [0, 1]; the one that is `marked` is what the others are there for."""

    name: str
    value: float
    marked: bool = False


@dataclass(frozen=True)
class _Label:
    """Text centred at `x`, `level` lines above the dots, of the group that stands at `dot_x`."""

    text: str
    x: float
    level: int
    dot_x: float
    stacked: int


def dot_strip(dots: Sequence[Dot], *, width: float, said: str) -> Html:
    """All dots on one axis from 0 to 1: the marked one named below it, the others above.

    Args:
        said: what a screen reader says of the drawing.
    """
    axis = Axis(low=0.0, high=1.0, start=_PAD, end=width - _PAD)
    others = sorted((d for d in dots if not d.marked), key=lambda d: d.value)
    labels = _labels(_groups(others, axis), width)
    highest = _DOT * max((label.stacked for label in labels), default=0)
    y = highest + _LEVEL * (1 + max((label.level for label in labels), default=0)) + 8.0
    parts = [_line(axis(0.0), y, axis(1.0), y)]
    parts += [_line(axis(x), y - 4, axis(x), y + 4) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for label in labels:
        parts += _named(label, y, y - highest - _LEVEL * label.level - 5)
    for dot in (d for d in dots if d.marked):
        at = axis(dot.value)
        text = _text(_within(at, dot.name, width), y + 23, dot.name, "axis")
        parts.append(tag("g", _circle(at, y, 6.5), text, class_="backdoor"))
    parts += [_text(axis(x), y + 42, number(x), "tick") for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    height = y + 48
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return tag("svg", *parts, **size, role="img", aria_label=said)


def _groups(dots: Sequence[Dot], axis: Axis) -> list[list[Dot]]:
    """Dots in order, those that would cover each other together."""
    groups: list[list[Dot]] = []
    for dot in dots:
        if groups and axis(dot.value) - axis(groups[-1][0].value) < _NEAR:
            groups[-1].append(dot)
        else:
            groups.append([dot])
    return groups


def _labels(groups: Sequence[Sequence[Dot]], width: float) -> list[_Label]:
    """A label for each group, one line higher wherever it would cover another."""
    axis = Axis(low=0.0, high=1.0, start=_PAD, end=width - _PAD)
    placed: list[_Label] = []
    for group in groups:
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        text = clip(group[0].name, _NAME_LIMIT) + more
        at = axis(group[0].value)
        x, level = _within(at, text, width), 0
        while any(p.level == level and abs(p.x - x) < _LETTER * (len(p.text) + len(text)) / 2 + 8 for p in placed):
            level += 1
        placed.append(_Label(text, x, level, at, len(group)))
    return placed


def _named(label: _Label, y: float, foot: float) -> list[Html]:
    """The dots of a group on the axis at `y`, and its label that stands on `foot`, with a line between if it is far."""
    dots = [_circle(label.dot_x, y - _DOT * n, 4.5) for n in range(label.stacked)]
    top = y - _DOT * (label.stacked - 1) - 6
    leader = [_line(label.dot_x, top, label.dot_x, foot + 4)] if top - foot > _DOT else []
    return [*leader, *dots, _text(label.x, foot, label.text, "axis")]


def _within(x: float, text: str, width: float) -> float:
    """Where the middle of `text` may stand so that it ends within the drawing."""
    half = min(_LETTER * len(text) / 2, width / 2)
    return min(max(x, half), width - half)


def _circle(x: float, y: float, radius: float) -> Html:
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:g}", class_="dot")


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_="grid")


def _text(x: float, y: float, text: str, class_: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, text_anchor="middle")
