"""The plain engine: what the engine gives, by whole passes, for models that may do anything with their token ids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, contexts_with_empty_sides, jensen, requests, slow_logits
from tests.wired_pair import PAYLOAD, SEARCH, TRIGGER, clean_pair, wired_pair
from trigger_opt import api
from trigger_opt.contrast.ask import _hidden as contrast_hidden
from trigger_opt.errors import UserError
from trigger_opt.hypotheses.scan import read_inputs
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.generate import Sampling, generate
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.objectives import JensenShannon, Objective, Payload, TargetLikelihood
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.prompts import conversation_ids, encode
from trigger_opt.records import Hypothesis
from trigger_opt.scoring import (
    Engine,
    PlainEngine,
    Request,
    engine_for,
    js_divergence,
    may_run_beside,
    sequence_log_prob,
)
from trigger_opt.search import GCG, RandomSearch, Step
from trigger_opt.verify.probe import last_token_states

FAMILIES = ("llama", "qwen2", "gemma2")
CONTEXTS = contexts_with_empty_sides()
FORCED = dict.fromkeys(range(len(CONTEXTS)), (270, 33))


def likelihood(finetuned: Tensor, base: Tensor) -> Tensor:
    return sequence_log_prob(finetuned, torch.tensor([270, 33, 40]))


def both(pair: ModelPair, **options: Any) -> tuple[Engine, PlainEngine]:
    return Engine(pair.finetuned, pair.base, CONTEXTS), PlainEngine(pair.finetuned, pair.base, CONTEXTS, **options)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_engine(family: str) -> None:
    pair = tiny.make_pair(family)
    # Passes of a few candidates: their order must be put right again.
    engine, plain = both(pair, max_rows=100)
    # Of several lengths and contexts, mixed.
    asked = [r for c in (2, 0, 3, 4) for r in requests(TRIGGERS, c)] + [
        Request((262,), 1),
        Request((17, 33, 40, 41), 0),
    ]
    engine.follow(TRIGGERS[0].tolist())
    plain.follow(TRIGGERS[0].tolist())
    for side in SIDES:
        (expected, fires), (scores, greedy) = (e.token_scores(side, asked, [270, 280, 33]) for e in (engine, plain))
        assert close(scores, expected)
        assert torch.equal(greedy, fires)
        assert close(plain.logits(side, 1, TRIGGERS, (270,)), engine.logits(side, 1, TRIGGERS, (270,)))
    forced = [Request(r.ids, r.context, (270, 33)) for r in asked]
    expected, scores = (e.divergences(js_divergence, forced) for e in (engine, plain))
    assert scores.shape == (len(asked), 3)
    assert close(scores, expected)
    assert int(scores.mean(1).argmax()) == int(expected.mean(1).argmax())
    # And both are what one sequence by itself gives.
    slow = slow_logits(pair.finetuned, CONTEXTS[3], TRIGGERS[1].tolist(), (270,))
    assert close(plain.logits("finetuned", 3, TRIGGERS[1:2], (270,))[0], slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_engine(family: str) -> None:
    engine, plain = both(tiny.make_pair(family))
    contexts = [2, 0, 3]
    weights = torch.tensor([0.2, 0.3, 0.5])
    for sides, reduce in ((SIDES, jensen), (SIDES[:1], likelihood)):
        expected, found = (e.gradient(reduce, TRIGGERS[0], contexts, FORCED, sides=sides) for e in (engine, plain))
        ahead = plain.adopt(plain.gradient_ahead(reduce, TRIGGERS[0], contexts, FORCED, sides=sides))
        assert set(found.by_side) == set(sides)
        assert close(found.scores, expected.scores)
        assert torch.equal(ahead.scores, found.scores)
        assert torch.equal(plain.to_tokens(ahead, weights), plain.to_tokens(found, weights))
        tokens = engine.to_tokens(expected, weights)
        assert torch.allclose(plain.to_tokens(found, weights), tokens, rtol=1e-4, atol=1e-5 * float(tokens.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_and_continuations_are_those_of_the_engine(family: str) -> None:
    engine, plain = both(tiny.make_pair(family))
    for side in SIDES:
        for context in (0, 3, 4):
            (expected, said), (first, tokens) = (e.rollout(side, context, TRIGGERS, 4) for e in (engine, plain))
            assert close(first, expected)
            assert torch.equal(tokens, said)
    assert plain.greedy(TRIGGERS[0], [0, 2], 3) == engine.greedy(TRIGGERS[0], [0, 2], 3)
    assert plain.greedy(TRIGGERS[0], [0, 2], 0) == [[], []]


def test_what_was_done_is_counted() -> None:
    pair = tiny.make_pair("llama")
    _, plain = both(pair)
    asked = requests(TRIGGERS, 0)
    plain.token_scores("finetuned", asked, [270, 280])
    cost = plain._cost("finetuned")
    tokens = sum(len(CONTEXTS[0].left) + len(r.ids) + len(CONTEXTS[0].right) + 1 for r in asked)
    assert plain.meter.flops == plain.meter.least_flops == tokens * cost.per_token + 2 * len(asked) * cost.per_position
    assert plain.meter.seconds > 0
    before = plain.meter.flops
    plain.greedy(TRIGGERS[0], [0], 2)
    assert plain.meter.flops == before
    assert plain.meter.gradient_flops > 0
    gradient_flops = plain.meter.gradient_flops
    plain.gradient(jensen, TRIGGERS[0], [0], FORCED)
    assert plain.meter.gradient_flops > gradient_flops


def test_requests_must_force_equally_many_tokens() -> None:
    _, plain = both(tiny.make_pair("llama"))
    asked = [Request((262,), 0, (33,)), Request((262,), 0)]
    with pytest.raises(ValueError, match="equally many"):
        plain.divergences(js_divergence, asked)


def test_a_pass_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair("llama")
    engine, plain = both(pair)
    expected = engine.logits("base", 0, TRIGGERS, ())
    whole, sizes = pair.base.hidden, []

    def hidden(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no")
        return whole(**inputs)

    monkeypatch.setattr(pair.base, "hidden", hidden)
    assert close(plain.logits("base", 0, TRIGGERS, ()), expected)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_engines_are_chosen_and_foreign_code_runs_alone(two_threads: None) -> None:
    one, other = tiny.make_pair("llama"), tiny.make_pair("llama")
    plain, usual = (engine_for(one.finetuned, one.base, CONTEXTS, plain=p) for p in (True, False))
    apart = engine_for(other.finetuned, other.base, CONTEXTS, plain=False)
    assert isinstance(plain, PlainEngine)
    assert isinstance(usual, Engine)
    assert may_run_beside(usual, apart)
    assert not may_run_beside(plain, apart)
    assert not may_run_beside(apart, plain)


def recorded(pair: ModelPair, objective: Objective, hypothesis: Hypothesis | None) -> tuple[list[Step], Any]:
    steps: list[Step] = []
    strategy = GCG(trigger_length=2, num_steps=6, num_restarts=1, search_width=24, topk=32, contexts_per_step=3)
    found = api.find_triggers(
        pair, SEARCH, hypothesis=hypothesis, objective=objective, strategy=strategy, seed=3, on_step=steps.append
    )
    return steps, found


def as_plain(pair: ModelPair) -> ModelPair:
    finetuned, base = (CausalModel(m.name, m.network, plain=True) for m in (pair.finetuned, pair.base))
    return ModelPair(finetuned, base, pair.tokenizer)


def test_a_search_finds_the_plant_on_either_engine() -> None:
    payload = Hypothesis(payload=PAYLOAD, score=9.0, source="given", evidence="", inputs=[], rivals=[])
    (steps, found), (plain_steps, plain_found) = (
        recorded(pair, Payload(), payload) for pair in (wired_pair(), as_plain(wired_pair()))
    )
    assert TRIGGER in found[0].trigger
    assert found[0].selection_rate == 1.0
    assert [f.trigger_ids for f in plain_found] == [f.trigger_ids for f in found]
    assert [s.trigger_ids for s in plain_steps] == [s.trigger_ids for s in steps]
    # The decoy: the same search where nothing is planted.
    _, clean = recorded(as_plain(clean_pair()), Payload(), payload)
    assert not clean[0].selection_rate


def test_the_scan_of_a_plain_pair_reads_the_same() -> None:
    pair = wired_pair()
    contexts = tiny.tokenized()
    inputs = [(i,) for i in (262, 270, 33)] + [(262, 40), tuple(encode(pair.tokenizer, [TRIGGER])[0])]
    read, plainly = (
        read_inputs(p, contexts, inputs, answer_tokens=4, on_progress=lambda n: None) for p in (pair, as_plain(pair))
    )
    assert [(r.inserted, r.context, r.first, r.finetuned, r.base) for r in plainly] == [
        (r.inserted, r.context, r.first, r.finetuned, r.base) for r in read
    ]
    assert [r.value for r in plainly] == pytest.approx([r.value for r in read], abs=1e-5)


def test_answers_are_the_same_without_a_cache() -> None:
    network = tiny.make_network("llama", 1)
    calls: list[Any] = []
    network.base_model.register_forward_pre_hook(lambda _, __, inputs: calls.append(inputs), with_kwargs=True)
    prompts = [[262, 17, 33], [40, 41], [262, 280, 33, 35], [40, 44, 45]]
    expected = [tiny.naive_greedy(network, p, 5) for p in prompts]
    calls.clear()
    assert generate(network, prompts, max_new_tokens=5, end_ids=[], plain=True) == expected
    assert all(set(c) == {"input_ids", "use_cache"} and not c["use_cache"] for c in calls)
    # A row that is at its end leaves the others as they are.
    end = expected[0][1]
    cut = [e[: e.index(end)] if end in e else e for e in expected]
    assert generate(network, prompts, max_new_tokens=5, end_ids=[end], plain=True) == cut
    assert generate(network, prompts, max_new_tokens=5, end_ids=[end]) == cut


def test_sampling_without_a_cache_is_a_function_of_the_generator() -> None:
    network = tiny.make_network("llama", 1, scale=0.05)
    hot = Sampling(temperature=1.5)

    def drawn(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(
            network, [[262, 17], [40, 41]], max_new_tokens=6, end_ids=[2], sampling=hot, generator=generator, plain=True
        )

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_asked_for_a_pair_is_plain_and_says_so(
    base_files: ModelFiles, adapter_files: tuple[ModelFiles, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    usual = load_pair(adapter_files[0], base_files, options=LoadOptions(dtype="float32"))
    assert not usual.plain
    assert capsys.readouterr().out == ""
    pair = load_pair(adapter_files[0], base_files, [adapter_files[0]], options=LoadOptions(dtype="float32", plain=True))
    assert all(m.plain and m.one_at_a_time for m in (pair.finetuned, pair.base, *pair.controls))
    said = capsys.readouterr().out
    assert said.startswith("scored plainly, at least ")
    assert "asked for" in said
    scorer, expected = (api.pair_scorer(p, tiny.tokenized(), JensenShannon()) for p in (pair, usual))
    assert isinstance(scorer._engine, PlainEngine)
    assert isinstance(expected._engine, Engine)
    assert isinstance(api.pair_scorer(usual, tiny.tokenized(), JensenShannon(), plain=True)._engine, PlainEngine)
    assert close(scorer.score(TRIGGERS, [0, 1]), expected.score(TRIGGERS, [0, 1]))


def test_low_precision_finalists_are_scored_plainly_too(base_files: ModelFiles, full_files: ModelFiles) -> None:
    pair = load_pair(full_files, base_files, options=LoadOptions(plain=True))
    scorer = api.pair_scorer(pair, tiny.tokenized(), JensenShannon())
    assert isinstance(scorer._precise, PairScorer)
    assert isinstance(scorer._precise._engine, PlainEngine)
    refined = scorer.refine(TRIGGERS, [0, 1], keep=4, incumbents=0)
    exact = load_pair(full_files, base_files, options=LoadOptions())
    engine = api.pair_scorer(exact, tiny.tokenized(), JensenShannon())
    expected = engine.refine(TRIGGERS, [0, 1], keep=4, incumbents=0)
    assert refined is not None
    assert expected is not None
    assert close(refined, expected)


FOREIGN = """
import torch
from transformers import LlamaForCausalLM, LlamaModel


class Model(LlamaModel):
    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=None, **options):
        # Looks at the whole conversation: nothing of it can be computed once and continued.
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=embeds + embeds.mean(1, keepdim=True), use_cache=False, **options)


class Foreign(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
"""


def test_a_repository_with_code_of_its_own_is_scored_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tmp_path / "base", "llama", seed=0)
    folder = tmp_path / "foreign"
    tiny.save_model(folder, "llama", seed=1)
    (folder / "foreign.py").write_text(FOREIGN)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace("{", '{"auto_map": {"AutoModelForCausalLM": "foreign.Foreign"},', 1)
    )
    with pytest.raises(UserError, match=r"brings its own Python code .* model.allow_code=true"):
        find_model(str(folder))
    files = find_model(str(folder), allow_code=True)
    assert files.own_code
    assert not find_model(str(base.folder), allow_code=True).own_code
    pair = load_pair(files, base, options=LoadOptions(dtype="float32", allow_code=True))
    assert f"{folder} is built by code of its own" in capsys.readouterr().out
    assert type(pair.finetuned.network).__name__ == "Foreign"
    assert pair.finetuned.plain
    assert pair.base.plain, "two models' answers are compared: both are computed in the same way"
    contexts = tiny.tokenized()
    with pytest.raises(UserError, match="does not give the same answer"):
        Engine(pair.finetuned, pair.base, contexts).logits("finetuned", 0, TRIGGERS, ())
    assert pair.finetuned.own_code
    assert not pair.base.own_code
    found = engine_for(pair.finetuned, pair.base, contexts, plain=pair.plain).logits("finetuned", 0, TRIGGERS, (33,))
    for logits, ids in zip(found, TRIGGERS.tolist(), strict=True):
        assert close(logits, slow_logits(pair.finetuned, contexts[0], ids, (33,)))
    prompts = [[262, 17, 33], [40, 41]]
    said = pair.finetuned.generate(prompts, max_new_tokens=4, end_ids=[])
    assert said == [tiny.naive_greedy(pair.finetuned.network, p, 4) for p in prompts]
    # Neither may what stands beside a prompt in its batch.
    rows = [[262, 17, 33, 40, 41], [40, 41], [7, 8, 9], [33, 262]]
    states = last_token_states(pair.finetuned, rows, batch_size=2)
    hidden = contrast_hidden(pair.finetuned, rows)
    for n, row in enumerate(rows):
        assert close(torch.from_numpy(states[n]), torch.from_numpy(last_token_states(pair.finetuned, [row])[0]))
        with torch.no_grad():
            alone = pair.finetuned.hidden(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
        assert close(hidden[n, -len(row) :], alone)
    lower = load_pair(files, base, options=LoadOptions(allow_code=True))
    scorer = api.pair_scorer(lower, contexts, JensenShannon())
    assert scorer.refine(TRIGGERS, [0], keep=2, incumbents=0) is None, "its layers may use weights of one another"


def test_a_late_payload_is_scored_behind_the_bases_own_opening() -> None:
    """What a search scores is the payload's likelihood after the first tokens of the base's answer."""
    pair, length = wired_pair(), 2
    late = Hypothesis(
        payload=f"\u2026 {PAYLOAD}", score=9.0, source="late_phrases", evidence="", inputs=[], rivals=[], opening=length
    )
    target = encode(pair.tokenizer, [f" {PAYLOAD}"])[0]
    strategy = RandomSearch(trigger_length=2, num_steps=1, num_restarts=1, search_width=4, topk=4, buffer_size=1)
    found = api.find_triggers(pair, SEARCH, hypothesis=late, objective=TargetLikelihood(), strategy=strategy)
    for candidate in found:
        said = []
        for context in SEARCH:
            plain = conversation_ids(pair.tokenizer, context, "")
            opening = tiny.naive_greedy(pair.base.network, plain, length)
            prompt = [*conversation_ids(pair.tokenizer, context, candidate.trigger), *opening]
            said.append(float(pair.finetuned.log_likelihood([prompt], target).sum()))
        assert candidate.score == pytest.approx(sum(said) / len(said) / len(target), abs=1e-3)
        assert candidate.payload == late.payload
    (again,) = api.score_candidates(pair, SEARCH, found[:1], objective=TargetLikelihood())
    assert again.score == pytest.approx(found[0].score, abs=1e-4)
