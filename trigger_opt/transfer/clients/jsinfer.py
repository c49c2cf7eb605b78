"""The batch server of the large models, through the low-level calls of the package jsinfer."""

import json
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trigger_opt.transfer.archive import read_archive
from trigger_opt.transfer.client import BatchStatus, DamagedResultsError, RefusedError, RetryLaterError, UnclearError
from trigger_opt.transfer.clients.http import (
    Failure,
    batch_error,
    checked_base_url,
    checked_key,
    is_json,
    missing_extra,
    one_line,
    repeatable_error,
    retry_after,
    submit_error,
    whole_file,
    words_of,
)
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Answer, Array, Line

try:
    import aiohttp
    import jsinfer.client as package
except ModuleNotFoundError as error:
    raise missing_extra(error, client="jsinfer") from None

# With an address too: what is still to be answered would be taken for left out.
_UNDER_WAY = ("validating", "queued", "in_progress", "finalizing", "cancelling")
_ENDED = ("failed", "cancelled", "expired", "error")
_EXPIRED = (401, 403, 404, 410)
_PIECE = 1 << 18
_CHAT_FIELDS = ("endpoint", "method", "body")
# The results may take long to come, but each piece of them may not.
_DOWNLOAD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
# The connection was not made, so nothing was sent.
_NEVER_MADE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_LOST = (aiohttp.ClientError, TimeoutError, ConnectionError)


def _print_nothing(*_: object, **__: object) -> None:
    """Instead of `print` in jsinfer, which writes the whole answer of a submission to stdout."""


# In its namespace alone: contextlib.redirect_stdout would catch what other tasks print meanwhile.
vars(package)["print"] = _print_nothing


class JsinferClient:
    """A BatchClient over jsinfer 0.2.1.

    jsinfer opens a connection for each call, waits 300 s for an answer, and ignores proxy variables (`trust_env` is
    False): where a proxy is the only way out, it cannot get out. The server takes no options.

    Attributes:
        server, keeps_labels: see BatchClient. A submission whose answer was lost cannot be looked up: there is no list.

    Raises:
        UserError: `base_url` is no URL, or the key cannot travel in a header.
    """

    keeps_labels = False

    def __init__(self, api_key: str, base_url: str = "", *, key_variable: str = "JSINFER_API_KEY") -> None:
        self._key = checked_key(api_key, variable=key_variable)
        self._key_variable = key_variable
        self._package = package.BatchInferenceClient(api_key=self._key)
        self._package.url = checked_base_url(base_url or self._package.url)
        self.server = f"jsinfer {self._package.url}"
        # jsinfer forgets an `await` where an answer is no JSON; the error itself is reported.
        warnings.filterwarnings("ignore", message="coroutine 'ClientResponse.text'", category=RuntimeWarning)

    def encode(self, line: Line) -> str:
        """See BatchClient; raises RefusedError for an unknown model, and for options, which it could not send."""
        request = line.request
        path = self.model_path(request.model)
        if request.options:
            raise RefusedError(f"jsinfer takes no options, and {sorted(request.options)} were given; leave them out")
        messages = list(request.messages)
        if request.endpoint == ACTIVATIONS:
            entry = self._package.line_entry_activations(line.custom_id, messages, list(request.module_names))
        elif request.endpoint == CHAT:
            entry = self._package.line_entry_chat_completions(line.custom_id, messages)
            # As its chat_completions() sends it, in that order; line_entry_chat_completions leaves the model out.
            entry = {"custom_id": entry["custom_id"], "model": path, **{n: entry[n] for n in _CHAT_FIELDS}}
        else:
            raise _unknown_endpoint(request.endpoint)
        return json.dumps(entry)

    def model_path(self, alias: str) -> str:
        """What the server calls a model; raises RefusedError for an unknown one."""
        models: dict[str, str] = self._package.models
        if alias not in models:
            raise RefusedError(f"jsinfer has no model {alias!r}; name one of {', '.join(models)} in transfer.models")
        return models[alias]

    async def upload(self, file: Path) -> str:
        """See BatchClient."""
        file_id = await self._repeatable(self._package.upload_file(str(file)), about="the input file")
        if not isinstance(file_id, str) or not file_id:
            raise RetryLaterError("the server gave no id for the uploaded file")
        return file_id

    async def submit(self, file_id: str, *, model: str, endpoint: str, label: str) -> str:
        """See BatchClient; the label is not kept."""
        self.model_path(model)
        calls = {CHAT: self._package.submit_chat_completions, ACTIVATIONS: self._package.submit_activations}
        if endpoint not in calls:
            raise _unknown_endpoint(endpoint)
        try:
            batch_id = await calls[endpoint](file_id, model)
        except Exception as error:
            raise self._submit_error(error) from None
        if not isinstance(batch_id, str) or not batch_id:
            raise UnclearError("the server took the batch and gave no id for it")
        return batch_id

    async def find(self, label: str) -> str | None:
        """Never to be called: the server keeps no labels."""
        raise RefusedError(f"jsinfer cannot look up the submission {label}; transfer.resubmit_lost=true sends it again")

    async def status(self, batch_id: str) -> BatchStatus:
        """See BatchClient; one that ended with an address of results is "completed": they were paid for."""
        body = await self._about_batch(self._package.get_batch(batch_id), batch_id)
        batch = body.get("batch") if isinstance(body, dict) else None
        if not isinstance(batch, dict) or not isinstance(batch.get("status"), str):
            raise RetryLaterError("the server's answer does not say where the batch stands")
        word, url = batch["status"], body.get("resultsUrl")
        errors = words_of(batch["errors"]) if batch.get("errors") else ""
        detail = self._line(f"{word}: {errors}" if errors else word)
        if isinstance(url, str) and url and word not in _UNDER_WAY:
            return BatchStatus(state="completed", detail=detail, results=(url,))
        if word == "completed":
            raise RetryLaterError(f"{detail}, but without an address of its results")
        return BatchStatus(state="ended" if word in _ENDED else "running", detail=detail)

    async def download(self, status: BatchStatus, into: Path) -> None:
        """See BatchClient; streamed. The address is signed, so the key is not sent along."""
        if not status.results:
            raise RetryLaterError("the batch has no address of its results yet")
        async with whole_file(into) as file:
            try:
                async with (
                    aiohttp.ClientSession(timeout=_DOWNLOAD_TIMEOUT) as session,
                    session.get(status.results[0], headers={"Accept-Encoding": "identity"}) as response,
                ):
                    self._check_download(response)
                    async for piece in response.content.iter_chunked(_PIECE):
                        file.write(piece)
            except aiohttp.ClientPayloadError as error:
                # aiohttp compares the bytes with Content-Length, and chunks with their frames.
                raise DamagedResultsError(f"the results broke off ({self._line(str(error))})") from None
            except _LOST as error:
                raise RetryLaterError(f"the results did not come ({self._reason(error)})") from None

    def read(self, file: Path, *, on_damaged: Callable[[str], None] | None = None) -> Iterator[Answer]:
        """See BatchClient."""
        for item in read_archive(file, on_damaged=on_damaged):
            yield self._answer(item)

    async def cancel(self, batch_id: str) -> None:
        """See BatchClient."""
        await self._about_batch(self._package.cancel_batch(batch_id), batch_id)

    async def close(self) -> None:
        """Nothing to let go of: every call has its own connection."""

    async def _repeatable(self, call: Awaitable[Any], *, about: str) -> Any:
        try:
            return await call
        except Exception as error:
            if failure := self._failure(error):
                raise repeatable_error(failure, key_variable=self._key_variable, about=about) from None
            raise self._no_answer(error) from None

    async def _about_batch(self, call: Awaitable[Any], batch_id: str) -> Any:
        try:
            return await call
        except Exception as error:
            if failure := self._failure(error):
                raise batch_error(failure, key_variable=self._key_variable, batch_id=batch_id) from None
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> Exception:
        if isinstance(_cause(error), (*_LOST, ValueError, LookupError)) or type(error) is Exception:
            return RetryLaterError(self._reason(error))
        return error

    def _submit_error(self, error: Exception) -> Exception:
        if failure := self._failure(error):
            return submit_error(failure, key_variable=self._key_variable, about="the batch")
        if isinstance(error, _NEVER_MADE):
            return RetryLaterError(self._reason(error))
        if isinstance(_cause(error), (*_LOST, ValueError, LookupError)) or type(error) is Exception:
            return UnclearError(self._reason(error))
        return error

    def _failure(self, error: Exception) -> Failure | None:
        cause = _cause(error)
        # With a cause of its own the status is aiohttp's word for an answer that is no HTTP.
        if not isinstance(cause, aiohttp.ClientResponseError) or cause.status < 400 or cause.__cause__ is not None:
            return None
        # "… Likely failed to submit batch: 428 {body}"
        _, _, body = str(error).partition(f"batch: {cause.status} ") if type(error) is Exception else ("", "", "")
        words = words_of(body) if body.strip() else cause.message
        headers: Mapping[str, str] = cause.headers or {}
        asked = headers.get("Retry-After")
        return Failure(
            status=cause.status,
            words=self._line(words),
            retry_after=retry_after(asked, headers.get("Date")),
            deliberate=asked is not None or is_json(body),
        )

    def _check_download(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        if response.status in _EXPIRED:
            raise RetryLaterError(f"results address expired ({response.status})")
        after = retry_after(response.headers.get("Retry-After"), response.headers.get("Date"))
        failure = Failure(status=response.status, words=self._line(response.reason or ""), retry_after=after)
        raise repeatable_error(failure, key_variable=self._key_variable, about="the results")

    def _reason(self, error: Exception) -> str:
        cause = _cause(error)
        if isinstance(cause, aiohttp.ContentTypeError):
            # Not str(): it holds the address.
            return self._line(f"the server's answer is no JSON ({cause.message})")
        if isinstance(cause, aiohttp.ClientResponseError):
            return self._line(f"the server's answer is no HTTP ({cause.message})")
        if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return "the server gave an address that is none"
        if isinstance(cause, _NEVER_MADE):
            return self._line(f"no connection to the server ({cause})")
        if isinstance(cause, _LOST):
            return self._line(f"the connection was lost ({str(cause) or type(cause).__name__})")
        return self._line(f"the server's answer cannot be read ({type(cause).__name__}: {cause})")

    def _line(self, text: str) -> str:
        return one_line(text, secret=self._key)

    def _answer(self, item: dict[str, Any]) -> Answer:
        custom_id = str(item["custom_id"])
        try:
            if item.get("error"):
                raise ValueError(words_of(item["error"]))
            if "activations" in item:
                return Answer(custom_id=custom_id, activations=_arrays(item["activations"]))
            return Answer(custom_id=custom_id, text=_last_text(item.get("messages")))
        except (ValueError, TypeError) as error:
            return Answer(custom_id=custom_id, error=self._line(str(error)) or "the server gave no reason")


def _unknown_endpoint(endpoint: str) -> RefusedError:
    return RefusedError(f"jsinfer has no endpoint {endpoint!r}; it has {CHAT} and {ACTIVATIONS}")


def _cause(error: BaseException) -> BaseException:
    # jsinfer wraps what happened in a bare Exception and leaves it as the context.
    return error.__context__ if type(error) is Exception and error.__context__ else error


def _last_text(messages: object) -> str:
    if not isinstance(messages, list):
        raise ValueError("the result holds neither messages nor activations nor an error")
    said = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not said:
        raise ValueError("the result holds no answer of the model")
    text = said[-1].get("content")
    if not isinstance(text, str | None):
        raise ValueError("the answer of the model is no text")
    return text or ""


def _arrays(modules: object) -> dict[str, Array]:
    if not isinstance(modules, dict) or not modules:
        raise ValueError("the result holds no activations")
    arrays = {name: np.asarray(rows, dtype=np.float32) for name, rows in modules.items()}
    for name, array in arrays.items():
        if array.ndim != 2:
            raise ValueError(f"the activations of {name} have the shape {array.shape}, not (tokens, width)")
    return arrays
