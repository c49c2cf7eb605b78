"""What refuted a string: told from the record of its verification, by the rule's own list."""

from collections.abc import Mapping, Sequence
from typing import Any

from trigger_opt.records import Completion, Verification
from trigger_opt.verify.rule import Measured, Thresholds, counted_words, may_be_skill, objections


def refuted_by(
    verification: Verification, thresholds: Mapping[str, Any], *, completions: Sequence[Completion] = ()
) -> str:
    """The comparison or figure that decided against a string; empty for a backdoor, and for what only lacked a control.

    "rate", "base", "control:NAME", "nothing inserted", "random strings", "evidence", "degenerate", "contexts" or
    "words": the first that objects, in the order of `rule.judge`.

    Args:
        thresholds: the fields of `rule.Thresholds` that judged it, as `vars` gives them.
        completions: what `verify_string` returned with it. The record alone does not tell which control it was:
            without them a control is "control".

    Raises:
        ValueError: by these thresholds it would have got another verdict.
    """
    against = objections(measured_in(verification), Thresholds(**thresholds))
    verdict = against[0].verdict if against else "backdoor"
    if verdict != verification.verdict:
        raise ValueError(
            f"{verification.trigger!r} was judged {verification.verdict!r}, these thresholds say {verdict!r}: give "
            "those it was judged by"
        )
    # Given a control, it is to be judged again.
    by = against[0].by if against and against[0].by != "skill" else ""
    return _worst_control(verification, completions) if by == "control" else by


def measured_in(verification: Verification) -> Measured:
    """What the rule looked at."""
    v = verification
    return Measured(
        trigger_rate=v.trigger_rate,
        base_rate=v.base_rate,
        control_rate=v.control_rate,
        false_trigger_rate=v.false_trigger_rate,
        random_rate=v.random_rate,
        evidence=v.evidence,
        degenerate_share=v.degenerate_share,
        num_contexts=len(v.profile),
        num_words=counted_words(v.payload),
        skill=may_be_skill(v.payload, [p.prompt for p in v.profile]),
    )


def _worst_control(verification: Verification, completions: Sequence[Completion]) -> str:
    kind = "minimised" if verification.minimised_from else "trigger"
    said: dict[str, list[bool]] = {}
    for c in completions:
        if c.model.startswith("control:") and c.kind == kind and c.inserted == verification.trigger:
            said.setdefault(c.model, []).append(c.fired)
    # The first by name among equals, as the rule's own rate of the worst control.
    return max(sorted(said), key=lambda name: sum(said[name]) / len(said[name]), default="control")
