"""The input file of a batch: which are accepted, and the requests in them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Line, Request

ENDPOINTS = {"/v1/chat/completions": CHAT, "/v1/activations": ACTIVATIONS}
_MAX_ERRORS = 10


def raw_lines(file: Path) -> Iterator[str]:
    """The lines of an input file that hold something."""
    with file.open(encoding="utf-8") as f:
        for text in f:
            if text.strip():
                yield text


def check(file: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """(lines, errors) of an input file; a batch with errors fails validation."""
    errors: list[dict[str, Any]] = []
    count = 0
    try:
        for count, text in enumerate(raw_lines(file), 1):
            if (wrong := _wrong(text, endpoint)) and len(errors) < _MAX_ERRORS:
                errors.append({"line": count, "message": wrong})
    except UnicodeDecodeError as error:
        errors.append({"line": count + 1, "message": f"no UTF-8: {error.reason}"})
    if count == 0 and not errors:
        errors.append({"line": 0, "message": "empty file"})
    return count, errors


def parse(text: str, *, model: str, number: int) -> Line:
    """Checked line `number` as a request to `model`; options are what else its body holds."""
    entry = json.loads(text)
    body = dict(entry["body"])
    endpoint = ENDPOINTS[entry["endpoint"]]
    messages = tuple(body.pop("messages" if endpoint == CHAT else "input"))
    modules = tuple(body.pop("module_names", ())) if endpoint == ACTIVATIONS else ()
    request = Request(
        server="emulator",
        model=model,
        endpoint=endpoint,
        messages=messages,
        options=body,
        module_names=modules,
        # The same question twice is two requests, and a sampled answer may differ.
        repeat=number,
    )
    return Line(custom_id=entry["custom_id"], request=request)


def count(batches: Iterable[tuple[str, Path]], *, details: bool) -> dict[str, Any]:
    """What was submitted in (model, input file) of each batch.

    Returns:
        lines: all. distinct: of them, those that differ in model, custom_id, endpoint or body. distinct_ids: different
        custom_ids. distinct_bodies: different (model, endpoint, body). batches: how many. models: lines of each.
        With `details`, custom_ids and bodies (SHA-256): lines of each.
    """
    models, ids, bodies, distinct, number = Counter[str](), Counter[str](), Counter[str](), set(), 0
    for model, file in batches:
        number += 1
        for text in raw_lines(file):
            entry = json.loads(text)
            asked = json.dumps([model, entry["endpoint"], entry["body"]], sort_keys=True)
            digest = hashlib.sha256(asked.encode()).hexdigest()
            models[model] += 1
            ids[entry["custom_id"]] += 1
            bodies[digest] += 1
            distinct.add((entry["custom_id"], digest))
    counted = {"lines": models.total(), "distinct": len(distinct), "distinct_ids": len(ids)}
    counted |= {"distinct_bodies": len(bodies), "batches": number}
    return counted | {"models": models} | ({"custom_ids": ids, "bodies": bodies} if details else {})


def _wrong(text: str, endpoint: str) -> str:
    try:
        entry = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    if not isinstance(entry, dict):
        return "no JSON object"
    if not isinstance(entry.get("custom_id"), str) or not entry["custom_id"]:
        return "custom_id is missing"
    if entry.get("endpoint") != endpoint:
        return f"endpoint {entry.get('endpoint')!r} in a batch for {endpoint!r}"
    if entry.get("method") != "POST":
        return f"method {entry.get('method')!r}, not 'POST'"
    return _wrong_body(entry.get("body"), ENDPOINTS[endpoint])


def _wrong_body(body: Any, endpoint: str) -> str:
    if not isinstance(body, dict):
        return "body is missing"
    key = "messages" if endpoint == CHAT else "input"
    messages = body.get(key)
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        return f"body.{key} is no list of {{role, content}}"
    names = body.get("module_names")
    if endpoint == ACTIVATIONS and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        return "body.module_names is no list of names"
    return ""


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )
