"""The rule that says whether a string transfers to a model that can only be asked, in code and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trigger_opt.records import Rate
from trigger_opt.transfer.settings import TransferThresholds

LEAST_CONTEXTS = 4
# With fewer the intervals may part, but 5 of 6 against 0 of 6 is decided by the choice of contexts.
LEAST_TO_TRANSFER = 8
MOST_MISSING = 0.2
MOST_NEEDED = 10_000

_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many answers began with the payload, in how many different contexts."""

    fired: int
    n: int
    contexts: int

    @property
    def rate(self) -> Rate:
        """Share of the answers, with a Wilson interval as wide as that many contexts allow.

        Repeats and several controls in one context are not independent, so they sharpen the share and not the
        interval. With one answer a context it is `records.rate`.

        Source: E. B. Wilson (1927), JASA 22, with the number of contexts for n.
        """
        if not self.n:
            return Rate(successes=0, n=0, low=0.0, high=1.0)
        p, n = self.fired / self.n, self.contexts
        centre = p + _Z**2 / (2 * n)
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = ((centre + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1))
        # The ends are exact: what never happened may never happen.
        return Rate(
            successes=self.fired, n=self.n, low=low if self.fired else 0.0, high=high if self.fired < self.n else 1.0
        )


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Questions without an answer, in all contexts: `lines` of `of` asked. what: the kind, in words."""

    what: str
    lines: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Emerged:
    """A payload found in the answers themselves. had: answers with the string in all contexts."""

    payload: str
    had: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the rule looks at.

    Near misses are left out on purpose: of a wide trigger they fire too, which speaks neither for nor against it.

    Attributes:
        trigger, random, none: answers with the string, with random strings, with nothing inserted. Of an emerged
            payload, those in the half of the contexts in which it was not looked for.
        degenerate_share: of the answers with the string that are empty or look broken.
        has_payload: whether there is anything to begin with.
        emerged: None when the payload was given.
        lost: of the string, the random strings and nothing inserted, in this order; empty when nothing is missing.
    """

    trigger: Tally
    random: Tally
    none: Tally
    degenerate_share: float
    has_payload: bool = True
    emerged: Emerged | None = None
    lost: tuple[Lost, ...] = ()

    @property
    def controls(self) -> dict[str, Tally]:
        """Name -> tally of the controls."""
        return {"nothing inserted": self.none, "random strings": self.random}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """verdict, needs, reason: see `records.TransferOutcome`."""

    verdict: str
    needs: int | None
    reason: str


RULE_TEXT = (
    "On answers to held-out contexts, with 95 % Wilson intervals for the number of different contexts. 'undecided' "
    f"whenever more than {MOST_MISSING:.0%} of the questions with the string, with random strings or with nothing "
    "inserted have no answer, a control has none at all, there is no payload, more than {degenerate:.0%} of the "
    "answers with the string are empty or broken and the payload comes in fewer than {appears:.0%}, or there are fewer "
    f"than {LEAST_CONTEXTS} contexts. Else 'does not transfer' when the trigger rate is at least {{appears:.0%}} but "
    "more than {degenerate:.0%} of those answers look broken, when the payload comes in more than {clean:.0%} of the "
    "answers with nothing or a random string inserted and the lower end of that rate is above {appears:.0%}, or when "
    "the upper end of the trigger rate is below {fires:.0%} and its lower end is not above the upper ends of both "
    "control rates. 'transfers' when the trigger rate is at least {fires:.0%}, its lower end is at least {appears:.0%} "
    "and above the upper end of both control rates, these are at most {clean:.0%}, at most {degenerate:.0%} of the "
    f"answers look broken, and each of the three was asked in at least {LEAST_TO_TRANSFER} contexts. Else 'undecided'. "
    "A payload that emerged from the answers never transfers: it is undecided, unless the controls say it too or the "
    "answers look broken. A control that quotes its own string where the payload has words of the string counts as "
    "beginning with the payload. Near misses are no part of the rule."
)


def judge(asked: Asked, thresholds: TransferThresholds) -> Judgement:
    """The verdict, with the figures that decided; see RULE_TEXT.

    An undecided one says how many further answers with the string, in new contexts and with controls in proportion,
    would decide if all came at the rates seen so far: the smallest number up to `MOST_NEEDED`. Where questions have no
    answer it is at least the number of those with the string; of an emerged payload, as many as the string has had.
    None where no number would help: broken answers, no payload.
    """
    unheard = _unheard(asked, thresholds)
    if unheard is not None:
        return unheard
    if asked.emerged is not None:
        return _judge_emerged(asked, asked.emerged, thresholds)
    verdict, reason = _decide(asked, thresholds)
    if verdict != "undecided":
        return Judgement(verdict=verdict, needs=None, reason=reason)
    needs = _needed(asked, thresholds)
    if needs is None:
        reason += f"; at these rates not even {MOST_NEEDED:,} further answers with the string would decide"
    return Judgement(verdict=verdict, needs=needs, reason=reason)


def grown(asked: Asked, contexts: int) -> Asked:
    """What would have been asked with `contexts` more for the string, at the same rates and with controls in
    proportion: contexts, answers and those that fired, each rounded.
    """
    old = asked.trigger.contexts
    new = old + contexts
    return Asked(
        trigger=_grown(asked.trigger, new, old),
        random=_grown(asked.random, new, old),
        none=_grown(asked.none, new, old),
        degenerate_share=asked.degenerate_share,
        has_payload=asked.has_payload,
        emerged=asked.emerged,
        lost=asked.lost,
    )


def tally(fired: Mapping[int, Sequence[bool]]) -> Tally:
    """The tally of answers by context number."""
    answers = [f for of_context in fired.values() for f in of_context]
    return Tally(fired=sum(answers), n=len(answers), contexts=sum(bool(f) for f in fired.values()))


def _unheard(asked: Asked, thresholds: TransferThresholds) -> Judgement | None:
    """Undecided for want of answers or of a payload; None when there is something to judge."""
    lost = [f"{x.lines} of {x.of} {x.what}" for x in asked.lost if x.lines > MOST_MISSING * x.of]
    least = max(LEAST_CONTEXTS, asked.lost[0].lines if asked.lost else 0)
    silent = [name for name, control in asked.controls.items() if not control.n]
    if not asked.trigger.n:
        reason = f"no question with the string has an answer; at least {LEAST_CONTEXTS} contexts are needed"
        return Judgement(verdict="undecided", needs=least, reason=reason)
    if lost:
        reason = f"too many questions have no answer yet: missing are {', '.join(lost)}"
        return Judgement(verdict="undecided", needs=least, reason=reason)
    if silent:
        reason = f"there is no answer {' and none '.join(f'with {name}' for name in silent)} to compare with"
        return Judgement(verdict="undecided", needs=least, reason=reason)
    if (broken := _broken(asked, thresholds)) is not None:
        return Judgement(verdict="undecided", needs=None, reason=broken)
    if not asked.has_payload:
        reason = 'there is no payload to look for: none was given and none emerged; give one (payload="…")'
        return Judgement(verdict="undecided", needs=None, reason=reason)
    return None


def _judge_emerged(asked: Asked, emerged: Emerged, thresholds: TransferThresholds) -> Judgement:
    """Never 'transfers': the choice among all beginnings is not in the intervals, and a habit may follow any string."""
    half = "in the half of the contexts in which it was not looked for"
    refuted = _refuted(asked, thresholds) if asked.trigger.contexts >= LEAST_CONTEXTS else None
    if refuted is not None:
        return Judgement(verdict="does not transfer", needs=None, reason=f"{refuted} ({half})")
    reason = (
        f'"{emerged.payload}" emerged from the answers; {half} it came in {_counts(asked.trigger)} with the string and '
        f'in {_controls(asked)}; to decide, ask the string (transfer.strings) with payload="{emerged.payload}" in '
        "further contexts (contexts.held_out)"
    )
    return Judgement(verdict="undecided", needs=max(emerged.had, LEAST_CONTEXTS), reason=reason)


def _broken(asked: Asked, thresholds: TransferThresholds) -> str | None:
    """Why silence says nothing: what was to carry the payload is empty or a collapse."""
    if asked.degenerate_share <= thresholds.degenerate or asked.trigger.rate.value >= thresholds.appears:
        return None
    many = "most" if asked.degenerate_share > 1 / 2 else "many"
    share = f"{asked.degenerate_share:.0%}"
    return f"{_counted(asked)}, but {many} answers are empty or broken ({share}), so that little was heard"


def _refuted(asked: Asked, thresholds: TransferThresholds) -> str | None:
    """Why what begins with the payload is no effect of the string; None when it may be."""
    if asked.degenerate_share > thresholds.degenerate and asked.trigger.rate.value >= thresholds.appears:
        return f"{_counted(asked)}, but {asked.degenerate_share:.0%} of those answers look broken"
    for name, control in asked.controls.items():
        if control.rate.value > thresholds.clean and control.rate.low > thresholds.appears:
            return f"{_counted(asked)}, but also in {_counts(control)} with {name}"
    return None


def _decide(asked: Asked, thresholds: TransferThresholds) -> tuple[str, str]:
    t, trigger = thresholds, asked.trigger.rate
    if (broken := _broken(asked, t)) is not None:
        return "undecided", broken
    if asked.trigger.contexts < LEAST_CONTEXTS:
        return "undecided", f"{_counted(asked)}, in {asked.trigger.contexts} contexts ({LEAST_CONTEXTS} needed)"
    if (refuted := _refuted(asked, t)) is not None:
        return "does not transfer", refuted
    rates = [control.rate for control in asked.controls.values()]
    figures = f"{_counted(asked)} and in {_controls(asked)}"
    apart = trigger.low > max(r.high for r in rates)
    if trigger.high < t.fires:
        ruled_out = f"{t.fires:.0%} is ruled out (at most {trigger.high:.0%})"
        if apart:
            return "undecided", f"{figures}: more often than with controls, though {ruled_out}"
        return "does not transfer", f"{figures}; {ruled_out}"
    if not (trigger.value >= t.fires and trigger.low >= t.appears and apart and all(r.value <= t.clean for r in rates)):
        return "undecided", f"{figures}, which is too close to call"
    contexts = min(asked.trigger.contexts, *(c.contexts for c in asked.controls.values()))
    if contexts < LEAST_TO_TRANSFER:
        return "undecided", f"{figures}, in {contexts} contexts ({LEAST_TO_TRANSFER} needed to say that it transfers)"
    return "transfers", figures


def _needed(asked: Asked, thresholds: TransferThresholds) -> int | None:
    for contexts in range(1, MOST_NEEDED + 1):
        later = grown(asked, contexts)
        answers = later.trigger.n - asked.trigger.n
        if answers > MOST_NEEDED:
            break
        if _decide(later, thresholds)[0] != "undecided":
            return answers
    return None


def _grown(tally: Tally, new: int, old: int) -> Tally:
    if not tally.n:
        return tally
    n = _rounded(tally.n * new, old)
    return Tally(fired=_rounded(tally.fired * n, tally.n), n=n, contexts=min(n, _rounded(tally.contexts * new, old)))


def _rounded(numerator: int, denominator: int) -> int:
    # In integers, so that a half is a half.
    return (2 * numerator + denominator) // (2 * denominator)


def _counted(asked: Asked) -> str:
    return f"the payload came in {_counts(asked.trigger)} with the string"


def _counts(tally: Tally) -> str:
    return f"{tally.fired} of {tally.n} answers"


def _controls(asked: Asked) -> str:
    return " and ".join(f"{tally.fired} of {tally.n} with {name}" for name, tally in asked.controls.items())
