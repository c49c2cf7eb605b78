"""What both OpenAI clients share: the connection, what its errors mean, and the answer in a chat completion."""

from collections.abc import Awaitable
from typing import Any

from trigger_opt.transfer.client import RetryLaterError, UnclearError
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
    words_of,
)
from trigger_opt.transfer.requests import Answer, Request

try:
    import httpx2
    import openai
except ModuleNotFoundError as error:
    raise missing_extra(error, client="openai") from None

# ValueError: an answer that is no JSON.
ERRORS = (openai.APIError, httpx2.HTTPError, ValueError)
# The stream ended before the body did.
BROKE_OFF = httpx2.RemoteProtocolError
# The connection was not made, so nothing was sent.
_NEVER_MADE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class OpenAIConnection:
    """The `openai` package on one server, without retries of its own.

    It waits 5 s for a connection and 600 s for an answer, and goes through the proxies of the environment. Without a
    `base_url` the package chooses: OPENAI_BASE_URL, or its own.

    Attributes:
        url: of the server, without a trailing slash.

    Raises:
        UserError: `base_url` is no URL, or the key cannot travel in a header.
    """

    def __init__(self, api_key: str, base_url: str, *, key_variable: str) -> None:
        self._key = checked_key(api_key, variable=key_variable)
        self._key_variable = key_variable
        # The package wants a key; servers such as vLLM want none.
        self.package = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=checked_base_url(base_url) if base_url else None, max_retries=0
        )
        self.url = str(self.package.base_url).rstrip("/")

    async def body(self, call: Awaitable[Any]) -> dict[str, Any]:
        """The JSON object that a raw call got; raises one of `ERRORS`."""
        response = await call
        body = response.http_response.json()
        if not isinstance(body, dict):
            raise ValueError("no JSON object")
        return body

    def failure(self, error: Exception) -> Failure | None:
        """The refusal in `error`; None when there was no answer, or none that can be read."""
        if not isinstance(error, openai.APIStatusError):
            return None
        asked = error.response.headers.get("retry-after")
        words = words_of(error.body) if error.body else error.response.reason_phrase
        return Failure(
            status=error.status_code,
            words=self.line(words),
            retry_after=retry_after(asked, error.response.headers.get("date")),
            code=error.code or "",
            deliberate=asked is not None or is_json(error.response.text),
        )

    def repeatable_error(self, error: Exception, *, about: str) -> Exception:
        """What `error` means for a call that may be made again."""
        if failure := self.failure(error):
            return repeatable_error(failure, key_variable=self._key_variable, about=about)
        return RetryLaterError(self.reason(error))

    def batch_error(self, error: Exception, *, batch_id: str) -> Exception:
        """What `error` means for a call about one batch."""
        if failure := self.failure(error):
            return batch_error(failure, key_variable=self._key_variable, batch_id=batch_id)
        return RetryLaterError(self.reason(error))

    def submit_error(self, error: Exception, *, about: str) -> Exception:
        """What `error` means for a call that costs."""
        if failure := self.failure(error):
            return submit_error(failure, key_variable=self._key_variable, about=about)
        if isinstance(error.__cause__, _NEVER_MADE):
            return RetryLaterError(self.reason(error))
        return UnclearError(self.reason(error))

    def reason(self, error: Exception) -> str:
        """Why there was no answer, one line."""
        cause = error.__cause__ or error
        said = str(cause) or type(cause).__name__
        if isinstance(cause, _NEVER_MADE):
            return self.line(f"no connection to the server ({said})")
        if isinstance(error, ValueError):
            return self.line(f"the server's answer is no JSON ({said})")
        return self.line(f"the connection was lost ({said})")

    def line(self, text: str) -> str:
        """`text` in one line, without the key."""
        return one_line(text, secret=self._key)

    def answer(self, custom_id: str, body: object) -> Answer:
        """The answer in the body of a chat completion; with an error when there is none in it."""
        if not isinstance(body, dict):
            return Answer(custom_id=custom_id, error="the result is no chat completion")
        try:
            message = body["choices"][0]["message"]
            text = message.get("content") or message.get("refusal") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            said = words_of(body["error"]) if body.get("error") else "the result holds no choices"
            return Answer(custom_id=custom_id, error=self.line(said))
        if not isinstance(text, str):
            return Answer(custom_id=custom_id, error="the answer of the model is no text")
        usage = body.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return Answer(
            custom_id=custom_id,
            text=text,
            input_tokens=_count(counts.get("prompt_tokens")),
            output_tokens=_count(counts.get("completion_tokens")),
        )


def chat_body(request: Request) -> dict[str, Any]:
    """The body of a chat completion: model, messages and whatever the options hold."""
    return {"model": request.model, "messages": list(request.messages), **request.options}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
