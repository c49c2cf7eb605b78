"""Answers with any transformers model on this machine; imports torch, so import it only when it is used."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigger_opt import zoo
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model, read_config
from trigger_opt.models.generate import Sampling
from trigger_opt.models.pair import CausalModel, LoadOptions, load_pair
from trigger_opt.prompts import RefusedConversationError, chat_text, encode
from trigger_opt.transfer.client import RefusedError
from trigger_opt.transfer.requests import CHAT, Answer, Array, Line
from trigger_opt.zoo.recipes import BASE_NAME, RECIPES

OPTIONS = ("max_tokens", "temperature")


class LocalClient:
    """A DirectClient whose models are on this machine.

    Attributes: see DirectClient; `at_once` is also the batch size of generation.
    """

    free = True

    def __init__(
        self,
        models: Mapping[str, str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        at_once: int = 16,
        options: LoadOptions | None = None,
    ) -> None:
        """Args:
        models: what requests call a model -> its name: an embedded one ("warmup_mini", "zoo:warmup_mini"), a folder
            or a hub name; a full model or an adapter. Adapters of one base share it.
        max_new_tokens, temperature: of answers whose request gives no other; temperature 0 is greedy.
        options: how weights are held.

        Raises:
            UserError: a model cannot be found or loaded, or an adapter names no base.
        """
        self.server = "local " + " ".join(f"{alias}={name}" for alias, name in sorted(models.items()))
        self.at_once = at_once
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        loaded = _load(dict.fromkeys(models.values()), options or LoadOptions())
        self._models = {alias: loaded[name] for alias, name in models.items()}
        # One thread: sides of one network take turns with its adapters.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-model")

    async def answers(self, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """See DirectClient; computed in a thread, so that the event loop goes on.

        Raises:
            RefusedError: an unknown model, or an option that is not `max_tokens` or `temperature`.
        """
        for group in self._groups(lines):
            for answer in await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, group):
                yield answer

    async def close(self) -> None:
        """Let go of the thread; a batch on its way is finished and dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _groups(self, lines: Sequence[Line]) -> list[list[Line]]:
        """Lines of one model and endpoint with the same options, `at_once` at most."""

        def kind(line: Line) -> tuple[str, str, int, float]:
            return line.request.model, line.request.endpoint, *self._sampling(line)

        alike = [list(g) for _, g in groupby(sorted(lines, key=kind), key=kind)]
        return [group[i : i + self.at_once] for group in alike for i in range(0, len(group), self.at_once)]

    def _sampling(self, line: Line) -> tuple[int, float]:
        request = line.request
        if request.model not in self._models:
            raise RefusedError(f"no local model is called {request.model!r}; there are: {', '.join(self._models)}")
        allowed = OPTIONS if request.endpoint == CHAT else ()
        if unknown := [name for name in request.options if name not in allowed]:
            raise RefusedError(
                f"the local client does not take the option {unknown[0]!r} for {request.endpoint}; "
                f"allowed: {', '.join(allowed) or 'none'}"
            )
        tokens = request.options.get("max_tokens", self._max_new_tokens)
        temperature = request.options.get("temperature", self._temperature)
        if not isinstance(tokens, int) or tokens < 1:
            raise RefusedError(f"the option max_tokens is {tokens!r}; give a whole number from 1")
        if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
            raise RefusedError(f"the option temperature is {temperature!r}; give a number from 0")
        return tokens, float(temperature)

    def _answer(self, group: list[Line]) -> list[Answer]:
        model = self._models[group[0].request.model]
        if group[0].request.endpoint != CHAT:
            return [model.activations(line) for line in group]
        tokens, temperature = self._sampling(group[0])
        return model.chat(group, max_new_tokens=tokens, temperature=temperature)


class _UnusableError(Exception):
    """This conversation cannot be answered; others may be."""


@dataclass(frozen=True)
class _Model:
    """A loaded model, its tokenizer and what ends its answers."""

    side: CausalModel
    tokenizer: Any
    end_ids: tuple[int, ...]

    def chat(self, lines: Sequence[Line], *, max_new_tokens: int, temperature: float) -> list[Answer]:
        """One batch of answers, those of unusable conversations with their error."""
        prompts: dict[str, list[int]] = {}
        out: list[Answer] = []
        for line in lines:
            try:
                prompts[line.custom_id] = self._prompt(line)
            except _UnusableError as error:
                out.append(Answer(custom_id=line.custom_id, error=str(error)))
        if prompts:
            made = self.side.generate(
                list(prompts.values()),
                max_new_tokens=max_new_tokens,
                end_ids=self.end_ids,
                sampling=Sampling(temperature=temperature),
                generator=_generator(lines),
                batch_size=len(prompts),
            )
            out += [self._said(i, len(prompts[i]), ids) for i, ids in zip(prompts, made, strict=True)]
        return out

    @torch.no_grad()
    def activations(self, line: Line) -> Answer:
        """Outputs of the asked modules for every token of the conversation, the answer's opening included."""
        names = line.request.module_names
        try:
            ids = self._prompt(line)
            with self.side.active() as network, _watched(network, names) as seen:
                network(input_ids=torch.tensor([ids], device=self.side.device), use_cache=False)
            arrays = {name: _per_token(name, seen.get(name), len(ids)) for name in names}
        except _UnusableError as error:
            return Answer(custom_id=line.custom_id, error=str(error))
        return Answer(custom_id=line.custom_id, activations=arrays, input_tokens=len(ids), output_tokens=0)

    def _prompt(self, line: Line) -> list[int]:
        """Token ids of the conversation, up to where the answer begins."""
        try:
            text = chat_text(self.tokenizer, [dict(m) for m in line.request.messages])
        except RefusedConversationError as error:
            # A template that wants other roles, or another order.
            raise _UnusableError(f"the chat template refuses the conversation: {error.reason}") from None
        return encode(self.tokenizer, [text])[0]

    def _said(self, custom_id: str, input_tokens: int, ids: list[int]) -> Answer:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(custom_id=custom_id, text=text, input_tokens=input_tokens, output_tokens=len(ids))


def _load(names: Mapping[str, Any], options: LoadOptions) -> dict[str, _Model]:
    """Each named model, loaded once; adapters of one base on one network."""
    files = {name: find_files(name) for name in names}
    loaded: dict[str, _Model] = {}
    for base, members in _by_base(files).items():
        root = find_files(base)
        adapters = [m for m in members if files[m].adapter]
        # A full model alone stands on both sides: read twice, held once.
        tuned = [files[m] for m in adapters] or [root]
        pair = load_pair(tuned[0], root, tuned[1:], options=options)
        sides = dict(zip(adapters, (pair.finetuned, *pair.controls), strict=False))
        loaded |= {m: _Model(sides.get(m, pair.base), pair.tokenizer, tuple(pair.end_ids)) for m in members}
    return loaded


def find_files(name: str) -> ModelFiles:
    """The files of a model: an embedded one with or without "zoo:", a folder, or a hub name.

    Raises:
        UserError: there is no such model.
    """
    embedded = name in (*RECIPES, BASE_NAME) and not Path(name).is_dir()
    if embedded or name.startswith(zoo.PREFIX):
        return replace(find_model(str(zoo.folder(name)), allow_code=zoo.brings_code(name)), name=name)
    return find_model(name)


def _by_base(files: Mapping[str, ModelFiles]) -> dict[str, list[str]]:
    """Names of models by the name of the base they run on; a full model runs on itself."""
    bases: dict[Path, str] = {}
    members: dict[str, list[str]] = {}
    # Full models first: an adapter's base goes by the name it was asked for under, if it was.
    for name, found in sorted(files.items(), key=lambda item: item[1].adapter):
        root = name
        if found.adapter:
            root = read_config(found).get("base_model_name_or_path") or ""
            if not root:
                raise UserError(f"the adapter {name!r} names no base; set base_model_name_or_path in its configuration")
        base = bases.setdefault(find_files(root).folder.resolve(), root)
        members.setdefault(base, []).append(name)
    return members


def _generator(lines: Sequence[Line]) -> torch.Generator:
    """Random numbers that depend on the questions alone."""
    digest = hashlib.sha256(" ".join(line.request.key for line in lines).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def _watched(network: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a dictionary that holds each module's last output."""
    known = [name for name, _ in network.named_modules() if name]
    if wrong := sorted(set(names) - set(known)):
        some = ", ".join([*known[:3], *known[-2:]])
        raise _UnusableError(f"the model has no module {wrong[0]!r}; there are {len(known)}, such as {some}")
    seen: dict[str, Any] = {}
    hooks = []
    try:
        for name in names:
            # The name is bound now: the hook runs after the loop.
            def keep(module: Any, inputs: Any, output: Any, name: str = name) -> None:
                seen[name] = output

            hooks.append(network.get_submodule(name).register_forward_hook(keep))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _per_token(name: str, output: Any, tokens: int) -> Array:
    """A module's output as (tokens, width) in fp32; the first tensor where there are several."""
    parts = output if isinstance(output, tuple) else tuple(output.values()) if isinstance(output, dict) else (output,)
    first = next((p for p in parts if isinstance(p, Tensor)), None)
    if first is None or first.ndim < 2 or first.numel() == 0 or first.shape[-1] * tokens != first.numel():
        raise _UnusableError(f"module {name!r} has no output for each token of the conversation")
    array: Array = first.reshape(tokens, -1).float().cpu().numpy()
    return array
