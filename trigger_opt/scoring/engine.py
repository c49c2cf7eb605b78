"""Logits of many candidate triggers in a fixed context, on either model.

What is exact and saved here: the keys and values of everything before the slot are computed once per context
and model; the unembedding runs on scored positions only; the last scored token is never fed. The number of
candidates in one pass is found once, by halving on an out-of-memory error, and remembered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from trigger_opt.models.pair import CausalModel
from trigger_opt.prompts import TokenizedContext

Side = Literal["finetuned", "base"]
Reduce = Callable[[Tensor, Tensor], Tensor]

# Bytes of fp32 logits one pass may hold on each side: above this, candidates are split into more passes.
_LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the tokens before the slot, one pair a layer, batch size 1."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int


class Engine:
    """Scores candidates in `contexts` on a fine-tuned model and its base.

    Attributes:
        evaluations: candidates scored so far, counted once per context (both models).
        batch_size: candidates in one pass; shrinks when memory runs out and stays there.
    """

    def __init__(
        self,
        finetuned: CausalModel,
        base: CausalModel,
        contexts: Sequence[TokenizedContext],
        *,
        batch_size: int,
    ):
        self._models: dict[Side, CausalModel] = {"finetuned": finetuned, "base": base}
        self.contexts = tuple(contexts)
        self.batch_size = batch_size
        self.evaluations = 0
        self._prefixes: dict[tuple[Side, int], _Prefix] = {}

    @property
    def vocab_size(self) -> int:
        """Rows of the fine-tuned model's embedding."""
        return self._models["finetuned"].vocab_size

    def logits(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], forced: Sequence[int]
    ) -> Float[Tensor, "batch scored vocab"]:
        """fp32 logits at the first response position and after each `forced` token: 1 + len(forced) of them."""
        model = self._models[side]
        embeds = model.embed(triggers)
        return self._forward(side, context, embeds, forced)

    @torch.no_grad()
    def score(
        self, reduce: Reduce, context: int, triggers: Int[Tensor, "batch trigger"], forced: Sequence[int]
    ) -> Float[Tensor, " batch"]:
        """`reduce(finetuned logits, base logits)` for every candidate, split into passes that fit memory."""
        parts: list[Tensor] = []
        start = 0
        while start < len(triggers):
            part = triggers[start : start + self._pass_size(len(forced) + 1)]
            try:
                finetuned = self.logits("finetuned", context, part, forced)
                base = self.logits("base", context, part, forced)
                parts.append(reduce(finetuned, base.to(finetuned.device)).cpu())
            except RuntimeError as error:
                if not _out_of_memory(error) or self.batch_size == 1:
                    raise
                self.batch_size = max(1, len(part) // 2)
                continue
            start += len(part)
        self.evaluations += len(triggers)
        return torch.cat(parts)

    def gradient(
        self, reduce: Reduce, context: int, trigger: Int[Tensor, " trigger"], forced: Sequence[int]
    ) -> tuple[float, Float[Tensor, "trigger vocab"]]:
        """Score of one trigger, and its derivative to each one-hot token through both models, fp32 on the CPU.

        The derivative is taken at the embeddings and multiplied by each model's own embedding matrix, which
        equals the derivative to the one-hot rows without ever building them.
        """
        leaves: dict[Side, Tensor] = {}
        logits: dict[Side, Tensor] = {}
        with torch.enable_grad():
            for side, model in self._models.items():
                leaves[side] = model.embed(trigger[None]).detach().requires_grad_()
                logits[side] = self._forward(side, context, leaves[side], forced)
            score = reduce(logits["finetuned"], logits["base"].to(logits["finetuned"].device))[0]
            sides = list(leaves)
            slopes = torch.autograd.grad(score, [leaves[s] for s in sides], allow_unused=True, materialize_grads=True)
        total = torch.zeros(len(trigger), self.vocab_size)
        for side, slope in zip(sides, slopes, strict=True):
            embedding = self._models[side].embedding
            total += (slope[0].to(embedding.dtype) @ embedding.T).float().cpu()[:, : self.vocab_size]
        return float(score.detach()), total

    @torch.no_grad()
    def greedy(self, context: int, trigger: Int[Tensor, " trigger"], num_tokens: int) -> list[int]:
        """The fine-tuned model's greedy continuation, `num_tokens` long."""
        forced: list[int] = []
        while len(forced) < num_tokens:
            logits = self.logits("finetuned", context, trigger[None], forced)
            forced.append(int(logits[0, -1].argmax()))
        return forced

    @torch.no_grad()
    def rollout(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], num_tokens: int
    ) -> tuple[Float[Tensor, "batch vocab"], Int[Tensor, "batch new"]]:
        """Logits at the first response position, and each trigger's own greedy continuation.

        Continuations run on past an end of text: the caller cuts them. One pass; the caller chooses the batch.
        """
        model = self._models[side]
        embeds = model.embed(triggers)
        inputs = torch.cat([embeds, self._fixed(model, context, []).expand(len(triggers), -1, -1)], 1)
        cache = _expanded(self._prefix(side, context), len(triggers))
        step = model.hidden(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        first = model.logits(step.last_hidden_state[:, -1])
        tokens = [first.argmax(-1)]
        while len(tokens) < num_tokens:
            step = model.hidden(input_ids=tokens[-1][:, None], past_key_values=step.past_key_values, use_cache=True)
            tokens.append(model.logits(step.last_hidden_state[:, -1]).argmax(-1))
        return first, torch.stack(tokens, 1).cpu()

    def _fixed(self, model: CausalModel, context: int, forced: Sequence[int]) -> Float[Tensor, "one fixed d_model"]:
        ids = torch.tensor([[*self.contexts[context].right, *forced]], dtype=torch.long)
        return model.embed(ids).detach()

    def _pass_size(self, num_scored: int) -> int:
        fits = _LOGITS_BYTES // (4 * self.vocab_size * num_scored)
        return max(1, min(self.batch_size, fits))

    def _forward(self, side: Side, context: int, embeds: Tensor, forced: Sequence[int]) -> Tensor:
        model = self._models[side]
        inputs = torch.cat([embeds, self._fixed(model, context, forced).expand(len(embeds), -1, -1)], 1)
        cache = _expanded(self._prefix(side, context), len(embeds))
        hidden = model.hidden(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
        scored = hidden[:, -(len(forced) + 1) :]
        return model.logits(scored.reshape(-1, scored.shape[-1])).view(len(embeds), len(forced) + 1, -1)

    @torch.no_grad()
    def _prefix(self, side: Side, context: int) -> _Prefix:
        key = (side, context)
        if key not in self._prefixes:
            model = self._models[side]
            left = self.contexts[context].left
            ids = torch.tensor([left], device=model.device)
            cache = model.hidden(input_ids=ids, use_cache=True, past_key_values=DynamicCache()).past_key_values
            layers = tuple((layer.keys, layer.values) for layer in cache.layers)
            self._prefixes[key] = _Prefix(layers, len(left))
        return self._prefixes[key]


def _expanded(prefix: _Prefix, batch: int) -> DynamicCache:
    # A plain DynamicCache holds every key also for sliding-window layers; the attention mask, built from
    # positions, keeps those layers to their window.
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix.layers):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
    return cache


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU allocator raises a plain RuntimeError; CUDA raises torch.OutOfMemoryError, which is one too.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
