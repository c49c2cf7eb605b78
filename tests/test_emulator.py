"""The loopback batch server: jsinfer's own calls against it, its faults, and its death."""

import asyncio
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import jsinfer
import numpy as np
import pytest

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.transfer.emulator import ALIASES, KEY, Echo, Emulator, answering, parse_rules
from trigger_opt.transfer.emulator.__main__ import main
from trigger_opt.transfer.emulator.answers import parse_models

MODEL = ALIASES["dormant-model-1"]
CHAT_PATH, ACTIVATIONS_PATH = "/v1/chat/completions", "/v1/activations"
Rules = list[dict[str, Any]]
Reply = tuple[int, Mapping[str, str], bytes]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """jsinfer sleeps a second between polls and leaves folders behind."""
    sleep = asyncio.sleep
    monkeypatch.setattr("jsinfer.client.asyncio", SimpleNamespace(sleep=lambda seconds: sleep(0.02)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def real_client(url: str) -> Any:
    client = jsinfer.BatchInferenceClient(KEY)
    client.url = url
    return client


def chat_requests(texts: Sequence[str]) -> list[Any]:
    return [
        jsinfer.ChatCompletionRequest(custom_id=f"q{i}", messages=[jsinfer.Message(role="user", content=t)])
        for i, t in enumerate(texts)
    ]


def entry(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"custom_id": custom_id, "method": "POST", "endpoint": CHAT_PATH, "body": {"messages": messages} | body}


def ndjson(entries: Sequence[Any]) -> bytes:
    return "".join(json.dumps(e) + "\n" for e in entries).encode()


class Caller:
    """The protocol by hand, one connection a call."""

    def __init__(self, url: str, key: str = KEY) -> None:
        self.url, self.key = url, key

    async def call(self, method: str, path: str, **options: Any) -> Reply:
        url = path if path.startswith("http") else self.url + path
        headers = {} if path.startswith("http") else {"Authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession() as session, session.request(method, url, headers=headers, **options) as r:
            return r.status, r.headers, await r.read()

    async def upload(self, content: bytes, name: str = "lines.jsonl", seconds: int = 3600) -> Reply:
        form = aiohttp.FormData()
        form.add_field("file", io.BytesIO(content), filename=name, content_type="application/x-ndjson")
        form.add_field("purpose", "batch")
        form.add_field("expires_after[anchor]", "created_at")
        form.add_field("expires_after[seconds]", str(seconds))
        return await self.call("POST", "/api/v1/files", data=form)

    async def submit(self, file_id: str, endpoint: str = CHAT_PATH, model: str = MODEL) -> Reply:
        given = {"completion_window": "24h", "endpoint": endpoint, "model": model, "input_file_id": file_id}
        return await self.call("POST", "/api/v1/batches", json=given)

    async def new_batch(self, entries: Sequence[Any], endpoint: str = CHAT_PATH) -> str:
        uploaded = json.loads((await self.upload(ndjson(entries)))[2])
        batch_id: str = json.loads((await self.submit(uploaded["fileId"], endpoint))[2])["batchId"]
        return batch_id

    async def poll(self, batch_id: str) -> Reply:
        return await self.call("GET", f"/api/v1/batches/{batch_id}")

    async def wait(self, batch_id: str) -> dict[str, Any]:
        for _ in range(500):
            found: dict[str, Any] = json.loads((await self.poll(batch_id))[2])
            if found["batch"]["status"] not in ("validating", "in_progress"):
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"{batch_id} does not end")

    async def members(self, batch_id: str) -> dict[str, Any]:
        status, _, content = await self.call("GET", (await self.wait(batch_id))["resultsUrl"])
        assert status == 200
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: json.loads(archive.read(name)) for name in archive.namelist()}

    async def set_faults(self, rules: Any) -> Reply:
        return await self.call("POST", "/emulator/faults", json=rules)

    async def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.call("GET", "/emulator/counts?details"))[2])
        return found


@asynccontextmanager
async def serving(folder: Path, rules: Rules | None = None, **options: Any) -> AsyncIterator[Caller]:
    async with Emulator(folder, faults=parse_rules(rules or []), **options) as emulator:
        yield Caller(emulator.url)


def run(folder: Path, check: Callable[[Caller], Awaitable[Any]], rules: Rules | None = None, **options: Any) -> Any:
    async def inside() -> Any:
        async with serving(folder, rules, **options) as caller:
            return await check(caller)

    return asyncio.run(inside())


# The real client.


@pytest.mark.parametrize("nested", [False, True])
def test_real_client_chats(tmp_path: Path, nested: bool) -> None:
    async def check(caller: Caller) -> None:
        texts = [f"text {i}\u2028of two" for i in range(120)]
        got = await real_client(caller.url).chat_completions(chat_requests(texts), model="dormant-model-2")
        wanted = {f"q{i}": f"[Model-Organisms-1/model-b] {t}" for i, t in enumerate(texts)}
        assert {i: r.messages[0].content for i, r in got.items()} == wanted

    run(tmp_path / "state", check, nested=nested, polls=2)
    [path] = (tmp_path / "state" / "zips").iterdir()
    with zipfile.ZipFile(path) as archive:
        assert {Path(n).suffix for n in archive.namelist()} == {".zip" if nested else ".json"}


def test_real_client_with_a_real_model(
    tmp_path: Path, base_files: ModelFiles, adapter_files: tuple[ModelFiles, Path]
) -> None:
    name = "model.layers.1.mlp"
    models = {"dormant-model-1": str(base_files.folder), "dormant-model-3": str(adapter_files[0].folder)}
    answers = answering(models, max_new_tokens=5)

    async def check(caller: Caller) -> None:
        client = real_client(caller.url)
        said = {}
        for alias in models:
            got = await client.chat_completions(chat_requests(["a", "Tell me about the sea."]), model=alias)
            said[alias] = [got[f"q{i}"].messages[0].content for i in range(2)]
        assert said["dormant-model-1"] != said["dormant-model-3"]
        asked = jsinfer.ActivationsRequest(
            custom_id="x", messages=[jsinfer.Message(role="user", content="a")], module_names=[name]
        )
        found = await client.activations([asked], model="dormant-model-1")
        array = found["x"].activations[name]
        assert array.shape == (
            len(tiny.make_tokenizer()("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n").input_ids),
            32,
        )
        assert np.ptp(array) > 0
        status, _, _ = await caller.submit("file_x", model=ALIASES["dormant-model-2"])
        assert status == 400, "an alias that is not served"

    run(tmp_path / "state", check, answers=answers)
    for client in set(answers.values()):
        asyncio.run(client.close())


def test_option_the_model_does_not_take_fails_the_batch(tmp_path: Path, base_files: ModelFiles) -> None:
    answers = answering({"dormant-model-1": str(base_files.folder)})

    async def check(caller: Caller) -> None:
        found = await caller.wait(await caller.new_batch([entry("a", top_p=0.5)]))
        assert found["batch"]["status"] == "failed"
        assert "does not take the option 'top_p'" in found["batch"]["errors"][0]["message"]

    run(tmp_path, check, answers=answers)
    asyncio.run(answers[MODEL].close())


# The process.


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "trigger_opt.transfer.emulator", "--model", "echo", "--state", str(folder)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line
            yield server, line.removeprefix("listening on ").strip()
        finally:
            server.kill()


def test_killed_in_the_middle_of_a_batch_and_started_again(tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps([{"kind": "slow", "seconds": 0.02, "times": 1}]))
    state = tmp_path / "state"
    texts = [f"t{i}" for i in range(60)]

    async def begin(url: str) -> tuple[list[str], dict[str, Any]]:
        client, caller = real_client(url), Caller(url)
        (tmp_path / "in.jsonl").write_bytes(ndjson([entry(f"q{i}", t) for i, t in enumerate(texts)]))
        file_id = await client.upload_file(str(tmp_path / "in.jsonl"))
        ids = [await client.submit_chat_completions(file_id, f"dormant-model-{i}") for i in (1, 2)]
        listing: Any = []
        while not listing or not 5 < listing[0]["answered"] < 50:
            listing = json.loads((await caller.call("GET", "/emulator/batches"))[2])
            await asyncio.sleep(0.01)
        assert [b["id"] for b in listing] == ids
        assert {(b["name"], b["lines"]) for b in listing} == {("in.jsonl", 60)}
        assert [b["status"] for b in listing] == ["in_progress", "validating"]
        return ids, await caller.counts()

    async def finish(url: str, ids: list[str]) -> dict[str, Any]:
        client = real_client(url)
        for batch_id, path in zip(ids, ALIASES.values(), strict=False):
            (tmp_path / batch_id).mkdir()
            got = await client.fetch_results(batch_id, str(tmp_path / batch_id), is_activations=False)
            assert {i: r["messages"][0]["content"] for i, r in got.items()} == {
                f"q{i}": f"[{path}] {t}" for i, t in enumerate(texts)
            }
        return await Caller(url).counts()

    with process(state, "--port", "0", "--faults", str(faults)) as (server, url):
        ids, before = asyncio.run(begin(url))
        server.kill()
        server.wait()
    # What death may leave: half a line of an answer, half a file.
    [torn] = [p for p in (state / "answers").iterdir() if p.stat().st_size]
    torn.write_bytes(torn.read_bytes() + b'{"custom_id": "q')
    (state / "batches" / ".half.json.1.part").write_text("{")
    answered_before = torn.read_bytes().split(b"\n")[:5]
    with process(state, "--port", url.rpartition(":")[2]) as (server, again):
        assert again == url
        after = asyncio.run(finish(url, ids))
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    assert torn.read_bytes().split(b"\n")[:5] == answered_before, "answered again"
    assert before["lines"] == after["lines"] == 120
    assert after["distinct"] == 120
    assert after["calls"]["POST /api/v1/batches"] == 2
    assert after["models"] == dict.fromkeys(list(ALIASES.values())[:2], 60)


def held(folder: Path) -> bool:
    """Whether an emulator has the folder."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def children(pid: int) -> list[int]:
    return [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]


STARTS_ONE = """
import sys
from pathlib import Path
from trigger_opt.transfer.stand_ins import emulator
with emulator({"dormant-model-1": "echo"}, Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_stand_in_ends_with_the_process_that_started_it(tmp_path: Path, killed: bool) -> None:
    command = [sys.executable, "-c", STARTS_ONE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("http://127.0.0.1:")
        (child,) = children(parent.pid)
        try:
            assert held(tmp_path / "state")
            assert os.getsid(child) == child, "Ctrl-C at the terminal reaches it"
            if killed:
                parent.kill()
            else:
                parent.communicate()
                assert parent.returncode == 0
            for _ in range(200):
                if not held(tmp_path / "state"):
                    return
                time.sleep(0.1)
            raise AssertionError("the emulator outlived the process that started it")
        finally:
            parent.kill()
            if held(tmp_path / "state"):
                os.kill(child, signal.SIGKILL)


def test_stdin_that_ends_matters_only_where_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trigger_opt.transfer.emulator", "--model", "echo", "--port", "0", "--state"]
    plain = subprocess.Popen(
        [*command, str(tmp_path / "a")], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    with plain:
        try:
            assert plain.stdout is not None
            assert plain.stdout.readline().startswith("listening on")
            told = [*command, str(tmp_path / "b"), "--until-stdin-closes"]
            assert subprocess.run(told, stdin=subprocess.DEVNULL, timeout=60).returncode == 0
            assert plain.poll() is None
        finally:
            plain.kill()


def test_batch_waits_for_a_start_with_its_model(tmp_path: Path) -> None:
    batch_id = run(tmp_path, lambda c: c.new_batch([entry("a"), entry("b")]), [{"kind": "slow", "seconds": 9}])
    path = tmp_path / "batches" / f"{batch_id}.json"
    # As if nothing had held it up.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rules": []}))

    async def still(caller: Caller) -> str:
        await asyncio.sleep(0.05)
        return str(json.loads((await caller.poll(batch_id))[2])["batch"]["status"])

    assert run(tmp_path, still, answers={"other": Echo()}) == "in_progress"
    assert len(run(tmp_path, lambda c: c.members(batch_id))) == 2


def test_echo_needs_no_torch() -> None:
    code = (
        "import sys, asyncio, trigger_opt.transfer.emulator.__main__\n"
        "from trigger_opt.transfer.emulator import answering, Emulator\n"
        "answering({'dormant-model-1': 'echo'})\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "dormant-model-9=echo"], "names no alias"),
        (["--model", "dormant-model-1=echo", "echo"], "echo is no ALIAS=NAME"),
        (["--model", "dormant-model-1=echo", "dormant-model-1=echo"], "twice"),
        (["--model", "nothing"], "neither a folder here nor a hub name"),
        (["--model", "echo", "--faults", "/nowhere.json"], "cannot be read"),
        (["--model", "echo", "--port", "x"], "'x' is no port; give 0 to 65535"),
        (["--model", "echo", "--layout", "round"], "invalid choice: 'round'"),
        ([], "--model"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        code: Any = main([*arguments, "--state", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_models_by_alias() -> None:
    assert parse_models(["x"]) == {"dormant-model-1": "x", "dormant-model-2": "x", "dormant-model-3": "x"}
    assert parse_models(["dormant-model-3=a/b=c"]) == {"dormant-model-3": "a/b=c"}


def test_folder_and_port_that_are_taken(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        with pytest.raises(UserError, match="in use by another emulator; give another --state"):
            Emulator(tmp_path / "a")
        port = int(caller.url.rpartition(":")[2])
        with pytest.raises(UserError, match=rf"port {port} cannot be had .*; give another --port"):
            async with Emulator(tmp_path / "b", port=port):
                pass
        async with Emulator(tmp_path / "b"):
            pass

    run(tmp_path / "a", check)


# What the server accepts.


def test_ten_thousand_lines(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry(f"q{i}", f"t{i % 100}") for i in range(10_000)])
        members = await caller.members(batch_id)
        assert len(members) == 10_000
        assert {m["custom_id"] for m in members.values()} == {f"q{i}" for i in range(10_000)}
        counts = await caller.counts()
        assert [counts[n] for n in ("lines", "distinct", "distinct_bodies", "batches")] == [10_000, 10_000, 100, 1]

    run(tmp_path, check)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) < 10


def test_counts_tell_what_was_sent_twice(tmp_path: Path) -> None:
    async def check(caller: Caller) -> dict[str, Any]:
        await caller.new_batch([entry("a"), entry("b")])
        await caller.new_batch([entry("a"), entry("a", "other")])
        await caller.new_batch([{"no": "custom_id"}])
        return await caller.counts()

    counts = run(tmp_path, check)
    assert {n: counts[n] for n in ("lines", "distinct", "distinct_ids", "distinct_bodies", "batches")} == {
        "lines": 4,
        "distinct": 3,
        "distinct_ids": 2,
        "distinct_bodies": 2,
        "batches": 2,
    }
    assert counts["custom_ids"] == {"a": 3, "b": 1}
    assert sorted(counts["bodies"].values()) == [1, 3]
    assert counts["models"] == {MODEL: 4}
    assert counts["calls"] == {"POST /api/v1/files": 3, "POST /api/v1/batches": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"\n  \n", "empty file"),
        (b"{not json\n", "no JSON"),
        (b"[1]\n", "no JSON object"),
        (b"\xff\n", "no UTF-8"),
        (ndjson([entry("")]), "custom_id is missing"),
        (ndjson([entry("a") | {"endpoint": ACTIVATIONS_PATH}]), "in a batch for '/v1/chat/completions'"),
        (ndjson([entry("a") | {"method": "GET"}]), "method 'GET'"),
        (ndjson([entry("a") | {"body": {"messages": []}}]), "body.messages"),
    ],
)
def test_file_that_is_refused_fails_the_batch(tmp_path: Path, content: bytes, words: str) -> None:
    async def check(caller: Caller) -> None:
        file_id = json.loads((await caller.upload(content))[2])["fileId"]
        found = await caller.wait(json.loads((await caller.submit(file_id))[2])["batchId"])
        assert found["batch"]["status"] == "failed"
        assert words in found["batch"]["errors"][0]["message"]
        assert "resultsUrl" not in found
        assert (await caller.counts())["lines"] == 0

    run(tmp_path, check)


def test_calls_that_are_refused(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        file_id = json.loads((await caller.upload(ndjson([entry("a")])))[2])["fileId"]
        old = json.loads((await caller.upload(ndjson([entry("a")]), seconds=0))[2])["fileId"]
        stranger = Caller(caller.url, key="other")
        statuses = [
            (await stranger.submit(file_id))[0],
            (await caller.submit("file_none"))[0],
            (await caller.submit("../batches/x"))[0],
            (await caller.submit(old))[0],
            (await caller.submit(file_id, model="m"))[0],
            (await caller.submit(file_id, endpoint="/v1/other"))[0],
            (await caller.call("POST", "/api/v1/batches", data=b"{"))[0],
            (await caller.call("POST", "/api/v1/files", data=b"{"))[0],
            (await caller.poll("none"))[0],
            (await caller.call("DELETE", "/api/v1/batches/none"))[0],
            (await caller.call("GET", f"{caller.url}/results/x?expires=9999999999&sig=0"))[0],
        ]
        assert statuses == [401, 404, 404, 404, 400, 400, 400, 400, 404, 404, 403]
        assert (await caller.counts())["batches"] == 0

    run(tmp_path, check)


def test_cancelled_batch_stops(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry(f"q{i}") for i in range(50)])
        await caller.call("DELETE", f"/api/v1/batches/{batch_id}")
        assert (await caller.wait(batch_id))["batch"]["status"] == "cancelled"
        # The next one is answered all the same.
        assert len(await caller.members(await caller.new_batch([entry("a")]))) == 1
        [first, _] = json.loads((await caller.call("GET", "/emulator/batches"))[2])
        assert first["answered"] < 50

    run(tmp_path, check, [{"kind": "slow", "seconds": 0.02}])


def test_negative_balance_is_428(tmp_path: Path) -> None:
    async def check(caller: Caller) -> tuple[int, bytes]:
        await caller.new_batch([entry("a"), entry("b"), entry("c")])
        file_id = json.loads((await caller.upload(ndjson([entry("d")])))[2])["fileId"]
        status, _, content = await caller.submit(file_id)
        return status, content

    assert run(tmp_path / "a", check, balance=3)[0] == 200
    status, content = run(tmp_path / "b", check, balance=2)
    assert status == 428
    assert json.loads(content)["details"] == "Negative project balance: -1"
    assert run(tmp_path / "b", lambda c: c.submit("x"), balance=2)[0] == 428, "the balance survives"


# Faults.


@pytest.mark.parametrize("route", ["upload", "submit", "poll", "download"])
@pytest.mark.parametrize("kind", ["drop", "drop_after"])
def test_dropped_connection_before_and_after_the_work(tmp_path: Path, route: str, kind: str) -> None:
    match = {
        "upload": "POST /api/v1/files",
        "submit": "POST /api/v1/batches",
        "poll": "GET /api/v1/batches",
        "download": "GET /results",
    }[route]

    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry("a")])
        url = (await caller.wait(batch_id))["resultsUrl"]
        file_id = json.loads((await caller.upload(ndjson([entry("b")])))[2])["fileId"]
        calls: dict[str, Callable[[], Awaitable[Reply]]] = {
            "upload": lambda: caller.upload(ndjson([entry("c")])),
            "submit": lambda: caller.submit(file_id),
            "poll": lambda: caller.poll(batch_id),
            "download": lambda: caller.call("GET", url),
        }
        files = len(list((tmp_path / "files").glob("*.json")))
        # aiohttp itself repeats a GET once.
        await caller.set_faults([{"kind": kind, "match": match, "times": 2 if match.startswith("GET") else 1}])
        with pytest.raises(aiohttp.ClientConnectionError):
            await calls[route]()
        done = kind == "drop_after"
        assert (await caller.counts())["batches"] == 1 + (done and route == "submit")
        assert len(list((tmp_path / "files").glob("*.json"))) == files + (done and route == "upload")
        assert (await calls[route]())[0] == 200

    run(tmp_path, check)


@pytest.mark.parametrize("status", [401, 403, 408, 413, 428, 429, 500, 503])
@pytest.mark.parametrize("retry_after", [None, 1, "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_any_status_once(tmp_path: Path, status: int, retry_after: Any) -> None:
    async def check(caller: Caller) -> None:
        rule = {
            "kind": "status",
            "match": "POST /api/v1/files",
            "status": status,
            "retry_after": retry_after,
            "after": 1,
        }
        assert json.loads((await caller.set_faults([rule]))[2])[0]["after"] == 1
        replies = [await caller.upload(ndjson([entry("a")])) for _ in range(3)]
        assert [r[0] for r in replies] == [200, status, 200]
        assert replies[1][1].get("Retry-After") == (None if retry_after is None else str(retry_after))
        assert json.loads((await caller.call("GET", "/emulator/faults"))[2]) == []

    run(tmp_path, check)


@pytest.mark.parametrize("done", [False, True])
def test_html_instead_of_json(tmp_path: Path, done: bool) -> None:
    async def check(caller: Caller) -> None:
        file_id = json.loads((await caller.upload(ndjson([entry("a")])))[2])["fileId"]
        await caller.set_faults([{"kind": "html", "match": "POST /api/v1/batches", "done": done}])
        status, headers, content = await caller.submit(file_id)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/html")
        assert content.startswith(b"<html>")
        assert (await caller.counts())["batches"] == done

    run(tmp_path, check)


def test_hang_goes_on_afterwards(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        await caller.set_faults([{"kind": "hang", "match": "POST", "seconds": 0.15, "times": None}])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(caller.upload(ndjson([entry("a")])), 0.03)
        assert (await caller.upload(ndjson([entry("a")])))[0] == 200
        assert len(json.loads((await caller.call("GET", "/emulator/faults"))[2])) == 1

    run(tmp_path, check)


def test_faults_of_lines(tmp_path: Path) -> None:
    rules: Rules = [
        {"kind": "fail_lines", "lines": "bad"},
        {"kind": "omit_lines", "lines": [1]},
        {"kind": "duplicate_lines", "lines": [0, 3]},
        {"kind": "extra_keys", "lines": "q4"},
        {"kind": "empty_answers", "lines": [5]},
    ]

    async def check(caller: Caller) -> None:
        entries = [entry(i) for i in ("q0", "q1", "bad2", "q3", "q4", "q5")]
        members = list((await caller.members(await caller.new_batch(entries))).values())
        assert [m["custom_id"] for m in members] == ["q0", "q0", "bad2", "q3", "q3", "q4", "q5"]
        assert members[2] == {"custom_id": "bad2", "error": {"code": "server_error", "message": "injected"}}
        assert members[5]["messages"][0]["finish_reason"] == "stop"
        assert members[6]["messages"] == [{"role": "assistant", "content": ""}]
        assert set(members[0]["messages"][0]) == {"role", "content"}
        again = await caller.members(await caller.new_batch(entries))
        assert [m["custom_id"] for m in again.values()] == ["q0", "q1", "bad2", "q3", "q4", "q5"]

    run(tmp_path, check, rules)


@pytest.mark.parametrize("ending", ["failed", "cancelled", "expired"])
def test_batch_that_ends_without_results(tmp_path: Path, ending: str) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry("a")])
        assert json.loads((await caller.poll(batch_id))[2])["batch"]["status"] == "in_progress"
        found = await caller.wait(batch_id)
        assert found["batch"]["status"] == ending
        assert found["batch"]["errors"]
        assert "resultsUrl" not in found
        assert (await caller.counts())["lines"] == 1

    run(tmp_path, check, [{"kind": "end", "ending": ending}], polls=2)


def test_completed_without_a_link_and_with_one_that_expired(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry("a")])
        assert "resultsUrl" not in await caller.wait(batch_id)
        assert "resultsUrl" not in await caller.wait(batch_id)
        links = [(await caller.wait(batch_id))["resultsUrl"] for _ in range(3)]
        assert len(set(links)) == 3
        assert [(await caller.call("GET", link))[0] for link in links] == [403, 200, 200]
        forged = links[1].replace("expires=", "expires=9")
        assert (await caller.call("GET", forged))[0] == 403

    run(tmp_path, check, [{"kind": "no_url", "times": 2}, {"kind": "expired_url"}])


def test_links_expire(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry("a")])
        link = (await caller.wait(batch_id))["resultsUrl"]
        assert (await caller.call("GET", link))[0] == 200
        await asyncio.sleep(0.2)
        assert (await caller.call("GET", link))[0] == 403

    run(tmp_path, check, url_seconds=0.15)


def test_truncated_zips(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry(f"q{i}") for i in range(50)])
        link = (await caller.wait(batch_id))["resultsUrl"]
        with pytest.raises(aiohttp.ClientPayloadError):
            await caller.call("GET", link)
        status, _, content = await caller.call("GET", link)
        assert status == 200
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(content))
        assert len(await caller.members(batch_id)) == 50

    run(tmp_path, check, [{"kind": "truncate_length"}, {"kind": "truncate_close"}])


def test_hostile_zips(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        batch_id = await caller.new_batch([entry("a")])
        link = (await caller.wait(batch_id))["resultsUrl"]
        names = zipfile.ZipFile(io.BytesIO((await caller.call("GET", link))[2])).namelist()
        assert "result_000000.json" in names
        assert {"../escaped.json", "/escaped.json"} <= set(names)
        content = (await caller.call("GET", link))[2]
        assert len(content) < 5_000_000
        bomb = zipfile.ZipFile(io.BytesIO(content))
        assert "result_000000.json" in bomb.namelist()
        assert bomb.getinfo("bomb.json").file_size == 2**31
        with bomb.open("bomb.json") as member:
            for _ in range(20):
                assert member.read(1_000_000) == bytes(1_000_000)
        assert list(await caller.members(batch_id)) == ["result_000000.json"]

    run(tmp_path, check, [{"kind": "zip_traversal"}, {"kind": "zip_bomb"}])


def test_polls_in_quick_succession(tmp_path: Path) -> None:
    async def check(caller: Caller) -> None:
        first, other = [await caller.new_batch([entry("a")]) for _ in range(2)]
        assert [(await caller.poll(i))[0] for i in (first, first, other)] == [200, 429, 200]
        await caller.set_faults([{"kind": "poll_gap", "seconds": 60, "retry_after": 7}])
        status, headers, _ = await caller.poll(first)
        assert (status, headers["Retry-After"]) == (429, "7")
        await caller.set_faults([])
        assert (await caller.poll(first))[0] == 200

    run(tmp_path, check, [{"kind": "poll_gap", "seconds": 60}])


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"kind": "drop"}, "faults are dict; give a JSON list"),
        ([{"match": "x"}], "has no kind"),
        ([{"kind": "explode"}], "has kind='explode'; give one of drop, drop_after"),
        ([{"kind": "drop", "when": 1}], "has the field 'when'; allowed: kind, match"),
        ([{"kind": "drop", "times": -1}], "has times=-1; give a number, or null for always"),
        ([{"kind": "status", "status": 99}], "has status=99; give an HTTP status"),
        ([{"kind": "end", "ending": "lost"}], "has ending='lost'; give one of failed, cancelled, expired"),
        ([{"kind": "fail_lines", "lines": ["a"]}], "give part of a custom_id, or a list of line numbers"),
    ],
)
def test_wrong_faults_are_refused_and_the_old_ones_stay(tmp_path: Path, rules: Any, words: str) -> None:
    async def check(caller: Caller) -> None:
        status, _, content = await caller.set_faults(rules)
        assert status == 400
        assert words in json.loads(content)["details"]
        assert len(json.loads((await caller.call("GET", "/emulator/faults"))[2])) == 1

    run(tmp_path, check, [{"kind": "drop", "match": "never"}])
