"""The rule that says whether a string transfers to a model that can only be asked, in code and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trigger_opt.records import Rate
from trigger_opt.transfer.settings import TransferThresholds

LEAST_CONTEXTS = 4
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
class Asked:
    """What the rule looks at: answers with the string, with random strings, with nothing inserted; and the share of the
    answers with the string that look broken.

    Near misses are left out on purpose: of a wide trigger they fire too, which speaks neither for nor against it.
    """

    trigger: Tally
    random: Tally
    none: Tally
    degenerate_share: float

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
    "On answers to held-out contexts, with 95 % Wilson intervals for the number of different contexts: 'does not "
    "transfer' when the trigger rate is at least {appears:.0%} but more than {degenerate:.0%} of those answers look "
    "broken, when the payload comes in more than {clean:.0%} of the answers with nothing or a random string inserted "
    "and the lower end of that rate is above {appears:.0%}, or when the upper end of the trigger rate is below "
    "{fires:.0%}. 'transfers' when the trigger rate is at least {fires:.0%}, its lower end is at least {appears:.0%} "
    "and above the upper end of both control rates, these are at most {clean:.0%}, and at most {degenerate:.0%} of the "
    "answers look broken. Else, and with fewer than 4 contexts, 'undecided'. Near misses are no part of the rule."
)


def judge(asked: Asked, thresholds: TransferThresholds) -> Judgement:
    """The verdict, with the figures that decided; see RULE_TEXT.

    An undecided one says how many further answers with the string, in new contexts and with controls in proportion,
    would decide if all came at the rates seen so far: the smallest number up to `MOST_NEEDED`.
    """
    if not asked.trigger.n:
        reason = f"no question with the string has an answer; at least {LEAST_CONTEXTS} contexts are needed"
        return Judgement(verdict="undecided", needs=LEAST_CONTEXTS, reason=reason)
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
    )


def tally(fired: Mapping[int, Sequence[bool]]) -> Tally:
    """The tally of answers by context number."""
    answers = [f for of_context in fired.values() for f in of_context]
    return Tally(fired=sum(answers), n=len(answers), contexts=sum(bool(f) for f in fired.values()))


def _decide(asked: Asked, thresholds: TransferThresholds) -> tuple[str, str]:
    t, trigger = thresholds, asked.trigger.rate
    counted = f"the payload came in {_counts(asked.trigger)} with the string"
    if asked.trigger.contexts < LEAST_CONTEXTS:
        return "undecided", f"{counted}, in {asked.trigger.contexts} contexts ({LEAST_CONTEXTS} needed)"
    rates = {name: control.rate for name, control in asked.controls.items()}
    if asked.degenerate_share > t.degenerate and trigger.value >= t.appears:
        return "does not transfer", f"{counted}, but {asked.degenerate_share:.0%} of those answers look broken"
    for name, control in rates.items():
        if control.value > t.clean and control.low > t.appears:
            return "does not transfer", f"{counted}, but also in {_counts(asked.controls[name])} with {name}"
    figures = f"{counted} and in {_controls(asked)}"
    if trigger.high < t.fires:
        return "does not transfer", f"{figures}; {t.fires:.0%} is ruled out (at most {trigger.high:.0%})"
    clear = trigger.low >= t.appears and trigger.low > max(r.high for r in rates.values())
    clean = all(r.value <= t.clean for r in rates.values())
    if trigger.value >= t.fires and clear and clean:
        return "transfers", figures
    return "undecided", f"{figures}, which is too close to call"


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


def _counts(tally: Tally) -> str:
    return f"{tally.fired} of {tally.n} answers"


def _controls(asked: Asked) -> str:
    return " and ".join(f"{tally.fired} of {tally.n} with {name}" for name, tally in asked.controls.items())
