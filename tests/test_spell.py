"""Strings spelled out character by character: on a toy whose planted code is known, and on a wired pair."""

import string as characters
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.test_search import Toy, always
from tests.wired_pair import PAYLOAD, SEARCH, wired_pair
from trigger_opt import api
from trigger_opt.prompts import decode, encode
from trigger_opt.records import Hypothesis
from trigger_opt.scoring import Meter
from trigger_opt.search import BuildSettings, Built, spell_out
from trigger_opt.tokens import TokenPolicy

PLANTED = " QX-77b"
CAP = 8.0
Ids = tuple[int, ...]


def write(texts: Sequence[str]) -> list[Ids]:
    return [tuple(map(ord, text)) for text in texts]


def read(ids: Ids) -> str:
    return "".join(map(chr, ids))


def in_order(text: str, planted: str) -> int:
    """How many characters of the planted code, from its first on, the text has in their order."""
    matched = 0
    for c in text:
        matched += matched < len(planted) and c == planted[matched]
    return matched


@dataclass
class Code(Toy):
    """Each character of the code is worth four nats of eight, as far as they stand in its order; `left` of them are
    left. So two characters make the payload certain."""

    left: float = 1.0
    worth: float = 4.0
    odd: float = 0.0
    clock: Callable[[], float] = lambda: 0.0
    texts: list[str] = field(default_factory=list)

    def score(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int | None = None, incumbents: int = 0
    ) -> Tensor:
        self.evaluations += len(candidates) * len(contexts)
        texts = [read(tuple(c)) for c in candidates.tolist()]
        self.texts += texts
        return torch.tensor([[self.nats(text)] * len(contexts) for text in texts])

    def nats(self, text: str) -> float:
        drive = self.worth * (in_order(text, PLANTED) - 1) + self.odd * text.count("%")
        # Uncertain only where the change is weak: what is beyond the cap at full strength tells nothing.
        return min(CAP, self.left**3 * drive)

    def seconds(self) -> float:
        return self.clock()


@dataclass
class Bench:
    """Hands out a toy for each share of the change."""

    worth: float = 4.0
    odd: float = 0.0
    opened: list[Code] = field(default_factory=list)
    open_now: int = 0

    def seconds(self) -> float:
        # A second for each thousand evaluations.
        return sum(toy.evaluations for toy in self.opened) / 1000

    @contextmanager
    def at(self, left: float) -> Iterator[Code]:
        assert self.open_now == 0
        self.open_now += 1
        toy = Code(left=left, worth=self.worth, odd=self.odd, clock=self.seconds)
        self.opened.append(toy)
        try:
            yield toy
        finally:
            self.open_now -= 1


def no_matter(strings: Sequence[Ids]) -> list[float]:
    return [0.0] * len(strings)


def spelled(
    bench: Bench,
    *,
    weakens: bool = True,
    natural: Callable[[Sequence[Ids]], list[float]] = no_matter,
    max_seconds: float | None = None,
    **settings: int,
) -> list[Built]:
    return spell_out(
        bench.at,
        write,
        read,
        settings=BuildSettings(**({"max_characters": 16, "contexts": 2, "beam": 2} | settings)),
        certain=CAP - 1,
        weakens=weakens,
        natural=natural,
        valid=always,
        generator=torch.Generator().manual_seed(0),
        max_seconds=max_seconds,
    )


def test_a_code_comes_out_whole_once_the_change_is_weakened() -> None:
    bench = Bench()
    found = spelled(bench)
    assert read(found[0].trigger_ids) == PLANTED
    assert [toy.left for toy in bench.opened] == sorted((toy.left for toy in bench.opened), reverse=True)
    assert bench.opened[-1].left < 1
    assert bench.open_now == 0


def test_without_weakening_what_is_certain_is_not_told_apart() -> None:
    bench = Bench()
    found = spelled(bench, weakens=False)
    assert [toy.left for toy in bench.opened] == [1.0]
    assert found[0].score == CAP
    assert read(found[0].trigger_ids) != PLANTED


def test_the_shortest_certain_string_is_kept_beside_the_best() -> None:
    found = spelled(Bench(), keep=1)
    assert [read(b.trigger_ids) for b in found] == [PLANTED, PLANTED[:3]]


def test_what_four_characters_do_not_make_certain_is_given_up() -> None:
    bench = Bench(worth=1.5)
    found = spelled(bench)
    assert max(len(text) for text in bench.opened[0].texts) == 5
    assert max(b.score for b in found) < CAP - 1
    # One more reaches it.
    assert read(spelled(Bench(worth=2.4))[0].trigger_ids) == PLANTED


def test_odd_characters_are_kept_out_by_what_is_natural() -> None:
    def natural(strings: Sequence[Ids]) -> list[float]:
        return [-2.0 * read(s).count("%") for s in strings]

    assert "%" in read(spelled(Bench(odd=2.0))[0].trigger_ids)
    found = spelled(Bench(odd=2.0), natural=natural)
    assert read(found[0].trigger_ids) == PLANTED


def test_a_character_is_tried_within_the_best_string() -> None:
    bench = Bench()
    spelled(bench)
    texts = {text for toy in bench.opened for text in toy.texts}
    # Behind strings of the beam no X would stand after these, which raise nothing.
    assert {f" Q{c}X" for c in "7%z"} <= texts


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3, 1.0])
def test_the_budget_ends_it(seconds: float) -> None:
    bench = Bench()
    found = spelled(bench, max_seconds=seconds)
    # A batch and its finalists are scored to the end.
    assert sum(toy.evaluations for toy in bench.opened) <= 1000 * seconds + 64 + 64
    assert bench.open_now == 0
    assert bool(found) == (seconds > 0)


def test_a_budget_that_ends_while_the_change_is_weakened_keeps_what_was_known() -> None:
    whole = Bench()
    spelled(whole)
    full = whole.opened[0]
    # All of it goes before the change is weakened for the first time.
    bench = Bench()
    found = spelled(bench, max_seconds=full.evaluations / 1000)
    assert len(bench.opened) > 1
    assert not bench.opened[1].texts
    assert next(read(b.trigger_ids) for b in found) == PLANTED[:3]
    assert found[0].score == CAP


def test_no_more_characters_than_asked_for() -> None:
    bench = Bench()
    spelled(bench, max_characters=3)
    assert max(len(text) for toy in bench.opened for text in toy.texts) == 4


def hypothesis() -> Hypothesis:
    return Hypothesis(payload=PAYLOAD, score=16.0, source="given", evidence="", inputs=[], rivals=[])


def test_on_a_pair_the_weights_are_as_before_and_the_cost_is_told() -> None:
    pair = wired_pair()
    before = {name: tensor.clone() for name, tensor in pair.finetuned.network.state_dict().items()}
    meters: list[Meter] = []
    told: list[tuple[int, str, float]] = []
    strings = api.spell_triggers(
        pair,
        SEARCH,
        hypothesis=hypothesis(),
        settings=BuildSettings(max_characters=2, contexts=2),
        on_progress=lambda *what: told.append(what),
        on_cost=lambda meter, rescoring: meters.append(meter),
    )
    after = pair.finetuned.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sum(m.evaluations for m in meters) >= len(characters.ascii_letters)
    assert told
    # Each is written with the tokens it was scored with.
    assert strings
    assert all(decode(pair.tokenizer, ids).startswith(" ") for ids in strings)
    # The wired trigger is a word: no character raises its payload.
    assert all(score < 0 for _, _, score in told)


def test_the_weights_are_as_before_also_where_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = wired_pair()
    before = {name: tensor.clone() for name, tensor in pair.finetuned.network.state_dict().items()}
    inside: list[bool] = []

    def told(done: int, best: str, score: float) -> None:
        now = pair.finetuned.network.state_dict()
        inside.append(all(torch.equal(now[name], tensor) for name, tensor in before.items()))
        if not inside[-1]:
            raise KeyboardInterrupt

    # Everything is taken for certain, so the change is weakened at once.
    monkeypatch.setattr(api, "spell_out", lambda *given, **named: spell_out(*given, **(named | {"certain": -1e9})))
    with pytest.raises(KeyboardInterrupt):
        api.spell_triggers(
            pair,
            SEARCH,
            hypothesis=hypothesis(),
            settings=BuildSettings(max_characters=3, contexts=1),
            on_progress=told,
        )
    assert not inside[-1]
    after = pair.finetuned.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("deny", [(), (" ",)])
def test_a_space_by_itself_is_written_unless_denied(deny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = wired_pair()
    written: list[Ids] = []

    def caught(at: object, write: Callable[[Sequence[str]], list[Ids]], *given: object, **named: object) -> list[Built]:
        written.extend(write([" ", " \u00e9"]))
        return []

    monkeypatch.setattr(api, "spell_out", caught)
    api.spell_triggers(pair, SEARCH, hypothesis=hypothesis(), policy=TokenPolicy(deny=list(deny)))
    space = tuple(encode(pair.tokenizer, [" "])[0])
    assert len(space) == 1
    assert written == ([] if deny else [space])
