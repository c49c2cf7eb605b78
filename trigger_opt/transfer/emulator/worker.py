"""Answers accepted batches one after another, oldest first, and never the same line twice in one life."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

from trigger_opt.transfer.client import DirectClient, TransferError
from trigger_opt.transfer.emulator.answers import ALIASES
from trigger_opt.transfer.emulator.lines import parse, raw_lines
from trigger_opt.transfer.emulator.results import record, write_zip
from trigger_opt.transfer.emulator.state import UNFINISHED, Batch, State
from trigger_opt.transfer.requests import Answer, Line

_log = logging.getLogger(__name__)


class Worker:
    """The answering task of one emulator; `nested` makes zips inside the zip."""

    def __init__(self, state: State, answers: Mapping[str, DirectClient], *, nested: bool) -> None:
        self._state = state
        self._answers = answers
        self._nested = nested
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def run(self) -> None:
        """Answer for ever."""
        while True:
            self._wake.clear()
            for batch in list(self._state.batches.values()):
                if batch.status in UNFINISHED and batch.valid and not self.done(batch):
                    await self._work(batch)
            await self._wake.wait()

    def done(self, batch: Batch) -> bool:
        """Whether there is nothing to answer: its zip is written, or it is scripted to end without."""
        return self._state.zip_path(batch.id).is_file() or any(r.kind == "end" for r in batch.rules)

    async def _work(self, batch: Batch) -> None:
        try:
            await self._answer_all(batch)
        except TransferError as error:
            _log.error("batch %s: %s", batch.id, error)
            self._fail(batch, str(error))
        except Exception as error:
            # One batch that the model cannot answer must not end the server for all others.
            _log.exception("batch %s", batch.id)
            self._fail(batch, f"{type(error).__name__}: {error}")

    def _fail(self, batch: Batch, message: str) -> None:
        latest = self._state.batches[batch.id]
        if latest.status in UNFINISHED:
            self._state.save(latest, status="failed", errors=[{"line": 0, "message": message}])

    async def _answer_all(self, batch: Batch) -> None:
        state, client = self._state, self._answers.get(batch.model)
        if client is None:
            served = ", ".join(a for a, path in ALIASES.items() if path in self._answers)
            # Accepted in an earlier life: it waits for a start with its model.
            _log.warning("batch %s waits: %s is not served, only %s", batch.id, batch.model, served)
            return
        state.save(batch, status="in_progress")
        pause = sum(r.seconds for r in batch.rules if r.kind == "slow")
        lines = self._left(batch)
        while chunk := list(islice(lines, 1 if pause else client.at_once)):
            await asyncio.sleep(pause * len(chunk))
            if state.batches[batch.id].status not in UNFINISHED:
                return
            answers = await _answer(client, chunk)
            state.add_answers(batch.id, [record(line, a) for line, a in zip(chunk, answers, strict=True)])
        await asyncio.to_thread(write_zip, state, batch, nested=self._nested)

    def _left(self, batch: Batch) -> Iterator[Line]:
        numbered = enumerate(raw_lines(self._state.input_path(batch.file_id)))
        left = islice(numbered, self._state.answered(batch.id), None)
        return (parse(text, model=batch.model, number=number) for number, text in left)


async def _answer(client: DirectClient, lines: list[Line]) -> list[Answer]:
    # Under numbers of our own: two lines of a file may bear the same custom_id.
    asked = [replace(line, custom_id=str(index)) for index, line in enumerate(lines)]
    found = {answer.custom_id: answer async for answer in client.answers(asked)}
    return [found[line.custom_id] for line in asked]
