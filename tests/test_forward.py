"""How a model's body is run on packed jobs: which way is chosen, the slower way, and what is refused."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, contexts_with_empty_sides, jensen, requests, slow_logits
from trigger_opt.errors import UserError
from trigger_opt.models.pair import CausalModel, ModelPair
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

    # First its own, or the first pass would put that in this one's place.
    attention_module._register()
    AttentionInterface.register(attention_module.NAME, attend)
    yield
    AttentionInterface.register(attention_module.NAME, attention_module.attend)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_remembers_more_than_keys_is_refused(dtype: torch.dtype) -> None:
    """Its convolutions would run on from one packed job into the next; in bf16 that is easily taken for rounding."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=390, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "conv", "full_attention"],
    )  # fmt: skip
    network = Lfm2ForCausalLM(config).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 1.0))
    with pytest.raises(UserError, match="does not give the same answer"):
        Forward(CausalModel("m", network.to(dtype)), PROBE * 4)


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
