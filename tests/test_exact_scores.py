"""Whatever a search may ask, on every family: the engine's scores are those of whole forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.slow_scores import contexts_with_empty_sides, slow_logits, slow_scores
from trigger_opt.models.pair import LoadOptions, ModelPair
from trigger_opt.objectives import (
    JensenShannon,
    KullbackLeibler,
    Objective,
    Payload,
    PayloadOdds,
    TargetLikelihood,
    TotalVariation,
)
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.prompts import Context, tokenize_context
from trigger_opt.scoring import Engine, Request, Side, js_divergence

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f: (f, {}) for f in tiny.FAMILIES},
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2, untied": ("gemma2", {"tie_word_embeddings": False}),
}
CONTEXTS = contexts_with_empty_sides()
TOKENS = st.integers(0, tiny.vocab_size() - 1)
OBJECTIVES = [Payload, PayloadOdds, TargetLikelihood, JensenShannon, TotalVariation, KullbackLeibler]


@cache
def pair_of(name: str) -> ModelPair:
    """Read-only."""
    family, options = NETWORKS[name]
    return tiny.make_pair(family, **options)


@dataclass
class Case:
    """A trigger that is followed, strings a search could make of it, where, and what is forced after them."""

    followed: list[int]
    strings: list[list[int]]
    contexts: list[int]
    payload: list[int]

    def requests(self) -> list[Request]:
        return [Request(tuple(s), c, tuple(self.payload[:-1])) for c in self.contexts for s in self.strings]


@st.composite
def moved(draw: st.DrawFn, trigger: Sequence[int]) -> list[int]:
    """`trigger` after one move, or another string."""
    move = draw(st.sampled_from(["swap", "swaps", "insert", "delete", "same", "other", "longer", "shorter"]))
    string, place = list(trigger), draw(st.integers(0, len(trigger) - 1))
    if move == "swap":
        string[place] = draw(TOKENS)
    elif move == "swaps":
        string = [draw(TOKENS) if draw(st.booleans()) else t for t in string]
    elif move == "insert":
        string.insert(place, draw(TOKENS))
    elif move == "delete":
        string = [*string[:place], *string[place + 1 :]] or string
    elif move == "other":
        string = draw(st.lists(TOKENS, min_size=1, max_size=10))
    elif move == "longer":
        string += draw(st.lists(TOKENS, min_size=1, max_size=4))
    elif move == "shorter":
        string = string[: place + 1]
    return string


@st.composite
def cases(draw: st.DrawFn) -> Case:
    followed = draw(st.lists(TOKENS, min_size=1, max_size=8))
    return Case(
        followed=followed,
        strings=draw(st.lists(moved(followed), min_size=1, max_size=5)),
        contexts=draw(st.lists(st.integers(0, len(CONTEXTS) - 1), min_size=1, max_size=3, unique=True)),
        payload=draw(st.lists(TOKENS, min_size=1, max_size=5)),
    )


def near(got: float, expected: float, tolerance: float = 1e-5) -> bool:
    return abs(got - expected) <= tolerance * max(1.0, abs(expected))


def same_best(got: Sequence[float], expected: Sequence[float], tolerance: float = 1e-5) -> bool:
    """Whether the best of `got` is the best, or as good as equal to it."""
    best = max(range(len(got)), key=lambda n: got[n])
    return near(expected[best], max(expected), 2 * tolerance)


@pytest.mark.parametrize("name", NETWORKS)
@given(case=cases())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_log_probabilities_and_divergences(name: str, case: Case) -> None:
    pair = pair_of(name)
    engine = Engine(pair.finetuned, pair.base, CONTEXTS)
    engine.follow(case.followed)
    asked = case.requests()
    slow = {
        side: [slow_logits(getattr(pair, side), CONTEXTS[r.context], r.ids, r.forced) for r in asked]
        for side in ("finetuned", "base")
    }
    sides: tuple[Side, ...] = ("finetuned", "base")
    for side in sides:
        log_probs, greedy = engine.token_scores(side, asked, case.payload)
        assert log_probs.shape == greedy.shape == (len(asked), len(case.payload))
        sums = []
        for row, logits in enumerate(slow[side]):
            expected = logits.log_softmax(-1)[torch.arange(len(case.payload)), torch.tensor(case.payload)]
            sums.append(float(expected.sum()))
            assert all(near(*both) for both in zip(log_probs[row].tolist(), expected.tolist(), strict=True))
            for position, token in enumerate(case.payload):
                others = logits[position].clone()
                others[token] = -torch.inf
                ahead = float(logits[position, token] - others.max())
                if abs(ahead) > 1e-4:
                    assert bool(greedy[row, position]) == (ahead > 0)
        assert same_best(log_probs.sum(1).tolist(), sums)
    got = engine.divergences(js_divergence, asked)
    expected = torch.stack([js_divergence(f, b) for f, b in zip(slow["finetuned"], slow["base"], strict=True)])
    assert got.shape == (len(asked), len(case.payload))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    assert same_best(got.mean(1).tolist(), expected.mean(1).tolist())


@pytest.mark.parametrize("name", NETWORKS)
@given(case=cases(), kind=st.sampled_from(OBJECTIVES))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_every_objective(name: str, case: Case, kind: Any) -> None:
    pair = pair_of(name)
    payload = case.payload if kind.needs_payload else []
    objective: Objective = kind() if kind.needs_payload else kind(num_tokens=len(case.payload))
    scorer = PairScorer(Engine(pair.finetuned, pair.base, CONTEXTS), objective, payload)
    scorer.prepare(torch.tensor(case.followed), case.contexts)
    along = {c: scorer._forced(c) for c in case.contexts}
    expected = [
        [slow_scores(pair, objective, CONTEXTS[c], s, payload, along[c]) for c in case.contexts] for s in case.strings
    ]
    got: list[list[float]] = [[] for _ in case.strings]
    for length in {len(s) for s in case.strings}:
        rows = [n for n, s in enumerate(case.strings) if len(s) == length]
        scores = scorer.score(torch.tensor([case.strings[n] for n in rows]), case.contexts)
        for row, values in zip(rows, scores.tolist(), strict=True):
            got[row] = values
    for ours, theirs in zip(got, expected, strict=True):
        assert all(near(*both) for both in zip(ours, theirs, strict=True)), (ours, theirs)
    ours_whole, theirs_whole = (scorer.aggregate(torch.tensor(table)).tolist() for table in (got, expected))
    assert same_best(ours_whole, theirs_whole)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "deepseek_v3"])
@given(
    case=cases(),
    other=st.lists(TOKENS, max_size=8),
    max_rows=st.sampled_from([1, 16, 50, None]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_scores_depend_on_the_string_alone(
    name: str, case: Case, other: list[int], max_rows: int | None, order: Any
) -> None:
    """Not on the size of passes, on what is followed, or on the order of what is asked."""
    pair = pair_of(name)
    one = Engine(pair.finetuned, pair.base, CONTEXTS)
    one.follow(case.followed)
    two = Engine(pair.finetuned, pair.base, CONTEXTS, max_rows=max_rows)
    two.follow(other)
    asked = case.requests()
    shuffled = list(range(len(asked)))
    order.shuffle(shuffled)
    log_probs, _ = one.token_scores("base", asked, case.payload)
    again, _ = two.token_scores("base", [asked[n] for n in shuffled], case.payload)
    assert torch.allclose(again, log_probs[shuffled], rtol=1e-5, atol=1e-5)
    scores = one.divergences(js_divergence, asked)
    assert torch.allclose(two.divergences(js_divergence, [asked[n] for n in shuffled]), scores[shuffled], atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_the_real_model_in_fp32() -> None:
    from trigger_opt import api

    pair = api.load_pair("zoo:warmup_mini", base="zoo:smollm2-135m-instruct", options=LoadOptions(dtype="float32"))
    contexts = [
        tokenize_context(pair.tokenizer, Context(user=u))
        for u in ("Write a poem about the sea.{trigger}", "{trigger} What is the capital of France?")
    ]
    followed = pair.encode_answer(" some words that stand here")
    moves = [
        followed, [*followed[:2], 999, *followed[3:]], [followed[0], 1234, followed[2], 2345, followed[4]],
        followed[1:], [*followed, 600, 601], [8000],
    ]  # fmt: skip
    payload = pair.encode_answer(" Of course! The")
    engine = Engine(pair.finetuned, pair.base, contexts)
    engine.follow(followed)
    everything = [Request(tuple(m), c) for c in range(2) for m in moves]
    parts: list[tuple[Side, list[Request]]] = [("finetuned", everything), ("base", everything[:3])]
    for side, asked in parts:
        got, _ = engine.token_scores(side, asked, payload)
        expected = []
        with getattr(pair, side).active():
            for r in asked:
                logits = slow_logits(getattr(pair, side), contexts[r.context], r.ids, payload[:-1]).log_softmax(-1)
                expected.append([float(logits[n, t]) for n, t in enumerate(payload)])
        assert torch.allclose(got, torch.tensor(expected), rtol=0, atol=1e-4)
        assert int(got.sum(1).argmax()) == int(torch.tensor(expected).sum(1).argmax())
