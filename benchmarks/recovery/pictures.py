"""Two pictures: recovery against difficulty, and the scores of organisms and controls as two clouds."""

from collections.abc import Mapping, Sequence

from benchmarks.chart import STYLE, document, frame, label, moved, rule
from benchmarks.recovery.records import Cell
from benchmarks.recovery.summary import MethodFigures, figures, trigger_rate
from trigger_opt.report.markup import Html, join, tag
from trigger_opt.report.svg import Axis

_STYLE = (
    STYLE
    + """.control { fill: none; stroke: #b3541e; stroke-width: 1.6; } .dot { fill-opacity: 0.75; }
.threshold { stroke: #b3541e; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) { .control { stroke: #e59a6a; } .threshold { stroke: #e59a6a; } }
"""
)
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PANEL, _HEIGHT, _COLUMNS = 260.0, 220.0, 3
_CLOUD, _CLOUDS_HEIGHT = 160.0, 260.0
_LEFT, _RADIUS = 44.0, 4.0


def recovery_chart(cells: Sequence[Cell]) -> str | None:
    """Trigger rate of the best string over the trigger's width, a panel a method, a dot a cell; None where no width is
    known."""
    shown = [c for c in cells if c.key and c.key.width is not None and not c.error]
    methods = list(dict.fromkeys(c.spec.method for c in shown))
    if not methods:
        return None
    panels = [
        moved(_panel(m, [c for c in shown if c.spec.method == m]), n % _COLUMNS * _PANEL, n // _COLUMNS * _HEIGHT)
        for n, m in enumerate(methods)
    ]
    rows = -(-len(methods) // _COLUMNS)
    said = "Trigger rate of the best string against how wide the trigger is, by method"
    size = {"width": min(len(methods), _COLUMNS) * _PANEL, "height": rows * _HEIGHT}
    return document(panels, **size, said=said, style=_STYLE)


def clouds_chart(cells: Sequence[Cell], names: Mapping[str, bool]) -> str | None:
    """Detection scores of organisms (dots) and controls (rings), and each method's threshold; None without cells."""
    done = [c for c in cells if not c.error]
    found = [f for f in figures(cells, names) if f.cells]
    if not found:
        return None
    width = _LEFT + len(found) * _CLOUD
    across = Axis(low=0.0, high=1.0, start=_LEFT, end=width - 6)
    up = Axis(low=0.0, high=1.0, start=_CLOUDS_HEIGHT - 40, end=30.0)
    parts = [
        label(4.0, 13.0, "detection score", "start", "axis"),
        _key(width),
        frame(across, up, x_ticks=(), y_ticks=_TICKS),
        *(
            _cloud(f, [c for c in done if c.spec.method == f.method], _LEFT + n * _CLOUD, up)
            for n, f in enumerate(found)
        ),
    ]
    said = "Detection scores of organisms and controls by method, with the threshold fixed on half of the controls"
    return document(parts, width=width, height=_CLOUDS_HEIGHT, said=said, style=_STYLE)


def _panel(method: str, cells: Sequence[Cell]) -> Html:
    across = Axis(low=0.0, high=1.0, start=_LEFT, end=_PANEL - 14)
    up = Axis(low=0.0, high=1.0, start=_HEIGHT - 42, end=28.0)
    points = [((c.key.width or 0.0) if c.key else 0.0, trigger_rate(c)) for c in cells]
    return join(
        [
            label(4.0, 13.0, f"{method}: trigger rate", "start", "axis"),
            label((across.start + across.end) / 2, _HEIGHT - 7, "width of the trigger", "middle", "axis"),
            frame(across, up, x_ticks=_TICKS, y_ticks=_TICKS),
            *(_dot(across(x), up(y), c) for (x, y), c in zip(points, cells, strict=True)),
        ]
    )


def _cloud(f: MethodFigures, cells: Sequence[Cell], left: float, up: Axis) -> Html:
    sides = [[c for c in cells if not c.control], [c for c in cells if c.control]]
    middles = (left + 0.3 * _CLOUD, left + 0.7 * _CLOUD)
    dots = [
        _dot(middle + shift, up(c.score), c)
        for some, middle in zip(sides, middles, strict=True)
        for c, shift in zip(some, beside([up(c.score) for c in some], reach=0.18 * _CLOUD), strict=True)
    ]
    line = []
    if f.threshold is not None:
        here = Axis(low=0.0, high=1.0, start=left + 8, end=left + _CLOUD - 8)
        line = [rule(here, up(min(f.threshold, 1.0)), "threshold")]
    return join([*line, *dots, label(left + _CLOUD / 2, up.start + 22, f.method, "middle", "axis")])


def beside(heights: Sequence[float], *, reach: float) -> list[float]:
    """Sideways shifts that keep dots of nearly the same height apart: 0, right, left and so on, at most `reach`; closer
    together where there are many."""
    shifts: list[float] = []
    for number, height in enumerate(heights):
        near = [n for n, other in enumerate(heights) if abs(height - other) < 2 * _RADIUS]
        apart = min(2 * _RADIUS + 1, reach / max(1, len(near) // 2))
        place = near.index(number)
        shifts.append((place + 1) // 2 * apart * (1 if place % 2 else -1))
    return shifts


def _dot(x: float, y: float, cell: Cell) -> Html:
    kind = "control" if cell.control else "dot"
    said = tag("title", f"{cell.spec.model}, seed {cell.spec.seed}")
    return tag("circle", said, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{_RADIUS:g}", class_=kind)


def _key(width: float) -> Html:
    x = width - 210
    return join(
        [
            tag("circle", cx=f"{x:.1f}", cy="9", r=f"{_RADIUS:g}", class_="dot"),
            label(x + 8, 13.0, "organism", "start"),
            tag("circle", cx=f"{x + 74:.1f}", cy="9", r=f"{_RADIUS:g}", class_="control"),
            label(x + 82, 13.0, "control", "start"),
            tag("line", x1=f"{x + 132:.1f}", y1="9", x2=f"{x + 148:.1f}", y2="9", class_="threshold"),
            label(x + 153, 13.0, "threshold", "start"),
        ]
    )
