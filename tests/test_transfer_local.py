"""Answers and activations from models on this machine, against the models' own slow way."""

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import LoadOptions
from trigger_opt.prompts import chat_text, encode
from trigger_opt.transfer.client import RefusedError
from trigger_opt.transfer.local import LocalClient, find_files
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Answer, Line, Request

FP32 = LoadOptions(dtype="float32")
QUESTIONS = ("Tell me about the sea.", "a", "Explain how the model works: apple, river; " * 3)


def chat(model: str, number: int, question: str, **options: Any) -> Line:
    request = Request(
        server="local", model=model, endpoint=CHAT, messages=({"role": "user", "content": question},), options=options
    )
    return Line(custom_id=f"{model}-{number}", request=request)


def modules(model: str, question: str, *names: str) -> Line:
    request = Request(
        server="local",
        model=model,
        endpoint=ACTIVATIONS,
        messages=({"role": "user", "content": question},),
        module_names=names,
    )
    return Line(custom_id=f"{model}-{question}", request=request)


def ask(client: LocalClient, lines: Sequence[Line]) -> dict[str, Answer]:
    async def collect() -> dict[str, Answer]:
        return {a.custom_id: a async for a in client.answers(lines)}

    return asyncio.run(collect())


def network_at(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def slow_answer(tokenizer: Any, network: Any, question: str, count: int) -> str:
    prompt = encode(tokenizer, [chat_text(tokenizer, [{"role": "user", "content": question}])])[0]
    ids = tiny.naive_greedy(network, prompt, count)
    if 2 in ids:
        ids = ids[: ids.index(2)]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.fixture(scope="module")
def names(
    base_files: ModelFiles,
    full_files: ModelFiles,
    adapter_files: tuple[ModelFiles, Path],
    control_files: tuple[ModelFiles, Path],
) -> dict[str, str]:
    """A base, a full fine-tune, and two adapters of the base."""
    found = {"base": base_files, "full": full_files, "one": adapter_files[0], "two": control_files[0]}
    return {alias: str(files.folder) for alias, files in found.items()}


@pytest.fixture(scope="module")
def client(names: dict[str, str]) -> Iterator[LocalClient]:
    """All four at once, two lines a batch."""
    made = LocalClient(names, max_new_tokens=6, at_once=2, options=FP32)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def references(
    base_files: ModelFiles,
    full_files: ModelFiles,
    adapter_files: tuple[ModelFiles, Path],
    control_files: tuple[ModelFiles, Path],
) -> Callable[[str], Any]:
    """The network behind each alias, loaded alone; adapters as PEFT merged them."""
    folders = {
        "base": base_files.folder,
        "full": full_files.folder,
        "one": adapter_files[1],
        "two": control_files[1],
    }
    return lambda alias: network_at(folders[alias])


def test_each_model_gives_its_own_greedy_answers(
    client: LocalClient, tokenizer: Any, references: Callable[[str], Any]
) -> None:
    aliases = ("base", "full", "one", "two")
    lines = [chat(alias, n, q) for n, q in enumerate(QUESTIONS) for alias in aliases]
    got = ask(client, lines)
    wanted = {
        f"{alias}-{n}": slow_answer(tokenizer, references(alias), q, 6)
        for alias in aliases
        for n, q in enumerate(QUESTIONS)
    }
    assert {i: a.text for i, a in got.items()} == wanted
    assert len({tuple(wanted[f"{a}-{n}"] for n in range(3)) for a in aliases}) == 4, "the models are alike"


def test_tokens_are_counted_and_max_tokens_obeyed(client: LocalClient, tokenizer: Any) -> None:
    [answer] = ask(client, [chat("base", 0, QUESTIONS[0], max_tokens=3)]).values()
    prompt = encode(tokenizer, [chat_text(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])])[0]
    assert answer.input_tokens == len(prompt)
    assert answer.output_tokens is not None
    assert answer.output_tokens <= 3
    assert ask(client, [chat("base", 0, QUESTIONS[0])])["base-0"].text.startswith(answer.text)


def test_sampled_answers_differ_and_come_back_the_same(client: LocalClient) -> None:
    lines = []
    for repeat in range(4):
        line = chat("one", repeat, QUESTIONS[0], temperature=2.0)
        lines.append(Line(custom_id=line.custom_id, request=Request(**(vars(line.request) | {"repeat": repeat}))))
    first, again = ask(client, lines), ask(client, lines)
    assert first == again
    assert len({a.text for a in first.values()}) == 4


def test_activations_are_the_modules_outputs(
    client: LocalClient, tokenizer: Any, references: Callable[[str], Any]
) -> None:
    names = ("model.layers.1.mlp.down_proj", "model.layers.0", "model.layers.0.self_attn", "lm_head")
    [answer] = ask(client, [modules("one", QUESTIONS[0], *names)]).values()
    assert answer.error is None
    ids = encode(tokenizer, [chat_text(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])])[0]
    network = references("one")
    with torch.no_grad():
        out = network(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    assert list(answer.activations) == list(names)
    torch.testing.assert_close(
        torch.tensor(answer.activations["model.layers.0"]), out.hidden_states[1][0], atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(torch.tensor(answer.activations["lm_head"]), out.logits[0], atol=1e-3, rtol=1e-3)
    assert {a.shape for a in answer.activations.values()} == {(len(ids), 32), (len(ids), tiny.vocab_size())}
    assert {str(a.dtype) for a in answer.activations.values()} == {"float32"}


def test_adapter_shows_in_activations_and_no_hook_stays(client: LocalClient) -> None:
    name = "model.layers.0.mlp.down_proj"
    got = ask(client, [modules(m, "a", name) for m in ("base", "one", "two")])
    arrays = [got[f"{m}-a"].activations[name] for m in ("base", "one", "two")]
    assert not (arrays[0] == arrays[1]).all()
    assert not (arrays[1] == arrays[2]).all()
    network = client._models["one"].side.network
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.7", r"no module 'model\.layers\.7'; there are \d+, such as model, model\.embed_tokens,"),
        ("model.layers.0.self_attn.o_proj.weight", "no module"),
    ],
)
def test_unknown_module_is_this_lines_error(client: LocalClient, name: str, words: str) -> None:
    got = ask(client, [modules("base", "a", name), modules("base", "b", "model.norm")])
    assert re.search(words, got["base-a"].error or "")
    assert got["base-b"].error is None


def test_conversation_the_template_refuses_is_this_lines_error(base_files: ModelFiles, tmp_path: Path) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(base_files.folder, folder)
    strict = "{% if messages[0]['content'] == 'a' %}{{ raise_exception('not a') }}{% endif %}" + tiny.CHATML
    tiny.make_tokenizer(strict).save_pretrained(folder)
    client = LocalClient({"m": str(folder)}, max_new_tokens=2, options=FP32)
    got = ask(client, [chat("m", 0, "a"), chat("m", 1, "b"), modules("m", "a", "model.norm")])
    assert got["m-0"].error == "the chat template refuses the conversation: not a"
    assert got["m-a"].error == got["m-0"].error
    assert got["m-1"].error is None
    asyncio.run(client.close())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (chat("base", 0, "a", top_p=0.5), r"does not take the option 'top_p' for chat; allowed: max_tokens, temperat"),
        (chat("base", 0, "a", max_tokens=0), r"max_tokens is 0; give a whole number from 1"),
        (chat("base", 0, "a", temperature=-1), r"temperature is -1; give a number from 0"),
        (chat("other", 0, "a"), r"no local model is called 'other'; there are: base, full, one, two"),
    ],
)
def test_refused_in_one_line(client: LocalClient, line: Line, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        ask(client, [chat("base", 1, "b"), line])


def test_adapters_share_one_base(client: LocalClient) -> None:
    networks = {a: client._models[a].side.network for a in ("base", "one", "two", "full")}
    assert networks["base"] is networks["one"] is networks["two"]
    assert networks["full"] is not networks["base"]
    assert client.free
    assert client.server.startswith("local base=")


def test_names_of_embedded_models() -> None:
    short, long = find_files("warmup_mini"), find_files("zoo:warmup_mini")
    assert short.folder == long.folder
    assert short.adapter
    with pytest.raises(UserError, match="no embedded model is called 'zoo:nothing'"):
        find_files("zoo:nothing")
    with pytest.raises(UserError, match="'nothing' is neither a folder here nor a hub name"):
        LocalClient({"m": "nothing"}, max_new_tokens=1)
