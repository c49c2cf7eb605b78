"""Cost charts as standalone SVG; both axes begin at zero, so that what grows in proportion looks so."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chart import document, frame, label, moved
from trigger_opt.report.markup import Html, join, tag
from trigger_opt.report.svg import Axis, ticks

_WIDTH, _HEIGHT, _GAP = 360.0, 230.0, 24.0


@dataclass(frozen=True)
class Curve:
    """One panel: what is drawn, and its (x, y) points from left to right."""

    label: str
    points: Sequence[tuple[float, float]]


def cost_chart(x_label: str, curves: Sequence[Curve]) -> str:
    """The panels side by side over the same x; every curve has at least one point."""
    width = len(curves) * _WIDTH + (len(curves) - 1) * _GAP
    panels = [moved(_panel(x_label, curve), number * (_WIDTH + _GAP)) for number, curve in enumerate(curves)]
    said = f"{', '.join(c.label for c in curves)} against {x_label}"
    return document(panels, width=width, height=_HEIGHT, said=said)


def _panel(x_label: str, curve: Curve) -> Html:
    x_ticks = ticks(0.0, max(x for x, _ in curve.points), 5)
    y_ticks = ticks(0.0, max(y for _, y in curve.points), 4)
    across = Axis(low=0.0, high=x_ticks[-1], start=44.0, end=_WIDTH - 14)
    up = Axis(low=0.0, high=y_ticks[-1], start=_HEIGHT - 40, end=26.0)
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
    return join(
        [
            label(4.0, 13.0, curve.label, "start", "axis"),
            label((across.start + across.end) / 2, _HEIGHT - 5, x_label, "middle", "axis"),
            frame(across, up, x_ticks=x_ticks, y_ticks=y_ticks),
            tag("polyline", points=path, class_="line"),
            *(tag("circle", cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", r="3", class_="dot") for x, y in curve.points),
        ]
    )
