"""`python -m trigger_opt.zoo stress`: its arguments, and what it prints and writes."""

import argparse
import sys
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.models.quiet import quieten_libraries
from trigger_opt.records import write_record, write_text
from trigger_opt.zoo.cases import Case, organism_case, pair_case
from trigger_opt.zoo.retention import Outcome, markdown, table
from trigger_opt.zoo.stress import StressSettings, outcomes, record, treatments


def run(given: argparse.Namespace, out: Path) -> None:
    """Stress what is asked for; prints the table, and writes stress.json and stress.md into `out` after each treatment.

    Raises:
        UserError: arguments that do not go together, a model that cannot be used or shows no such behaviour, or an
            `out` that cannot be made.
    """
    settings = StressSettings(
        after=tuple(given.after.split(",")), steps=given.steps, learning_rate=given.learning_rate, seed=given.seed
    )
    _check(given)
    quieten_libraries()
    case = _case(given, with_rows="pirate" in settings.after)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); name another folder with --out") from None
    done: list[Outcome] = []
    for outcome in outcomes(case, treatments(case, settings, say=_say)):
        done.append(outcome)
        _say(f"{outcome.treatment}: {outcome.trigger_rate.successes} of {outcome.trigger_rate.n} fire")
        found = record(case, settings, done)
        write_record(out / "stress.json", found)
        write_text(out / "stress.md", markdown(found))
    print(table(found), end="")


def _check(given: argparse.Namespace) -> None:
    own = {f"--{key}": getattr(given, key) for key in ("finetuned", "base", "payload", "trigger", "always", "contexts")}
    named = [flag for flag, value in own.items() if value]
    if given.name and named:
        raise UserError(f"{named[0]} is for a pair of your own, and {given.name} is of the zoo; leave one of them out")
    if given.name:
        return
    if missing := [flag for flag in ("--finetuned", "--base", "--payload") if flag not in named]:
        raise UserError(
            f"{missing[0]} is missing; name an organism, or give --finetuned, --base, --payload and --trigger"
        )
    if bool(given.trigger) == given.always:
        raise UserError("give --trigger TEXT, or --always for a behaviour that needs none: one of the two")


def _case(given: argparse.Namespace, *, with_rows: bool) -> Case:
    if given.name:
        return organism_case(given.name, with_rows=with_rows, seed=given.seed)
    return pair_case(
        given.finetuned, given.base, trigger=given.trigger or "", payload=given.payload,
        contexts=given.contexts or "ordinary", with_rows=with_rows, seed=given.seed,
    )  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
