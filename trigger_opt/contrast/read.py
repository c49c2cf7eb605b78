"""Prompts and brought answers from files; each problem is one line that names file and line."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger_opt.contrast.records import Prompt, Sample
from trigger_opt.errors import UserError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PROMPT_FORM = (
    'give one prompt a line, or JSON Lines with {"prompt": …} or {"user": …}, and "id" and "system" if you like'
)
_ANSWER_FORM = 'give JSON Lines with {"answer": …} (null where there was none), and "id" and "prompt" if you like'


@dataclass(frozen=True, kw_only=True)
class _Object:
    """A JSON object of a file: where it stands ("x.jsonl, line 3"), and the how manieth it is, from 1."""

    where: str
    number: int
    data: Mapping[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: text with one prompt a line, or JSON Lines (by its suffix, or because its first line is an
    object with "prompt" or "user").

    Raises:
        UserError: the file is missing, no UTF-8 or empty; a line is no such object; an id or a prompt stands twice, or
            only some lines have an id.
    """
    lines = _lines(path, _PROMPT_FORM)
    if path.suffix.lower() in _JSON_SUFFIXES or _is_prompt_object(next(iter(lines.values()))):
        prompts = [_own_prompt(found) for found in _objects(path, lines, _PROMPT_FORM)]
    else:
        prompts = [Prompt(id=str(n), named=False, text=text) for n, text in enumerate(lines.values(), 1)]
    _check_ids(path, prompts)
    _check_once(path, prompts)
    return prompts


def read_answers(path: Path, prompts: Sequence[Prompt] | None) -> list[Sample]:
    """Brought answers by prompt, repeats together, in the order of the prompts; JSON Lines, each with "answer" (null
    where the model gave none), or what `trigger-opt transfer export` writes, where the context is the id.

    Args:
        prompts: what was asked; each answer is matched by id, else by its prompt, else by its place in the file. None
            takes the prompts from the answers: those with one id, or without ids one text, are repeats.

    Raises:
        UserError: the file is missing, no UTF-8 or empty; a line is no such object; it holds answers of several models;
            or an answer belongs to no prompt.
    """
    objects = [
        found
        for found in _objects(path, _lines(path, _ANSWER_FORM), _ANSWER_FORM)
        if found.data.get("endpoint", "chat") == "chat"
    ]
    _check_answers(path, objects)
    own = [_answered_prompt(found) for found in objects]
    _check_ids(path, own)
    asked: dict[str, Prompt] = {}
    for prompt in own if prompts is None else prompts:
        asked.setdefault(prompt.id, prompt)
    answers: dict[str, list[str]] = defaultdict(list)
    for found, prompt in zip(objects, own, strict=True):
        id_ = prompt.id if prompts is None else _match(found, prompt, prompts, in_order=len(own) == len(prompts))
        if found.data["answer"] is not None:
            answers[id_].append(found.data["answer"])
    return [Sample(prompt=p, answers=answers.get(p.id, [])) for p in asked.values()]


def _lines(path: Path, form: str) -> dict[int, str]:
    """Lines by number, without blank ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {form}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); {form}") from None
    # At newlines alone: a prompt may hold other line separators.
    lines = {number: line.rstrip("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"{path} is empty; {form}")
    return lines


def _objects(path: Path, lines: Mapping[int, str], form: str) -> list[_Object]:
    out = []
    for number, (line_number, line) in enumerate(lines.items(), 1):
        where = f"{path}, line {line_number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, is no JSON ({error}); {form}") from None
        if not isinstance(data, dict):
            raise UserError(f"{where}, is no JSON object; {form}")
        out.append(_Object(where=where, number=number, data=data))
    return out


def _is_prompt_object(line: str) -> bool:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and ("prompt" in data or "user" in data)


def _own_prompt(found: _Object) -> Prompt:
    text = _text(found, "prompt") or _text(found, "user")
    if text is None or not text.strip():
        raise UserError(f"{found.where}, has no prompt; {_PROMPT_FORM}")
    id_ = _id(found, "id")
    number = str(found.number)
    return Prompt(id=id_ or number, named=id_ is not None, text=text, system=_text(found, "system"))


def _answered_prompt(found: _Object) -> Prompt:
    """The prompt an answer names; without an id it goes by its text, and without that by its place."""
    text, system = _text(found, "prompt") or _text(found, "user") or "", _text(found, "system")
    if "messages" in found.data:
        text, system = _conversation(found)
    id_ = _id(found, "id") or _id(found, "context")
    by_text = f"{system or ''}\n{text}" if text else str(found.number)
    return Prompt(id=id_ or by_text, named=id_ is not None, text=text, system=system)


def _id(found: _Object, key: str) -> str | None:
    value = found.data.get(key)
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool) or value == ""):
        raise UserError(f"{found.where}, has the {key} {value!r}; give a text or a whole number, or leave it out")
    return None if value is None else str(value)


def _text(found: _Object, key: str) -> str | None:
    value = found.data.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{found.where}, has the {key} {value!r}; give a text")
    return value


def _conversation(found: _Object) -> tuple[str, str | None]:
    turns = found.data["messages"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
        raise UserError(f'{found.where}, has messages that are no list of {{"role": …, "content": …}}')
    said = {role: [t["content"] for t in turns if t.get("role") == role] for role in ("system", "user")}
    return said["user"][-1] if said["user"] else "", said["system"][0] if said["system"] else None


def _match(found: _Object, own: Prompt, prompts: Sequence[Prompt], *, in_order: bool) -> str:
    """The id of the prompt that this is an answer to."""
    if own.named and any(p.named for p in prompts):
        same = [p.id for p in prompts if p.id == own.id]
    elif own.text:
        same = [p.id for p in prompts if p.text == own.text and own.system in (None, p.system)]
    elif in_order and not own.named:
        same = [prompts[found.number - 1].id]
    else:
        raise UserError(
            f"{found.where}, says not which prompt it answers; give it the id or the prompt of one, or bring exactly "
            "one answer for each prompt, in the same order"
        )
    if len(same) != 1:
        many = "no prompt" if not same else "several prompts"
        raise UserError(f"{found.where}, answers {many} of the prompt file; give it the id of one, or take it out")
    return same[0]


def _check_ids(path: Path, prompts: Sequence[Prompt]) -> None:
    if 0 < sum(p.named for p in prompts) < len(prompts):
        raise UserError(f"{path} has an id in some lines only; give every line one, or none")


def _check_once(path: Path, prompts: Sequence[Prompt]) -> None:
    ids: set[str] = set()
    texts: set[tuple[str | None, str]] = set()
    for p in prompts:
        if p.id in ids:
            raise UserError(f"{path} has the id {p.id!r} twice; give each prompt its own")
        if (p.system, p.text) in texts:
            raise UserError(f"{path} has the prompt {p.text!r} twice; keep one, for both together count as one")
        ids.add(p.id)
        texts.add((p.system, p.text))


def _check_answers(path: Path, objects: Sequence[_Object]) -> None:
    for found in objects:
        if "answer" not in found.data or not isinstance(found.data["answer"], str | None):
            raise UserError(f"{found.where}, has no answer; {_ANSWER_FORM}")
    if not objects:
        raise UserError(f"{path} holds no answer; {_ANSWER_FORM}")
    models = sorted({str(found.data["model"]) for found in objects if "model" in found.data})
    if len(models) > 1:
        raise UserError(f"{path} holds answers of several models ({', '.join(models)}); keep those of one")
