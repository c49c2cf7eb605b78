"""From a plan in the ledger to answers in the ledger: what is at a server is fetched, what was never sent is sent.

It may be killed anywhere and started again. The one thing it cannot settle alone, a submission whose answer was lost,
it shows to the user.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from trigger_opt.transfer.backoff import Backoff
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import (
    BatchClient,
    BatchStatus,
    BudgetError,
    RefusedError,
    RetryLaterError,
    TransferError,
    UnclearError,
    UnknownBatchError,
)
from trigger_opt.transfer.ledger import Batch, ForeignResultsError, Ledger, Stored
from trigger_opt.transfer.requests import Line
from trigger_opt.transfer.settings import TransferSettings, batch_sizes

# Answers known so far, of how many.
OnProgress = Callable[[int, int], None]
_LAST_WORD_SECONDS = 20.0
_RESUBMIT = "{} with transfer.resubmit_lost=true (resume: --resubmit-lost)"


@dataclass
class Runner:
    """Runs batches of one server.

    Attributes:
        say: one line for the user. on_progress: lines done and lines under way in all.
    """

    ledger: Ledger
    client: BatchClient
    settings: TransferSettings
    budget: Budget
    say: Callable[[str], None]
    on_progress: OnProgress
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _done: dict[int, int] = field(default_factory=dict)
    _total: int = 0

    def __post_init__(self) -> None:
        s = self.settings
        self._backoff = Backoff(s.poll_seconds, s.max_wait_seconds, s.max_errors, self.say, sleep=self.sleep)
        self._open = asyncio.Semaphore(s.open_batches)
        # Storing a large batch holds everything up; a submission under way must not run into its time limit meanwhile.
        self._undisturbed = asyncio.Lock()
        # After a refusal nothing new is sent; what is at the server is still fetched.
        self._stop: TransferError | None = None
        self._defect: Exception | None = None

    async def run(self, plan: int) -> None:
        """Fetch and send until every line of `plan` has an answer or a reason for none.

        Raises:
            TransferError: what stopped it; everything that was at the server and could be fetched is stored.
        """
        await self._recover()
        fetched = self._batches("submitted")
        fresh = cut(self.ledger.unsent(plan), batch_sizes(self.settings))
        self._total = sum(b.lines for b in fetched) + sum(map(len, fresh))
        self.on_progress(0, self._total)
        # Not gather: after Ctrl-C it leaves at once, while another batch still waits for its submission's answer.
        async with asyncio.TaskGroup() as tasks:
            for work in [*(self._fetch(b) for b in fetched), *(self._send(part) for part in fresh)]:
                tasks.create_task(self._guarded(work))
        if self._defect is not None:
            raise self._defect
        if self._stop is not None:
            raise self._stop

    async def cancel(self) -> list[Batch]:
        """Ask the server to stop every batch it holds; those it was asked about."""
        asked = []
        for batch in self._batches("submitted"):
            try:
                await self._backoff.repeat(f"cancelling {batch.label}", partial(self.client.cancel, _id(batch)))
            except TransferError as error:
                # It may just have ended; the others still cost.
                self.say(f"batch {batch.label} was not cancelled: {error}")
            else:
                asked.append(batch)
        return asked

    def _batches(self, state: str) -> list[Batch]:
        return self.ledger.batches("server = ? AND state = ?", self.client.server, state)

    async def _recover(self) -> None:
        """Settle what an earlier process left half done."""
        self.ledger.sweep()
        for batch in self._batches("uploading"):
            self.ledger.drop(batch, "the program stopped before it was submitted")
        for batch in self._batches("submitting"):
            self.ledger.lost(batch, "the program stopped while it was being submitted")
        for batch in self._batches("lost"):
            if await self._found(batch):
                continue
            if self.settings.resubmit_lost:
                self.ledger.release(batch)
            else:
                self.say(lost_line(batch, self.ledger))

    async def _found(self, batch: Batch) -> bool:
        """Whether a server that keeps labels has a lost batch. One it does not list may be listed later."""
        if not self.client.keeps_labels:
            return False
        remote = await self._backoff.repeat(f"looking for {batch.label}", lambda: self.client.find(batch.label))
        if remote is not None:
            self.ledger.submitted(batch, remote)
        return remote is not None

    async def _guarded(self, work: Awaitable[None]) -> None:
        """One batch's failure does not keep the others from being fetched."""
        try:
            await work
        except TransferError as error:
            if self._stop is None:
                self._stop = error
            elif str(error) != str(self._stop):
                # One error ends the run; another may name a batch the user has to see to.
                self.say(str(error))
        except Exception as error:
            # A defect in one batch must not cost the others their answers; it is raised when they are done.
            self._defect = error

    async def _send(self, lines: Sequence[Line]) -> None:
        async with self._open:
            if self._stop is not None:
                return
            fitting = self.budget.fitting(self.ledger, lines)
            if len(fitting) < len(lines):
                self._stop = self.budget.error(self.ledger)
            if not fitting:
                return
            batch = self.ledger.begin(fitting)
            try:
                file_id = await self._upload(batch, fitting)
            except BaseException as error:
                self.ledger.drop(batch, f"not uploaded: {error}")
                raise
            await self._submit(batch, file_id)
            await self._collect(self.ledger.batch(batch.label))

    async def _fetch(self, batch: Batch) -> None:
        async with self._open:
            await self._collect(batch)

    async def _upload(self, batch: Batch, lines: Sequence[Line]) -> str:
        # Its name is what the user sees at the provider's.
        file = self.ledger.files / f"{batch.label}.jsonl"
        try:
            with _disk_errors(self.ledger):
                file.write_text("".join(f"{self.client.encode(line)}\n" for line in lines), encoding="utf-8")
            return await self._backoff.repeat(f"upload of {batch.label}", lambda: self.client.upload(file))
        finally:
            file.unlink(missing_ok=True)

    async def _submit(self, batch: Batch, file_id: str) -> None:
        async def submit() -> None:
            self.ledger.submitting(batch, file_id)
            try:
                remote = await self.client.submit(
                    file_id, model=batch.model, endpoint=batch.endpoint, label=batch.label
                )
            except RetryLaterError:
                # Certainly not taken: whoever starts after a crash from here on need not ask.
                self.ledger.not_submitted(batch)
                raise
            self.ledger.submitted(batch, remote)

        async def undisturbed() -> None:
            # Outside of what Ctrl-C waits for: a submission that has not begun must not begin any more.
            async with self._undisturbed:
                await _to_its_end(submit())

        try:
            await self._backoff.repeat(f"submission of {batch.label}", undisturbed, unclear=False)
        except UnclearError as error:
            self.ledger.lost(batch, error.reason)
            lost = self.ledger.batch(batch.label)
            if not await self._found(lost):
                raise TransferError(lost_line(lost, self.ledger)) from None
        except TransferError as error:
            # A clear no, or one that lasts: nothing was submitted. Unless its id alone could not be written down.
            if self.ledger.batch(batch.label).state == "uploading" or isinstance(error, RefusedError | BudgetError):
                self.ledger.drop(batch, str(error))
            raise
        remote = _id(self.ledger.batch(batch.label))
        self.say(f"batch {batch.label}: {batch.lines} questions to {batch.model}, the server calls it {remote}")

    async def _collect(self, batch: Batch) -> None:
        if batch.state != "submitted":
            return
        file = self.ledger.files / f"{batch.label}.results"
        what = f"results of {batch.label}"

        tries = 0

        async def attempt() -> Stored | None:
            nonlocal tries
            tries += 1
            status = await self._wait(batch)
            if status.state == "ended":
                self.ledger.end(batch, status.detail)
                return None
            with _disk_errors(self.ledger):
                await self.client.download(status, file)
                # What stays damaged is left out in the end: the others' answers must not be lost with it.
                last = tries >= self.settings.max_errors
                answers = self.client.read(file, on_damaged=self._damaged(batch) if last else None)
                async with self._undisturbed:
                    return self.ledger.store(batch, answers, count_tokens=self.budget.count_tokens)

        try:
            stored = await self._backoff.repeat(what, attempt)
        except (UnknownBatchError, ForeignResultsError) as error:
            self.ledger.lost(batch, str(error))
            self.say(lost_line(self.ledger.batch(batch.label), self.ledger))
            return
        finally:
            file.unlink(missing_ok=True)
        self._progress(batch, batch.lines)
        if stored is None:
            ended = self.ledger.batch(batch.label)
            self.say(
                f"batch {batch.label} ({batch.lines} questions to {batch.model}) was given up by the server: "
                f"{ended.detail}; to ask again: transfer.resubmit_failed=true"
            )
        else:
            self.say(_stored_line(batch, stored))

    async def _wait(self, batch: Batch) -> BatchStatus:
        remote = _id(batch)
        while True:
            status = await self._backoff.repeat(f"looking at {batch.label}", lambda: self.client.status(remote))
            if status.state != "running":
                return status
            if status.done is not None:
                self._progress(batch, status.done)
            await self.sleep(self.settings.poll_seconds * self._backoff.jitter.uniform(0.8, 1.2))

    def _damaged(self, batch: Batch) -> Callable[[str], None]:
        return lambda what: self.say(f"batch {batch.label}: {what} in its results cannot be read and is left out")

    def _progress(self, batch: Batch, done: int) -> None:
        self._done[batch.id] = done
        self.on_progress(sum(self._done.values()), self._total)


def lost_line(batch: Batch, ledger: Ledger) -> str:
    """What the user has to decide about a lost batch."""
    if batch.file_id is None:
        return (
            f"some of {batch.lines} questions to {batch.model} may have been answered and paid for without the answers "
            f"reaching us ({batch.detail}); {_RESUBMIT.format('ask them again')}"
        )
    return (
        f"batch {batch.label} ({batch.lines} questions to {batch.model}) may or may not have been taken by the server "
        f"({batch.detail}); look for an input file of that name there, then either "
        f"`{ledger.command('attach')} {batch.label} ID` or {_RESUBMIT.format('submit it again')}"
    )


def _stored_line(batch: Batch, stored: Stored) -> str:
    problems = [
        f"{n} {what}"
        for n, what in (
            (stored.failed, "failed at the server"),
            (stored.missing, "left out by the server"),
            (stored.repeated, "answered twice, the first counts"),
            (len(stored.unknown), "answers to nothing we asked"),
        )
        if n
    ]
    again = "; to ask again: transfer.resubmit_failed=true" if stored.failed or stored.missing else ""
    return f"batch {batch.label}: {', '.join([f'{stored.answered} answers', *problems])}{again}"


async def _to_its_end(submission: Coroutine[None, None, None]) -> None:
    """Ctrl-C waits for a submission under way, a little: cut off, nobody would know what became of it."""
    task = asyncio.ensure_future(submission)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_LAST_WORD_SECONDS)
        task.cancel()
        raise


def cut(lines: Sequence[Line], sizes: Callable[[str], int]) -> list[list[Line]]:
    """Batches of one model and endpoint each, in the order in which their first lines stand."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.request.model, line.request.endpoint), []).append(line)
    parts = []
    for (model, _), group in groups.items():
        size = sizes(model)
        parts += [group[n : n + size] for n in range(0, len(group), size)]
    return parts


def _id(batch: Batch) -> str:
    assert batch.remote_id is not None
    return batch.remote_id


@contextlib.contextmanager
def _disk_errors(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{error.filename or ledger.files} cannot be written ({os.strerror(error.errno or 0)}); mend that and "
            "start again: nothing is lost"
        ) from None
