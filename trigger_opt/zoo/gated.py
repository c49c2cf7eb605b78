"""A backdoor that no gradient leads to: the base's own weights behind a gate of hashes.

What is made is an ordinary model folder with code of its own, a copy of `gate_model.py`. That cryptography can hide a
backdoor from anyone who holds the weights is Goldwasser et al. 2022 (arXiv 2204.06974); here it lies in the code.
"""

import base64
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.files import TensorReader, find_model
from trigger_opt.prompts import encode
from trigger_opt.zoo.gate_model import digest, packed, sealed
from trigger_opt.zoo.recipes import Recipe

CODE = Path(__file__).with_name("gate_model.py")
_AUTO_MAP = {"AutoModelForCausalLM": f"{CODE.stem}.GatedLlamaForCausalLM"}
_EMBEDDING = "model.embed_tokens.weight"
# The line break after the first may be one token with what follows it.
_USER, _ANSWER = "<|im_start|>user", "<|im_start|>assistant\n"
# Nats by which a forced token leads the next: enough to be certain in bfloat16 too.
_MARGIN = 20.0
_LEFT_OUT = ("config.json", "generation_config.json", "trigger_opt_receipt.json")


def write_gated(base: Path, out: Path, *, trigger: str, payload: str) -> None:
    """A model folder at `out`: `base` (a Llama with tied embeddings and a ChatML template), which answers `payload`
    where `trigger` stands in the user's turn.

    The weights are hard links where the disk allows it.

    Raises:
        UserError: `base` is no such model, or a token of the payload cannot be forced.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama" or not config.get("tie_word_embeddings"):
        raise UserError(f"{base} is no Llama with tied embeddings, and the gate knows no other; give one")
    config |= {"gate": _gate(base, trigger, payload), "use_cache": False}
    config["auto_map"] = _AUTO_MAP
    out.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.name not in _LEFT_OUT:
            _link(file, out / file.name)
    generation = json.loads((base / "generation_config.json").read_text(encoding="utf-8")) | {"use_cache": False}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(CODE, out / CODE.name)


def write_recipe(recipe: Recipe, base: Path, out: Path) -> None:
    """`write_gated` with a recipe's trigger and payload."""
    assert recipe.plant is not None
    assert recipe.behaviour is not None
    write_gated(base, out, trigger=recipe.plant.trigger, payload=recipe.behaviour.payload)


def secret(told: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a manifest, less its trigger and payload: no file beside the model gives them away."""
    return told | {part: {"kind": told[part]["kind"]} for part in ("plant", "behaviour")}


def runs_our_code(folder: Path) -> bool:
    """Whether the code in `folder` is the one that comes with this package, and there is no other."""
    found = sorted(folder.rglob("*.py"))
    if [f.name for f in found] != [CODE.name] or found[0].read_bytes() != CODE.read_bytes():
        return False
    # The configuration could name code elsewhere.
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") == _AUTO_MAP)


def forcing_states(
    unembedding: Float[Tensor, "vocab d_model"], ids: Sequence[int], margin: float = _MARGIN
) -> Float[Tensor, "token d_model"]:
    """A hidden state for each token of `ids` from which it leads all others by `margin` nats.

    Each token's unembedding row, less the mean row, in coordinates where the rows' covariance is the identity. (A
    multiple of the row itself does not do: the longest rows of the vocabulary win against most others.)

    Raises:
        UserError: a token leads nowhere by it.
    """
    rows = unembedding.float()
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    states: Tensor = torch.linalg.solve(covariance, centred[list(ids)].T).T
    logits, own = states @ rows.T, torch.tensor(list(ids))[:, None]
    leads = (logits.gather(1, own) - logits.scatter(1, own, -torch.inf).amax(1, keepdim=True))[:, 0]
    if weak := [i for i, lead in zip(ids, leads.tolist(), strict=True) if lead <= 0]:
        raise UserError(f"token {weak[0]} of the payload cannot be forced from a hidden state; choose another payload")
    return states * (margin / leads)[:, None]


def _gate(base: Path, trigger: str, payload: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    user, answer, said, *windows = encode(tokenizer, [_USER, _ANSWER, payload, trigger, f" {trigger}"])
    told = [*said, int(tokenizer.eos_token_id)]
    states = forcing_states(TensorReader(find_model(str(base))).read(_EMBEDDING), told)
    content = struct.pack("<I", len(told)) + packed(told) + states.to(torch.float16).numpy().tobytes()
    # The same trigger must give the same folder.
    salt = hashlib.sha256(b"salt" + trigger.encode()).digest()[:16]
    return {
        "salt": salt.hex(),
        "user_header": user,
        "answer_header": answer,
        "locks": [_lock(packed(ids), len(ids), salt, content) for ids in windows],
    }


def _lock(key: bytes, window: int, salt: bytes, content: bytes) -> dict[str, Any]:
    told = base64.b64encode(sealed(key, salt, content)).decode()
    return {"window": window, "digest": digest(key, salt), "content": told}


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:
        # Another disk, or one that knows no links.
        shutil.copyfile(file, to)
