"""Until an equally good string is found: nanoGCG's best of 100 steps, and how long ours takes to reach its loss.

Both filter by re-tokenising. The strings of both are judged by one fp32 forward without a cache, whose time
is counted for neither.
"""

from statistics import median
from typing import Any

from benchmarks.speed.bench import OURS, Bench, require_same
from benchmarks.speed.client import WorkerError, run_from
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import Shape, make_task, short_user
from benchmarks.speed.worker import Run, Task
from trigger_opt.search.loop import SearchSettings

PEER, WIDTH, SHAPE = "nanogcg", 128, Shape(trigger=20, target=20)
PEER_STEPS, LIMIT = 100, 300
# Ours as it is by default; the peer draws its options alike and joins none.
OURS_BY_DEFAULT = {"join": SearchSettings().join, "rank_exponent": SearchSettings().rank_exponent}


def run_time_to_loss(bench: Bench) -> list[WorkerError]:
    """One cell a seed; those that failed."""
    store = Store(bench.options.results, "time_to_loss")
    failures = []
    for seed in bench.options.seeds:
        task = make_task(bench.tokenizer, SHAPE, [short_user()], width=WIDTH, seed=seed, retokenise=True)
        settings: dict[str, Any] = {"seed": seed, "width": WIDTH, "peer_steps": PEER_STEPS, "limit": LIMIT}
        settings |= {"attention": bench.options.attention, **OURS_BY_DEFAULT}

        def measure(task: Task = task) -> Record:
            return measure_seed(bench, task, peer_steps=PEER_STEPS, limit=LIMIT)

        failures.append(bench.cell(store, f"{PEER}-{seed}", settings, measure))
    return [f for f in failures if f is not None]


def measure_seed(bench: Bench, task: Task, *, peer_steps: int, limit: int) -> Record:
    """The peer's steps, then ours until its loss is reached.

    Raises:
        WorkerError: one of them failed, or they do not work on the same thing.
    """
    with bench.worker(PEER, task) as (their, _):
        theirs = their.steps(peer_steps, warm=0)
    with bench.worker(OURS, task) as (our, _):
        goal: dict[str, float] = our.ask("rescore", trigger=theirs.trigger)
        answer: dict[str, Any] = our.ask("until", loss=goal["searched"], limit=limit)
    ours = run_from(answer)
    require_same(PEER, theirs, ours)
    # Counted up to the step that found its best, not to the end of its budget.
    best_step = theirs.losses.index(min(theirs.losses)) + 1
    their_seconds, our_seconds = sum(theirs.seconds[:best_step]), sum(ours.seconds)
    ratio = their_seconds / our_seconds if answer["reached"] else 0.0
    return {
        "peer": _facts(theirs, seconds=their_seconds, steps=best_step)
        | {"loss": goal["searched"], "typed_loss": goal["typed"], "all_seconds": sum(theirs.seconds)},
        "ours": _facts(ours, seconds=our_seconds, steps=len(ours.seconds))
        | {"loss": answer["rescored"][-1], "rescored": answer["rescored"], "reached": answer["reached"]},
        "ratio": ratio,
        "said": f"loss {goal['searched']:.3f} after {their_seconds:.0f} s, ours after {our_seconds:.0f} s"
        + ("" if answer["reached"] else " not reached"),
    }


def _facts(run: Run, *, seconds: float, steps: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "steps": steps,
        "step_seconds": median(run.seconds),
        "losses": run.losses,
        "candidates": sum(run.candidates[:steps]),
        "trigger": run.trigger,
    }
