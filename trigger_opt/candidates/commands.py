"""`trigger-opt candidates list`: the ledger of candidates from the command line."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trigger_opt.candidates.entries import EXPORTED, Judged, Summary
from trigger_opt.candidates.ledger import CandidateLedger, default_path
from trigger_opt.errors import UserError
from trigger_opt.records import Rate

_SHORT_PAIR = 12
_SHORT_PAYLOAD = 40


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    given = _parser().parse_args(arguments)
    try:
        _list(given.ledger or default_path(), given.pair, given.format)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `… list | head`: whoever read has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trigger-opt candidates", description="Look at the strings found so far and at what refuted them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "strings of each pair, latest first, with what refuted them"
    listing = commands.add_parser("list", help=text, description=text)
    listing.add_argument("--pair", default="", metavar="PREFIX", help="only pairs whose fingerprint begins so")
    listing.add_argument("--ledger", type=Path, default=None, help="SQLite file (default: the user's own)")
    listing.add_argument("--format", choices=["table", "jsonl", "csv"], default="table")
    return parser


def _list(path: Path, prefix: str, form: str) -> None:
    if not path.expanduser().is_file():
        raise UserError(f"there is no ledger of candidates {path}; name one with --ledger, or run a search first")
    with CandidateLedger.open(path) as ledger:
        pairs = ledger.pairs(prefix)
        if prefix and not pairs:
            there = ", ".join(p[:_SHORT_PAIR] for p in ledger.pairs()) or "none at all"
            raise UserError(f"the ledger {ledger.path} has no pair that begins with {prefix!r}; it has {there}")
        _WRITERS[form](ledger, pairs)
    sys.stdout.flush()


def _write_jsonl(ledger: CandidateLedger, pairs: Sequence[str]) -> None:
    for pair in pairs:
        for row in ledger.rows(pair):
            print(json.dumps(row))


def _write_csv(ledger: CandidateLedger, pairs: Sequence[str]) -> None:
    writer = csv.DictWriter(sys.stdout, EXPORTED)
    writer.writeheader()
    for pair in pairs:
        for row in ledger.rows(pair):
            writer.writerow({**row, "thresholds": row["thresholds"] and json.dumps(row["thresholds"])})


def _write_table(ledger: CandidateLedger, pairs: Sequence[str]) -> None:
    print(f"ledger: {ledger.path}")
    for pair in pairs:
        print(f"\npair {pair[:_SHORT_PAIR]}: {_counts(ledger.summary(pair))}")
        judged = ledger.judged(pair)
        if judged:
            print("\n".join(_aligned([_HEAD, *(_cells(j) for j in judged)])))
    if not pairs:
        print("it is empty")


_HEAD = [
    "verdict", "refuted by", "fires", "base", "control", "nothing", "random", "evidence", "run", "payload", "string",
]  # fmt: skip


def _counts(summary: Summary) -> str:
    verdicts = ", ".join(f"{verdict} {n:,}" for verdict, n in summary.verdicts.items())
    refuted = ", ".join(f"{by} {n:,}" for by, n in summary.refuted_by.items())
    parts = [
        f"{sum(summary.verdicts.values()):,} verified" + (f" ({verdicts})" if verdicts else ""),
        *([f"refuted by {refuted}"] if refuted else []),
        f"{summary.unverified:,} found and never verified",
    ]
    return "; ".join(parts)


def _cells(j: Judged) -> list[str]:
    rates = (j.trigger_rate, j.base_rate, j.control_rate, j.false_trigger_rate, j.random_rate)
    payload = j.payload if len(j.payload) <= _SHORT_PAYLOAD else j.payload[: _SHORT_PAYLOAD - 1] + "…"
    # repr: a found string may hold line ends and what a terminal would obey.
    shown = [repr(payload), repr(j.trigger)]
    return [j.verdict, j.refuted_by or "-", *map(_fraction, rates), f"{j.evidence:.1f}", j.run, *shown]


def _fraction(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.successes}/{rate.n}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


_WRITERS = {"table": _write_table, "jsonl": _write_jsonl, "csv": _write_csv}
