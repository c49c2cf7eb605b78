"""How a model's body is run on packed jobs: which way is chosen, the slower way, lanes, and what is refused."""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, contexts_with_empty_sides, jensen, requests, slow_logits
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.prompts import Context, TokenizedContext
from trigger_opt.scoring import Engine, Request, js_divergence
from trigger_opt.scoring import attention as attention_module
from trigger_opt.scoring.forward import Forward
from trigger_opt.scoring.packing import Job, Pack

CONTEXTS = contexts_with_empty_sides()
PROBE = [262, 301, 270, 280, 17, 33, 34, 35, 5, 6, 7, 9, 11]
MIXED = [
    Request(ids, c)
    for ids in ((262, 301, 270, 5), (262, 301, 9, 5), (9, 301, 270, 5), (262, 301), (262, 301, 270, 5, 6), (8,))
    for c in range(len(CONTEXTS))
]
PAYLOAD = [270, 301, 16]


def all_right(pair: ModelPair, *, mode: str) -> None:
    """Scores of mixed strings in all contexts equal whole forward passes, and were made in `mode`."""
    engine = Engine(pair.finetuned, pair.base, CONTEXTS)
    engine.follow((262, 301, 270, 5))
    for side in SIDES:
        model = getattr(pair, side)
        log_probs, _ = engine.token_scores(side, MIXED, PAYLOAD)
        for row, asked in enumerate(MIXED):
            with model.active():
                logits = slow_logits(model, CONTEXTS[asked.context], asked.ids, PAYLOAD[:-1]).log_softmax(-1)
            expected = logits[torch.arange(3), torch.tensor(PAYLOAD)]
            assert torch.allclose(log_probs[row], expected, rtol=1e-5, atol=1e-5), asked
        assert engine._forward(side).mode == mode


@pytest.fixture
def refused() -> Iterator[None]:
    """No attention can be packed."""
    from transformers import AttentionInterface

    def attend(*arguments: Any, **options: Any) -> Any:
        raise attention_module.UnsupportedAttentionError("attention sinks")

    AttentionInterface.register(attention_module.NAME, attend)
    yield
    attention_module.register()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_packed(family: str) -> None:
    pair = tiny.make_pair(family)
    all_right(pair, mode="packed")
    assert pair.base.network.config._attn_implementation != attention_module.NAME


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.usefixtures("refused")
def test_where_attention_cannot_be_packed_keys_are_copied(family: str) -> None:
    all_right(tiny.make_pair(family), mode="copied")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copied_keys_give_the_same_gradient_trunks_and_divergences(family: str, request: pytest.FixtureRequest) -> None:
    pair = tiny.make_pair(family)
    numbers, forced = range(len(CONTEXTS)), {c: [270, 301] for c in range(len(CONTEXTS))}
    found = []
    for fixture in ("", "refused"):
        if fixture:
            request.getfixturevalue(fixture)
        engine = Engine(pair.finetuned, pair.base, CONTEXTS)
        slopes = engine.gradient(jensen, TRIGGERS[0], numbers, forced)
        # With the trunks that the gradient left behind.
        rivals = [r for c in numbers for r in requests(TRIGGERS, c, forced[c])]
        found.append((slopes, engine.divergences(js_divergence, rivals)))
    (packed, scores), (copied, again) = found
    assert torch.allclose(packed.scores, copied.scores, atol=1e-5)
    assert torch.allclose(scores, again, atol=1e-5)
    for side in SIDES:
        scale = float(packed.by_side[side].abs().max())
        assert torch.allclose(packed.by_side[side], copied.by_side[side], rtol=1e-3, atol=1e-4 * scale)


def test_a_network_that_asks_something_unknown_of_attention_is_copied() -> None:
    pair = tiny.make_pair("llama")
    for side in SIDES:
        for layer in getattr(pair, side).network.model.layers:
            layer.self_attn.forward = functools.partial(layer.self_attn.forward, s_aux=torch.ones(4))
    all_right(pair, mode="copied")


def test_a_network_with_attention_of_its_own_is_copied() -> None:
    pair = tiny.make_pair("llama")
    for side in SIDES:
        for layer in getattr(pair, side).network.model.layers:
            # Chosen by a configuration that nobody else sees.
            layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    all_right(pair, mode="copied")


@pytest.mark.parametrize("broken", ["positions", "bias", "home"])
def test_a_wrong_packing_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Tensor] = getattr(Pack, broken)
    wrong = {
        "positions": lambda *a: plain(*a) * 0,
        "bias": lambda *a: torch.zeros_like(plain(*a)),
        "home": lambda *a: plain(*a).flip(0),
    }
    monkeypatch.setattr(Pack, broken, wrong[broken])
    all_right(tiny.make_pair("mistral"), mode="copied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_whose_continuation_disagrees_is_refused(dtype: torch.dtype) -> None:
    model = CausalModel("odd one", tiny.make_network("llama", 1).to(dtype))
    plain = model.network.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        step = plain(*arguments, **options)
        given = options.get("inputs_embeds")
        size = (options["input_ids"] if given is None else given).shape[1]
        # What a token becomes depends on how many are computed with it.
        step.last_hidden_state = step.last_hidden_state.roll(size, -1)
        return step

    model.network.model.forward = forward
    with pytest.raises(UserError, match=r"'odd one' \(LlamaForCausalLM\) does not give the same answer"):
        Forward(model, PROBE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lower_precisions_are_packed_too(family: str, dtype: torch.dtype) -> None:
    # As in trained networks the numbers stay small: float16 has none above 65,504.
    network = tiny.make_network(family, 1, scale=0.1).to(dtype)
    assert Forward(CausalModel("m", network), PROBE).mode == "packed"


@pytest.fixture
def falcon() -> CausalModel:
    """A family that reckons with the attention mask itself, also where there is none."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=390)
    return CausalModel("falcon", FalconForCausalLM(config).requires_grad_(False).eval())


def test_a_family_that_fails_on_packed_jobs_is_copied(falcon: CausalModel) -> None:
    all_right(ModelPair(finetuned=falcon, base=falcon, tokenizer=None), mode="copied")


def test_a_family_whose_cache_is_more_than_keys_is_refused_in_words() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=390, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(UserError, match="does not give the same answer"):
        Forward(CausalModel("m", Lfm2ForCausalLM(config).requires_grad_(False).eval()), PROBE)


@pytest.mark.parametrize(("left", "right"), [((5,), ()), ((), (5,)), ((5,), (6,))])
def test_contexts_of_a_token_or_two(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """A chat template may add as little as this."""
    pair = tiny.make_pair("llama")
    context = TokenizedContext(Context(user="{trigger}"), left, right)
    engine = Engine(pair.finetuned, pair.base, [context])
    got = engine.logits("finetuned", 0, TRIGGERS, [270])
    expected = torch.stack([slow_logits(pair.finetuned, context, t, [270]) for t in TRIGGERS.tolist()])
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["packed", "copied"])
def test_trunks_hold_the_keys_of_a_whole_pass(way: str, request: pytest.FixtureRequest) -> None:
    """A pass over several strings leaves of each what a pass over it alone leaves."""
    if way == "copied":
        request.getfixturevalue("refused")
    forward = Forward(CausalModel("m", tiny.make_network("gemma2", 1)), PROBE)
    assert forward.mode == way
    trunks = [forward.trunk(PROBE[:4]), forward.trunk([])]
    jobs = [Job(0, 0, 4, (1, 2, 3)), Job(1, 0, 2, (4, 5)), Job(2, 1, 0, (6, 7, 8, 9))]
    pack = Pack(jobs)
    with torch.no_grad():
        _, captured = forward.hidden(pack, trunks, capture=True)
    for number, job in enumerate(jobs):
        alone = forward.trunk([*PROBE[: job.start], *job.tokens])
        rows = slice(pack.first_row(number), pack.first_row(number) + len(job.tokens))
        for layer, (keys, values) in captured.items():
            assert torch.allclose(keys[:, rows], alone[layer][0][:, job.start :], atol=1e-5)
            assert torch.allclose(values[:, rows], alone[layer][1][:, job.start :], atol=1e-5)


@pytest.fixture
def ran_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that passes ran in."""
    names: list[str] = []
    plain = Forward.hidden

    def hidden(forward: Forward, *arguments: Any, **options: Any) -> Any:
        names.append(threading.current_thread().name)
        return plain(forward, *arguments, **options)

    monkeypatch.setattr(Forward, "hidden", hidden)
    return names


def many_requests(seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    followed = torch.randint(390, (8,), generator=generator)
    asked = []
    for _ in range(60):
        string = followed.clone()
        string[torch.randint(8, (1,), generator=generator)] = torch.randint(390, (1,), generator=generator)
        asked.append(Request(tuple(string.tolist()), int(torch.randint(5, (1,), generator=generator))))
    return asked


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "deepseek_v3"])
def test_two_lanes_give_what_one_gives(family: str, request: pytest.FixtureRequest, ran_in: list[str]) -> None:
    pair, asked = tiny.make_pair(family), many_requests()
    found = []
    for fixture in ("", "two_threads"):
        if fixture:
            request.getfixturevalue(fixture)
        engine = Engine(pair.finetuned, pair.base, CONTEXTS, max_rows=200)
        found.append((engine.token_scores("base", asked, PAYLOAD)[0], engine.divergences(js_divergence, asked)))
        lanes = {n for n in ran_in if n.startswith("lane")}
        assert len(lanes) == (2 if fixture else 0), ran_in
        ran_in.clear()
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_adapter_pair_in_lanes_scores_as_its_merged_weights(
    base_files: ModelFiles, adapter_files: tuple[ModelFiles, Any], ran_in: list[str]
) -> None:
    """One network, its adapters on and off in turn, in several threads at once."""
    from transformers import AutoModelForCausalLM

    pair = load_pair(adapter_files[0], base_files, options=LoadOptions(dtype="float32"))
    finetuned, base = (
        CausalModel("m", AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).requires_grad_(False))
        for f in (adapter_files[1], base_files.folder)
    )
    asked = many_requests()
    one, two = (Engine(p, q, CONTEXTS, max_rows=200) for p, q in ((pair.finetuned, pair.base), (finetuned, base)))
    for _ in range(2):
        assert torch.allclose(one.divergences(js_divergence, asked), two.divergences(js_divergence, asked), atol=1e-5)
        for side in (*SIDES, "finetuned"):
            ours, theirs = (e.token_scores(side, asked, PAYLOAD)[0] for e in (one, two))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float(one.divergences(js_divergence, asked).min()) > 1e-4
    assert any(n.startswith("lane") for n in ran_in)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_lane_is_raised_after_all_have_ended() -> None:
    from trigger_opt.scoring.lanes import in_lanes

    ended = []

    def work(item: int) -> int:
        if item == 1:
            raise KeyError("one")
        ended.append(item)
        return item

    with pytest.raises(KeyError, match="one"):
        in_lanes(work, range(5), 2)
    assert sorted(ended) == [0, 2, 3, 4]
    assert in_lanes(lambda i: i * i, range(5), 2) == [0, 1, 4, 9, 16]
    assert torch.get_num_threads() == 2


def test_sharing_computes_only_what_a_swap_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, used = tiny.make_pair(), []
    plain = Forward.hidden

    def hidden(forward: Forward, pack: Pack, *arguments: Any, **options: Any) -> Any:
        used.append(sorted(len(j.tokens) for j in pack.jobs))
        return plain(forward, pack, *arguments, **options)

    engine = Engine(pair.finetuned, pair.base, tiny.tokenized())
    followed = tuple(range(20, 30))
    swaps = [Request((*followed[:n], 7, *followed[n + 1 :]), 1) for n in range(10)]
    engine.follow(followed)
    engine.token_scores("finetuned", swaps, PAYLOAD)
    after = len(engine.contexts[1].right) + 2
    monkeypatch.setattr(Forward, "hidden", hidden)
    engine.token_scores("finetuned", swaps, PAYLOAD)
    assert used == [[10 - n + after for n in range(9, -1, -1)]]
    # A prompt that is followed to its end still has its last token computed.
    used.clear()
    engine.token_scores("finetuned", [Request(followed, 1), *swaps], PAYLOAD)
    assert used[0][0] == after
