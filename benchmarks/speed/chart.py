"""Cost charts as standalone SVG; both axes begin at zero, so that what grows in proportion looks so."""

from collections.abc import Sequence
from dataclasses import dataclass

from trigger_opt.report.markup import Html, join, tag
from trigger_opt.report.svg import Axis, ticks

_WIDTH, _HEIGHT, _GAP = 360.0, 230.0, 24.0
# Seen on white and on dark pages; nothing is fetched.
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #646a70; }
.axis { fill: #1e2226; } .grid { stroke: #dedbd3; } .line { fill: none; stroke: #2d5b7b; stroke-width: 1.8; }
.dot { fill: #2d5b7b; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa0a5; } .axis { fill: #e3e1dc; } .grid { stroke: #34383c; }
  .line { stroke: #8cb4d2; } .dot { fill: #8cb4d2; }
}
"""


@dataclass(frozen=True)
class Curve:
    """One panel: what is drawn, and its (x, y) points from left to right."""

    label: str
    points: Sequence[tuple[float, float]]


def cost_chart(x_label: str, curves: Sequence[Curve]) -> str:
    """The panels side by side over the same x; every curve has at least one point."""
    width = len(curves) * _WIDTH + (len(curves) - 1) * _GAP
    panels = [
        tag("g", _panel(x_label, curve), transform=f"translate({number * (_WIDTH + _GAP):g} 0)")
        for number, curve in enumerate(curves)
    ]
    said = f"{', '.join(c.label for c in curves)} against {x_label}"
    style = Html(f"<style>{_STYLE}</style>")
    size = {"viewBox": f"0 0 {width:g} {_HEIGHT:g}", "width": f"{width:g}", "height": f"{_HEIGHT:g}"}
    whole = tag("svg", style, *panels, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=said, **size)
    return whole.text + "\n"


def _panel(x_label: str, curve: Curve) -> Html:
    x_ticks = ticks(0.0, max(x for x, _ in curve.points), 5)
    y_ticks = ticks(0.0, max(y for _, y in curve.points), 4)
    across = Axis(low=0.0, high=x_ticks[-1], start=44.0, end=_WIDTH - 14)
    up = Axis(low=0.0, high=y_ticks[-1], start=_HEIGHT - 40, end=26.0)
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
    return join(
        [
            _text(4.0, 13.0, curve.label, "start", "axis"),
            _text((across.start + across.end) / 2, _HEIGHT - 5, x_label, "middle", "axis"),
            *(_rule(across, up(y)) for y in y_ticks),
            *(_text(across.start - 6, up(y) + 4, f"{y:g}", "end") for y in y_ticks),
            *(_text(across(x), up.start + 16, f"{x:g}", "middle") for x in x_ticks),
            tag("polyline", points=path, class_="line"),
            *(tag("circle", cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", r="3", class_="dot") for x, y in curve.points),
        ]
    )


def _rule(across: Axis, y: float) -> Html:
    return tag("line", x1=f"{across.start:g}", y1=f"{y:.1f}", x2=f"{across.end:g}", y2=f"{y:.1f}", class_="grid")


def _text(x: float, y: float, text: str, anchor: str, class_: str = "tick") -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)
