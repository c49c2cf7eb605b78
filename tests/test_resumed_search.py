"""A search that goes on from any of its states ends as one that nobody interrupted: strings, scores, steps, costs."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch

from tests import tiny
from trigger_opt import api
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import JensenShannon, KullbackLeibler, Objective, Payload
from trigger_opt.records import Candidate, Hypothesis
from trigger_opt.scoring import Meter
from trigger_opt.search import GCG, RandomSearch, SearchState, Step

HYPOTHESIS = Hypothesis(
    payload=" the river", score=0.0, source="given", evidence="", inputs=[" fox dog", " sea sky please"], rivals=[]
)
SHARED: dict[str, Any] = {
    "trigger_length": 3, "num_steps": 3, "num_restarts": 2, "search_width": 8, "topk": 8, "contexts_per_step": 2,
    "check_every": 2, "stop_rate": 2.0,
}  # fmt: skip


@dataclass
class Told:
    """All that a search told, but for times."""

    found: list[Candidate]
    steps: list[Step]
    early: list[Candidate]
    meters: list[dict[str, Any]]


def search(
    pair: ModelPair,
    objective: Objective,
    strategy: api.Strategy,
    *,
    on_state: Callable[[Callable[[], SearchState]], None] = lambda make: None,
    resume: SearchState | None = None,
) -> Told:
    told = Told([], [], [], [])

    def costs(meter: Meter, rescoring: Meter) -> None:
        told.meters += [asdict(replace(m, seconds=0.0)) for m in (meter, rescoring)]

    told.found = api.find_triggers(
        pair,
        tiny.CONTEXTS,
        hypothesis=HYPOTHESIS if objective.needs_payload else None,
        objective=objective,
        strategy=strategy,
        seed=3,
        on_step=lambda s: told.steps.append(replace(s, seconds=0.0)),
        on_found=told.early.append,
        on_cost=costs,
        on_state=on_state,
        resume=resume,
    )
    return told


def through_a_file(state: SearchState) -> SearchState:
    file = io.BytesIO()
    torch.save(state.plain(), file)
    file.seek(0)
    return SearchState.from_plain(torch.load(file, weights_only=True))


def make_pair(dtype: torch.dtype = torch.float32, *, family: str = "qwen2", plain: bool = False) -> ModelPair:
    pair = tiny.make_pair(family)
    for model in (pair.finetuned, pair.base):
        model.network.to(dtype)
        model.plain = plain
    return pair


CASES = [
    ("payload", Payload(), GCG(**SHARED), {}),
    ("payload in bf16, rescored", Payload(), GCG(**SHARED), {"dtype": torch.bfloat16}),
    ("divergence along a continuation", JensenShannon(num_tokens=3), GCG(**SHARED), {"dtype": torch.bfloat16}),
    ("unbounded divergence", KullbackLeibler(), GCG(**SHARED), {}),
    ("random", Payload(), RandomSearch(**SHARED), {}),
    ("several swaps", Payload(), GCG(**(SHARED | {"n_replace": 2, "buffer_size": 4})), {}),
    ("plain passes", Payload(), GCG(**SHARED), {"plain": True}),
    ("sliding windows", JensenShannon(), GCG(**SHARED), {"family": "gemma2"}),
    ("compressed keys", Payload(), GCG(**SHARED), {"family": "deepseek_v3"}),
]


@pytest.mark.parametrize(("name", "objective", "strategy", "options"), CASES, ids=[c[0] for c in CASES])
def test_goes_on_exactly(name: str, objective: Objective, strategy: api.Strategy, options: dict[str, Any]) -> None:
    states: list[SearchState] = []
    whole = search(
        make_pair(**options), objective, strategy, on_state=lambda make: states.append(through_a_file(make()))
    )
    assert len(states) == len(whole.steps) == 6
    # In the middle of a restart, and at the end of one.
    for number in (1, 2):
        rest = search(make_pair(**options), objective, strategy, resume=states[number])
        assert rest.found == whole.found, number
        assert rest.steps == whole.steps[number + 1 :], number
        assert rest.early == whole.early, number
        assert rest.meters == whole.meters, number


@pytest.mark.usefixtures("two_threads")
def test_goes_on_exactly_with_a_gradient_made_ahead() -> None:
    test_goes_on_exactly(*CASES[1])


def test_state_of_another_step_leads_elsewhere() -> None:
    """The states above differ: what is compared is not the same whatever they hold."""
    states: list[SearchState] = []
    search(make_pair(), Payload(), GCG(**SHARED), on_state=lambda make: states.append(make()))
    skipped = replace(states[4], step=0)
    rest = search(make_pair(), Payload(), GCG(**SHARED), resume=skipped)
    whole = search(make_pair(), Payload(), GCG(**SHARED))
    assert rest.steps != whole.steps[4:]


def test_asking_for_states_changes_nothing() -> None:
    states: list[SearchState] = []
    asked = search(make_pair(), Payload(), GCG(**SHARED), on_state=lambda make: states.append(make()))
    assert asked == search(make_pair(), Payload(), GCG(**SHARED))


def test_budget_already_spent_is_not_spent_again() -> None:
    strategy = GCG(**(SHARED | {"max_evaluations": 60}))
    states: list[SearchState] = []
    whole = search(make_pair(), Payload(), strategy, on_state=lambda make: states.append(make()))
    assert len(whole.steps) < 6
    rest = search(make_pair(), Payload(), strategy, resume=states[0])
    assert (rest.found, rest.steps) == (whole.found, whole.steps[1:])


def test_seconds_already_spent_count() -> None:
    states: list[SearchState] = []
    search(make_pair(), Payload(), GCG(**SHARED), on_state=lambda make: states.append(make()))
    late = replace(states[0], seconds=1e6)
    rest = search(make_pair(), Payload(), GCG(**(SHARED | {"max_seconds": 1e6})), resume=late)
    # The step under way is finished, and no other restart begins: there is a string to hand over.
    assert [(s.restart, s.step) for s in rest.steps] == [(0, 1)]
