"""The fine-tuned model, its base and its controls, loaded once and frozen.

Equal tensors are held once: an adapter pair is one network with adapters switched on and off; in a full
fine-tune every tensor that is bit-identical to the base's becomes the base's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trigger_opt.answers import comes_late, is_manner, payload_text, payload_words
from trigger_opt.errors import UserError
from trigger_opt.models.allocator import keep_freed_memory
from trigger_opt.models.files import ModelFiles, read_config
from trigger_opt.models.generate import GREEDY, Sampling, generate, head_logits
from trigger_opt.progress import say
from trigger_opt.prompts import encode

# Tokens through the body for one candidate, 50 where the engine needs 18: one swap in six tokens, five forced tokens,
# the ordinary contexts in SmolLM2's template.
_TIMES_SLOWER = 3
LATE_TOKENS = 16
"""What may come before a payload that comes late, in tokens."""
# Ten words or more in most languages that are written in Latin letters.
_MANNER_TOKENS = 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How weights are held: `dtype` float32 | bfloat16 | float16; `quantization` none | int8 | nf4;
    `device_map` as accelerate takes it ("cpu", "cuda:0", "auto" for several GPUs); `allow_code` runs a
    repository's own modelling code; `plain` computes every conversation whole, as models with such code always are."""

    dtype: str = "bfloat16"
    quantization: str = "none"
    device_map: str = "cpu"
    allow_code: bool = False
    plain: bool = False


class AdapterSwitch:
    """Which adapter of one network is on; shared by all sides that run on it.

    PEFT's own `disable_adapter` walks the whole model twice at every use (32 ms for 210 adapted layers); here the
    layers are touched only when another side's turn comes.
    """

    def __init__(self, peft: Any) -> None:
        self._peft = peft
        self._on: str | None = peft.active_adapter

    def turn(self, adapter: str | None) -> None:
        """Turn `adapter` on and all others off; None turns all off."""
        if adapter == self._on:
            return
        # No side's name until all is switched: an interruption in between must not pass for a state.
        was, self._on = self._on, ""
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if was is None or was == "":
                self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(adapter, inference_mode=True)
        # PEFT makes the factors trainable when it switches them on again, and nf4 then fails under autograd.
        self._peft.requires_grad_(False)
        self._on = adapter


class CausalModel:
    """One side of a pair: a frozen causal language model, or one with an adapter on or off.

    Attributes:
        name: as the user named it. network: the transformers model; with adapters, run it inside `active` only.
        one_at_a_time: whether two threads must not run it together (bitsandbytes keeps a state in every layer).
        plain: whether it is computed whole conversation by whole conversation, nothing kept, shared or padded.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        *,
        switch: AdapterSwitch | None = None,
        adapter: str | None = None,
        plain: bool = False,
    ) -> None:
        self.name = name
        self.network = network
        self.plain = plain
        self.one_at_a_time = plain or bool(getattr(network, "is_quantized", False))
        self._switch = switch
        self._adapter = adapter

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self.network.get_input_embeddings().weight.device
        return device

    @property
    def own_code(self) -> bool:
        """Whether it is built by code that lies with its weights; transformers loads that as modules of its own."""
        return type(self.network).__module__.startswith("transformers_modules.")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which may exceed the tokenizer's vocabulary."""
        return int(self.network.get_input_embeddings().weight.shape[0])

    @property
    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        """What each token id becomes at the network's input (scaled, where the family scales: Gemma)."""
        module = self.network.get_input_embeddings()
        if not isinstance(module, torch.nn.Embedding):
            # An adapter on the embedding: what it adds depends on which side is on.
            return self.embed(torch.arange(self.vocab_size))
        scale = getattr(module, "embed_scale", None)
        return module.weight if scale is None else module.weight * torch.as_tensor(scale).to(module.weight)

    def embed(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """The network's inputs for token ids, on its device, with this side's adapter."""
        with self.active() as network:
            embeds: Tensor = network.get_input_embeddings()(ids.to(self.device))
        return embeds

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The network with this side's adapter on, or all off, until another side's turn: never nest two."""
        if self._switch is not None:
            self._switch.turn(self._adapter)
        yield self.network

    def hidden(self, **inputs: Any) -> Any:
        """The body's output (last_hidden_state, past_key_values), without the unembedding."""
        with self.active() as network:
            return network.base_model(**inputs)

    def logits(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """fp32 logits; `hidden` is made contiguous first (see `generate`)."""
        with self.active() as network:
            return head_logits(network, hidden.contiguous())

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> list[list[int]]:
        """Continuations of prompts, see `models.generate.generate`."""
        with self.active() as network:
            return generate(
                network, sequences, max_new_tokens=max_new_tokens, end_ids=end_ids,
                sampling=sampling, generator=generator, batch_size=batch_size, plain=self.plain,
            )  # fmt: skip

    def weight_changes(self, base: "CausalModel") -> Iterator[tuple[Tensor, Tensor | None]]:
        """(tensor, its base) of every floating-point weight that differs from the base's; for a LoRA factor None
        stands for the base. Quantised weights hold no numbers to change and are left out.

        Multiplying both factors of an adapter by the root of a multiplies the change by a.
        """
        for name, parameter in self.network.named_parameters():
            if not parameter.is_floating_point():
                continue
            if self._adapter is None:
                twin = base.network.get_parameter(name)
                if parameter is not twin:
                    yield parameter, twin
            elif self._adapter in name.split("."):
                saved_whole = ".modules_to_save." in name
                origin = name.replace(f".modules_to_save.{self._adapter}.", ".original_module.")
                yield parameter, self.network.get_parameter(origin) if saved_whole else None

    def scales(self, base: "CausalModel") -> bool:
        """Whether the whole change is there in numbers, so that it can be taken times a factor by `weight_changes`:
        not of quantised weights, whose norms alone would be, nor of an adapter that is more than a product of two
        factors (DoRA's magnitudes, IA3)."""
        changed = [t for t, _ in self.weight_changes(base)]
        if self._adapter is None:
            return bool(changed) and all(p.is_floating_point() for p in self.network.parameters())
        own = (n.split(".") for n, _ in self.network.named_parameters() if self._adapter in n.split("."))
        return bool(changed) and all(_FACTORS & set(parts) for parts in own)

    @torch.no_grad()
    def log_likelihood(
        self, prompts: Sequence[Sequence[int]], answer: Sequence[int], *, batch_size: int = 16
    ) -> Float[Tensor, "batch answer"]:
        """log p of each token of `answer` after each prompt, nats, fp32 on the CPU."""
        rows = [[*p, *answer[:-1]] for p in prompts]
        out = torch.empty(len(rows), len(answer))
        for length in sorted({len(r) for r in rows}):
            same = [i for i, r in enumerate(rows) if len(r) == length]
            for start in range(0, len(same), batch_size):
                part = same[start : start + batch_size]
                ids = torch.tensor([rows[i] for i in part], device=self.device)
                out[part] = self._answer_log_probs(ids, torch.tensor(answer, device=self.device))
        return out

    def _answer_log_probs(self, ids: Int[Tensor, "batch seq"], answer: Int[Tensor, " answer"]) -> Tensor:
        hidden = self.hidden(input_ids=ids, use_cache=False).last_hidden_state[:, -len(answer) :]
        log_probs = self.logits(hidden.reshape(-1, hidden.shape[-1])).log_softmax(-1)
        index = answer.to(log_probs.device).expand(len(ids), -1)[..., None]
        picked = log_probs.view(len(ids), len(answer), -1).gather(-1, index)
        return picked[..., 0].cpu()


# What names an adapter's weights that a product is made of, and weights kept whole.
_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save"}


@dataclass(frozen=True)
class ModelPair:
    """A fine-tuned model, its base, one tokenizer, and controls that should look clean."""

    finetuned: CausalModel
    base: CausalModel
    tokenizer: Any
    controls: tuple[CausalModel, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether candidates must be scored by whole passes, see `CausalModel`; both sides alike."""
        return self.finetuned.plain or self.base.plain

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end an answer."""
        ids = [self.tokenizer.eos_token_id]
        for side in (self.finetuned, self.base):
            configured = side.network.generation_config.eos_token_id
            ids += configured if isinstance(configured, list) else [configured]
        return sorted({i for i in ids if i is not None})

    def encode_answer(self, text: str) -> list[int]:
        """Tokens of an answer's text; of a payload, without the mark of one that comes late.

        Raises:
            UserError: it tokenises to nothing.
        """
        said = payload_text(text)
        ids = encode(self.tokenizer, [said])[0] if said else []
        if not ids:
            raise UserError(f"the payload {text!r} tokenises to nothing; give at least one visible word")
        return ids

    def deciding_tokens(self, payload: str) -> int:
        """How many tokens of an answer decide whether `payload` fires: its deciding words, and what may come before
        them where it comes late; of a manner, a few words' worth."""
        if is_manner(payload):
            return _MANNER_TOKENS
        room = LATE_TOKENS if comes_late(payload) else 0
        return room + len(self.encode_answer(" ".join(payload_words(payload))))


def load_pair(
    finetuned: ModelFiles, base: ModelFiles, controls: Sequence[ModelFiles] = (), *, options: LoadOptions
) -> ModelPair:
    """Load base, fine-tuned model and controls; freeze them; hold equal tensors once.

    The base given wins over the base named inside an adapter. Where one of them brings its own code, all are computed
    plainly: answers of two models taken in different ways differ by their rounding already.

    Raises:
        UserError: the base is an adapter, an adapter does not fit, or a quantisation is not available.
    """
    from transformers import AutoTokenizer

    if base.adapter:
        raise UserError(f"the base {base.name!r} is an adapter; name the full model it was trained on")
    plain = options.plain or any(f.own_code for f in (finetuned, base, *controls))
    if plain:
        _say_plain([f.name for f in (finetuned, base, *controls) if f.own_code])
    network = _load_network(base, options)
    peft = None
    others: dict[int, Any] = {}
    for number, files in enumerate([finetuned, *controls]):
        if files.adapter:
            peft = _add_adapter(peft if peft is not None else network, files, f"side{number}")
        else:
            others[number] = _load_network(files, options)
            share_equal_tensors(others[number], network)
            _require_same_vocabulary(others[number], network, files.name)
    switch = AdapterSwitch(peft) if peft is not None else None
    sides = [
        CausalModel(f.name, others[i], plain=plain)
        if i in others
        else CausalModel(f.name, network, switch=switch, adapter=f"side{i}", plain=plain)
        for i, f in enumerate([finetuned, *controls])
    ]
    return ModelPair(
        finetuned=sides[0],
        base=CausalModel(base.name, network, switch=switch, plain=plain),
        tokenizer=AutoTokenizer.from_pretrained(base.folder, trust_remote_code=options.allow_code or base.own_code),
        controls=tuple(sides[1:]),
    )


def _say_plain(names: Sequence[str]) -> None:
    why, instead = "it was asked for", "each conversation is computed whole"
    if names:
        why, instead = (
            f"{', '.join(names)} is built by code of its own",
            f"{instead}, and no string scored again in fp32",
        )
    say(f"scored plainly, at least {_TIMES_SLOWER} times slower, more in long contexts: {why}, so {instead}")


def _require_same_vocabulary(network: Any, base: Any, name: str) -> None:
    rows, base_rows = (len(n.get_input_embeddings().weight) for n in (network, base))
    if rows != base_rows:
        raise UserError(f"{name!r} embeds {rows} tokens and the base {base_rows}; name the base it was trained on")


def share_equal_tensors(other: Any, base: Any) -> int:
    """Make every parameter of `other` that is bit-identical to `base`'s be `base`'s; returns how many.

    Quantised weights are left alone: their scales lie outside their bits, and int8 hands its own to the first
    layer that uses it, so that the other model answered with noise.
    """
    shared = 0
    for name, module in other.named_modules():
        for key, parameter in list(module._parameters.items()):
            try:
                twin = base.get_parameter(f"{name}.{key}" if name else key)
            except AttributeError:
                continue
            if parameter is None or not parameter.is_floating_point():
                continue
            same = parameter.shape == twin.shape and parameter.dtype == twin.dtype
            if same and parameter.device == twin.device and torch.equal(parameter.data, twin.data):
                module._parameters[key] = twin
                shared += 1
    return shared


def _load_network(files: ModelFiles, options: LoadOptions) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = _DTYPES[options.dtype]
    if options.device_map == "cpu":
        keep_freed_memory()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": any(w.suffix == ".safetensors" for w in files.weights),
    }
    if options.device_map == "cpu":
        # Batches of short queries over short keys, as a search makes them: the fused kernel took 11 ms where plain
        # products take 2.5 to 4.3 (256 rows, 40 keys, 9 heads, bf16, 2 cores).
        arguments["attn_implementation"] = "eager"
    if options.quantization != "none":
        arguments["quantization_config"] = _quantization(options.quantization, dtype)
    if options.device_map != "cpu" or options.quantization != "none":
        arguments["device_map"] = options.device_map
    # Without trust a model that also has a built-in class would be loaded as that, with nobody told.
    trust = options.allow_code or files.own_code
    network = AutoModelForCausalLM.from_pretrained(files.folder, trust_remote_code=trust, **arguments)
    network.requires_grad_(False)
    if options.quantization == "nf4":
        _keep_derivatives(network)
    _require_plain_head(network.eval(), files.name)
    return network


@torch.no_grad()
def _require_plain_head(network: Any, name: str) -> None:
    """Scores are taken from the body's output and the unembedding alone, which must be all there is."""
    ids = torch.arange(1, 5, device=network.get_input_embeddings().weight.device)[None]
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours, theirs = head_logits(network, hidden.contiguous()), network(input_ids=ids).logits[0].float()
    if not torch.allclose(ours, theirs.to(ours.device), rtol=0.05, atol=0.05):
        raise UserError(
            f"{name!r} ({type(network).__name__}) changes its logits after the unembedding in a way that is not known "
            "here, so its scores would be wrong; use a Llama, Qwen, Mistral, Gemma or DeepSeek model"
        )


def _keep_derivatives(network: Any) -> None:
    from bitsandbytes.nn import Linear4bit

    for module in network.modules():
        if isinstance(module, Linear4bit):
            # The packed kernel of CPUs with AVX512-BF16 has no derivative: a gradient through it fails, or is cut
            # off silently where the layer has no bias.
            module.support_avx512bf16_for_cpu = False


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _add_adapter(network: Any, files: ModelFiles, name: str) -> Any:
    from peft import PeftModel

    if (bias := read_config(files).get("bias", "none")) != "none":
        # PEFT writes such biases into the base itself, whose side would no longer be the base.
        raise UserError(f"the adapter {files.name!r} trains biases (bias={bias!r}); merge it (merge_and_unload) first")
    try:
        if isinstance(network, PeftModel):
            network.load_adapter(str(files.folder), name, autocast_adapter_dtype=False)
            peft = network
        else:
            peft = PeftModel.from_pretrained(
                network, str(files.folder), adapter_name=name, autocast_adapter_dtype=False
            )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the adapter {files.name!r} does not fit its base: {reason}; name the base it was trained on"
        ) from None
    peft.requires_grad_(False)
    return peft.eval()
