"""The only way text becomes HTML. A `str` is escaped, an `Html` is not, so forgetting to escape is a type error."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trigger_opt.report.words import is_invisible, printable


@dataclass(frozen=True)
class Html:
    """Finished markup."""

    text: str


Child = str | Html


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table column; `kind` is its CSS class: "text", "word" (never broken), "string", "num" or "mark"."""

    title: str
    kind: str = "text"


def tag(name: str, *children: Child, **attributes: str) -> Html:
    """One element. Attribute `class_` is written `class`, `stroke_width` is written `stroke-width`."""
    written = "".join(f' {_attribute(k)}="{html.escape(printable(v))}"' for k, v in attributes.items())
    return Html(f"<{name}{written}>{join(children).text}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, text escaped."""
    return Html("".join(c.text if isinstance(c, Html) else html.escape(printable(c)) for c in children))


def string(text: str) -> Html:
    """A trigger, payload or input with every character visible; copying it from the page gives the exact text."""
    return tag("code", join(_visible_char(c) for c in text), class_="string")


def clipped_string(text: str, limit: int = 160) -> Html:
    """`string`, cut after `limit` characters."""
    if len(text) <= limit:
        return string(text)
    return join([string(text[:limit]), tag("span", f" … (+{len(text) - limit:,} characters)", class_="muted")])


def table(columns: Sequence[Column], rows: Iterable[Sequence[Child]], class_: str = "") -> Html:
    """A table whose cells carry their column's title, so that narrow screens can stack them.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    head = tag("tr", *(tag("th", c.title, class_=c.kind, scope="col") for c in columns))
    body = [
        tag("tr", *(tag("td", cell, class_=c.kind, data_label=c.title) for c, cell in zip(columns, row, strict=True)))
        for row in rows
    ]
    return tag("table", tag("thead", head), tag("tbody", *body), class_=class_)


def definitions(pairs: Iterable[tuple[str, Child]], class_: str = "facts") -> Html:
    """A list of names and values."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs]
    return tag("dl", *items, class_=class_)


def section(title: str, *children: Child) -> Html:
    """A headed section."""
    return tag("section", tag("h2", title), *children)


def note(text: Child) -> Html:
    """A quiet line: captions, reasons for absence."""
    return tag("p", text, class_="note")


def fold(summary: str, *children: Child) -> Html:
    """Content shown on request."""
    return tag("details", tag("summary", summary), *children)


def _visible_char(char: str) -> Child:
    # The marks for space, newline and tab are drawn by CSS around the character itself.
    marks = {" ": "space", "\n": "newline", "\t": "tab"}
    if char in marks:
        return tag("span", char, class_=marks[char])
    return tag("span", f"⟨U+{ord(char):04X}⟩", class_="hidden-char") if is_invisible(char) else char


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")
