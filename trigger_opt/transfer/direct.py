"""The runner for servers that answer while one waits: a few questions at a time, each answer kept as it comes."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from trigger_opt.transfer.backoff import Backoff, GaveUpError
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import BudgetError, DirectClient, RefusedError, TransferError, UnclearError
from trigger_opt.transfer.ledger import Batch, Ledger
from trigger_opt.transfer.runner import OnProgress, cut, lost_line
from trigger_opt.transfer.settings import TransferSettings


@dataclass
class DirectRunner:
    """See `runner.Runner`. A batch here is what is asked in one call."""

    ledger: Ledger
    client: DirectClient
    settings: TransferSettings
    budget: Budget
    say: Callable[[str], None]
    on_progress: OnProgress
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        s = self.settings
        self._backoff = Backoff(s.poll_seconds, s.max_wait_seconds, s.max_errors, self.say, sleep=self.sleep)
        self._done = self._total = 0

    async def run(self, plan: int) -> None:
        """Ask until every line of `plan` has an answer or a reason for none.

        Raises:
            TransferError: what stopped it; answers that came are stored.
        """
        self._recover()
        parts = cut(self.ledger.unsent(plan), lambda model: self.client.at_once)
        self._total = sum(map(len, parts))
        self.on_progress(0, self._total)
        for part in parts:
            fitting = self.budget.fitting(self.ledger, part)
            if fitting:
                await self._ask(self.ledger.begin(fitting, state="submitting"))
            if len(fitting) < len(part):
                raise self.budget.error(self.ledger)

    def _recover(self) -> None:
        for state in ("uploading", "submitting"):
            for batch in self.ledger.batches("server = ? AND state = ?", self.client.server, state):
                self.ledger.lost(batch, "the program stopped while it was being asked")
        for batch in self.ledger.batches("server = ? AND state = 'lost'", self.client.server):
            if self.client.free or self.settings.resubmit_lost:
                self.ledger.release(batch)
            else:
                self.say(lost_line(batch, self.ledger))

    async def _ask(self, batch: Batch) -> None:
        async def attempt() -> None:
            async for answer in self.client.answers(self.ledger.lines(batch)):
                self.ledger.store_one(batch, answer, count_tokens=self.budget.count_tokens)
                self._done += 1
                self.on_progress(self._done, self._total)

        try:
            await self._backoff.repeat(f"asking {batch.model}", attempt, unclear=self.client.free)
        except UnclearError as error:
            self.ledger.lost(batch, error.reason)
            raise TransferError(lost_line(self.ledger.batch(batch.label), self.ledger)) from None
        except (RefusedError, BudgetError, GaveUpError) as error:
            # What is not answered was not taken: free for the next start. An error of the ledger says no such thing.
            self.ledger.drop(batch, str(error))
            raise
        self.ledger.close_batch(batch)
