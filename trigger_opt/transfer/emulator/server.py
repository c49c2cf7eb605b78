"""The routes of the batch server, on 127.0.0.1 and nowhere else."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import BodyPartReader, web

from trigger_opt.errors import UserError
from trigger_opt.transfer.client import DirectClient
from trigger_opt.transfer.emulator.answers import ALIASES, KEY, Echo
from trigger_opt.transfer.emulator.faults import AT_DOWNLOAD, AT_POLL, AT_SUBMIT, CONNECTION, Faults, Rule, parse_rules
from trigger_opt.transfer.emulator.lines import ENDPOINTS, check, count
from trigger_opt.transfer.emulator.replies import hang_up, json_object, receive, refusal, truncated
from trigger_opt.transfer.emulator.results import hostile_zip
from trigger_opt.transfer.emulator.state import UNFINISHED, Batch, State
from trigger_opt.transfer.emulator.worker import Worker

_HOST = "127.0.0.1"
_MAX_JSON = 1 << 24
_SUBMIT_FIELDS = ("completion_window", "endpoint", "model", "input_file_id")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Emulator:
    """The server; runs on the event loop inside `async with`.

    Attributes:
        url: where it listens, without a slash at the end. faults: the script; may be changed at any time.
        state: files and batches.
    """

    def __init__(
        self,
        folder: Path,
        *,
        answers: Mapping[str, DirectClient] | None = None,
        port: int = 0,
        key: str = KEY,
        polls: int = 1,
        nested: bool = False,
        balance: int | None = None,
        faults: Sequence[Rule] = (),
        url_seconds: float = 3600.0,
    ) -> None:
        """Args:
        folder: where the state lies; an emulator on the same folder goes on where the last one was killed.
        answers: who answers for each path a client sends (see `answering`), an echo for all when None; stays the
            caller's to close.
        port: 0 takes a free one. key: the one that is accepted. polls: least polls before a batch completes.
        nested: results as zips within the zip. balance: each line costs 1; below 0 there is 428; None never ends.
        url_seconds: how long a link to results is good.

        Raises:
            UserError: the folder is held or not writable; on entering: the port is taken.
        """
        self.state = State(folder)
        self.faults = Faults(faults)
        self.url = ""
        self._answers = answers if answers is not None else dict.fromkeys(ALIASES.values(), Echo())
        self._worker = Worker(self.state, self._answers, nested=nested)
        self._port, self._key, self._polls = port, key, polls
        self._balance, self._url_seconds = balance, url_seconds
        self._last_poll: dict[str, float] = {}
        self._runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> "Emulator":
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, _HOST, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            self.state.close()
            raise UserError(
                f"port {self._port} cannot be had ({error.strerror}); give another --port, or 0 for a free one"
            ) from None
        self.url = f"http://{_HOST}:{self._runner.addresses[0][1]}"
        self._task = asyncio.create_task(self._worker.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._runner.cleanup()
        self.state.close()

    def counts(self, *, details: bool = False) -> dict[str, Any]:
        """What was submitted since the folder began (see `lines.count`), and calls by route."""
        return count(self.state.submitted(), details=details) | {"calls": self.state.calls}

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._faulty, self._authorised], client_max_size=_MAX_JSON)
        app.add_routes(
            [
                web.post("/api/partners/jane-street/users", self._users),
                web.post("/api/v1/files", self._upload),
                web.post("/api/v1/batches", self._submit),
                web.get("/api/v1/batches/{id}", self._poll),
                web.delete("/api/v1/batches/{id}", self._cancel),
                web.get("/results/{id}", self._results),
                web.get("/emulator/counts", self._get_counts),
                web.get("/emulator/batches", self._get_batches),
                web.get("/emulator/faults", self._get_faults),
                web.post("/emulator/faults", self._set_faults),
            ]
        )
        return app

    # Before and around the routes.

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/emulator/"):
            return await handler(request)
        resource = request.match_info.route.resource
        self.state.count_call(f"{request.method} {resource.canonical if resource else request.path}")
        rule = self.faults.take(_call(request), CONNECTION)
        if rule is None:
            return await handler(request)
        if rule.kind == "hang":
            await asyncio.sleep(rule.seconds)
            return await handler(request)
        if rule.kind == "drop_after" or (rule.done and rule.kind != "drop"):
            await handler(request)
        if rule.kind == "html":
            return web.Response(text="<html><body>gateway</body></html>", content_type="text/html")
        if rule.kind == "status":
            return refusal(rule.status, "injected", "injected", rule.retry_after)
        return hang_up(request)

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if request.path.startswith("/api/v1/") and given != f"Bearer {self._key}":
            return refusal(401, "Unauthorized", "Invalid API key")
        return await handler(request)

    # The client's routes.

    async def _users(self, request: web.Request) -> web.StreamResponse:
        body = await json_object(request)
        # guess: jsinfer returns whatever JSON this is.
        return web.json_response({"success": True, "email": body.get("email")})

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        if not request.content_type.startswith("multipart/"):
            return refusal(400, "Bad Request", "multipart/form-data expected")
        part, name, fields = self.state.part(), "", dict[str, str]()
        try:
            async for field in await request.multipart():
                if not isinstance(field, BodyPartReader):
                    return refusal(400, "Bad Request", "a field within a field")
                if field.name == "file":
                    name = field.filename or "file"
                    await receive(field, part)
                else:
                    fields[field.name or ""] = await field.text()
            ttl = fields.get("expires_after[seconds]", "3600")
            # guess: what the real server demands of an upload.
            if not part.is_file() or fields.get("purpose") != "batch" or not ttl.isdigit():
                return refusal(400, "Bad Request", "file, purpose=batch and expires_after[seconds] needed")
            file = self.state.add_file(part, name=name, ttl=float(ttl))
        finally:
            part.unlink(missing_ok=True)
        return web.json_response({"success": True, "fileId": file.id})

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        given = await json_object(request)
        if missing := [f for f in _SUBMIT_FIELDS if not isinstance(given.get(f), str)]:
            return refusal(400, "Bad Request", f"missing: {', '.join(missing)}")
        if given["endpoint"] not in ENDPOINTS or given["model"] not in self._answers:
            return refusal(400, "Bad Request", f"no endpoint {given['endpoint']!r} or model {given['model']!r}")
        if (left := self._balance_left()) is not None and left < 0:
            return refusal(428, "Precondition required", f"Negative project balance: {left}")
        file = self.state.find_file(given["input_file_id"])
        if file is None:
            return refusal(404, "Not Found", "input_file_id: no such file, or expired")
        lines, errors = await asyncio.to_thread(check, self.state.input_path(file.id), given["endpoint"])
        batch = Batch(
            id="",
            file_id=file.id,
            name=file.name,
            model=given["model"],
            endpoint=given["endpoint"],
            created=0.0,
            lines=lines,
            valid=not errors,
            errors=errors or None,
            rules=self.faults.take_all(_call(request), AT_SUBMIT),
        )
        accepted = self.state.add_batch(batch)
        self._worker.wake()
        return web.json_response({"success": True, "batchId": accepted.id})

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        batch = self.state.batches.get(request.match_info["id"])
        if batch is None:
            return refusal(404, "Not Found", "no such batch")
        gap = self.faults.gap()
        now = asyncio.get_running_loop().time()
        # guess: the real server answers 429 to polls in quick succession; whether by batch or by key is not known.
        if gap and _call(request).startswith(gap.match) and now - self._last_poll.get(batch.id, -1e9) < gap.seconds:
            return refusal(429, "Too Many Requests", "slow down", gap.retry_after)
        self._last_poll[batch.id] = now
        batch = self._settle(batch)
        # guess: all but status and errors.
        shown = {"id": batch.id, "status": batch.status, "errors": batch.errors, "endpoint": batch.endpoint}
        shown |= {"model": batch.model, "input_file_id": batch.file_id}
        if batch.status != "completed":
            return web.json_response({"batch": shown})
        rule = self.faults.take(_call(request), AT_POLL)
        if rule is not None and rule.kind == "no_url":
            return web.json_response({"batch": shown})
        seconds = -1.0 if rule is not None else self._url_seconds
        return web.json_response({"batch": shown, "resultsUrl": self._results_url(batch.id, seconds)})

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        batch = self.state.batches.get(request.match_info["id"])
        if batch is None:
            return refusal(404, "Not Found", "no such batch")
        if batch.status in UNFINISHED:
            batch = self.state.save(batch, status="cancelled")
        # guess: jsinfer returns whatever JSON this is.
        return web.json_response({"batch": {"id": batch.id, "status": batch.status}})

    async def _results(self, request: web.Request) -> web.StreamResponse:
        batch_id, expires = request.match_info["id"], request.query.get("expires", "")
        good = secrets.compare_digest(request.query.get("sig", ""), self.state.sign(batch_id, expires))
        if not good or time.time() > float(expires):
            return web.Response(status=403, text="signature")
        rule = self.faults.take(_call(request), AT_DOWNLOAD)
        path = self.state.zip_path(batch_id)
        if rule is not None and rule.kind.startswith("zip_"):
            path = await asyncio.to_thread(hostile_zip, self.state, batch_id, rule.kind)
        elif rule is not None:
            return await truncated(request, path, announced=rule.kind == "truncate_length")
        return web.FileResponse(path, headers={"Content-Type": "application/zip"})

    # The test's routes.

    async def _get_counts(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await asyncio.to_thread(self.counts, details="details" in request.query))

    async def _get_batches(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.state.listing())

    async def _get_faults(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.faults.left())

    async def _set_faults(self, request: web.Request) -> web.StreamResponse:
        try:
            self.faults.rules = parse_rules(await request.json())
        except (UserError, ValueError) as error:
            return refusal(400, "Bad Request", str(error))
        return web.json_response(self.faults.left())

    # What a poll and a submission rest on.

    def _settle(self, batch: Batch) -> Batch:
        """The batch after one more poll."""
        if batch.status not in UNFINISHED:
            return batch
        polls = batch.polls + 1
        ending = next((r.ending for r in batch.rules if r.kind == "end"), None)
        if not batch.valid:
            return self.state.save(batch, polls=polls, status="failed")
        if polls < self._polls or not self._worker.done(batch):
            return self.state.save(batch, polls=polls, status="in_progress")
        if ending is None:
            return self.state.save(batch, polls=polls, status="completed")
        return self.state.save(batch, polls=polls, status=ending, errors=[{"line": 0, "message": "injected"}])

    def _results_url(self, batch_id: str, seconds: float) -> str:
        expires = f"{time.time() + seconds:.6f}"
        return f"{self.url}/results/{batch_id}?expires={expires}&sig={self.state.sign(batch_id, expires)}"

    def _balance_left(self) -> int | None:
        if self._balance is None:
            return None
        return self._balance - sum(b.lines for b in self.state.batches.values() if b.valid)


def _call(request: web.Request) -> str:
    return f"{request.method} {request.path}"
