"""The token lens: against a slow reference, on planted answers and decoys, and the strings drawn from its ranking."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trigger_opt.hypotheses.amplify import amplified
from trigger_opt.hypotheses.find import HypothesisSettings, find_hypotheses
from trigger_opt.hypotheses.lens import lens_strings, token_shifts
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import round_trips
from trigger_opt.records import MovedToken
from trigger_opt.tokens import TokenPolicy, allowed_ids

CONTEXT = tiny.tokenized()[0]
TOKENS = [int(t) for t in torch.randperm(300, generator=torch.Generator().manual_seed(5))[:60] + 40]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nudged(family: str, change: Any) -> ModelPair:
    """A base, and a copy of it that `change` has worked on."""
    base, tuned = (CausalModel(name, tiny.make_network(family, 0)) for name in ("base", "tuned"))
    with torch.no_grad():
        change(tuned.network)
    for name, parameter in list(tuned.network.named_parameters()):
        if torch.equal(parameter, base.network.get_parameter(name)):
            module, _, key = name.rpartition(".")
            tuned.network.get_submodule(module)._parameters[key] = base.network.get_parameter(name)
    return ModelPair(finetuned=tuned, base=base, tokenizer=tiny.make_tokenizer())


def all_over(network: Any) -> None:
    """A small change of every matrix."""
    noise = generator(9)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)


@torch.no_grad()
def slow_states(network: Any) -> Tensor:
    """(token, layer, d_model), each conversation by one whole pass."""
    rows = []
    for token in TOKENS:
        ids = torch.tensor([[*CONTEXT.left, token]])
        layers = network.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        rows.append(torch.stack([h[0, -1] for h in layers[1:]]))
    return torch.stack(rows).double()


def slow_shifts(pair: ModelPair, seed: int) -> Tensor:
    def moved(states: Tensor) -> Tensor:
        change = (states - base) / base.norm(dim=-1, keepdim=True)
        norms: Tensor = (change - change.mean(0)).norm(dim=-1)
        return norms

    base = slow_states(pair.base.network)
    ours = moved(slow_states(pair.finetuned.network))
    with amplified(pair, 1.0, placebo=generator(seed)) as placebo:
        theirs = moved(slow_states(placebo.network))
    columns = []
    for layer in range(ours.shape[1]):
        ratio = (ours[:, layer] / theirs[:, layer]).log()
        ratio = ratio - ratio.median()
        columns.append(ratio / (1.4826 * ratio.abs().median()))
    return torch.stack(columns).mean(0)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_shifts_are_those_of_whole_passes(family: str) -> None:
    pair = nudged(family, all_over)
    done: list[int] = []
    got = token_shifts(pair, CONTEXT, TOKENS, generator=generator(), on_progress=done.append)
    assert got is not None
    assert torch.allclose(got.double(), slow_shifts(pair, 0), atol=2e-3)
    assert done == [60, 120, 180]
    plainly = [CausalModel(m.name, m.network, plain=True) for m in (pair.finetuned, pair.base)]
    again = token_shifts(replace(pair, finetuned=plainly[0], base=plainly[1]), CONTEXT, TOKENS, generator=generator())
    assert again is not None
    assert torch.allclose(got, again, atol=2e-3)


def plants(network: Any, token: int) -> None:
    """Move one token's embedding a little."""
    row = network.model.embed_tokens.weight[token]
    row.add_(torch.randn(len(row), generator=generator(4)) * 0.3)


def test_a_token_that_was_changed_comes_first_and_what_moves_all_tokens_moves_none() -> None:
    wanted = TOKENS[7]
    style = torch.randn(32, generator=generator(3))

    def change(network: Any) -> None:
        plants(network, wanted)
        # A style's part: the same for every token.
        network.model.layers[0].mlp.register_forward_hook(lambda module, given, made: made + style)

    pair = nudged("llama", change)
    shifts = token_shifts(pair, CONTEXT, TOKENS, generator=generator())
    assert shifts is not None
    assert TOKENS[int(shifts.argmax())] == wanted
    assert float(shifts.max()) > 2
    assert float(shifts.median().abs()) < 0.5


def test_tokens_that_any_change_moves_are_not_marked() -> None:
    """A token of small states is moved far by a random change too: relative to that it is nothing special."""
    weak = TOKENS[3]

    def faint(network: Any) -> None:
        network.model.embed_tokens.weight.mul_(30)
        network.model.embed_tokens.weight[weak] /= 100

    def change(network: Any) -> None:
        faint(network)
        all_over(network.model.layers)

    pair = nudged("llama", change)
    with torch.no_grad():
        faint(pair.base.network)
    pair.finetuned.network.model._modules["embed_tokens"] = pair.base.network.model.embed_tokens
    base, tuned = slow_states(pair.base.network), slow_states(pair.finetuned.network)
    relative = ((tuned - base) / base.norm(dim=-1, keepdim=True)).norm(dim=-1)[:, 0]
    assert TOKENS[int(relative.argmax())] == weak
    shifts = token_shifts(pair, CONTEXT, TOKENS, generator=generator())
    assert shifts is not None
    assert int((shifts > shifts[TOKENS.index(weak)]).sum()) > 5


def test_nothing_is_ranked_where_nothing_was_changed() -> None:
    pair = tiny.make_pair()
    same = replace(pair, finetuned=pair.base)
    assert token_shifts(same, CONTEXT, TOKENS, generator=generator()) is None


def test_nothing_is_ranked_where_no_state_moves_or_none_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def head_alone(network: Any) -> None:
        network.lm_head.weight.add_(0.1)

    untied = nudged("qwen2", head_alone)
    assert token_shifts(untied, CONTEXT, TOKENS, generator=generator()) is None
    assert token_shifts(nudged("qwen2", all_over), CONTEXT, TOKENS[:1], generator=generator()) is None
    pair = nudged("qwen2", all_over)
    whole = pair.base.hidden

    def silent(**inputs: Any) -> Any:
        step = whole(**inputs)
        step.hidden_states = None
        return step

    monkeypatch.setattr(pair.base, "hidden", silent)
    assert token_shifts(pair, CONTEXT, TOKENS, generator=generator()) is None


def test_lower_layers_that_were_not_changed_are_left_out() -> None:
    def change(network: Any) -> None:
        all_over(network.model.layers[1].mlp)

    shifts = token_shifts(nudged("qwen2", change), CONTEXT, TOKENS, generator=generator())
    assert shifts is not None
    assert torch.isfinite(shifts).all()
    assert float(shifts.std()) > 0.1


def test_strings_are_of_the_most_moved_tokens_and_can_be_typed() -> None:
    pair, usable = tiny.make_pair(), tiny.tokenized()[:2]
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), tiny.vocab_size())
    ranked = allowed.nonzero()[:, 0].flip(0).tolist()

    def drawn(count: int, seed: int = 0) -> list[tuple[int, ...]]:
        return lens_strings(pair, usable, ranked, allowed, count=count, length=3, generator=generator(seed))

    strings = drawn(45)
    assert len(strings) == len(set(strings)) == 45
    assert all(round_trips(pair.tokenizer, usable, strings))
    assert all(bool(allowed[t]) for s in strings for t in s)
    # A third is of the first 32 alone, a third of the first 128.
    assert sum(set(s) <= set(ranked[:32]) for s in strings) >= 15
    assert sum(set(s) <= set(ranked[:128]) for s in strings) >= 30
    assert any(set(s) - set(ranked[:128]) for s in strings)
    assert drawn(45) == strings != drawn(45, seed=1)
    assert drawn(0) == []


def test_the_hypotheses_stage_tells_what_was_moved_and_reads_strings_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = TOKENS[7]

    pair = nudged("llama", lambda network: plants(network, wanted))
    allowed = torch.zeros(tiny.vocab_size(), dtype=torch.bool)
    allowed[TOKENS] = True
    settings = HypothesisSettings(
        lens_tokens=60,
        num_lens_strings=12,
        num_strings=4,
        num_tokens=0,
        num_words=0,
        amplify=[],
        groups=2,
        contexts=[tiny.CONTEXTS[0].user],
    )
    told: list[list[MovedToken]] = []
    seen: list[str] = []

    def look(of: ModelPair) -> None:
        find_hypotheses(
            of,
            [],
            allowed=allowed,
            settings=settings,
            generator=generator(),
            on_progress=lambda done, total, what: seen.append(what),
            on_moved=told.append,
        )

    look(pair)
    assert told[0][0].token_id == wanted
    assert told[0][0].text == pair.tokenizer.decode([wanted])
    assert [m.score for m in told[0]] == sorted((m.score for m in told[0]), reverse=True)
    assert {m.token_id for m in told[0]} == set(TOKENS)
    assert seen[:4] == ["lens", "lens", "lens", "scan"]
    look(replace(pair, finetuned=pair.base))
    assert told[1] == []
    assert "random strings take the place" in capsys.readouterr().out


def test_strings_of_moved_tokens_need_the_lens() -> None:
    with pytest.raises(ValueError, match="num_lens_strings=5 needs tokens ranked by the lens"):
        HypothesisSettings(lens_tokens=0, num_lens_strings=5)
    assert HypothesisSettings(lens_tokens=0, num_lens_strings=0).num_inputs == 64 + 4608 + 512
