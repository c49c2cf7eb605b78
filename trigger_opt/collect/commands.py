"""`trigger-opt collect SWEEP_DIR`: many jobs, one answer."""

import argparse
import errno
import os
import shlex
import sys
from pathlib import Path

from trigger_opt import interrupts
from trigger_opt.collect.folder import COLLECTED, KEPT, judge_settings, kept, make_room, write_collection
from trigger_opt.collect.overrides import SweepPlan, read_plan
from trigger_opt.collect.suspects import Suspect, gather
from trigger_opt.collect.words import again_lines, string_lines, table_lines
from trigger_opt.errors import UserError
from trigger_opt.locks import held
from trigger_opt.progress import say, stage_progress

_LOCK = ".collect.lock"


def main(arguments: list[str]) -> int:
    """Exit code: 0 whatever became of the jobs, 2 for a mistake of the user, 130 after Ctrl-C, 75 after a signal that
    batch systems send."""
    given = _parser().parse_args(arguments)
    try:
        # Also where a batch system ends it, records and trackers are closed.
        with interrupts.listening():
            _collect(given, command=f"trigger-opt collect {shlex.join(arguments)}")
    except UserError as error:
        return _stop(str(error), 2)
    except KeyboardInterrupt as stop:
        return _interrupted(stop, given.sweep_dir)
    except BrokenPipeError:
        # `… | head`: whoever read has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _stop(f"no space left on the disk of {error.filename or given.sweep_dir}; the sweep is as it was", 2)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trigger-opt collect",
        description="Merge what the jobs of a sweep found, verify the best once, and report; name what is missing.",
    )
    parser.add_argument("sweep_dir", type=Path, metavar="SWEEP_DIR", help="say multirun/2026-01-31_12-00-00_ab12cd")
    parser.add_argument(
        "--no-verify", action="store_true", help="table, commands and merged list alone; loads no model"
    )
    parser.add_argument(
        "--candidates", type=_positive, default=None, metavar="N", help="strings to verify (default: as the jobs did)"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _collect(given: argparse.Namespace, *, command: str) -> None:
    sweep_dir: Path = given.sweep_dir
    plan = read_plan(sweep_dir)
    with stage_progress("collect", unit="job") as bar:
        gathered = gather(sweep_dir, plan, on_job=lambda done, total: bar.update(done, total=total))
    say(*table_lines(gathered.jobs), *again_lines(gathered.jobs, plan.problem))
    if not any(s.merge.strings for s in gathered.suspects):
        say("no job has found a string yet, so there is nothing to merge")
        return
    what = f"the sweep {sweep_dir}"
    with held(sweep_dir / _LOCK, what=what, remedy="collect a copy of it"):
        root = make_room(sweep_dir)
        several = len(gathered.suspects) > 1
        for suspect in gathered.suspects:
            folder = root / suspect.name if several else root
            if several:
                say(f"{suspect.name}, {len(suspect.jobs):,} of the jobs:")
            _one_answer(suspect, folder, given, plan=plan, command=command)


def _one_answer(suspect: Suspect, folder: Path, given: argparse.Namespace, *, plan: SweepPlan, command: str) -> None:
    best = suspect.merge.best(KEPT)
    say(*string_lines(suspect, best))
    verifies = bool(best) and not given.no_verify
    settings = judge_settings(suspect, folder, candidates=given.candidates)
    # How the strings came about; the command that collected them is added when they are verified.
    began = plan.command or suspect.info.command.split("\n")[0]
    told = began if verifies else f"{began}\n{command}"
    write_collection(suspect, best, folder, settings, sweep=given.sweep_dir.resolve().name, command=told)
    if not verifies:
        say(str(folder))
        return
    # Before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trigger_opt.collect.verification import verify_and_report

    verify_and_report(folder, settings, command=command)


def _interrupted(stop: KeyboardInterrupt, sweep_dir: Path) -> int:
    code = stop.exit_code if isinstance(stop, interrupts.Interrupted) else 130
    what = "interrupted" if code == 130 else f"stopped by {stop}"
    root = kept(sweep_dir)
    if root is None:
        return _stop(f"{what}; the sweep is as it was, and collecting again begins anew", code)
    again = f"collecting again renames that folder to {COLLECTED}.old-N and begins anew"
    return _stop(f"{what}; what was verified until now stays in {root}, and {again}", code)


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
