"""Any OpenAI-compatible server that answers chat while one waits."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from trigger_opt.transfer.client import BudgetError, RefusedError, RetryLaterError, UnclearError
from trigger_opt.transfer.clients.openai_api import ERRORS, OpenAIConnection, chat_body
from trigger_opt.transfer.requests import CHAT, Answer, Line

# The line itself is at fault: too long, an option the model does not know.
_OF_THE_LINE = (400, 413, 422)
# The first that occurred is raised: where one line may have been taken, none may be called untaken.
_FAILURES = (UnclearError, BudgetError, RefusedError, RetryLaterError)


class OpenAIChatClient:
    """A DirectClient over the package `openai`.

    Attributes:
        server, free: see DirectClient. at_once: lines asked at the same time.

    Raises:
        UserError: `base_url` is no URL, or the key cannot travel in a header.
    """

    free = False

    def __init__(
        self, api_key: str, base_url: str = "", at_once: int = 8, *, key_variable: str = "OPENAI_API_KEY"
    ) -> None:
        self._connection = OpenAIConnection(api_key, base_url, key_variable=key_variable)
        self.server = f"openai {self._connection.url}"
        self.at_once = at_once

    async def answers(self, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """See DirectClient. After a failure no further line is sent; answers under way are waited for and yielded."""
        _check(lines)
        gate = asyncio.Semaphore(self.at_once)
        failures: list[Exception] = []

        async def ask(line: Line) -> Answer | None:
            async with gate:
                if failures:
                    return None
                try:
                    return await self._ask(line)
                except _FAILURES as error:
                    failures.append(error)
                    return None

        tasks = [asyncio.ensure_future(ask(line)) for line in lines]
        try:
            for task in asyncio.as_completed(tasks):
                if answer := await task:
                    yield answer
        finally:
            for pending in tasks:
                pending.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failures:
            raise _worst(failures)

    async def close(self) -> None:
        """Let go of connections."""
        await self._connection.package.close()

    async def _ask(self, line: Line) -> Answer:
        body = chat_body(line.request)
        create = self._connection.package.chat.completions.with_raw_response.create
        try:
            # All of it as extra_body: what the package does not know, a server may.
            said = await self._connection.body(create(model=body["model"], messages=[], extra_body=body))
        except ERRORS as error:
            failure = self._connection.failure(error)
            if failure and failure.status in _OF_THE_LINE and not failure.out_of_budget:
                return Answer(custom_id=line.custom_id, error=str(failure))
            raise self._connection.submit_error(error, about="the question") from None
        return self._connection.answer(line.custom_id, said)


def _check(lines: Sequence[Line]) -> None:
    for line in lines:
        if line.request.endpoint != CHAT:
            raise RefusedError(
                f"the client openai has no endpoint {line.request.endpoint!r}; leave transfer.activations empty"
            )


def _worst(failures: Sequence[Exception]) -> Exception:
    first = min(failures, key=lambda f: next(i for i, kind in enumerate(_FAILURES) if isinstance(f, kind)))
    if not isinstance(first, RetryLaterError):
        return first
    asked = [f.retry_after for f in failures if isinstance(f, RetryLaterError) and f.retry_after is not None]
    return RetryLaterError(first.reason, max(asked, default=None))
