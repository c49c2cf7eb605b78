"""Answers that end a call, well or badly, and what is read of one."""

import json
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web

_CHUNK = 1 << 16


def refusal(status: int, error: str, details: str, retry_after: int | float | str | None = None) -> web.StreamResponse:
    """An error as the server words it; Retry-After is sent as given."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return web.json_response({"error": error, "success": False, "details": details}, status=status, headers=headers)


def hang_up(request: web.Request) -> web.StreamResponse:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.close()
    # Goes nowhere; aiohttp wants a response of every handler.
    return web.Response()


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; anything else is answered by 400."""
    try:
        given = await request.json()
    except ValueError:
        given = None
    if not isinstance(given, dict):
        text = json.dumps({"error": "Bad Request", "success": False, "details": "a JSON object expected"})
        raise web.HTTPBadRequest(text=text, content_type="application/json")
    return given


async def receive(field: BodyPartReader, path: Path) -> None:
    """Write an uploaded file, a piece at a time."""
    with path.open("wb") as f:
        while chunk := await field.read_chunk(_CHUNK):
            f.write(chunk)


async def truncated(request: web.Request, path: Path, *, announced: bool) -> web.StreamResponse:
    """The first half of a file: fewer bytes than announced, or a well framed answer that is short."""
    data = path.read_bytes()
    half = data[: len(data) // 2]
    if not announced:
        return web.Response(body=half, content_type="application/zip")
    response = web.StreamResponse(headers={"Content-Length": str(len(data)), "Content-Type": "application/zip"})
    await response.prepare(request)
    await response.write(half)
    if request.transport is not None:
        request.transport.close()
    return response
