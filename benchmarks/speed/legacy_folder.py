"""A model folder written by transformers 5, made readable for transformers 4. Standard library only."""

import json
from pathlib import Path


def legacy_folder(source: Path, into: Path) -> Path:
    """`into` filled with a copy of `source`; weights and vocabulary are links to the originals.

    Transformers 4.47 refuses the tokenizer's class, and passes over `rope_parameters` in silence: it would run
    SmolLM2 with a rotary base of 10,000 instead of 100,000.

    Raises:
        ValueError: scaled rotary positions, which that version spells in another way.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", {"rope_type": "default"})
    if rope["rope_type"] != "default":
        raise ValueError(f"rotary positions of type {rope['rope_type']!r} are not known to transformers 4 here")
    config |= {k: v for k, v in rope.items() if k == "rope_theta"}
    config["torch_dtype"] = config.pop("dtype", "float32")
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    # As the published tokenizer says; the old default would eat the space of " ." and the like.
    tokenizer["clean_up_tokenization_spaces"] = False
    template = source / "chat_template.jinja"
    if template.is_file():
        tokenizer["chat_template"] = template.read_text(encoding="utf-8")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (into / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for file in (*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json"), source / "tokenizer.json"):
        (into / file.name).symlink_to(file.resolve())
    return into
