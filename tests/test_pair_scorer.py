"""A pair scorer: scores by the formula, what may be left out, what is remembered, and where a payload comes out."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests import tiny
from tests.slow_scores import SIDES, slow_scores
from trigger_opt.api import pair_scorer
from trigger_opt.objectives import JensenShannon, Objective, Payload, TargetLikelihood
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.scoring import AnyEngine, Engine, js_divergence

TRIGGERS = torch.tensor([[262, 301, 270], [280, 17, 389], [33, 34, 35]])


def make_scorer(objective: Objective, payload: list[int] | None = None, family: str = "qwen2") -> PairScorer:
    pair = tiny.make_pair(family)
    return PairScorer(Engine(pair.finetuned, pair.base, tiny.tokenized()), objective, payload or [])


def test_scores_have_a_column_for_each_context_in_the_order_asked_for() -> None:
    scorer = make_scorer(JensenShannon())
    assert scorer.num_contexts == 3
    scores = scorer.score(TRIGGERS, [2, 0])
    assert scores.shape == (3, 2)
    assert torch.equal(scores[:, 0], scorer.score(TRIGGERS, [2])[:, 0])
    assert torch.equal(scores[:, 1], scorer.score(TRIGGERS, [0])[:, 0])
    assert not torch.allclose(scores[:, 0], scores[:, 1])


def test_payload_score_equals_the_formula_on_whole_sequences() -> None:
    pair, payload = tiny.make_pair(), [270, 301, 16]
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized())
    scorer = PairScorer(engine, Payload(floor=-9.0), payload)
    context = tiny.tokenized()[0]
    for row, trigger in enumerate(TRIGGERS.tolist()):
        said = []
        for model in (pair.finetuned, pair.base):
            prompt = [*context.left, *trigger, *context.right]
            log_probs = tiny.naive_logits(model.network, [*prompt, *payload]).log_softmax(-1)
            said.append(sum(float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(payload)))
        expected = said[0] - max(said[1], -9)
        assert float(scorer.score(TRIGGERS, [0])[row, 0]) == pytest.approx(expected, abs=1e-4)


def test_a_divergence_over_several_tokens_is_taken_along_the_incumbents_continuation() -> None:
    pair = tiny.make_pair()
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized())
    scorer = PairScorer(engine, JensenShannon(num_tokens=4))
    scorer.prepare(TRIGGERS[0], [0, 1])
    context = tiny.tokenized()[1]
    along = tiny.naive_greedy(pair.finetuned.network, [*context.left, *TRIGGERS[0].tolist(), *context.right], 3)
    rival = [*context.left, *TRIGGERS[1].tolist(), *context.right, *along]
    finetuned, base = (tiny.naive_logits(m.network, rival)[-4:] for m in (pair.finetuned, pair.base))
    expected = float(js_divergence(finetuned, base).mean())
    assert float(scorer.score(TRIGGERS[1:2], [1])[0, 0]) == pytest.approx(expected, abs=1e-5)
    before = scorer.score(TRIGGERS[1:2], [1])
    scorer.prepare(TRIGGERS[2], [1])
    assert not torch.allclose(scorer.score(TRIGGERS[1:2], [1]), before)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3"])
def test_fires_exactly_where_greedy_generation_gives_the_payload(family: str) -> None:
    pair = tiny.make_pair(family)
    contexts = tiny.tokenized()
    trigger = TRIGGERS[0].tolist()
    prompts = [[*c.left, *trigger, *c.right] for c in contexts]
    answers = pair.finetuned.generate(prompts, max_new_tokens=4, end_ids=[])
    assert len({tuple(a) for a in answers}) > 1
    engine = Engine(pair.finetuned, pair.base, contexts)
    for payload in answers:
        fired = PairScorer(engine, Payload(), payload).fires(TRIGGERS[0], [0, 1, 2])
        assert fired is not None
        assert fired.tolist() == [a == payload for a in answers]
    wrong_end = [*answers[0][:-1], (answers[0][-1] + 1) % 390]
    fired = PairScorer(engine, Payload(), wrong_end).fires(TRIGGERS[0], [0])
    assert fired is not None
    assert not bool(fired[0])


def test_what_was_just_scored_is_known_to_fire_without_another_pass() -> None:
    pair, contexts = tiny.make_pair(), tiny.tokenized()
    payload = pair.finetuned.generate([[*contexts[1].left, *TRIGGERS[2].tolist(), *contexts[1].right]],
                                      max_new_tokens=2, end_ids=[])[0]  # fmt: skip
    scorer = PairScorer(Engine(pair.finetuned, pair.base, contexts), Payload(), payload)
    alone = [scorer.fires(t, [1]) for t in TRIGGERS]
    scorer.score(TRIGGERS, [0, 1])
    spent = scorer.evaluations
    again = [scorer.fires(t, [1]) for t in TRIGGERS]
    assert scorer.evaluations == spent
    assert [bool(a) for a in again] == [bool(a) for a in alone]
    assert bool(again[2])
    assert scorer.fires(TRIGGERS[2], [2]) is not None
    assert scorer.evaluations > spent


def test_a_divergence_never_fires() -> None:
    assert make_scorer(JensenShannon()).fires(TRIGGERS[0], [0]) is None


def calls_of(engine: AnyEngine, name: str) -> list[tuple[Any, ...]]:
    """Arguments of every call of one of the engine's methods from now on."""
    made: list[tuple[Any, ...]] = []
    plain: Callable[..., Any] = getattr(engine, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        return plain(*arguments, **options)

    setattr(engine, name, counted)
    return made


def test_known_are_the_strings_scored_in_exactly_these_contexts() -> None:
    scorer = make_scorer(Payload(), [270, 301])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [False] * 3
    scorer.score(TRIGGERS[:2], [0, 1])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [True, True, False]
    assert scorer.known(TRIGGERS, [0]).tolist() == [False] * 3
    assert scorer.known(TRIGGERS, [0, 1, 2]).tolist() == [False] * 3
    assert scorer.known(TRIGGERS[:0], [0, 1]).shape == (0,)
    # A string that was left out is known too: it cannot come back into the race.
    scorer.score(TRIGGERS[[0, 2]], [0, 1], keep=1, incumbents=1)
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [True] * 3
    scorer.score(TRIGGERS[:1], [2])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [False] * 3


@pytest.mark.parametrize("objective", [Payload(), JensenShannon()], ids=["payload", "js"])
def test_what_lost_against_one_incumbent_may_beat_another(objective: Objective) -> None:
    scorer = make_scorer(objective, [270, 301] if objective.needs_payload else [])
    scorer.prepare(TRIGGERS[0], [0, 1])
    scorer.score(TRIGGERS, [0, 1])
    scorer.prepare(TRIGGERS[0], [0, 1])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [True] * 3
    scorer.prepare(TRIGGERS[1], [0, 1])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [False] * 3
    # Its score is remembered all the same: nothing is forced here, so nothing has changed.
    spent = scorer.evaluations
    scorer.score(TRIGGERS, [0, 1])
    assert scorer.evaluations == spent
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [True] * 3


def test_for_a_divergence_known_is_along_the_same_continuation() -> None:
    scorer = make_scorer(JensenShannon(num_tokens=3))
    scorer.prepare(TRIGGERS[0], [0, 1])
    scorer.score(TRIGGERS, [0, 1])
    scorer.prepare(TRIGGERS[0], [0, 1])
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [True] * 3
    before = dict(scorer._continuations)
    scorer.prepare(TRIGGERS[1], [0, 1])
    assert scorer._continuations != before
    assert scorer.known(TRIGGERS, [0, 1]).tolist() == [False] * 3
    spent = scorer.evaluations
    scorer.score(TRIGGERS, [0, 1])
    assert scorer.evaluations == spent + 6


@pytest.mark.parametrize("objective", [Payload(), JensenShannon(num_tokens=2)], ids=["payload", "js"])
def test_the_gradient_of_an_unchanged_trigger_is_computed_once(objective: Objective) -> None:
    scorer = make_scorer(objective, [270, 301] if objective.needs_payload else [])
    calls = calls_of(scorer._engine, "gradient")
    scorer.prepare(TRIGGERS[0], [0, 1])
    first = scorer.token_gradient(TRIGGERS[0], [0, 1])
    scorer.score(TRIGGERS, [0, 1])
    scorer.prepare(TRIGGERS[0], [0, 1])
    assert torch.equal(scorer.token_gradient(TRIGGERS[0], [0, 1]), first)
    assert len(calls) == 1
    assert not torch.allclose(scorer.token_gradient(TRIGGERS[0], [0]), first)
    scorer.prepare(TRIGGERS[1], [0, 1])
    assert not torch.allclose(scorer.token_gradient(TRIGGERS[1], [0, 1]), first)
    assert len(calls) == 3
    if not objective.needs_payload:
        # The same trigger along another continuation is another gradient.
        along = scorer.token_gradient(TRIGGERS[0], [0, 1])
        scorer.prepare(TRIGGERS[0], [0, 1])
        assert not torch.allclose(scorer.token_gradient(TRIGGERS[0], [0, 1]), along)
        assert len(calls) == 5


def test_an_objective_without_a_base_asks_nothing_of_it() -> None:
    scorer = make_scorer(TargetLikelihood(), [270, 301])
    scores, gradients = (calls_of(scorer._engine, n) for n in ("token_scores", "gradient"))
    scorer.score(TRIGGERS, [0, 1, 2])
    scorer.fires(TRIGGERS[0], [0, 1])
    scorer.token_gradient(TRIGGERS[0], [0])
    assert {c[0] for c in scores} == {"finetuned"}
    assert list(scorer._slopes[1].by_side) == ["finetuned"] if scorer._slopes else False
    assert len(gradients) == 1


def test_without_a_higher_precision_there_is_nothing_to_refine() -> None:
    scorer = make_scorer(Payload(), [270])
    assert scorer.refine(TRIGGERS, [0], keep=1, incumbents=1) is None
    assert scorer.precise_meter.evaluations == 0


@pytest.mark.parametrize("objective", [Payload(), JensenShannon(num_tokens=3)], ids=["payload", "js"])
def test_refined_scores_are_those_of_the_precise_scorer_along_the_same_continuation(objective: Objective) -> None:
    payload = [270, 301] if objective.needs_payload else []
    fast, exact = (tiny.make_pair(family) for family in ("qwen2", "llama"))
    contexts = tiny.tokenized()
    precise = PairScorer(Engine(exact.finetuned, exact.base, contexts), objective, payload)
    scorer = PairScorer(Engine(fast.finetuned, fast.base, contexts), objective, payload, precise=precise)
    scorer.prepare(TRIGGERS[0], [0, 2])
    refined = scorer.refine(TRIGGERS, [0, 2], keep=3, incumbents=0)
    assert refined is not None
    along = {c: scorer._forced(c) for c in (0, 2)}
    for row, ids in enumerate(TRIGGERS.tolist()):
        for column, context in enumerate((0, 2)):
            expected = slow_scores(exact, objective, contexts[context], ids, payload, along[context])
            assert float(refined[row, column]) == pytest.approx(expected, abs=1e-4)
    # The search's own scores and budget are the fast ones'.
    assert not torch.allclose(scorer.score(TRIGGERS, [0, 2]), refined, atol=1e-2)
    assert scorer.evaluations == scorer.meter.evaluations == 6
    assert scorer.precise_meter.evaluations == 6
    again = scorer.refine(TRIGGERS, [0, 2], keep=3, incumbents=0)
    assert again is not None
    assert torch.equal(again, refined)
    assert scorer.precise_meter.evaluations == 6


def test_a_pair_in_lower_precision_is_refined_in_fp32() -> None:
    pair = tiny.make_pair()
    for model in (pair.finetuned, pair.base):
        model.network.bfloat16()
    wide = tiny.make_pair()
    for model in (wide.finetuned, wide.base):
        model.network.bfloat16().float()
    contexts, payload = tiny.tokenized(), [270, 301]
    scorer = pair_scorer(pair, contexts, Payload(), payload)
    refined = scorer.refine(TRIGGERS, [0, 1], keep=3, incumbents=1)
    assert refined is not None
    exact = pair_scorer(wide, contexts, Payload(), payload)
    assert torch.allclose(refined, exact.score(TRIGGERS, [0, 1]), rtol=1e-5, atol=1e-5)
    rounded = scorer.score(TRIGGERS, [0, 1])
    assert not torch.allclose(refined, rounded, atol=1e-4)
    assert torch.allclose(refined, rounded, atol=1.0)
    assert exact.refine(TRIGGERS, [0, 1], keep=3, incumbents=1) is None
    alone = pair_scorer(pair, contexts, Payload(), payload, precise=False)
    assert alone.refine(TRIGGERS, [0, 1], keep=3, incumbents=1) is None


def test_a_refinement_without_memory_is_given_up_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = tiny.make_pair()
    contexts = tiny.tokenized()
    scorers = [PairScorer(Engine(pair.finetuned, pair.base, contexts), Payload(), [270]) for _ in range(2)]
    scorer = PairScorer(Engine(pair.finetuned, pair.base, contexts), Payload(), [270], precise=scorers[0])

    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorers[0], "score", fail)
    assert scorer.refine(TRIGGERS, [0], keep=1, incumbents=1) is None
    said = capsys.readouterr().out
    assert "fp32" in said
    assert scorer.refine(TRIGGERS, [0], keep=1, incumbents=1) is None
    assert capsys.readouterr().out == ""
    assert torch.allclose(scorer.score(TRIGGERS, [0]), scorers[1].score(TRIGGERS, [0]), atol=1e-5)

    def break_(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(scorers[1], "score", break_)
    broken = PairScorer(Engine(pair.finetuned, pair.base, contexts), Payload(), [270], precise=scorers[1])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        broken.refine(TRIGGERS, [0], keep=1, incumbents=1)


@pytest.mark.parametrize("objective", [Payload(), JensenShannon()], ids=["soft minimum", "mean"])
def test_what_is_no_number_is_never_the_best(objective: Objective) -> None:
    scorer = make_scorer(objective, [270] if objective.needs_payload else [])
    scores = torch.tensor([[1.0, 2.0], [torch.nan, 5.0], [0.5, -torch.inf]])
    joined = scorer.aggregate(scores)
    assert joined[1:].tolist() == [-torch.inf] * 2
    assert float(joined[0]) > 0


def test_a_clock_for_the_search() -> None:
    scorer = make_scorer(Payload(), [270])
    first = scorer.seconds()
    assert 0 <= scorer.seconds() - first < 60


def lower_scorer(objective: Objective, target: Sequence[int]) -> PairScorer:
    """A pair in bf16 with its fp32 scorer, both as a search gets them."""
    pair = tiny.make_pair()
    for side in SIDES:
        getattr(pair, side).network.to(torch.bfloat16)
    return pair_scorer(pair, tiny.tokenized(), objective, target)


AHEAD: list[tuple[Objective, list[int]]] = [(Payload(), [270, 301]), (TargetLikelihood(), [270, 301, 16])]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("objective", "target"), AHEAD, ids=[o.name for o, _ in AHEAD])
def test_a_gradient_made_ahead_is_the_one_asked_for(objective: Objective, target: list[int]) -> None:
    direct, scorer = lower_scorer(objective, target), lower_scorer(objective, target)
    expected, scores = direct.token_gradient(TRIGGERS[1], [0, 2]), direct.refine(TRIGGERS, [0, 1], keep=3, incumbents=1)
    now, ahead = (calls_of(scorer._engine, n) for n in ("gradient", "gradient_ahead"))
    scorer.token_gradient(TRIGGERS[0], [0, 1])
    refined = scorer.refine(TRIGGERS, [0, 1], keep=3, incumbents=1, ahead=(TRIGGERS[1], [0, 2]))
    assert scores is not None
    assert refined is not None
    assert torch.equal(refined, scores)
    assert len(now) == 1
    assert len(ahead) == 2
    assert isinstance(scorer._engine, Engine)
    assert isinstance(direct._engine, Engine)
    # Until it is asked for, the old incumbent is followed.
    assert scorer._engine._followed == tuple(TRIGGERS[0].tolist())
    scorer.prepare(TRIGGERS[1], [0, 2])
    assert torch.equal(scorer.token_gradient(TRIGGERS[1], [0, 2]), expected)
    assert len(now) == 1
    assert set(scorer._engine._trunks) == set(direct._engine._trunks)
    assert torch.equal(scorer.score(TRIGGERS, [0, 2]), direct.score(TRIGGERS, [0, 2]))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("other", [(TRIGGERS[2], [0, 2]), (TRIGGERS[1], [0, 1])], ids=["trigger", "contexts"])
def test_a_gradient_made_ahead_in_vain_is_not_taken(other: tuple[torch.Tensor, list[int]]) -> None:
    direct, scorer = (lower_scorer(Payload(), [270, 301]) for _ in range(2))
    scorer.token_gradient(TRIGGERS[0], [0, 1])
    scorer.refine(TRIGGERS, [0, 1], keep=3, incumbents=1, ahead=(TRIGGERS[1], [0, 2]))
    scorer.prepare(*other)
    assert torch.equal(scorer.token_gradient(*other), direct.token_gradient(*other))


@pytest.mark.usefixtures("two_threads")
def test_nothing_is_made_ahead_that_nobody_asks_for() -> None:
    # A search without gradients; a continuation that is not known yet.
    without, divergence = lower_scorer(Payload(), [270, 301]), lower_scorer(JensenShannon(num_tokens=2), [])
    divergence.prepare(TRIGGERS[0], [0])
    divergence.token_gradient(TRIGGERS[0], [0])
    for scorer in (without, divergence):
        ahead = calls_of(scorer._engine, "gradient_ahead")
        assert scorer.refine(TRIGGERS, [0], keep=3, incumbents=1, ahead=(TRIGGERS[1], [0])) is not None
        assert not ahead
