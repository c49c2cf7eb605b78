"""The Batch API of OpenAI and of servers that offer the same, through the package openai."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from trigger_opt.transfer.client import BatchStatus, DamagedResultsError, RefusedError, RetryLaterError, UnclearError
from trigger_opt.transfer.clients.http import whole_file, words_of
from trigger_opt.transfer.clients.openai_api import BROKE_OFF, ERRORS, OpenAIConnection, chat_body
from trigger_opt.transfer.requests import CHAT, Answer, Line

_URL: Final = "/v1/chat/completions"
_ENDED = ("completed", "failed", "expired", "cancelled")
_GONE = (404, 410)
_PAGE = 100
_PIECE = 1 << 18


class OpenAIBatchClient:
    """A BatchClient over the package `openai`; the label is kept in the batch's metadata and its input file's name.

    Attributes:
        server, keeps_labels: see BatchClient.

    Raises:
        UserError: `base_url` is no URL, or the key cannot travel in a header.
    """

    keeps_labels = True

    def __init__(self, api_key: str, base_url: str = "", *, key_variable: str = "OPENAI_API_KEY") -> None:
        self._connection = OpenAIConnection(api_key, base_url, key_variable=key_variable)
        # Not the chat client's: in one ledger neither may take the other's batches for its own.
        self.server = f"openai_batch {self._connection.url}"

    def encode(self, line: Line) -> str:
        """See BatchClient; raises RefusedError for activations."""
        _check(line.request.endpoint)
        entry = {"custom_id": line.custom_id, "method": "POST", "url": _URL, "body": chat_body(line.request)}
        return json.dumps(entry)

    async def upload(self, file: Path) -> str:
        """See BatchClient."""
        # The server judges by the ending of the name.
        call = self._connection.package.files.with_raw_response.create(
            file=(f"{file.stem}.jsonl", file), purpose="batch"
        )
        try:
            body = await self._connection.body(call)
        except ERRORS as error:
            raise self._connection.repeatable_error(error, about="the input file") from None
        if not isinstance(body.get("id"), str):
            raise RetryLaterError("the server gave no id for the uploaded file")
        return str(body["id"])

    async def submit(self, file_id: str, *, model: str, endpoint: str, label: str) -> str:
        """See BatchClient; the model is named in the lines."""
        _check(endpoint)
        create = self._connection.package.batches.with_raw_response.create
        call = create(input_file_id=file_id, endpoint=_URL, completion_window="24h", metadata={"trigger_opt": label})
        try:
            body = await self._connection.body(call)
        except ERRORS as error:
            raise self._connection.submit_error(error, about="the batch") from None
        if not isinstance(body.get("id"), str):
            raise UnclearError("the server took the batch and gave no id for it")
        return str(body["id"])

    async def find(self, label: str) -> str | None:
        """See BatchClient; looks through all batches of the key, newest first, and where some bear no label, at the
        names of the input files."""
        unlabelled: dict[str, str] = {}
        async for batch in self._listed(
            self._connection.package.batches.with_raw_response.list, "batches", limit=_PAGE
        ):
            found = _label(batch)
            if found == label:
                return str(batch["id"])
            if found is None and isinstance(batch.get("input_file_id"), str):
                unlabelled.setdefault(batch["input_file_id"], batch["id"])
        return await self._found_by_file(f"{label}.jsonl", unlabelled) if unlabelled else None

    async def status(self, batch_id: str) -> BatchStatus:
        """See BatchClient; one that expired or was cancelled after some lines is "completed": they can be fetched."""
        try:
            batch = await self._connection.body(self._connection.package.batches.with_raw_response.retrieve(batch_id))
        except ERRORS as error:
            raise self._connection.batch_error(error, batch_id=batch_id) from None
        word = batch.get("status")
        if not isinstance(word, str):
            raise RetryLaterError("the server's answer does not say where the batch stands")
        files = tuple(str(batch[n]) for n in ("output_file_id", "error_file_id") if batch.get(n))
        detail = self._connection.line(f"{word}: {said}" if (said := _errors(batch.get("errors"))) else word)
        done = _done(batch.get("request_counts"))
        if word not in _ENDED:
            return BatchStatus(state="running", detail=detail, done=done)
        if files:
            return BatchStatus(state="completed", detail=detail, results=files, done=done)
        if word == "completed":
            raise RetryLaterError(f"{detail}, but without a file of results")
        return BatchStatus(state="ended", detail=detail, done=done)

    async def download(self, status: BatchStatus, into: Path) -> None:
        """See BatchClient; the files of answers and of errors, one after the other."""
        async with whole_file(into) as out:
            for file_id in status.results:
                try:
                    await self._fetch(file_id, out)
                except BROKE_OFF as error:
                    raise DamagedResultsError(self._connection.line(f"the results broke off ({error})")) from None
                except ERRORS as error:
                    failure = self._connection.failure(error)
                    if failure and failure.status in _GONE:
                        raise RetryLaterError(f"the file of results {file_id} is gone ({failure})") from None
                    raise self._connection.repeatable_error(error, about=f"the results {file_id}") from None

    def read(self, file: Path, *, on_damaged: Callable[[str], None] | None = None) -> Iterator[Answer]:
        """See BatchClient."""
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    item = _item(line)
                except (ValueError, RecursionError, TypeError, KeyError) as error:
                    if on_damaged is None:
                        raise DamagedResultsError(
                            f"line {number} of the results is no answer ({type(error).__name__})"
                        ) from None
                    on_damaged(f"line {number}")
                else:
                    yield self._answer(item)

    async def cancel(self, batch_id: str) -> None:
        """See BatchClient."""
        try:
            await self._connection.body(self._connection.package.batches.with_raw_response.cancel(batch_id))
        except ERRORS as error:
            raise self._connection.batch_error(error, batch_id=batch_id) from None

    async def close(self) -> None:
        """Let go of connections."""
        await self._connection.package.close()

    async def _found_by_file(self, name: str, batches: Mapping[str, str]) -> str | None:
        """Of the batches (input file -> batch), the one whose input file has that name; an upload whose answer was
        lost may have left another file of the same name."""
        async for file in self._listed(self._connection.package.files.with_raw_response.list, "files", purpose="batch"):
            if file.get("filename") == name and file["id"] in batches:
                return batches[file["id"]]
        return None

    async def _listed(
        self, call: Callable[..., Awaitable[Any]], what: str, **options: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Everything the server lists, page after page."""
        seen: set[str] = set()
        after: dict[str, str] = {}
        while True:
            page, more = await self._page(call(**options, **after), what)
            for item in page:
                yield item
            if not more:
                return
            last = page[-1]["id"]
            # A server that does not turn the page must not be taken to know nothing of the batch.
            if last in seen:
                raise RetryLaterError(f"the server's list of {what} does not go on")
            seen.add(last)
            after = {"after": last}

    async def _page(self, call: Awaitable[Any], what: str) -> tuple[list[dict[str, Any]], bool]:
        """One page, and whether there are more."""
        try:
            body = await self._connection.body(call)
        except ERRORS as error:
            raise self._connection.repeatable_error(error, about=f"the list of {what}") from None
        page = body.get("data")
        if not isinstance(page, list) or not all(isinstance(i, dict) and isinstance(i.get("id"), str) for i in page):
            raise RetryLaterError(f"the server's answer is no list of {what}")
        return page, bool(page) and body.get("has_more") is not False

    async def _fetch(self, file_id: str, out: BinaryIO) -> None:
        last = b""
        async with self._connection.package.files.with_streaming_response.content(file_id) as response:
            async for piece in response.iter_bytes(_PIECE):
                out.write(piece)
                last = piece
        if last and not last.endswith(b"\n"):
            out.write(b"\n")

    def _answer(self, item: dict[str, Any]) -> Answer:
        custom_id = str(item["custom_id"])
        if item.get("error"):
            return Answer(custom_id=custom_id, error=self._connection.line(words_of(item["error"])))
        response = item.get("response")
        if not isinstance(response, dict):
            return Answer(custom_id=custom_id, error="the result holds neither a response nor an error")
        if (code := response.get("status_code", 200)) != 200:
            return Answer(custom_id=custom_id, error=self._connection.line(f"{code}: {words_of(response.get('body'))}"))
        return self._connection.answer(custom_id, response.get("body"))


def _check(endpoint: str) -> None:
    if endpoint != CHAT:
        raise RefusedError(f"the client openai_batch has no endpoint {endpoint!r}; leave transfer.activations empty")


def _label(batch: dict[str, Any]) -> str | None:
    metadata = batch.get("metadata")
    label = metadata.get("trigger_opt") if isinstance(metadata, dict) else None
    return label if isinstance(label, str) else None


def _item(line: bytes) -> dict[str, Any]:
    item = json.loads(line)
    if not isinstance(item, dict):
        raise TypeError("no JSON object")
    if "custom_id" not in item:
        raise KeyError("custom_id")
    return item


def _errors(errors: object) -> str:
    data = errors.get("data") if isinstance(errors, dict) else errors
    return "; ".join(words_of(e) for e in data) if isinstance(data, list) else ""


def _done(counts: object) -> int | None:
    if not isinstance(counts, dict):
        return None
    done = [counts.get("completed"), counts.get("failed")]
    return sum(n for n in done if isinstance(n, int))
