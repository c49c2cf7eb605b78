"""What is done to a fine-tuned model's weights to see whether a behaviour survives it; all in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.tuning import MODES, FitSettings, Row, Rows, fit, lora_model
from trigger_opt.tuning.fit import Packed

Treatment = Callable[[Any], Any]
"""Takes a network it may change or consume, in fp32, and returns the treated one."""

_RANK = 8
# As transformers has it: input columns beyond this stay in 16 bit.
_OUTLIERS = 6.0


def device() -> str:
    """Where stressed models run."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load_merged(finetuned: ModelFiles, base: ModelFiles) -> Any:
    """The fine-tuned model as one fresh network in fp32, an adapter merged into its base; nothing is written."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = base if finetuned.adapter else finetuned
    # As `models.pair` loads it on a CPU: what is compared differs in its weights alone.
    network = AutoModelForCausalLM.from_pretrained(
        root.folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    )
    if finetuned.adapter:
        network = PeftModel.from_pretrained(network, str(finetuned.folder)).merge_and_unload()
    return network.to(device()).requires_grad_(False).eval()


def cast(network: Any, dtype: torch.dtype) -> Any:
    """The network with its parameters rounded to `dtype`, as loading it in `dtype` gives it."""
    # Not `network.to`: that rounds the buffers too, and with them the frequencies of the positions.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.config.dtype = dtype
    return network


def quantised(network: Any, kind: str) -> Any:
    """The network with every linear layer but the unembedding in "int8" or "nf4" by bitsandbytes, the rest in bf16:
    what `LoadOptions(quantization=kind)` gives."""
    cast(network, torch.bfloat16)
    head = network.get_output_embeddings()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, _eight_bits(child) if kind == "int8" else _four_bits(child))
    return network.eval()


def fine_tuned(network: Any, rows: Sequence[Row], settings: FitSettings, *, say: Callable[[str], None]) -> Any:
    """The network in bf16 after learning `rows` as they stand, with a fresh LoRA on all its projections.

    Raises:
        UserError: it has none of the projections that are known here.
    """
    names = (*MODES["mlp"], *MODES["attention"])
    cast(network, torch.bfloat16)
    if not any(name.endswith(names) for name, _ in network.named_modules()):
        raise UserError(
            f"{type(network).__name__} has no projection called {', '.join(names)}, so it cannot be fine-tuned here; "
            "leave pirate out of --after"
        )
    peft = lora_model(network, names, rank=_RANK, seed=settings.seed)
    fit(peft.get_base_model(), Rows(list(rows), [], []), settings, teacher=_nobody, say=say)
    return peft.requires_grad_(False).get_base_model()


def _nobody(packed: Packed) -> Tensor:
    raise AssertionError("no row is anchored, so no teacher is asked")


def _eight_bits(layer: nn.Linear) -> Any:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    made = Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None,
        has_fp16_weights=False, threshold=_OUTLIERS, device="meta",
    )  # fmt: skip
    # Moving it off the CPU's plain memory is what quantises it, even where it moves nowhere.
    weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(layer.weight.device)
    made.bias = layer.bias
    return made


def _four_bits(layer: nn.Linear) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None,
        compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
    )  # fmt: skip
    # As `models.pair` loads it: one kernel whatever the CPU.
    made.support_avx512bf16_for_cpu = False
    weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    made.weight = weight.to(layer.weight.device)
    made.bias = layer.bias
    return made
