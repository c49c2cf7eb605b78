"""Scripted faults: rules that each strike a number of times at calls whose "METHOD path" begins alike."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError

CONNECTION = ("drop", "drop_after", "status", "html", "hang")
ENDINGS = ("failed", "cancelled", "expired")
AT_SUBMIT = ("end", "fail_lines", "omit_lines", "duplicate_lines", "extra_keys", "empty_answers", "slow")
AT_POLL = ("no_url", "expired_url")
AT_DOWNLOAD = ("truncate_length", "truncate_close", "zip_traversal", "zip_bomb")
GAP = "poll_gap"
KINDS = (*CONNECTION, *AT_SUBMIT, *AT_POLL, *AT_DOWNLOAD, GAP)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One fault.

    Attributes:
        kind: on any call: drop (connection closed, nothing done), drop_after (done, then closed), status, html (200
            with HTML), hang (`seconds`, then goes on). At submit, for that batch: end (it ends as `ending`),
            fail_lines, omit_lines, duplicate_lines, extra_keys (finish_reason in a message), empty_answers, slow
            (`seconds` for each line). At polls: no_url (completed without resultsUrl), expired_url, poll_gap (429 to a
            poll of the same batch within `seconds`; holds until replaced). At downloads: truncate_length (fewer bytes
            than announced), truncate_close (fewer, well framed), zip_traversal, zip_bomb.
        match: what "METHOD path" begins with, "POST /api/v1/batches"; empty for every call.
        times: how often it strikes; None for always. after: calls that pass before it.
        status, retry_after: of the answer; Retry-After is sent as given (seconds or an HTTP date).
        done: for status and html: do the work first.
        lines: which, as part of a custom_id or as numbers from 0; None for all.
    """

    kind: str
    match: str = ""
    times: int | None = 1
    after: int = 0
    status: int = 500
    retry_after: int | float | str | None = None
    done: bool = False
    seconds: int | float = 0
    ending: str = "failed"
    lines: str | list[int] | None = None

    def strikes(self, number: int, custom_id: str) -> bool:
        """Whether the line with this number and custom_id is meant."""
        if isinstance(self.lines, str):
            return self.lines in custom_id
        return self.lines is None or number in self.lines


class Faults:
    """What is left of a script."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = list(rules)

    def take(self, call: str, kinds: Sequence[str]) -> Rule | None:
        """The first rule of one of `kinds` that strikes at `call`; each rule passed on the way counts the call."""
        for index, rule in enumerate(self.rules):
            if rule.kind not in kinds or not call.startswith(rule.match) or rule.times == 0:
                continue
            if rule.after > 0:
                self.rules[index] = replace(rule, after=rule.after - 1)
                continue
            if rule.times is not None:
                self.rules[index] = replace(rule, times=rule.times - 1)
            return rule
        return None

    def take_all(self, call: str, kinds: Sequence[str]) -> list[Rule]:
        """At most one rule of each kind."""
        return [rule for kind in kinds if (rule := self.take(call, [kind])) is not None]

    def gap(self) -> Rule | None:
        """The rule about polls in quick succession."""
        return next((r for r in self.rules if r.kind == GAP), None)

    def left(self) -> list[dict[str, Any]]:
        """Rules that can still strike, as JSON objects."""
        return [asdict(r) for r in self.rules if r.times != 0]


def parse_rules(raw: Any) -> list[Rule]:
    """Rules from JSON.

    Raises:
        UserError: it is no list of rules, or a field is unknown or wrong.
    """
    if not isinstance(raw, list):
        raise UserError(f"faults are {type(raw).__name__}; give a JSON list of rules like {{'kind': 'drop'}}")
    return [_rule(entry) for entry in raw]


def read_rules(path: Path) -> list[Rule]:
    """Rules from a JSON file.

    Raises:
        UserError: it cannot be read, or see `parse_rules`.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the faults in {path} cannot be read ({error}); give a JSON list of rules") from None
    return parse_rules(raw)


# What each field may hold, in words and as a test.
_FIELDS: dict[str, tuple[str, Any]] = {
    "kind": (f"one of {', '.join(KINDS)}", lambda v: v in KINDS),
    "match": ("the beginning of 'METHOD path'", lambda v: isinstance(v, str)),
    "times": ("a number, or null for always", lambda v: v is None or _count(v)),
    "after": ("a number of calls", lambda v: _count(v)),
    "status": ("an HTTP status from 200 to 599", lambda v: _count(v) and 200 <= v <= 599),
    "retry_after": ("seconds or an HTTP date", lambda v: v is None or isinstance(v, int | float | str)),
    "done": ("true or false", lambda v: isinstance(v, bool)),
    "seconds": ("seconds from 0", lambda v: isinstance(v, int | float) and v >= 0),
    "ending": (f"one of {', '.join(ENDINGS)}", lambda v: v in ENDINGS),
    "lines": ("part of a custom_id, or a list of line numbers", lambda v: isinstance(v, str) or _counts(v)),
}


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_count(v) for v in value))


def _rule(entry: Any) -> Rule:
    if not isinstance(entry, dict) or "kind" not in entry:
        raise UserError(f"the fault {entry!r} has no kind; allowed: {', '.join(KINDS)}")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise UserError(f"the fault {entry['kind']!r} has the field {name!r}; allowed: {', '.join(_FIELDS)}")
        allowed, fits = _FIELDS[name]
        if not fits(value):
            raise UserError(f"the fault {entry['kind']!r} has {name}={value!r}; give {allowed}")
    return Rule(**entry)
