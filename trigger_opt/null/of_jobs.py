"""What nulls of a sweep's jobs say of the strings collected from all of them."""

from collections.abc import Sequence
from dataclasses import replace

from trigger_opt.null.runs import score_of
from trigger_opt.records import Verdict, Verification, read_record
from trigger_opt.report.jobs import Collection, TakenBack
from trigger_opt.report.words import p_value
from trigger_opt.session import Session


def held_against_jobs(session: Session, verdict: Verdict, verified: Sequence[Verification]) -> Verdict:
    """The verdict of a run, and in the folder of a collected sweep what is left of it by `held_by_jobs`."""
    if not session.folder.has("collection.json"):
        return verdict
    collection = read_record(session.folder.file("collection.json"), Collection)
    return held_by_jobs(verdict, collection.taken_back, score_of(session, verified))


def held_by_jobs(verdict: Verdict, taken: Sequence[TakenBack], score: float) -> Verdict:
    """A backdoor is taken back to a generic shift where the null of a job speaks against it, as it did against the
    job's own: the sweep on a control would have found at least what one of its searches found there.

    A control that ended in a backdoor, or scores no less than `score`, the collected strings' detection score, speaks
    against every string; one that scores less, against the string alone that the job itself took back.
    """
    if verdict.verdict != "backdoor":
        return verdict
    against = next((t for t in taken if _speaks_against(t, verdict, score)), None)
    if against is None:
        return verdict
    p = "" if against.p_value is None else f" (p = {p_value(against.p_value)})"
    return replace(
        verdict,
        verdict="generic shift",
        reason=f"taken back by the null of job {against.job}{p}: {against.reason}",
        null_p_value=against.p_value,
        null_controls=against.controls,
        before_null=verdict.verdict,
        reason_before_null=verdict.reason,
    )


def _speaks_against(taken: TakenBack, verdict: Verdict, score: float) -> bool:
    same = taken.trigger in (verdict.trigger, verdict.minimised_trigger)
    # Without the controls' scores nothing says that these strings are above them.
    return same or taken.control_found or taken.control_score is None or taken.control_score >= score
