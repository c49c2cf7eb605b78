"""All controls of a run, one after another, and what they say of the suspect's finding."""

import time
from dataclasses import replace

from trigger_opt.null.controls import Suspect, controls_of, require_controls
from trigger_opt.null.rule import held_verdict, null_result
from trigger_opt.null.runs import Search, score_of, search_control
from trigger_opt.progress import say
from trigger_opt.records import (
    NullControl,
    NullResult,
    TensorFamilyDiff,
    Verdict,
    Verification,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.session import Session, StageOutcome


def hold_against_null(session: Session, outcome: StageOutcome, *, search: Search) -> NullResult:
    """Search every control as the suspect was searched, and write null.jsonl, null.json and the verdict anew.

    What is finished stays whatever happens: each control has a run folder of its own. Where the suspect scores 0 no
    control is searched.

    Args:
        search: runs the named stages of a control's run.

    Raises:
        UserError: a control cannot be made, or what stopped its search.
    """
    folder = session.folder
    verdict = read_record(folder.file("verdict.json"), Verdict)
    verified = read_records(folder.file("verified.jsonl"), Verification)
    score = score_of(session, verified)
    held = _search_all(session, outcome, verified, search) if score > 0 else []
    write_records(folder.file("null.jsonl"), held)
    result = null_result(verdict, score, held)
    write_record(folder.file("null.json"), result)
    write_record(folder.file("verdict.json"), _with_cost(session, held_verdict(verdict, result), outcome))
    return result


def _search_all(
    session: Session, outcome: StageOutcome, verified: list[Verification], search: Search
) -> list[NullControl]:
    controls = controls_of(session.config, session.files[2:])
    suspect = _suspect(session, verified)
    require_controls(controls, suspect, session.folder.path)
    say(f"null: {len(controls)} controls, each searched like the suspect, which took {_seconds(session):.0f} s")
    session.release()
    held: list[NullControl] = []
    for number, control in enumerate(controls, 1):
        within = f"null {number} of {len(controls)}: {control.name}"
        found, evaluations = search_control(session, control, suspect, within=within, search=search)
        held.append(found)
        outcome.evaluations += evaluations
        write_records(session.folder.file("null.jsonl"), held)
        say(f"{within}: " + (f"score {found.score:.2f}, {found.verdict}" if found.score is not None else found.note))
    return held


def _suspect(session: Session, verified: list[Verification]) -> Suspect:
    has_diff = session.folder.has("diff.jsonl")
    return Suspect(
        finetuned=session.files[0],
        base=session.files[1],
        options=session.options,
        verified=verified,
        diff=read_records(session.folder.file("diff.jsonl"), TensorFamilyDiff) if has_diff else [],
        clean=session.config.verify.thresholds.clean,
    )


def _seconds(session: Session) -> float:
    last = {s.stage: s.seconds for s in session.folder.info.stages if s.stage in ("hypotheses", "search", "verify")}
    return sum(last.values())


def _with_cost(session: Session, verdict: Verdict, outcome: StageOutcome) -> Verdict:
    earlier = session.folder.info.stages
    return replace(
        verdict,
        evaluations=sum(s.evaluations for s in earlier) + outcome.evaluations,
        seconds=sum(s.seconds for s in earlier) + time.monotonic() - outcome.began,
    )
