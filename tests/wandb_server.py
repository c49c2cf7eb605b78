"""A W&B server on loopback, as far as histories go: enough for wandb 0.31 to run online, resume and `wandb sync`.

What it does with a run it has already is what W&B documents: to resume continues it, to upload it without "resume"
replaces it.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """Address, and the history of each run by id: rows as W&B sent them, in the order of their lines."""

    url: str = ""
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def stream(self, run: str, chunks: dict[str, Any]) -> None:
        """Take lines of a run's history from an offset on."""
        for name, chunk in chunks.items():
            if name == "wandb-history.jsonl":
                rows = self.histories.setdefault(run, [])
                rows[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What W&B is told to a GraphQL query."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = str(variables.get("name"))
        match found and found[1]:
            case "UpsertBucket":
                known = name in self.histories
                self.histories.setdefault(name, [])
                return {"upsertBucket": {"bucket": _bucket(name), "inserted": not known}}
            case "RunResumeStatus":
                rows = self.histories.get(name)
                return {"model": {**_PROJECT, "bucket": None if rows is None else _resumed(name, rows)}}
            case "ServerInfo" | "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "Viewer":
                return {"viewer": {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        # Files, artifacts: W&B goes on without.
        raise KeyError(found)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server for the time of the block."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
            reply: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                asked = json.loads(data)
                try:
                    reply = {"data": state.answer(asked["query"], asked.get("variables") or {})}
                except KeyError as error:
                    reply = {"data": {}, "errors": [{"message": f"unknown: {error}"}]}
            elif self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], json.loads(data).get("files") or {})
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


_PROJECT = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}


def _bucket(name: str) -> dict[str, Any]:
    about = {
        "id": f"id-{name}",
        "name": name,
        "displayName": name,
        "config": "{}",
        "description": "",
        "sweepName": None,
    }
    return {**about, "project": _PROJECT, "historyLineCount": None}


def _resumed(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = {"_step": rows[-1]["_step"]} if rows else {}
    return {
        **_bucket(name),
        "historyLineCount": len(rows),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(last)] if rows else []),
        "eventsTail": "[]",
        "summaryMetrics": json.dumps(last),
        "tags": [],
        "wandbConfig": json.dumps({"t": {"value": 1}}),
    }
