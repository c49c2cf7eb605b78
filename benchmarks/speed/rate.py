"""Candidate passes of ours against the machine's own rate of matrix products, measured in turns in one process."""

import time
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.speed.bench import Bench
from benchmarks.speed.client import WorkerError
from benchmarks.speed.ratios import spread
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import make_task, short_user
from benchmarks.speed.worker import Task
from trigger_opt.api import load_pair, pair_scorer
from trigger_opt.models.pair import LoadOptions
from trigger_opt.objectives import TargetLikelihood
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.prompts import Context, encode, tokenize_context

ROUNDS = 5
_WIDTH = 512
_SIZE = 2048


def run_rate(bench: Bench) -> list[WorkerError]:
    """One record a shape."""
    store = Store(bench.options.results, "rate")
    failures = []
    for shape in bench.options.shapes:
        task = make_task(bench.tokenizer, shape, [short_user()], width=_WIDTH)
        settings: dict[str, Any] = {
            "trigger": shape.trigger, "target": shape.target, "width": _WIDTH, "rounds": ROUNDS,
        }  # fmt: skip

        def measure(task: Task = task) -> Record:
            return measure_rate(bench, task)

        failures.append(bench.cell(store, f"{shape}", settings, measure))
    return [f for f in failures if f is not None]


def measure_rate(bench: Bench, task: Task) -> Record:
    """Operations a second of scoring fresh swaps of one trigger, and of a square product, round by round."""
    scorer, trigger = _scorer(bench, task)
    generator = torch.Generator().manual_seed(0)
    shares, rates, needed = [], [], []
    for number in range(ROUNDS + 1):
        machine = _product_rate()
        done, least, seconds = scorer.meter.flops, scorer.meter.least_flops, scorer.meter.seconds
        scorer.prepare(trigger, [0])
        scorer.score(_swaps(trigger, task.width, generator), [0])
        flops = scorer.meter.flops - done
        # The first round warms both up.
        if number:
            rates.append(flops / (scorer.meter.seconds - seconds))
            shares.append(rates[-1] / ((machine + _product_rate()) / 2))
            needed.append((scorer.meter.least_flops - least) / flops)
    share = spread(shares)
    return {
        "gflops": median(rates) / 1e9,
        "share": {"median": share.median, "low": share.low, "high": share.high},
        "needed": median(needed),
        "said": f"{median(rates) / 1e9:.0f} GFLOP/s, {share.median:.0%} of the machine's, {median(needed):.0%} needed",
    }


def _scorer(bench: Bench, task: Task) -> tuple[PairScorer, Int[Tensor, " trigger"]]:
    pair = load_pair(str(bench.folder), base=str(bench.folder), options=LoadOptions(dtype="bfloat16"))
    trigger, target = encode(pair.tokenizer, [task.trigger, task.target])
    contexts = [tokenize_context(pair.tokenizer, Context(user=u)) for u in task.users]
    objective = TargetLikelihood(target_tokens=len(target))
    return pair_scorer(pair, contexts, objective, target, precise=False), torch.tensor(trigger)


def _swaps(trigger: Int[Tensor, " trigger"], count: int, generator: torch.Generator) -> Int[Tensor, "batch trigger"]:
    swapped = trigger.repeat(count, 1)
    positions = torch.randint(len(trigger), (count,), generator=generator)
    swapped[torch.arange(count), positions] = torch.randint(1000, 40000, (count,), generator=generator)
    return swapped


def _product_rate() -> float:
    left, right = (torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return float(2 * _SIZE**3 / median(times))
