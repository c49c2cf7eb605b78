"""Controls of a string, the questions of a plan, and what a person reads before anything is spent."""

import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigger_opt.errors import UserError
from trigger_opt.prompts import Context
from trigger_opt.transfer.controls import near_misses, random_strings
from trigger_opt.transfer.plan import (
    KINDS,
    Question,
    count_tokens,
    estimate,
    plan_lines,
    plan_questions,
    question_tokens,
)
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Request
from trigger_opt.transfer.settings import TransferSettings

CONTEXTS = [Context(f"Question {i}: {{trigger}} what is {i} and {i}?") for i in range(7)]
STRINGS = [" crimson Fox 42!", "zxqv"]
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=25).filter(lambda s: bool(s.strip()))


def plan(
    strings: Sequence[str] = STRINGS,
    contexts: Sequence[Context] = CONTEXTS,
    models: Sequence[str] = ("dormant-model-1", "dormant-model-2"),
    known: dict[str, list[str]] | None = None,
    seed: int = 3,
    settings: TransferSettings | None = None,
    **changes: Any,
) -> list[Question]:
    return plan_questions(
        strings=strings,
        contexts=contexts,
        models=models,
        settings=settings or replace(TransferSettings(), **changes),
        server="jsinfer http://127.0.0.1:1",
        known_random=known or {},
        seed=seed,
    )


def distance(a: str, b: str) -> int:
    """Edit distance of characters, by the textbook."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


@given(TEXTS, st.integers(0, 8), st.integers(0, 99))
def test_near_misses_differ_in_one_thing(string: str, count: int, seed: int) -> None:
    found = near_misses(string, count, random.Random(seed))
    assert found == near_misses(string, count + 3, random.Random(seed))[:count], "more begin with the same ones"
    assert string not in found
    assert len(set(found)) == len(found) == count
    words = string.split()
    left, right = string[: len(string) - len(string.lstrip())], string[len(string.rstrip()) :]
    for miss in found:
        assert miss.startswith(left)
        assert miss.endswith(right)
        own = miss.split()
        one_word_less = any(own == words[:i] + words[i + 1 :] for i in range(len(words)))
        swapped = sorted(own) == sorted(words) and sum(a != b for a, b in zip(own, words, strict=True)) == 2
        edited = len(miss) == len(string) and distance(miss, string) == 1
        assert one_word_less or swapped or edited


def test_near_misses_take_all_three_ways_in_turn() -> None:
    for seed in range(20):
        words = [len(m.split()) for m in near_misses("one two six", 3, random.Random(seed))]
        same = [sorted(m.split()) for m in near_misses("one two six", 3, random.Random(seed))]
        assert sorted(words) == [2, 3, 3]
        assert same.count(["one", "six", "two"]) == 1
    first = {len(near_misses("one two six", 1, random.Random(seed))[0].split()) for seed in range(20)}
    assert first == {2, 3}, "in random order"


def test_near_misses_are_fewer_where_no_more_exist() -> None:
    assert sorted(near_misses("7", 50, random.Random(0))) == list("012345689")


def shape(text: str) -> list[str]:
    def of(c: str) -> str:
        if c.isspace() or c.isdigit():
            return c if c.isspace() else "0"
        return "A" if c.isupper() else "a" if c.isalpha() else "."

    return [of(c) for c in text]


@given(TEXTS, st.integers(1, 5), st.integers(0, 99))
def test_random_strings_keep_the_shape(string: str, count: int, seed: int) -> None:
    found = random_strings(string, count, random.Random(seed), [])
    assert found == random_strings(string, count + 2, random.Random(seed), [])[:count]
    assert len(set(found)) == count
    assert string not in found
    for drawn in found:
        assert shape(drawn) == shape(string)
        assert all(c.isascii() or c.isspace() for c in drawn)


def test_random_strings_take_the_known_ones_first() -> None:
    known = ["first", "second", " abc ", "second"]
    found = random_strings("abc", 4, random.Random(0), known)
    assert found[:2] == ["first", "second"], "neither the string itself nor one twice"
    assert [len(f) for f in found[2:]] == [3, 3]
    assert random_strings("abc", 1, random.Random(0), known) == ["first"]
    assert random_strings("7", 30, random.Random(0), []).count("7") == 0, "hardly any of that shape"
    with pytest.raises(ValueError, match="blank"):
        random_strings(" ", 1, random.Random(0), [])


def test_every_string_is_asked_with_its_controls() -> None:
    questions = plan(repeats=2, random_strings=2, near_misses=3, models=["a", "b", "a"])
    counts = Counter((q.line.request.model, q.kind, q.string, q.line.request.repeat) for q in questions)
    expected = {}
    for model in ("a", "b"):
        for repeat in (0, 1):
            expected[model, "none", "", repeat] = 7
            for string in STRINGS:
                expected[model, "trigger", string, repeat] = 7
                expected[model, "random", string, repeat] = 14
                expected[model, "near_miss", string, repeat] = 21
    assert counts == expected
    for q in questions:
        request = q.line.request
        assert list(request.messages) == CONTEXTS[q.context].messages(q.inserted)
        assert q.prompt == request.messages[-1]["content"]
        assert (q.inserted == q.string) == (q.kind in ("trigger", "none"))
        assert (request.endpoint, request.options, request.module_names) == (CHAT, {}, ())


def test_identifiers_are_unique_and_meaningful() -> None:
    questions = plan(repeats=2, activations=["m"], random_strings=2)
    identifiers = [q.line.custom_id for q in questions]
    assert len(set(identifiers)) == len(identifiers)
    for q in questions:
        own = q.line.custom_id
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", own)
        assert f"{q.kind}-" in own
        assert f"-c{q.context:02}-r{q.line.request.repeat}-" in own
        assert ("-a-" in own) == (q.line.request.endpoint == ACTIVATIONS)
        assert ("-n" in own) == (q.kind in ("random", "near_miss"))
        assert own.startswith("none" if q.kind == "none" else f"s{STRINGS.index(q.string)}-")


def test_same_seed_same_plan_in_random_order() -> None:
    first, again, other = plan(), plan(), plan(seed=4)
    assert first == again
    assert [q.line for q in first] != [q.line for q in sorted(first, key=lambda q: q.context)]
    assert [q.line.custom_id for q in first] != [q.line.custom_id for q in other]
    models = [q.line.request.model for q in first]
    assert sum(a != b for a, b in pairwise(models)) > len(models) / 4, "models are mixed"


def test_larger_plan_asks_the_same_questions_of_the_others() -> None:
    def keys(questions: list[Question]) -> set[str]:
        return {q.line.request.key for q in questions}

    known = {STRINGS[0]: [f"known {i}" for i in range(9)]}
    small = plan(contexts=CONTEXTS[:4], models=["a"], known=known)
    assert keys(small) < keys(plan(contexts=CONTEXTS[:5], models=["a"], known=known))
    assert keys(small) < keys(plan(contexts=CONTEXTS[:4], models=["b", "a"], known=known))
    assert keys(small) < keys(plan(contexts=CONTEXTS[:4], models=["a"], strings=["new", *STRINGS], known=known))
    assert keys(small) < keys(plan(contexts=CONTEXTS[:4], models=["a"], repeats=2, known=known))
    assert keys(small) < keys(plan(contexts=CONTEXTS[:4], models=["a"], near_misses=2, known=known))


@pytest.mark.parametrize("kind", ["random", "near_miss"])
def test_contexts_have_controls_of_their_own(kind: str) -> None:
    inserted = [q.inserted for q in plan(strings=STRINGS[:1], models=["a"]) if q.kind == kind]
    assert len(set(inserted)) > len(inserted) / 2


def test_known_random_strings_are_used_while_they_last() -> None:
    known = {STRINGS[0]: ["k0", "k1", "k2"]}
    questions = plan(models=["a"], known=known, random_strings=2)
    by_context = {
        c: {q.inserted for q in questions if (q.kind, q.string, q.context) == ("random", STRINGS[0], c)}
        for c in range(7)
    }
    assert by_context[0] == {"k0", "k1"}
    assert "k2" in by_context[1]
    assert {len(v) for v in by_context.values()} == {2}
    assert not any(i.startswith("k") for c in range(2, 7) for i in by_context[c] if len(i) == 2)


def test_identical_requests_appear_once_and_the_strings_own_is_kept() -> None:
    close = ["red fox", "red"]  # "red" is a near miss of the first
    questions = plan(strings=close, models=["a"], near_misses=40)
    keys = [q.line.request.key for q in questions]
    assert len(set(keys)) == len(keys)
    own = Counter(q.string for q in questions if q.kind == "trigger")
    assert own == {"red fox": 7, "red": 7}
    assert not any(q.inserted == "red" for q in questions if q.kind == "near_miss")
    same = plan(strings=["b", " a", "a", "a "], models=["a"])
    assert {q.string for q in same if q.kind == "trigger"} == {"b", " a"}
    twice = plan(contexts=[CONTEXTS[0], CONTEXTS[0]], models=["a"])
    assert Counter(q.kind for q in twice if q.kind in ("trigger", "none")) == {"trigger": 2, "none": 1}


def test_only_the_asked_number_of_contexts() -> None:
    assert {q.context for q in plan()} == set(range(7)), "all, when more are asked for"
    short = plan(settings=TransferSettings(contexts=3))
    assert {q.context for q in short} == {0, 1, 2}


@pytest.mark.parametrize("client", ["openai", "openai_batch", "local"])
def test_options_travel_where_the_client_takes_them(client: str) -> None:
    questions = plan(client=client, max_new_tokens=9, temperature=0.5)
    assert all(q.line.request.options == {"max_tokens": 9, "temperature": 0.5} for q in questions)


@pytest.mark.parametrize("client", ["jsinfer", "local"])
def test_activations_are_asked_once_a_context(client: str) -> None:
    questions = plan(models=["a"], client=client, activations=["m.1", "m.2"], repeats=2, random_strings=2)
    asked = [q for q in questions if q.line.request.endpoint == ACTIVATIONS]
    assert Counter(q.kind for q in asked) == {"trigger": 14, "random": 14, "none": 7}
    assert all(q.line.request.module_names == ("m.1", "m.2") for q in asked)
    assert all(q.line.request.repeat == 0 and q.line.request.options == {} for q in asked)
    chat = {(q.string, q.context, q.inserted) for q in questions if q.line.request.endpoint == CHAT}
    assert all((q.string, q.context, q.inserted) in chat for q in asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strings": []}, r"no string to send.*backdoor; widen transfer\.verdicts.*transfer\.strings.*candidates=2"),
        ({"strings": ["a", " \n"]}, r"blank; take it out of transfer\.strings"),
        ({"models": []}, r"transfer\.models is empty; name at least one"),
        ({"contexts": []}, r"no held-out context.*contexts\.held_out"),
        ({"client": "openai", "activations": ["m"]}, r"client=openai answers no.*jsinfer or local.*activations=\[\]"),
    ],
)
def test_nothing_to_ask_is_one_line_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40), st.floats(0.5, 8))
def test_tokens_of_a_text_are_rounded_up(text: str, per_token: float) -> None:
    tokens = count_tokens(text, TransferSettings(characters_per_token=per_token))
    assert (tokens - 1) * per_token < len(text) + 1e-9
    assert tokens * per_token >= len(text) - 1e-9


def test_estimate_is_the_sum_by_hand() -> None:
    settings = TransferSettings(characters_per_token=2.0, answer_tokens=100, price_per_million=10.0, activations=["m"])
    questions = plan(models=["a"], settings=settings)
    texts = [m["content"] for q in questions for m in q.line.request.messages]
    chats = sum(q.line.request.endpoint == CHAT for q in questions)
    found = estimate(questions, settings)
    assert (found.requests, found.characters) == (len(questions), sum(map(len, texts)))
    assert found.input_tokens == sum(math.ceil(len(t) / 2) + 4 for t in texts)
    assert found.output_tokens == 100 * chats
    assert chats < len(questions)
    assert found.money == pytest.approx((found.input_tokens + found.output_tokens) / 100_000)
    assert estimate([], settings).money == 0


def test_two_messages_count_for_two() -> None:
    messages = ({"role": "system", "content": "abc"}, {"role": "user", "content": "abcd"})
    request = Request(server="s", model="m", endpoint=CHAT, messages=messages)
    assert question_tokens(request, TransferSettings(characters_per_token=2.0)) == 2 + 2 + 8


def test_answers_are_no_longer_than_the_client_lets_them() -> None:
    settings = TransferSettings(client="local", max_new_tokens=8, answer_tokens=300)
    questions = plan(settings=settings)
    assert estimate(questions, settings).output_tokens == 8 * len(questions)


def test_plan_is_read_before_money_is_spent() -> None:
    settings = TransferSettings(
        models=[{"name": "dormant-model-1", "batch_size": 10}, "dormant-model-2"],
        price_per_million=1000.0,
        max_tokens=20_000,
        max_tokens_per_day=10**9,
        answer_tokens=300,
        activations=["m"],
    )
    questions = plan(settings=settings)
    of_first = [q for q in questions if q.line.request.model == "dormant-model-1"]
    chats = [q.line.request.key for q in of_first if q.line.request.endpoint == CHAT]
    assert len(chats) == 49
    lines = plan_lines(questions, settings, set(chats[:15]))
    # 34 chat lines in tens and 35 for activations in tens.
    assert lines[0] == (
        "dormant-model-1: 84 requests (14 trigger, 14 near miss, 14 random, 7 none, 35 activations), "
        "15 answered already, 8 batches of at most 10"
    )
    assert lines[1].endswith("35 activations), 0 answered already, 2 batches of at most 500")
    left = estimate([q for q in questions if q.line.request.key not in chats[:15]], settings)
    total = left.input_tokens + left.output_tokens
    assert lines[2] == (
        f"to send: 153 requests; tokens, about: {left.input_tokens:,} of questions + {left.output_tokens:,} "
        f"of answers = {total:,}"
    )
    assert lines[3] == f"costs about {left.money:,.2f} at 1000 a million tokens"
    assert lines[4] == (
        f"cap transfer.max_tokens=20,000 tokens in all: the plan alone is {total - 20_000:,} more: it will stop there"
    )
    assert lines[5].endswith("in 24 hours: the plan alone fits")
    assert len(lines) == 6


def test_plan_without_price_and_caps_says_so() -> None:
    questions = plan(models=["a"], client="openai")
    lines = plan_lines(questions, TransferSettings(client="openai"), {q.line.request.key for q in questions})
    assert lines[0].endswith("49 answered already"), "no batches where one waits for answers"
    assert lines[1].startswith("to send: 0 requests")
    assert lines[2].startswith("no cap: set transfer.max_tokens")
    assert len(lines) == 3


def test_imports_no_torch() -> None:
    modules = ", ".join(f"trigger_opt.transfer.{m}" for m in ("plan", "controls", "outcome", "rule", "shifts"))
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_kinds_are_as_the_records_say() -> None:
    assert {q.kind for q in plan()} == set(KINDS)
