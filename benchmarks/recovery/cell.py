"""One cell: a method looks, what it found is judged, and only then the answer key is read."""

import time
from collections.abc import Callable, Sequence

from benchmarks.recovery.answer_key import AnswerKey, against_key
from benchmarks.recovery.judge import best_of, judge_strings
from benchmarks.recovery.methods import Budget, Method
from benchmarks.recovery.records import Cell, Made, Spec
from trigger_opt import api, zoo
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context
from trigger_opt.zoo.recipes import BASE_NAME

# A method shall not learn from a name which model is a twin.
_SUSPECT = "suspect"


def load_suspect(model: str) -> ModelPair:
    """The pair of a model of the zoo, with no controls and under no name of its own."""
    pair = api.load_pair(f"{zoo.PREFIX}{model}", base=f"{zoo.PREFIX}{BASE_NAME}")
    pair.finetuned.name = _SUSPECT
    return pair


def run_cell(
    spec: Spec,
    made: Made,
    method: Method,
    *,
    load: Callable[[], ModelPair],
    contexts: tuple[Sequence[Context], Sequence[Context]],
    key: Callable[[], AnswerKey],
) -> Cell:
    """The finished cell.

    Args:
        load: the pair. contexts: (the method's, held-out ones). key: reads the answer key; called last.
    """
    start = time.monotonic()
    pair = load()
    given, held_out = contexts[0], contexts[1][: spec.held_out]
    result = method(pair, given, budget=Budget(seconds=spec.seconds, evaluations=spec.evaluations), seed=spec.seed)
    judged = judge_strings(pair, result.strings[: spec.strings], given, held_out, seed=spec.seed)
    best = best_of(judged)
    verification = judged[best].verification if best is not None else None
    planted = key()
    return Cell(
        spec=spec,
        made=made,
        control=planted.behaviour is None,
        error="",
        result=result,
        judged=judged,
        best=best,
        verdict=verification.verdict if verification else "not reproduced",
        score=max((j.score for j in judged), default=0.0),
        key=against_key(pair, planted, judged, best, held_out),
        seconds=time.monotonic() - start,
    )
