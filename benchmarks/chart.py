"""What the benchmarks' pictures have in common: standalone SVG that is legible on white and on dark pages, and fetches
nothing."""

from collections.abc import Sequence

from trigger_opt.report.markup import Child, Html, join, tag
from trigger_opt.report.svg import Axis

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #646a70; }
.axis { fill: #1e2226; } .grid { stroke: #dedbd3; } .line { fill: none; stroke: #2d5b7b; stroke-width: 1.8; }
.dot { fill: #2d5b7b; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa0a5; } .axis { fill: #e3e1dc; } .grid { stroke: #34383c; }
  .line { stroke: #8cb4d2; } .dot { fill: #8cb4d2; }
}
"""


def document(parts: Sequence[Child], *, width: float, height: float, said: str, style: str = STYLE) -> str:
    """A whole file; `said` is what a screen reader says."""
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    sheet = Html(f"<style>{style}</style>")
    whole = tag("svg", sheet, *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=said, **size)
    return whole.text + "\n"


def moved(part: Html, x: float, y: float = 0.0) -> Html:
    """`part`, drawn from (x, y)."""
    return tag("g", part, transform=f"translate({x:g} {y:g})")


def frame(across: Axis, up: Axis, *, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Html:
    """Rules at the y ticks, and the numbers of both."""
    return join(
        [
            *(rule(across, up(y)) for y in y_ticks),
            *(label(across.start - 6, up(y) + 4, f"{y:g}", "end") for y in y_ticks),
            *(label(across(x), up.start + 16, f"{x:g}", "middle") for x in x_ticks),
        ]
    )


def rule(across: Axis, y: float, class_: str = "grid") -> Html:
    """A line over the whole width at height `y`."""
    return tag("line", x1=f"{across.start:g}", y1=f"{y:.1f}", x2=f"{across.end:g}", y2=f"{y:.1f}", class_=class_)


def label(x: float, y: float, text: str, anchor: str, class_: str = "tick") -> Html:
    """Text at a point; `anchor` is start, middle or end."""
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)
