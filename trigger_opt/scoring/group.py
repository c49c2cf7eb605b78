"""The processes of one search: passes are dealt out, results come back to all. One process needs none of it."""

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Group:
    """This process among those of a torch.distributed job; without one, the only one.

    Passes are never divided, only dealt out, so that every pass is computed from the same numbers in the same order
    however many processes there are.
    """

    def __init__(self) -> None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if ready else 0
        self.size = torch.distributed.get_world_size() if ready else 1

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

    def clock(self) -> float:
        """The first process's monotonic clock, so that all stop in the same step."""
        now = [time.monotonic()]
        if self.size > 1:
            torch.distributed.broadcast_object_list(now, src=0)
        return now[0]


def start_group() -> Callable[[], None]:
    """Join the other processes of a `torchrun` job (gloo, or nccl where each has a GPU); a no-op without one.

    Returns what ends it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        return lambda: None
    # Results travel as pickled objects over gloo also on GPUs: they are a few numbers a candidate.
    torch.distributed.init_process_group("gloo")
    return torch.distributed.destroy_process_group
