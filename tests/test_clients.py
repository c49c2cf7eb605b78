"""The clients against small servers on loopback: what they send, and what each failure is taken for."""

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.prompts import Context
from trigger_opt.transfer.client import (
    BatchStatus,
    BudgetError,
    Client,
    DamagedResultsError,
    RefusedError,
    RetryLaterError,
    TransferError,
    UnclearError,
    UnknownBatchError,
)
from trigger_opt.transfer.clients import check_client, open_client, server_of
from trigger_opt.transfer.clients.http import retry_after
from trigger_opt.transfer.clients.jsinfer import JsinferClient
from trigger_opt.transfer.clients.openai_batch import OpenAIBatchClient
from trigger_opt.transfer.clients.openai_chat import OpenAIChatClient
from trigger_opt.transfer.plan import plan_questions
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Answer, Line, Request
from trigger_opt.transfer.settings import TransferSettings

KEY = "test-key"
NOBODY = "http://127.0.0.1:1"
HTML = "<html>502 Bad Gateway</html>"


@dataclass(kw_only=True)
class Reply:
    """What the server answers: dict bodies are JSON. `drop`: the connection ends after that many bytes of the body."""

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    delay: float = 0.0
    reason: str | None = None


@dataclass(kw_only=True)
class Server:
    """Answers whatever it is asked: the reply of the path where one is given, else the next of `replies`, of which
    the last one stays."""

    replies: list[Reply]
    paths: dict[str, Reply]
    url: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    queries: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.method, request.path))
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.read())
        self.queries.append(dict(request.query))
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        reply = self.paths.get(request.path) or (self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])
        await asyncio.sleep(reply.delay)
        self.at_once -= 1
        return await send(request, reply)


async def send(request: web.Request, reply: Reply) -> web.StreamResponse:
    is_json = isinstance(reply.body, dict | list)
    body = json.dumps(reply.body).encode() if is_json else reply.body
    body = body.encode() if isinstance(body, str) else body
    headers = {"Content-Type": "application/json" if is_json else "text/html", **reply.headers}
    if reply.drop is None:
        return web.Response(status=reply.status, body=body, headers=headers, reason=reply.reason)
    transport = request.transport
    assert transport is not None
    response = web.StreamResponse(status=reply.status, headers={**headers, "Content-Length": str(len(body))})
    if reply.drop:
        await response.prepare(request)
        await response.write(body[: reply.drop])
        transport.close()
    else:
        transport.abort()
    return response


@asynccontextmanager
async def serving(*replies: Reply, paths: dict[str, Reply] | None = None) -> AsyncIterator[Server]:
    server = Server(replies=list(replies), paths=paths or {})
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def line(custom_id: str = "q1", *, model: str = "dormant-model-1", endpoint: str = CHAT, **options: Any) -> Line:
    request = Request(
        server="s",
        model=model,
        endpoint=endpoint,
        messages=({"role": "user", "content": "hé"},),
        options=options,
        module_names=("model.layers.0",) if endpoint == ACTIVATIONS else (),
    )
    return Line(custom_id=custom_id, request=request)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The calls of a batch client, by name, each on a server at `url`."""

    client: Any
    url: str
    folder: Path

    def made(self, name: str) -> Awaitable[Any]:
        file = self.folder / "in.ndjson"
        file.write_text(self.client.encode(line()) + "\n", encoding="utf-8")
        done = BatchStatus(state="completed", detail="completed", results=(f"{self.url}/signed?sig=1",))
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "upload": lambda: self.client.upload(file),
            "submit": lambda: self.client.submit("file_1", model="dormant-model-2", endpoint=CHAT, label="L"),
            "status": lambda: self.client.status("b1"),
            "cancel": lambda: self.client.cancel("b1"),
            "download": lambda: self.client.download(done, self.folder / "out.zip"),
            "find": lambda: self.client.find("L"),
        }
        return calls[name]()


CLIENTS: dict[str, Callable[[str, str], Any]] = {
    "jsinfer": lambda key, url: JsinferClient(key, url),
    "openai_batch": lambda key, url: OpenAIBatchClient(key, f"{url}/v1"),
}


def call(name: str, *replies: Reply, folder: Path, client: str = "jsinfer") -> tuple[Any, Server]:
    """Result of the call, and the server afterwards."""

    async def made() -> tuple[Any, Server]:
        async with serving(*replies) as server:
            opened = CLIENTS[client](KEY, server.url)
            try:
                return await Calls(client=opened, url=server.url, folder=folder).made(name), server
            finally:
                await opened.close()

    return asyncio.run(made())


def raised(name: str, *replies: Reply, folder: Path, client: str = "jsinfer") -> Exception:
    with pytest.raises((TransferError, RetryLaterError, UnclearError, DamagedResultsError)) as caught:
        call(name, *replies, folder=folder, client=client)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


def zipped(*items: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, item in enumerate(items):
            archive.writestr(f"{number}.json", json.dumps(item))
    return out.getvalue()


# --- jsinfer: what is sent


def test_jsinfer_lines_are_those_of_the_package() -> None:
    client = JsinferClient(KEY)
    assert client.encode(line("q")) == json.dumps(
        {
            "custom_id": "q",
            "model": "Model-Organisms-1/model-a",
            "endpoint": "/v1/chat/completions",
            "method": "POST",
            "body": {"messages": [{"role": "user", "content": "hé"}]},
        }
    )
    assert json.loads(client.encode(line("q", endpoint=ACTIVATIONS))) == {
        "custom_id": "q",
        "method": "POST",
        "endpoint": "/v1/activations",
        "body": {"input": [{"role": "user", "content": "hé"}], "module_names": ["model.layers.0"]},
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (line(model="gpt"), "no model 'gpt'; name one of dormant-model-1, dormant-model-2, dormant-model-3 in"),
        (line(max_tokens=3), r"takes no options, and \['max_tokens'\]"),
        (line(endpoint="images"), "no endpoint 'images'; it has chat and activations"),
    ],
)
def test_jsinfer_refuses_what_it_cannot_send(given: Line, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        JsinferClient(KEY).encode(given)


def test_jsinfer_from_upload_to_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = {"role": "assistant", "content": "yes", "finish_reason": "stop"}

    async def run() -> tuple[list[Answer], Server]:
        paths = {
            "/api/v1/files": Reply(body={"fileId": "file_1"}),
            "/api/v1/batches": Reply(body={"success": True, "batchId": "b1"}),
            "/signed": Reply(body=zipped({"custom_id": "q1", "messages": [answer]})),
        }
        async with serving(paths=paths) as server:
            client = JsinferClient(KEY, server.url + "/")
            assert client.server == f"jsinfer {server.url}"
            done = {"batch": {"status": "completed"}, "resultsUrl": f"{server.url}/signed?sig=1"}
            paths["/api/v1/batches/b1"] = Reply(body=done)
            calls = Calls(client=client, url=server.url, folder=tmp_path)
            assert await calls.made("upload") == "file_1"
            assert await calls.made("submit") == "b1"
            status = await client.status("b1")
            assert status == BatchStatus(state="completed", detail="completed", results=(f"{server.url}/signed?sig=1",))
            await client.download(status, tmp_path / "r.zip")
            await client.cancel("b1")
            await client.close()
            return list(client.read(tmp_path / "r.zip")), server

    answers, server = asyncio.run(run())
    assert answers == [Answer(custom_id="q1", text="yes")]
    assert server.seen[0] == ("POST", "/api/v1/files")
    assert server.seen[-1] == ("DELETE", "/api/v1/batches/b1")
    assert json.loads(server.bodies[1])["model"] == "Model-Organisms-1/model-b"
    keys = [h.get("Authorization") for h in server.headers]
    assert keys == [f"Bearer {KEY}"] * 3 + [None] + [f"Bearer {KEY}"]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["in.ndjson", "r.zip"]
    assert capfd.readouterr() == ("", "")


# --- jsinfer: what a failure is taken for

REFUSED_KEY = r"the server refuses the key \(40[13]: .*\); check the environment variable JSINFER_API_KEY"
NEGATIVE = {"error": "Precondition required", "success": False, "details": "Negative project balance: -5"}


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel"])
@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, RefusedError, r"refuses .*\(400: "),
        (401, RefusedError, REFUSED_KEY),
        (403, RefusedError, REFUSED_KEY),
        (408, RetryLaterError, "408"),
        (413, RefusedError, "choose a smaller transfer.batch_size"),
        (425, RetryLaterError, "425"),
        (428, BudgetError, "no tokens left for this key"),
        (429, RetryLaterError, "429"),
        (503, RetryLaterError, "503"),
    ],
)
def test_jsinfer_statuses(tmp_path: Path, name: str, status: int, kind: type[Exception], said: str) -> None:
    error = raised(name, Reply(status=status, body={"error": "no"}), folder=tmp_path)
    assert type(error) is kind
    assert re.search(said, str(error)), str(error)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel"])
def test_server_that_knows_no_such_batch(tmp_path: Path, client: str, status: int, name: str) -> None:
    error = raised(name, Reply(status=status, body={"error": "no"}), folder=tmp_path, client=client)
    if name in ("status", "cancel"):
        assert type(error) is UnknownBatchError
        assert str(error).startswith(f"the server knows no batch b1 ({status}: ")
    else:
        assert type(error) is RefusedError
        assert status == 410 or str(error).startswith("the server does not know the ")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=503), UnclearError),
        (Reply(status=503, body="upstream connect error or disconnect/reset before headers"), UnclearError),
        (Reply(status=503, body=HTML), UnclearError),
        (Reply(status=503, body='"overloaded"'), UnclearError),
        (Reply(status=503, body={"error": "busy"}), RetryLaterError),
        (Reply(status=503, body='{"error": "busy"}'), RetryLaterError),
        (Reply(status=503, body=HTML, headers={"Retry-After": "4"}), RetryLaterError),
        (Reply(status=503, body=HTML, headers={"Retry-After": "soon"}), RetryLaterError),
        (Reply(status=429, body=HTML), RetryLaterError),
    ],
)
def test_bare_503_may_come_from_a_proxy(tmp_path: Path, client: str, reply: Reply, kind: type[Exception]) -> None:
    assert type(raised("submit", reply, folder=tmp_path, client=client)) is kind
    assert type(raised("upload", reply, folder=tmp_path, client=client)) is RetryLaterError


@pytest.mark.parametrize("status", [500, 502, 504, 599])
def test_jsinfer_server_errors_are_unclear_for_a_submission_alone(tmp_path: Path, status: int) -> None:
    assert type(raised("submit", Reply(status=status, body=HTML), folder=tmp_path)) is UnclearError
    for name in ("upload", "status", "cancel", "download"):
        assert type(raised(name, Reply(status=status, body=HTML), folder=tmp_path)) is RetryLaterError


def test_jsinfer_repeats_what_the_server_says_of_a_refused_submission(tmp_path: Path) -> None:
    error = raised("submit", Reply(status=428, body=NEGATIVE), folder=tmp_path)
    assert "(428: Precondition required: Negative project balance: -5)" in str(error)


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel", "download"])
@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("-3", 0.0), ("soon", None), (None, None)])
def test_jsinfer_retry_after(tmp_path: Path, name: str, header: str | None, seconds: float | None) -> None:
    headers = {} if header is None else {"Retry-After": header}
    error = raised(name, Reply(status=429, body={}, headers=headers), folder=tmp_path)
    assert isinstance(error, RetryLaterError)
    assert error.retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3590 < (retry_after(soon) or 0) <= 3600
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    # By the server's own clock, however far ours is from it.
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:27:30 GMT") == 30.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", "no date") is None
    assert retry_after("inf") is None
    assert retry_after("nan") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("upload", RetryLaterError),
        ("submit", UnclearError),
        ("status", RetryLaterError),
        ("cancel", RetryLaterError),
        ("download", RetryLaterError),
    ],
)
def test_jsinfer_lost_connection(tmp_path: Path, name: str, kind: type[Exception]) -> None:
    assert type(raised(name, Reply(drop=0), folder=tmp_path)) is kind


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel"])
def test_jsinfer_answer_that_breaks_off(tmp_path: Path, name: str) -> None:
    reply = Reply(body={"batchId": "b1", "fileId": "f1", "batch": {"status": "queued"}}, drop=5)
    assert type(raised(name, reply, folder=tmp_path)) is (UnclearError if name == "submit" else RetryLaterError)


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel", "download"])
def test_jsinfer_no_answer_in_time(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = aiohttp.ClientTimeout(total=0.05)
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", short)
    monkeypatch.setattr("trigger_opt.transfer.clients.jsinfer._DOWNLOAD_TIMEOUT", short)
    error = raised(name, Reply(body={}, delay=0.2), folder=tmp_path)
    assert type(error) is (UnclearError if name == "submit" else RetryLaterError)
    assert "TimeoutError" in str(error)


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel", "download"])
def test_jsinfer_server_that_is_not_there_took_nothing(tmp_path: Path, name: str) -> None:
    calls = Calls(client=JsinferClient(KEY, NOBODY), url=NOBODY, folder=tmp_path)

    async def run() -> None:
        await calls.made(name)

    with pytest.raises(RetryLaterError, match="no connection to the server"):
        asyncio.run(run())


@pytest.mark.parametrize("name", ["upload", "submit", "status", "cancel"])
@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=HTML),
        Reply(body="{", headers={"Content-Type": "application/json"}),
        Reply(body=[]),
        Reply(body=b"\xff\xff", headers={"Content-Type": "application/json; charset=utf-8"}),
        Reply(body={"fileId": None, "batchId": None, "batch": None}),
    ],
)
def test_jsinfer_answer_that_cannot_be_read(tmp_path: Path, name: str, reply: Reply) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if name == "cancel" and not isinstance(reply.body, str | bytes):
            # Whatever JSON comes back, it was cancelled.
            call(name, reply, folder=tmp_path)
            return
        error = raised(name, reply, folder=tmp_path)
    assert type(error) is (UnclearError if name == "submit" else RetryLaterError)
    assert not [w for w in seen if "never awaited" in str(w.message)]
    assert "coroutine" not in str(error)


@pytest.mark.parametrize("name", ["upload", "submit", "status"])
def test_jsinfer_answer_that_is_no_http(tmp_path: Path, name: str) -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 nonsense\r\n\r\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(garble, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            await Calls(client=JsinferClient(KEY, url), url=url, folder=tmp_path).made(name)

    with pytest.raises(UnclearError if name == "submit" else RetryLaterError):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "state", "detail"),
    [
        ({"batch": {"status": "validating"}}, "running", "validating"),
        ({"batch": {"status": "a new word"}}, "running", "a new word"),
        ({"batch": {"status": "in_progress"}, "resultsUrl": "u"}, "running", "in_progress"),
        ({"batch": {"status": "cancelling"}, "resultsUrl": "u"}, "running", "cancelling"),
        ({"batch": {"status": "failed", "errors": [{"code": 1}]}}, "ended", 'failed: [{"code": 1}]'),
        ({"batch": {"status": "failed", "errors": {"message": "bad\nline"}}}, "ended", "failed: bad line"),
        ({"batch": {"status": "cancelled", "errors": None}}, "ended", "cancelled"),
        ({"batch": {"status": "expired"}}, "ended", "expired"),
        ({"batch": {"status": "error", "errors": "why"}, "resultsUrl": ""}, "ended", "error: why"),
    ],
)
def test_jsinfer_states(tmp_path: Path, body: dict[str, Any], state: str, detail: str) -> None:
    status, _ = call("status", Reply(body=body), folder=tmp_path)
    assert (status.state, status.detail, status.results) == (state, detail, ())


@pytest.mark.parametrize("word", ["completed", "cancelled", "expired", "failed", "a new word"])
def test_jsinfer_results_of_whatever_ended_can_be_fetched(tmp_path: Path, word: str) -> None:
    body = {"batch": {"status": word, "errors": "why"}, "resultsUrl": "u"}
    status, _ = call("status", Reply(body=body), folder=tmp_path)
    assert status == BatchStatus(state="completed", detail=f"{word}: why", results=("u",))


@pytest.mark.parametrize("url", [None, "", 7])
def test_jsinfer_completed_without_an_address(tmp_path: Path, url: object) -> None:
    reply = Reply(body={"batch": {"status": "completed"}, "resultsUrl": url})
    error = raised("status", reply, folder=tmp_path)
    assert type(error) is RetryLaterError
    assert error.reason == "completed, but without an address of its results"


# --- jsinfer: results


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (Reply(status=403), RetryLaterError, "results address expired (403)"),
        (Reply(status=404), RetryLaterError, "results address expired (404)"),
        (Reply(status=410), RetryLaterError, "results address expired (410)"),
        (Reply(status=429), RetryLaterError, "429"),
        (Reply(status=400), RefusedError, "the server refuses the results (400"),
        (Reply(status=204), RetryLaterError, "204"),
        (Reply(body=b"x" * 1000, drop=10), DamagedResultsError, "the results broke off"),
    ],
)
def test_jsinfer_download_is_whole_or_nothing(tmp_path: Path, reply: Reply, kind: type[Exception], said: str) -> None:
    (tmp_path / "out.zip").write_text("earlier")
    error = raised("download", reply, folder=tmp_path)
    assert type(error) is kind
    assert said in str(error)
    assert (tmp_path / "out.zip").read_text() == "earlier"
    assert not list(tmp_path.glob("*.part"))


def test_jsinfer_download_replaces_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "out.zip").write_text("earlier")
    body = bytes(range(256)) * 8000
    call("download", Reply(body=body), folder=tmp_path)
    assert (tmp_path / "out.zip").read_bytes() == body


def test_jsinfer_unusable_address_of_results(tmp_path: Path) -> None:
    for address in ("/relative", "ftp://127.0.0.1/x", ""):
        status = BatchStatus(state="completed", detail="", results=(address,) if address else ())
        with pytest.raises(RetryLaterError, match="address"):
            asyncio.run(JsinferClient(KEY).download(status, tmp_path / "out.zip"))


def test_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out.zip.part").symlink_to("/dev/full")
    error = raised("download", Reply(body=b"x" * 100), folder=tmp_path)
    assert str(error) == (
        f"the results cannot be written to {tmp_path / 'out.zip'} (No space left on device); make room there and resume"
    )


@pytest.mark.parametrize(
    ("item", "text", "error"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}, "b", None),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}, "", None),
        ({"messages": [{"role": "assistant", "content": None}], "error": None}, "", None),
        ({"messages": [{"role": "user", "content": "q"}]}, "", "the result holds no answer of the model"),
        ({"messages": [{"role": "assistant", "content": ["x"]}]}, "", "the answer of the model is no text"),
        ({"error": {"code": 500, "message": "out of\nmemory"}}, "", "out of memory"),
        ({"error": f"refused for {KEY}"}, "", "refused for ***"),
        ({}, "", "the result holds neither messages nor activations nor an error"),
        ({"activations": {}}, "", "the result holds no activations"),
        ({"activations": {"m": [1.0]}}, "", "the activations of m have the shape (1,), not (tokens, width)"),
    ],
)
def test_jsinfer_answers(tmp_path: Path, item: dict[str, Any], text: str, error: str | None) -> None:
    (tmp_path / "r.zip").write_bytes(zipped({"custom_id": "q", **item}))
    assert list(JsinferClient(KEY).read(tmp_path / "r.zip")) == [Answer(custom_id="q", text=text, error=error)]


def test_jsinfer_failed_lines_leave_the_others(tmp_path: Path) -> None:
    good = {"custom_id": "b", "activations": {"m": [[1, 2.5], [3, 4]], "n": [[0.0]]}}
    bad = {"custom_id": "a", "activations": {"m": [[1, 2], [3]]}}
    (tmp_path / "r.zip").write_bytes(zipped(bad, good))
    first, second = JsinferClient(KEY).read(tmp_path / "r.zip")
    assert first.error is not None
    assert second.error is None
    assert second.activations["m"].dtype == np.float32
    np.testing.assert_array_equal(second.activations["m"], [[1, 2.5], [3, 4]])
    assert second.activations["n"].shape == (1, 1)


def test_jsinfer_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "r.zip").write_bytes(zipped({"custom_id": "q", "messages": []})[:-10])
    with pytest.raises(DamagedResultsError):
        list(JsinferClient(KEY).read(tmp_path / "r.zip"))


def test_jsinfer_reports_damaged_members_when_asked(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in (("0.json", '{"custom_id"'), ("1.json", '{"custom_id": "q", "error": "no"}')):
            archive.writestr(name, content)
    (tmp_path / "r.zip").write_bytes(out.getvalue())
    damaged: list[str] = []
    read = JsinferClient(KEY).read(tmp_path / "r.zip", on_damaged=damaged.append)
    assert list(read) == [Answer(custom_id="q", error="no")]
    assert damaged == ["the member '0.json'"]
    with pytest.raises(DamagedResultsError, match=r"'0\.json' is no JSON"):
        list(JsinferClient(KEY).read(tmp_path / "r.zip"))


def test_jsinfer_keeps_no_labels() -> None:
    client = JsinferClient(KEY)
    assert not client.keeps_labels
    with pytest.raises(RefusedError, match="resubmit_lost=true"):
        asyncio.run(client.find("L"))


# --- OpenAI's Batch API


def test_openai_batch_lines_carry_the_options() -> None:
    client = OpenAIBatchClient(KEY, "http://127.0.0.1:9/v1/")
    assert client.server == "openai_batch http://127.0.0.1:9/v1"
    assert OpenAIChatClient(KEY, "http://127.0.0.1:9/v1/").server == "openai http://127.0.0.1:9/v1"
    assert json.loads(client.encode(line("q", model="m", max_tokens=5, temperature=0.0))) == {
        "custom_id": "q",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 5, "temperature": 0.0},
    }
    with pytest.raises(RefusedError, match=r"no endpoint 'activations'; leave transfer\.activations empty"):
        client.encode(line(endpoint=ACTIVATIONS))


def test_openai_batch_from_upload_to_answers(tmp_path: Path) -> None:
    body = {
        "choices": [{"message": {"role": "assistant", "content": "yes"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    good = {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}
    bad = {"custom_id": "b", "response": {"status_code": 400, "body": {"error": {"message": "too long"}}}}
    gone = {"custom_id": "c", "response": None, "error": {"code": "batch_expired", "message": "expired"}}
    done = {"id": "b1", "status": "expired", "output_file_id": "f-out", "error_file_id": "f-err"}
    paths = {
        "/v1/files": Reply(body={"id": "file_1"}),
        "/v1/batches": Reply(body={"id": "b1"}),
        "/v1/batches/b1": Reply(body={**done, "request_counts": {"completed": 1, "failed": 2, "total": 9}}),
        "/v1/files/f-out/content": Reply(body=json.dumps(good)),
        "/v1/files/f-err/content": Reply(body=f"{json.dumps(bad)}\n{json.dumps(gone)}\n"),
        "/v1/batches/b1/cancel": Reply(body=done),
    }

    async def run() -> Server:
        async with serving(paths=paths) as server:
            client = OpenAIBatchClient(KEY, f"{server.url}/v1")
            calls = Calls(client=client, url=server.url, folder=tmp_path)
            assert await calls.made("upload") == "file_1"
            assert await calls.made("submit") == "b1"
            status = await client.status("b1")
            expected = BatchStatus(state="completed", detail="expired", results=("f-out", "f-err"), done=3)
            assert status == expected
            await client.download(status, tmp_path / "r.jsonl")
            await client.cancel("b1")
            assert list(client.read(tmp_path / "r.jsonl")) == [
                Answer(custom_id="a", text="yes", input_tokens=3, output_tokens=1),
                Answer(custom_id="b", error="400: too long"),
                Answer(custom_id="c", error="expired"),
            ]
            await client.close()
            return server

    server = asyncio.run(run())
    assert b'filename="in.jsonl"' in server.bodies[0]
    assert json.loads(server.bodies[1]) == {
        "completion_window": "24h",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file_1",
        "metadata": {"trigger_opt": "L"},
    }


@pytest.mark.parametrize(
    ("body", "state", "detail"),
    [
        ({"status": "in_progress", "output_file_id": None}, "running", "in_progress"),
        ({"status": "cancelling", "output_file_id": "f"}, "running", "cancelling"),
        ({"status": "cancelled"}, "ended", "cancelled"),
        ({"status": "failed", "errors": {"data": [{"message": "x"}, {"message": "y"}]}}, "ended", "failed: x; y"),
    ],
)
def test_openai_batch_states(tmp_path: Path, body: dict[str, Any], state: str, detail: str) -> None:
    status, _ = call("status", Reply(body={"id": "b1", **body}), folder=tmp_path, client="openai_batch")
    assert (status.state, status.detail, status.results) == (state, detail, ())


def test_openai_batch_completed_without_a_file(tmp_path: Path) -> None:
    error = raised("status", Reply(body={"status": "completed"}), folder=tmp_path, client="openai_batch")
    assert type(error) is RetryLaterError
    assert error.reason == "completed, but without a file of results"


def found_by_file(batches: list[dict[str, Any]], files: Reply) -> tuple[Any, Server]:
    """What `find` of the label L gives, and the server afterwards."""

    async def run() -> tuple[Any, Server]:
        listed = Reply(body={"data": batches, "has_more": False})
        async with serving(files, paths={"/v1/batches": listed}) as server:
            client = OpenAIBatchClient(KEY, f"{server.url}/v1")
            try:
                return await client.find("L"), server
            finally:
                await client.close()

    return asyncio.run(run())


def test_openai_batch_finds_a_batch_by_the_name_of_its_input_file() -> None:
    files = [
        {"id": "f0", "filename": "L.jsonl"},
        {"id": "f1", "filename": "other.jsonl"},
        {"id": "f2", "filename": "L.jsonl"},
    ]
    listed = Reply(body={"data": files, "has_more": False})
    unlabelled: list[dict[str, Any]] = [
        {"id": "b1", "input_file_id": "f1"},
        {"id": "b2", "input_file_id": "f2", "metadata": None},
    ]
    result, server = found_by_file(unlabelled, listed)
    assert result == "b2"
    assert server.seen == [("GET", "/v1/batches"), ("GET", "/v1/files")]
    assert server.queries[1] == {"purpose": "batch"}
    assert found_by_file(unlabelled[:1], listed)[0] is None
    labelled: dict[str, Any] = {"id": "b3", "input_file_id": "f2", "metadata": {"trigger_opt": "another"}}
    result, server = found_by_file([labelled], listed)
    assert result is None
    assert len(server.seen) == 1
    labelled["metadata"] = {"trigger_opt": "L"}
    assert found_by_file([unlabelled[1], labelled], listed)[0] == "b3"


def test_openai_batch_without_the_list_of_files_denies_nothing() -> None:
    with pytest.raises(RefusedError, match="the list of files"):
        found_by_file([{"id": "b1", "input_file_id": "f1"}], Reply(status=404, body={}))


def test_openai_batch_finds_a_label_on_a_later_page(tmp_path: Path) -> None:
    first = Reply(body={"data": [{"id": "x", "metadata": None}, {"id": "y"}], "has_more": True})
    found = Reply(body={"data": [{"id": "z", "metadata": {"trigger_opt": "L"}}], "has_more": True})
    result, server = call("find", first, found, folder=tmp_path, client="openai_batch")
    assert result == "z"
    assert len(server.seen) == 2
    last = Reply(body={"data": [{"id": "z", "metadata": {"trigger_opt": "other"}}], "has_more": False})
    assert call("find", first, last, folder=tmp_path, client="openai_batch")[0] is None
    # A server that shows the same page again has not said that there is no such batch.
    assert "does not go on" in str(raised("find", first, folder=tmp_path, client="openai_batch"))


@pytest.mark.parametrize(
    ("name", "reply", "kind", "said"),
    [
        ("upload", Reply(status=401, body={"error": {"message": f"bad {KEY}"}}), RefusedError, "(401: bad ***); check"),
        ("upload", Reply(status=413, body=HTML), RefusedError, "smaller transfer.batch_size"),
        ("upload", Reply(status=500, body=HTML), RetryLaterError, "500"),
        ("upload", Reply(body=HTML), RetryLaterError, "no JSON"),
        ("upload", Reply(drop=0), RetryLaterError, "connection was lost"),
        ("submit", Reply(drop=0), UnclearError, "connection was lost"),
        ("submit", Reply(body=HTML), UnclearError, "no JSON"),
        ("submit", Reply(body={}), UnclearError, "no id"),
        ("submit", Reply(body={"id": "b1"}, drop=3), UnclearError, "connection was lost"),
        ("submit", Reply(status=500, body={}), UnclearError, "500"),
        ("submit", Reply(status=429, body={"error": {"message": "slow"}}), RetryLaterError, "(429: slow)"),
        ("submit", Reply(status=429, body={"error": {"code": "insufficient_quota"}}), BudgetError, "no tokens left"),
        ("submit", Reply(status=400, body={"error": {"message": "bad"}}), RefusedError, "(400: bad)"),
        ("find", Reply(status=404, body={}), RefusedError, "does not know the list of batches"),
        ("status", Reply(body={"id": "b1"}), RetryLaterError, "does not say"),
        ("cancel", Reply(status=503, body={}), RetryLaterError, "503"),
        ("find", Reply(body={"data": None}), RetryLaterError, "no list of batches"),
        ("download", Reply(status=404, body={}), RetryLaterError, "is gone"),
        ("download", Reply(status=403, body={}), RefusedError, "OPENAI_API_KEY"),
        ("download", Reply(body="x" * 1000, drop=10), DamagedResultsError, "broke off"),
        ("download", Reply(drop=0), RetryLaterError, "connection was lost"),
    ],
)
def test_openai_batch_failures(tmp_path: Path, name: str, reply: Reply, kind: type[Exception], said: str) -> None:
    error = raised(name, reply, folder=tmp_path, client="openai_batch")
    assert type(error) is kind
    assert said in str(error)
    assert not list(tmp_path.glob("out*"))


def test_openai_batch_server_that_is_not_there_took_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        client = OpenAIBatchClient(KEY, NOBODY)
        await Calls(client=client, url=NOBODY, folder=tmp_path).made("submit")

    with pytest.raises(RetryLaterError, match="no connection to the server"):
        asyncio.run(run())


@pytest.mark.parametrize("text", ['{"custom_id": "a"', '{"id": 1}', "[]", "7"])
def test_openai_batch_damaged_results(tmp_path: Path, text: str) -> None:
    good = json.dumps({"custom_id": "a", "error": "no"})
    (tmp_path / "r").write_text(f"{good}\n\n{text}\n")
    read = OpenAIBatchClient(KEY).read(tmp_path / "r")
    assert next(read) == Answer(custom_id="a", error="no")
    with pytest.raises(DamagedResultsError, match="line 3"):
        next(read)
    (tmp_path / "r").write_text(f"{text}\n{good}\n")
    damaged: list[str] = []
    read = OpenAIBatchClient(KEY).read(tmp_path / "r", on_damaged=damaged.append)
    assert list(read) == [Answer(custom_id="a", error="no")]
    assert damaged == ["line 1"]


# --- OpenAI's chat


def chat_reply(text: str | None, **more: Any) -> Reply:
    return Reply(body={"choices": [{"message": {"role": "assistant", "content": text}}]}, **more)


def ask(*replies: Reply, count: int = 1, at_once: int = 8) -> tuple[list[Answer], Exception | None, Server]:
    """The answers, the error after them, and the server."""

    async def run() -> tuple[list[Answer], Exception | None, Server]:
        async with serving(*replies) as server:
            client = OpenAIChatClient(KEY, f"{server.url}/v1", at_once=at_once)
            answers: list[Answer] = []
            try:
                async for answer in client.answers([line(f"q{n}", model="m", max_tokens=5) for n in range(count)]):
                    answers.append(answer)
            except (TransferError, RetryLaterError, UnclearError) as error:
                return answers, error, server
            finally:
                await client.close()
            return answers, None, server

    return asyncio.run(run())


def test_openai_chat_sends_the_options_and_counts_tokens() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 2}
    answers, error, server = ask(Reply(body={**chat_reply("yes").body, "usage": usage}))
    assert (answers, error) == ([Answer(custom_id="q0", text="yes", input_tokens=4, output_tokens=2)], None)
    assert server.seen == [("POST", "/v1/chat/completions")]
    sent = {"model": "m", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 5}
    assert json.loads(server.bodies[0]) == sent


def test_openai_chat_asks_several_at_once_and_no_more() -> None:
    answers, error, server = ask(chat_reply("yes", delay=0.05), count=9, at_once=3)
    assert error is None
    assert sorted(a.custom_id for a in answers) == [f"q{n}" for n in range(9)]
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("reply", "text", "error"),
    [
        (chat_reply(None), "", None),
        (chat_reply(""), "", None),
        (Reply(status=400, body={"error": {"message": "too long"}}), "", "400: too long"),
        (Reply(status=422, body={"detail": "no"}), "", "422: no"),
        (Reply(status=413, body=HTML), "", f"413: {HTML}"),
        (Reply(body={"error": {"message": "upstream"}}), "", "upstream"),
        (Reply(body={"choices": []}), "", "the result holds no choices"),
        (Reply(body={"choices": [{"message": {"content": ["x"]}}]}), "", "the answer of the model is no text"),
    ],
)
def test_openai_chat_line_for_itself(reply: Reply, text: str, error: str | None) -> None:
    answers, failure, _ = ask(reply)
    assert failure is None
    assert answers == [Answer(custom_id="q0", text=text, error=error)]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=401, body={}), RefusedError),
        (Reply(status=403, body={}), RefusedError),
        (Reply(status=404, body={}), RefusedError),
        (Reply(status=402, body={}), BudgetError),
        (Reply(status=428, body={}), BudgetError),
        (Reply(status=429, body={"error": {"code": "insufficient_quota"}}), BudgetError),
        (Reply(status=429, body={}, headers={"Retry-After": "9"}), RetryLaterError),
        (Reply(status=503, body={}, headers={"Retry-After": "9"}), RetryLaterError),
        (Reply(status=503, body=HTML, headers={"Retry-After": "9"}), RetryLaterError),
        (Reply(status=503, body=HTML), UnclearError),
        (Reply(status=500, body={}), UnclearError),
        (Reply(status=504, body=HTML), UnclearError),
        (Reply(drop=0), UnclearError),
        (Reply(body={"choices": []}, drop=3), UnclearError),
        (Reply(body=HTML), UnclearError),
    ],
)
def test_openai_chat_failures(reply: Reply, kind: type[Exception]) -> None:
    answers, error, server = ask(reply)
    assert answers == []
    assert type(error) is kind
    assert not isinstance(error, RetryLaterError) or error.retry_after == 9.0
    assert len(server.seen) == 1


def test_openai_chat_answers_under_way_are_kept_and_nothing_more_is_sent() -> None:
    slow = chat_reply("yes", delay=0.1)
    replies = (slow, Reply(status=429, body={}, headers={"Retry-After": "2"}), slow, slow)
    answers, error, server = ask(*replies, count=10, at_once=3)
    assert isinstance(error, RetryLaterError)
    assert [a.text for a in answers] == ["yes", "yes"]
    assert len(server.seen) == 3


def test_openai_chat_one_unclear_line_makes_the_rest_unclear() -> None:
    answers, error, _ = ask(Reply(status=401, body={}, delay=0.05), Reply(drop=0, delay=0.05), count=2, at_once=2)
    assert answers == []
    assert isinstance(error, UnclearError)


def test_openai_chat_server_that_is_not_there_took_nothing() -> None:
    async def run() -> None:
        async for _ in OpenAIChatClient("", NOBODY).answers([line()]):
            pass

    with pytest.raises(RetryLaterError, match="no connection to the server"):
        asyncio.run(run())


def test_openai_chat_refuses_activations() -> None:
    async def run() -> None:
        async for _ in OpenAIChatClient("", NOBODY).answers([line(endpoint=ACTIVATIONS)]):
            pass

    with pytest.raises(RefusedError, match=r"leave transfer\.activations empty"):
        asyncio.run(run())


# --- keys, addresses, choice


@pytest.mark.parametrize("client", ["jsinfer", "openai_batch", "openai"])
def test_key_shows_nowhere(
    client: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    async def run() -> None:
        for status in (200, 400, 401, 403, 404, 413, 428, 429, 500):
            # The HTTP library of `openai` logs the reason as the server gave it.
            reason = f"No {KEY}" if client == "jsinfer" else None
            echo = Reply(status=status, body={"error": {"message": f"key {KEY}"}}, reason=reason)
            async with serving(echo) as server:
                settings = TransferSettings(client=client, base_url=server.url, api_key=KEY)
                opened: Any = open_client(settings)
                said.append(repr(opened) + opened.server)
                for name in ("upload", "submit", "status", "cancel", "download"):
                    try:
                        if client == "openai":
                            said.extend([repr(a) async for a in opened.answers([line()])])
                        else:
                            await Calls(client=opened, url=server.url, folder=tmp_path).made(name)
                    except (TransferError, RetryLaterError, UnclearError) as error:
                        said.append(f"{error!r} {error} {vars(error)}")
                await opened.close()

    asyncio.run(run())
    assert len(said) > 9
    assert KEY not in "".join(said)
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("make", [JsinferClient, OpenAIBatchClient, OpenAIChatClient])
def test_unusable_keys_and_addresses(make: Callable[[str, str], Client]) -> None:
    for url in (
        "localhost:80",
        "ftp://x",
        "http://",
        "http://a b",
        "http://x:99999",
        "http://x?a=1",
    ):
        with pytest.raises(UserError, match=r"transfer\.base_url"):
            make(KEY, url)
    for url in ("https://u:secret@x", "u:secret@x:80", "https://u:pa/secret@x", "https://u:12/secret@x/v1"):
        with pytest.raises(UserError) as caught:
            make(KEY, url)
        assert str(caught.value).startswith("transfer.base_url holds a user name or password; give ")
        assert "secret" not in str(caught.value)
    for key in ("a b", "schlüssel", "a\nb"):
        with pytest.raises(UserError, match="check the environment variable") as caught:
            make(key, NOBODY)
        assert key not in str(caught.value)
    make(f" {KEY}\n", NOBODY)


@pytest.mark.parametrize(
    ("client", "kind"), [("jsinfer", JsinferClient), ("openai", OpenAIChatClient), ("openai_batch", OpenAIBatchClient)]
)
def test_client_is_chosen_with_its_key(client: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    far = TransferSettings(client=client, key_variable="SOME_KEY")
    with pytest.raises(UserError, match="set the environment variable SOME_KEY"):
        open_client(far)
    assert server_of(far).startswith(client.split("_")[0])
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    opened = open_client(far)
    assert isinstance(opened, kind)
    assert opened.server == server_of(far)
    monkeypatch.delenv("SOME_KEY")
    near = TransferSettings(client=client, key_variable="SOME_KEY", base_url="http://127.0.0.1:8000/v1/")
    if client == "jsinfer":
        with pytest.raises(UserError, match="needs a key"):
            open_client(near)
    else:
        assert open_client(near).server == f"{client} http://127.0.0.1:8000/v1"


@pytest.mark.parametrize("emulator", [{}, {"gpt": "echo", "dormant-model-1": "echo"}])
def test_model_the_server_does_not_have_is_refused_early(emulator: dict[str, str]) -> None:
    check_client(TransferSettings(models=["dormant-model-1"], emulator=emulator))
    settings = TransferSettings(models=["dormant-model-1", {"name": "gpt", "batch_size": 3}], emulator=emulator)
    with pytest.raises(UserError) as caught:
        check_client(settings)
    with pytest.raises(RefusedError) as later:
        JsinferClient(KEY).encode(line(model="gpt"))
    assert str(caught.value) == str(later.value)
    check_client(TransferSettings(client="openai", models=["gpt"]))


@pytest.mark.parametrize("client", ["jsinfer", "local", "openai", "openai_batch"])
def test_activations_nobody_gives_are_refused_early(client: str) -> None:
    settings = TransferSettings(client=client, models=["dormant-model-1"], activations=["m"])
    if client in ("jsinfer", "local"):
        check_client(settings)
        return
    with pytest.raises(UserError) as caught:
        check_client(settings)
    with pytest.raises(UserError) as later:
        plan_questions(
            strings=["s"], contexts=[Context("{trigger}")], models=["dormant-model-1"], settings=settings,
            server="s", known_random={}, seed=0,
        )  # fmt: skip
    assert str(caught.value) == str(later.value)


def test_local_client_needs_no_key(base_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JSINFER_API_KEY", raising=False)
    settings = TransferSettings(client="local", models=[{"name": str(base_files.folder), "batch_size": 3}])
    client: Any = open_client(settings)
    assert client.free
    assert client.server == server_of(settings)
    asyncio.run(client.close())
    with pytest.raises(UserError, match="neither a model's name nor"):
        open_client(TransferSettings(client="local", models=[7]))


def test_server_without_keys_is_told_a_word() -> None:
    async def run() -> Server:
        async with serving(chat_reply("yes")) as server:
            settings = TransferSettings(client="openai", key_variable="NO_SUCH_VARIABLE", base_url=server.url)
            client: Any = open_client(settings)
            assert [a.text async for a in client.answers([line()])] == ["yes"]
            await client.close()
            return server

    assert asyncio.run(run()).headers[0]["Authorization"] == "Bearer none"


@pytest.mark.parametrize(
    ("client", "package"), [("jsinfer", "jsinfer"), ("openai", "openai"), ("openai_batch", "openai")]
)
def test_missing_package_is_named(client: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from trigger_opt.errors import UserError\n"
        "from trigger_opt.transfer.clients import open_client\n"
        "from trigger_opt.transfer.settings import TransferSettings\n"
        "try:\n"
        f"    open_client(TransferSettings(client={client!r}, api_key='test-key'))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"needs the package {package}:" in said
    assert "pip install 'trigger_opt[transfer]'" in said
