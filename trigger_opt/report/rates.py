"""Rates as rows: what was counted, the interval drawn, and the figures."""

from collections.abc import Sequence

from trigger_opt.report.markup import Html, tag
from trigger_opt.report.svg import interval_plot, interval_scale
from trigger_opt.report.words import RateRow, interval, of, percent


def rates(rows: Sequence[RateRow]) -> Html:
    """One line a rate, all on one scale from 0 to 100 %."""
    scale = tag(
        "div",
        tag("span", class_="name"),
        tag("div", interval_scale(), class_="plot"),
        tag("span"),
        tag("span"),
        tag("span", "95 % interval"),
        class_="rate scale",
    )
    return tag("div", *(_rate(row) for row in rows), scale, class_="rates")


def _rate(row: RateRow) -> Html:
    name = tag("span", row.label, class_="name")
    if row.rate is None:
        return tag("div", name, tag("span", row.absent, class_="absent"), class_="rate")
    return tag(
        "div",
        name,
        tag("div", interval_plot(row.rate), class_="plot"),
        tag("span", of(row.rate), class_="kofn"),
        tag("span", percent(row.rate), class_="value"),
        tag("span", interval(row.rate), class_="muted"),
        class_="rate",
    )
