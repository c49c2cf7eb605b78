"""Several passes at once on a CPU, and none lost when memory runs out: a lane is a thread with its share of the cores.

One pass on all cores waits at the end of every operation for the core that came last; two passes on half of the
cores each do not (T = 1, width 128, 2 cores: 0.77 s instead of 0.90 s).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring.packing import Job, padded
from trigger_opt.scoring.pass_size import PassSize, out_of_memory

Result = TypeVar("Result")
Item = TypeVar("Item")

_LANES = 2
# torch does not divide elementwise work below this many numbers.
_WORTH_A_THREAD = 32768


def num_lanes(model: CausalModel) -> int:
    """Passes of a model that may run at once: 2 on a CPU with an even number of threads, otherwise 1."""
    threads = torch.get_num_threads()
    shared = model.device.type == "cpu" and not model.one_at_a_time
    return _LANES if shared and threads >= _LANES and threads % _LANES == 0 else 1


def parts_for(device: torch.device) -> int:
    """Parts to cut work into that may run in lanes."""
    return _LANES if device.type == "cpu" else 1


def in_lanes(work: Callable[[Item], Result], items: Sequence[Item], lanes: int) -> list[Result]:
    """`[work(i) for i in items]`, in lanes; order kept, the first error raised after all have ended."""
    if lanes == 1 or len(items) < 2:
        return [work(i) for i in items]
    futures = [_pool(torch.get_num_threads() // lanes).submit(work, i) for i in items]
    try:
        wait(futures)
    except BaseException:
        # Ctrl-C: none may go on behind the caller's back, with the model in a pass's state.
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    errors = [e for f in futures if (e := f.exception()) is not None]
    if errors:
        raise errors[0]
    return [f.result() for f in futures]


@contextmanager
def beside(work: Callable[[], Result]) -> Iterator[Future[Result]]:
    """Run `work` in one lane while the body has the other's share of the cores; both have ended after it."""
    before = torch.get_num_threads()
    future = _pool(before // _LANES).submit(work)
    torch.set_num_threads(before // _LANES)
    try:
        yield future
    finally:
        wait([future])
        torch.set_num_threads(before)


def run_passes(
    run: Callable[[Sequence[Job]], list[Tensor]],
    passes: Sequence[Sequence[Job]],
    size: PassSize,
    lanes: int,
) -> list[list[Tensor]]:
    """`run` on every pass, in lanes; one that does not fit in memory is run again in halves, one after the other.

    Raises:
        RuntimeError: not even a single job fits.
    """

    def attempt(jobs: Sequence[Job]) -> list[Tensor] | None:
        try:
            return run(jobs)
        except RuntimeError as error:
            if not out_of_memory(error) or len(jobs) == 1:
                raise
            return None

    made = []
    for jobs, outcome in zip(passes, in_lanes(attempt, passes, lanes), strict=True):
        if outcome is None:
            size.failed(padded(jobs))
            halves = [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
            first, second = (run_passes(run, [half], size, lanes)[0] for half in halves)
            outcome = [torch.cat(both) for both in zip(first, second, strict=True)]
        else:
            size.fitted(padded(jobs))
        made.append(outcome)
    return made


@contextmanager
def threads_for(numbers: int, device: torch.device) -> Iterator[None]:
    """Fewer threads where an activation of `numbers` is too small to share: then they only wait for each other
    (token gradient of 45 tokens of 576: 0.17 s on one thread, 0.3 s on two)."""
    before = torch.get_num_threads()
    needed = max(1, min(before, round(numbers / _WORTH_A_THREAD)))
    if device.type != "cpu" or needed == before:
        yield
        return
    torch.set_num_threads(needed)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Set in each lane: OpenMP keeps the number for the thread that sets it. Torch also notes it for threads to come,
    # so the caller's own number is set again.
    before = torch.get_num_threads()

    def set_threads() -> None:
        # Asking first: a thread takes torch's number over when it first needs one, and would undo what is set here.
        torch.get_num_threads()
        torch.set_num_threads(threads)

    pool = ThreadPoolExecutor(_LANES, "lane", initializer=set_threads)
    # All lanes at once, or the first would answer for the second, which would set its threads later.
    barrier = Barrier(_LANES)
    list(pool.map(lambda _: barrier.wait(), range(_LANES)))
    torch.set_num_threads(before)
    return pool
