"""One loss for every engine's strings: full precision, no cache, the whole sequence."""

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from trigger_opt.prompts import Context, conversation_ids, encode, tokenize_context


class Rescorer:
    """Losses of strings in one context, in fp32."""

    def __init__(self, folder: str, user: str, target: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._context = tokenize_context(self._tokenizer, Context(user=user))
        self._target = encode(self._tokenizer, [target])[0]

    def searched(self, trigger: str) -> float:
        """Nats a token, with the string's own tokens between the tokens around the slot, as searches see it."""
        ids = encode(self._tokenizer, [trigger])[0]
        return self._loss([*self._context.left, *ids, *self._context.right])

    def typed(self, trigger: str) -> float:
        """Nats a token when a person types the string: the whole conversation is tokenised at once."""
        return self._loss(conversation_ids(self._tokenizer, self._context.context, trigger))

    @torch.no_grad()
    def _loss(self, prompt: list[int]) -> float:
        ids = torch.tensor([[*prompt, *self._target]])
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return float(cross_entropy(logits.float(), torch.tensor(self._target)))
