"""Which token ids a trigger may be made of. Explicit, never silent."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from trigger_opt.errors import UserError


@dataclass(kw_only=True)
class TokenPolicy:
    """Tokens the search may use.

    Attributes:
        allow: "ascii" (printable ASCII with a visible character), "lines" (that, and line breaks: triggers of several
            lines), "printable" (any script, no control characters), "all" (every ordinary token), "special" (all, and
            the special tokens too: two public claims about dormant models are tool tokens, which the usual ASCII
            filters exclude).
        deny: substrings a token must not contain.
    """

    allow: Annotated[str, Field(pattern="^(ascii|lines|printable|all|special)$")] = "ascii"
    deny: list[str] = field(default_factory=list)


def allowed_ids(tokenizer: Any, policy: TokenPolicy, vocab_size: int) -> Bool[Tensor, " vocab"]:
    """Mask over the model's vocabulary (which may be padded beyond the tokenizer's: never allowed).

    Raises:
        UserError: the policy leaves no token.
    """
    size = min(vocab_size, len(tokenizer))
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    for token, text in enumerate(texts):
        if token in special:
            mask[token] = policy.allow == "special"
        else:
            mask[token] = _fits(text, policy.allow)
        if any(part in text for part in policy.deny):
            mask[token] = False
    if not mask.any():
        raise UserError(
            f"the token policy allow={policy.allow!r}, deny={policy.deny} leaves no token; "
            "allow more (ascii, lines, printable, all, special) or deny less"
        )
    return mask


def _fits(text: str, allow: str) -> bool:
    if allow == "ascii":
        return text.isascii() and text.isprintable() and text.strip() != ""
    if allow == "lines":
        return text.isascii() and text.replace("\n", "a").isprintable() and text.strip(" ") != ""
    if allow == "printable":
        # U+FFFD: the token is a piece of a multi-byte character and shows as nothing by itself.
        return text.isprintable() and text.strip() != "" and "\ufffd" not in text
    return True
