"""How many tokens a pass may hold: found once for a network, remembered, and changed only when memory says so."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

# Above this a CPU gains nothing, and its caches lose (128 candidates of 35 tokens, bf16, 2 lanes: 1.67 s at 1,100 to
# 2,200 rows, 1.8 s below 600).
_CPU_ROWS = 2048
_FIRST_GPU_ROWS = 4096
_MOST_ROWS = 2**17
_FEWEST_ROWS = 64
# Full passes without a failure after which a size that once failed is tried again: another job may have ended.
_PATIENCE = 200


@dataclass
class PassSize:
    """Tokens in one pass.

    Attributes:
        rows: what to use now. ceiling: never more than this.
    """

    rows: int = _CPU_ROWS
    ceiling: int = _CPU_ROWS
    _most: int = _CPU_ROWS
    _since_failure: int = 0

    @classmethod
    def on(cls, device: torch.device) -> "PassSize":
        """To begin with on a device."""
        if device.type == "cpu":
            return cls()
        return cls(rows=_FIRST_GPU_ROWS, ceiling=_MOST_ROWS, _most=_MOST_ROWS)

    def failed(self, rows: int) -> None:
        """A pass of `rows` tokens did not fit: stay at half of it."""
        self.ceiling = max(_FEWEST_ROWS, rows // 2)
        self.rows = min(self.rows, self.ceiling)
        self._since_failure = 0

    def fitted(self, rows: int) -> None:
        """A pass of `rows` tokens did fit: a full one allows twice as many, up to the ceiling."""
        self._since_failure += 1
        if self._since_failure >= _PATIENCE and self.ceiling < self._most:
            self.ceiling = min(self._most, 2 * self.ceiling)
            self._since_failure = 0
        if 2 * rows > self.rows:
            self.rows = min(self.ceiling, 2 * self.rows)


_known: "WeakKeyDictionary[Any, PassSize]" = WeakKeyDictionary()


def pass_size(model: object, device: torch.device) -> PassSize:
    """What is remembered for a network (or a view of one), for as long as it lives: across searches and stages."""
    if model not in _known:
        _known[model] = PassSize.on(device)
    return _known[model]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a CPU or a GPU."""
    # The CPU allocator raises a plain RuntimeError; CUDA raises torch.OutOfMemoryError, which is one too.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
