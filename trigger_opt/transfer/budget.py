"""Caps on tokens: how many of the next questions still fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trigger_opt.transfer.client import BudgetError
from trigger_opt.transfer.ledger import Ledger
from trigger_opt.transfer.plan import count_tokens, question_tokens
from trigger_opt.transfer.requests import CHAT, Line, Request
from trigger_opt.transfer.settings import TransferSettings


@dataclass(frozen=True)
class Budget:
    """The caps of the settings, over everything ever sent to `server`."""

    settings: TransferSettings
    server: str

    def count_tokens(self, text: str) -> int:
        """Of a text, about; see `plan.count_tokens`."""
        return count_tokens(text, self.settings)

    def expected_tokens(self, request: Request) -> int:
        """Of question and answer together."""
        answer = self.settings.answer_tokens if request.endpoint == CHAT else 0
        return question_tokens(request, self.settings) + answer

    def fitting(self, ledger: Ledger, lines: Sequence[Line]) -> list[Line]:
        """As many of `lines`, from the first, as stay under both caps."""
        left = self._left(ledger)
        fitting = []
        for line in lines:
            left -= self.expected_tokens(line.request)
            if left < 0:
                break
            fitting.append(line)
        return fitting

    def error(self, ledger: Ledger) -> BudgetError:
        """Why no more is sent."""
        s = self.settings
        day, total = (ledger.spent(server=self.server, last_day=only_day) for only_day in (True, False))
        caps = []
        if s.max_tokens_per_day is not None:
            caps.append(f"{day:,} of {s.max_tokens_per_day:,} in the last 24 hours (transfer.max_tokens_per_day)")
        if s.max_tokens is not None:
            caps.append(f"{total:,} of {s.max_tokens:,} in all (transfer.max_tokens)")
        return BudgetError(
            f"the next questions would go over the budget: spent {' and '.join(caps)}; raise it or go on later"
        )

    def _left(self, ledger: Ledger) -> float:
        s = self.settings
        left = math.inf
        if s.max_tokens_per_day is not None:
            left = min(left, s.max_tokens_per_day - ledger.spent(server=self.server, last_day=True))
        if s.max_tokens is not None:
            left = min(left, s.max_tokens - ledger.spent(server=self.server))
        return float(left)
