"""The processes of one search: passes are dealt out, results come back to all. One process needs none of it."""

import os
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

CLOCK: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.monotonic)
"""What the seconds of a search are measured by. Who measures on a machine that others use too may set
`time.process_time`."""

# Passes in which a call is cut under torchrun, if it is large enough: 1, 2, 3, 4, 6 or 12 processes have the same work.
_SHARES = 12


class Group:
    """This process among those of a torch.distributed job; without one, the only one.

    Passes are cut alike and only dealt out, so that every pass is computed from the same numbers in the same order
    however many processes there are; but for one that ran out of memory, and GPUs that differ in what they hold.
    """

    def __init__(self, *, alone: bool = False) -> None:
        """`alone`: this process by itself, whatever job it belongs to."""
        ready = not alone and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if ready else 0
        self.size = torch.distributed.get_world_size() if ready else 1
        # The same number of passes however many processes there are, so that all compute the same numbers.
        self.shares = _SHARES if ready else 1

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """This process's items with their numbers."""
        return [(n, i) for n, i in enumerate(items) if n % self.size == self.rank]

    def gather(self, mine: dict[int, list[Tensor]], count: int) -> list[list[Tensor]]:
        """All processes' results by number, 0 to `count` - 1, each a list of CPU tensors."""
        if self.size == 1:
            return [mine[n] for n in range(count)]
        everyone: list[dict[int, list[Tensor]]] = [{} for _ in range(self.size)]
        torch.distributed.all_gather_object(everyone, mine)
        merged = {n: r for part in everyone for n, r in part.items()}
        return [merged[n] for n in range(count)]

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.size == 1:
            return value
        values = [0] * self.size
        torch.distributed.all_gather_object(values, value)
        return min(values)

    def first(self, tensors: list[Tensor]) -> list[Tensor]:
        """The first process's tensors, on all."""
        if self.size > 1:
            torch.distributed.broadcast_object_list(tensors, src=0)
        return tensors

    def announce(self, call: object) -> None:
        """From the first process: tell the others what to join; None ends their waiting."""
        if self.size > 1:
            torch.distributed.broadcast_object_list([call], src=0)

    def listen(self) -> Any:
        """On any other process: wait for what the first announces."""
        heard: list[Any] = [None]
        torch.distributed.broadcast_object_list(heard, src=0)
        return heard[0]

    def clock(self) -> float:
        """The first process's `CLOCK`, so that all stop in the same step."""
        now = [CLOCK.get()()]
        if self.size > 1:
            torch.distributed.broadcast_object_list(now, src=0)
        return now[0]


def start_group() -> Group:
    """Join the other processes of a `torchrun` job; without one nothing happens.

    Over gloo also where the models are on GPUs: what travels is a few numbers a candidate, held by the CPU. Others
    wait for the first process through stages of hours.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return Group()
