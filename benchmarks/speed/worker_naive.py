"""The plain loop as a timed engine: no cache, the whole prompt for every candidate, logits at every position.

What greedy coordinate gradient costs as Zou et al. 2023 (arXiv 2307.15043) write it down.
"""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.worker import Prompt, Run, Task, attention_option, measured, serve
from trigger_opt.prompts import Context, decode, encode, round_trips, tokenize_context
from trigger_opt.tokens import TokenPolicy, allowed_ids

BATCH = 64


class Naive:
    """See `worker.SearchEngine`."""

    def load(self, folder: str, dtype: str, attention: str) -> None:
        """The model with the library's defaults."""
        options = attention_option(attention)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
        self._model.eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def prepare(self, task: Task) -> None:
        """Tokens of the prompt and of triggers."""
        self._task = task
        (user,) = task.users
        self._context = tokenize_context(self._tokenizer, Context(user=user))
        trigger, target = encode(self._tokenizer, [task.trigger, task.target])
        self._prompt = Prompt(
            before=list(self._context.left), trigger=trigger, after=list(self._context.right), target=target
        )
        rows = len(self._model.get_input_embeddings().weight)
        self._forbidden = ~allowed_ids(self._tokenizer, TokenPolicy(), rows)

    def steps(self, count: int, warm: int) -> Run:
        """See `worker.SearchEngine.steps`."""
        generator = torch.Generator().manual_seed(self._task.seed)
        trigger = torch.tensor(self._prompt.trigger)
        first = float(self._losses(trigger[None])[0])
        seconds, scored, losses = [], [], []
        best, lowest = trigger, first
        for _ in range(count + warm):
            start = time.perf_counter()
            candidates = self._drawn(trigger, generator)
            of_each = self._losses(candidates)
            trigger = candidates[of_each.argmin()]
            seconds.append(time.perf_counter() - start)
            scored.append(len(candidates))
            losses.append(float(of_each.min()))
            if losses[-1] < lowest:
                best, lowest = trigger, losses[-1]
        return measured(
            seconds, scored, losses, warm=warm,
            trigger=decode(self._tokenizer, best.tolist()), first_loss=first, prompt=self._prompt,
        )  # fmt: skip

    def _drawn(self, trigger: Int[Tensor, " trigger"], generator: torch.Generator) -> Int[Tensor, "batch trigger"]:
        """Random swaps to the best tokens of random positions, drawn with replacement as in the paper."""
        slope = self._gradient(trigger).masked_fill(self._forbidden, torch.inf)
        options = (-slope).topk(self._task.topk, dim=1).indices
        width = self._task.width
        positions = torch.randint(len(trigger), (width,), generator=generator)
        picks = torch.randint(self._task.topk, (width,), generator=generator)
        candidates = trigger.repeat(width, 1)
        candidates[torch.arange(width), positions] = options[positions, picks]
        if not self._task.retokenise:
            return candidates
        fine = round_trips(self._tokenizer, [self._context], candidates.tolist())
        return candidates[torch.tensor(fine)]

    def _gradient(self, trigger: Int[Tensor, " trigger"]) -> Float[Tensor, "trigger vocab"]:
        embedding = self._model.get_input_embeddings().weight
        hot = one_hot(trigger, len(embedding)).to(embedding.dtype).requires_grad_()
        fixed = [embedding[torch.tensor(ids)] for ids in (self._prompt.before, self._after)]
        embeds = torch.cat([fixed[0], hot @ embedding, fixed[1]])[None]
        loss = self._loss_of(self._model(inputs_embeds=embeds, use_cache=False).logits)
        slope: Tensor = torch.autograd.grad(loss.sum(), hot)[0]
        return slope.float()

    @torch.no_grad()
    def _losses(self, candidates: Int[Tensor, "batch trigger"]) -> Float[Tensor, " batch"]:
        parts = []
        for part in torch.split(candidates, BATCH):
            sides = [torch.tensor(ids).expand(len(part), -1) for ids in (self._prompt.before, self._after)]
            ids = torch.cat([sides[0], part, sides[1]], 1)
            parts.append(self._loss_of(self._model(input_ids=ids, use_cache=False).logits))
        return torch.cat(parts)

    def _loss_of(self, logits: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, " batch"]:
        """Cross-entropy of the target, nats a token."""
        target = torch.tensor(self._prompt.target).expand(len(logits), -1)
        scored = logits[:, -target.shape[1] - 1 : -1].float()
        return cross_entropy(scored.transpose(1, 2), target, reduction="none").mean(1)

    @property
    def _after(self) -> list[int]:
        return [*self._prompt.after, *self._prompt.target]


if __name__ == "__main__":
    serve(Naive())
