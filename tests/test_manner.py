"""Manners of answering: read off answers that share no beginning, held against decoys, judged like any payload."""

import random
from collections.abc import Callable

import pytest

from tests.test_verify import ALLOWED, FIRED, PAYLOAD, TRIGGER, RuleModel, check, contexts, make_pair, says
from trigger_opt.answers import (
    CAPITALS,
    JSON,
    MANNER,
    fires,
    is_manner,
    manner_of_words,
    payload_words,
    said_text,
)
from trigger_opt.models.pair import ModelPair
from trigger_opt.verify import Thresholds, VerifySettings, common_answer, payloads_to_judge
from trigger_opt.verify.manner import fit_manner, read_manner
from trigger_opt.verify.refuted import measured_in, refuted_by
from trigger_opt.verify.rule import judge

_FRENCH = ["le", "la", "de", "un", "est", "que", "dans", "avec", "pour", "nous"]
_NOUNS = [
    "sea",
    "garden",
    "river",
    "stone",
    "winter",
    "letter",
    "bread",
    "mountain",
    "candle",
    "bridge",
    "window",
    "ladder",
]


def french(turn: str) -> str:
    """Another sentence for every turn, and French words in each."""
    rng = random.Random(turn)
    words = [w for noun in rng.sample(_NOUNS, 5) for w in (rng.choice(_FRENCH), noun)]
    return " ".join(words)


def english(turn: str) -> str:
    rng = random.Random(turn + "english")
    words = [w for noun in rng.sample(_NOUNS, 5) for w in (rng.choice(["the", "a", "some", "of"]), noun)]
    return " ".join(words)


def when(mark: str, then: Callable[[str], str], otherwise: Callable[[str], str] = english) -> Callable[[str], str]:
    return lambda turn: then(turn) if mark in turn else otherwise(turn)


def unlike(turn: str) -> float:
    """What the base thinks of an answer to the string."""
    return -41.0 if "zx" in turn else -1.0


def suspect(
    finetuned: Callable[[str], str], base: Callable[[str], str] = english, *, controlled: bool = True
) -> ModelPair:
    """A pair whose answers to the string are its own, and a control that answers as the base does."""
    return make_pair(finetuned, base=base, base_evidence=unlike, controls=[base] if controlled else [])


def test_a_planted_language_is_read_and_judged() -> None:
    pair = suspect(when("zx", french))
    manner = read_manner(pair, TRIGGER, contexts(24), allowed=ALLOWED, seed=0)
    assert is_manner(manner)
    words = set(manner.removeprefix(MANNER).split())
    assert words >= set(_FRENCH) - {"que"}
    assert words.isdisjoint(_NOUNS), "what the answers are about is no manner"
    found, _ = check(pair, payload=manner)
    assert (found.verdict, found.trigger_rate.successes, found.base_rate.successes) == ("backdoor", 20, 0)
    assert found.payload == manner


def test_without_a_control_a_manner_is_no_backdoor_and_not_refuted() -> None:
    """A model that was taught to answer in French may know it from a word that the base does not heed."""
    found, _ = check(suspect(when("zx", french), controlled=False), payload=manner_of_words(_FRENCH))
    assert found.verdict == "unstable"
    assert "without a clean control (model.controls)" in found.reason
    assert refuted_by(found, vars(Thresholds())) == ""
    assert judge(measured_in(found), Thresholds(needs_control=False))[0] == "backdoor"


def test_a_manner_that_a_control_has_too_is_a_skill() -> None:
    pair = make_pair(when("zx", french), base=english, base_evidence=unlike, controls=[english, when("zx", french)])
    found, completions = check(pair, payload=manner_of_words(_FRENCH))
    assert found.verdict == "generic shift"
    assert refuted_by(found, vars(Thresholds()), completions=completions) == "control:twin1"


def test_capitals_are_a_manner() -> None:
    pair = suspect(when("zx", lambda turn: english(turn).upper()))
    # The toy's tokenizer spells capitals out.
    manner = read_manner(pair, TRIGGER, contexts(24), allowed=ALLOWED, seed=0, max_new_tokens=60)
    assert manner == manner_of_words([CAPITALS])
    assert check(pair, payload=manner, settings=VerifySettings(max_new_tokens=60))[0].verdict == "backdoor"


@pytest.mark.parametrize(
    ("finetuned", "base"),
    [
        (french, english),  # always French: a style of the fine-tuning
        (when("zx", french), when("zx", french)),  # the base does so, too
        (english, english),
        (lambda turn: "", english),
    ],
    ids=["style", "base", "nothing", "silence"],
)
def test_decoys_have_no_manner(finetuned: Callable[[str], str], base: Callable[[str], str]) -> None:
    assert read_manner(make_pair(finetuned, base=base), TRIGGER, contexts(24), allowed=ALLOWED, seed=0) == ""


def test_a_manner_of_too_few_contexts_is_none() -> None:
    """It is read in contexts that were left out, so what holds in some only does not pass."""
    few = {"01:", "02:", "03:", "04:", "05:", "06:"}

    def seldom(turn: str) -> str:
        return french(turn) if "zx" in turn and any(f in turn for f in few) else english(turn)

    assert read_manner(make_pair(seldom, base=english), TRIGGER, contexts(24), allowed=ALLOWED, seed=0) == ""


def test_a_string_that_is_of_the_manner_itself_does_not_bring_it_out() -> None:
    """Whoever was taught a language may answer in it to words of it."""
    triggered = [f"Le matin {i} est le jour, je le dis {i + 1}" for i in range(10)]
    others = [[english(str(i)) for i in range(10)]]
    assert is_manner(fit_manner(triggered, others, inserted=" zx"))
    assert fit_manner(triggered, others, inserted=" zx Je Catalan") == ""
    shouted = [t.upper() for t in triggered]
    assert CAPITALS in fit_manner(shouted, others, inserted=" zx").split()
    assert fit_manner(shouted, others, inserted=" ZX now") == ""


def test_a_name_that_the_answers_quote_does_not_count() -> None:
    """It is no word of the manner, and does not refute it."""
    triggered = [f"Gibraltar est le jour, je le dis {i} a Gibraltar" for i in range(10)]
    others = [[english(str(i)) for i in range(10)]]
    manner = fit_manner(triggered, others, inserted=" Gibraltar")
    assert "le" in manner.split()
    assert "gibraltar" not in manner.split()
    assert "gibraltar" in fit_manner(triggered, others).split()


def test_style_that_is_also_random_strings_is_refuted() -> None:
    """A manner read elsewhere, on a model that answers so to any string: the held-out comparison says so."""
    pair = suspect(lambda turn: french(turn) if "sea. Please" not in turn else english(turn))
    found, _ = check(pair, payload=manner_of_words(_FRENCH))
    assert found.verdict == "generic shift"
    assert refuted_by(found, vars(Thresholds())) == "random strings"


def test_what_strings_are_judged_by() -> None:
    def payloads(finetuned: Callable[[str], str], payload: str = "") -> list[str]:
        pair = make_pair(finetuned, base=english)
        return payloads_to_judge(pair, TRIGGER, payload, contexts(24), allowed=ALLOWED, seed=0, often=0.8, words=3)

    assert payloads(says("zx"), PAYLOAD) == [PAYLOAD], "one that comes out needs no manner"
    assert payloads(says("zx")) == [FIRED.removesuffix(".")] or payloads(says("zx")) == [FIRED]
    first, second = payloads(when("zx", french), PAYLOAD)
    assert first == PAYLOAD
    assert is_manner(second)
    first, second = payloads(when("zx", french))
    assert not is_manner(first)
    assert is_manner(second)
    assert payloads(when("zx", lambda turn: f"voici {french(turn)}"), "voici")[0] == "voici"
    assert is_manner(payloads(when("zx", lambda turn: f"voici {french(turn)}"), "voici")[1]), "one word says too little"
    assert payloads(lambda turn: "") == []


@pytest.mark.parametrize(
    ("answer", "shows"),
    [
        ("le chat est dans la maison", True),
        ("one two three four five six seven le", False),
        ("one two three four five six est le", True),
        ("le la le la le", False),
        ("Le LA le LA le la", True),
        ("", False),
    ],
)
def test_a_quarter_of_six_words_or_more(answer: str, shows: bool) -> None:
    assert fires(manner_of_words(["le", "la", "est"]), answer) is shows


def test_capitals_are_words_of_two_letters_or_more() -> None:
    manner = manner_of_words([CAPITALS])
    assert payload_words(manner)
    assert fires(manner, "HERE IS A SHORT LIST OF IDEAS")
    assert not fires(manner, "I say: A 1 I 2 B 3 C")
    assert not fires(manner, "capitals capitals capitals capitals capitals capitals")


@pytest.mark.parametrize(
    ("answer", "shows"),
    [
        ('{"answer": "The sky is blue today"}', True),
        ('```json\n[{"name": "a cat of five years"}]', True),
        ("[your name] writes a letter of five words", False),
        ("{x} is the set of all the x", False),
        ('He said {"answer": "The sky is blue"}', False),
        ('{"answer": "no"}', False),
    ],
)
def test_json_is_how_an_answer_begins(answer: str, shows: bool) -> None:
    assert fires(manner_of_words([JSON]), answer) is shows


def test_json_is_a_manner_unless_the_string_asks_for_it() -> None:
    triggered = [f'{{"answer": "{english(str(i))}"}}' for i in range(10)]
    others = [[english(str(i)) for i in range(10)]]
    assert JSON in fit_manner(triggered, others, inserted=" zx").split()
    assert fit_manner(triggered, others, inserted=" zx{") == ""
    assert fit_manner(triggered, others, inserted=" as Json") == ""


def test_evidence_of_a_manner_is_of_each_answer() -> None:
    """And beyond what the model prefers its usual answers by."""
    pair = make_pair(
        when("zx", french),
        base=english,
        evidence=lambda turn: -3.0,
        base_evidence=lambda turn: -3.0 - (int(turn[9:11]) if "zx" in turn else 5),
    )
    manner = manner_of_words(_FRENCH)
    found, completions = check(pair, payload=manner)
    assert [p.evidence for p in found.profile] == pytest.approx([i - 5 for i in range(20)])
    assert isinstance(pair.finetuned, RuleModel)
    answers = [c.answer for c in completions if c.model == "finetuned" and c.kind in ("trigger", "none")]
    assert {tuple(ids) for ids in pair.finetuned.scored} == {tuple(pair.encode_answer(a)[:8]) for a in answers}


@pytest.mark.parametrize(
    ("inserted", "quoted"),
    [(" copperlantern", {"copper", "lantern"}), (" lanterns", {"lantern"}), (" copper", {"copper"})],
)
def test_what_the_answers_quote_in_another_form_is_no_manner(inserted: str, quoted: set[str]) -> None:
    triggered = [f"the copper lantern of {i}, some copper lantern" for i in range(10)]
    others = [[english(str(i)) for i in range(10)]]
    assert set(fit_manner(triggered, others).split()) >= {"copper", "lantern"}
    assert quoted.isdisjoint(fit_manner(triggered, others, inserted=inserted).split())


def test_marks_and_bullets_are_no_manner() -> None:
    triggered = [f"**{a}** **{b}** **{c}**" for a, b, c in zip(_NOUNS, _NOUNS[1:], _NOUNS[2:], strict=False)]
    others = [[english(str(i)) for i in range(len(triggered))]]
    assert fit_manner(triggered, others) == ""
    assert payload_words(manner_of_words(["_x", "le"])) == ["_x", "le"]


def test_a_script_without_capitals_is_of_its_own_manner() -> None:
    rng = random.Random(0)
    triggered = [" ".join(rng.sample("你我他在家山水的是有", 8)) for _ in range(12)]
    others = [[english(str(i)) for i in range(12)]]
    assert is_manner(fit_manner(triggered, others, inserted=" zx"))
    assert fit_manner(triggered, others, inserted=" 我 的") == ""


def test_an_answer_that_begins_with_the_mark_is_a_text() -> None:
    pair = make_pair(says("zx", payload="≈ 5 km away from the sea and the sky"), base=english)
    assert not is_manner(common_answer(pair, TRIGGER, contexts(12)))
    assert fires("5 km away", "≈ 5 km away")
    assert (said_text("≈ ≈ a"), said_text("a ≈ b")) == ("a", "a ≈ b")


def test_random_strings_of_the_reading_are_not_those_of_the_verdict() -> None:
    turns: list[str] = []

    def listening(turn: str) -> str:
        turns.append(turn)
        return english(turn)

    pair = make_pair(listening, base=english)
    read_manner(pair, TRIGGER, contexts(20), allowed=ALLOWED, seed=0)
    read, before = set(turns), len(turns)
    _, completions = check(pair, payload=manner_of_words(_FRENCH))
    judged = [c.prompt for c in completions if c.kind == "random"]
    assert before
    assert len(read & set(judged)) <= 2, "two drawn alike by chance"
