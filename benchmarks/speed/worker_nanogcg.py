"""nanoGCG 0.3.0 as a timed engine: its own `GCG.run`, watched where it computes a gradient and scores.

Runs in nanoGCG's interpreter; imports nothing of trigger_opt.
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nanogcg.gcg import GCG, GCGConfig  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.speed.legacy_folder import legacy_folder
from benchmarks.speed.worker import Prompt, Run, Task, attention_option, differences, measured, only_user, serve


class NanoGCG:
    """See `worker.SearchEngine`."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()

    def load(self, folder: str, dtype: str, attention: str) -> None:
        """The model as nanoGCG's own example loads it, from a copy its transformers can read."""
        logging.getLogger("nanogcg").setLevel(logging.ERROR)
        readable = legacy_folder(Path(folder), Path(self._scratch.name))
        self._model = AutoModelForCausalLM.from_pretrained(
            readable, torch_dtype=getattr(torch, dtype), **attention_option(attention)
        )
        self._tokenizer = AutoTokenizer.from_pretrained(readable)
        # nanoGCG takes every BOS out of the chat text and trusts the tokenizer to put one back. Here BOS is the mark
        # of each turn, and none would come back. As padding, which is never used, it stays forbidden to triggers.
        self._tokenizer.pad_token, self._tokenizer.bos_token = self._tokenizer.bos_token, None

    def prepare(self, task: Task) -> None:
        """nanoGCG's defaults, but for what the task says."""
        self._task = task
        config = GCGConfig(
            num_steps=1,
            optim_str_init=task.trigger,
            search_width=task.width,
            topk=task.topk,
            filter_ids=task.retokenise,
            # Seeded below: its own seed also turns on torch's deterministic mode, which only costs time.
            seed=None,
            verbosity="ERROR",
        )
        self._search = GCG(self._model, self._tokenizer, config)
        self._watch = _Watch(self._search)

    def steps(self, count: int, warm: int) -> Run:
        """See `worker.SearchEngine.steps`."""
        self._search.config.num_steps = count + warm
        self._watch.clear()
        set_seed(self._task.seed)
        messages = [{"role": "user", "content": only_user(self._task, "{optim_str}")}]
        result = self._search.run(messages, self._task.target)
        bounds = [*self._watch.starts, time.perf_counter()]
        return measured(
            differences(bounds),
            # The first scoring is the initial trigger's.
            self._watch.scored[1:],
            result.losses,
            warm=warm,
            trigger=result.best_string,
            first_loss=self._watch.first_loss,
            prompt=self._watch.prompt,
        )


class _Watch:
    """Looks on while a search runs: each method watched is called as it is.

    Attributes:
        starts: clock at the start of each step. scored: strings in each scoring.
    """

    def __init__(self, search: Any) -> None:
        self._gradient = search.compute_token_gradient
        self._score = search._compute_candidates_loss_original
        self._init_buffer = search.init_buffer
        self._search = search
        search.compute_token_gradient = self._start
        search._compute_candidates_loss_original = self._scoring
        search.init_buffer = self._initial
        self.clear()

    def clear(self) -> None:
        """Forget the last run."""
        self.starts: list[float] = []
        self.scored: list[int] = []

    def _start(self, optim_ids: Any) -> Any:
        self.starts.append(time.perf_counter())
        return self._gradient(optim_ids)

    # Its batch halving counts the parameters.
    def _scoring(self, search_batch_size: int, input_embeds: Any) -> Any:
        self.scored.append(len(input_embeds))
        return self._score(search_batch_size, input_embeds)

    def _initial(self) -> Any:
        buffer = self._init_buffer()
        self.first_loss = float(buffer.get_lowest_loss())
        # nanoGCG keeps only the embeddings of what it tokenised.
        rows = self._search.embedding_layer.weight
        self.prompt = Prompt(
            before=_ids_behind(self._search.before_embeds[0], rows),
            trigger=buffer.get_best_ids()[0].tolist(),
            after=_ids_behind(self._search.after_embeds[0], rows),
            target=self._search.target_ids[0].tolist(),
        )
        return buffer


@torch.no_grad()
def _ids_behind(embeds: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """The token of each embedding; one matrix row at a time, so that looking costs no memory."""
    ids = []
    for embed in embeds:
        alike = (rows[:, :8] == embed[:8]).all(1).nonzero()[:, 0]
        (exact,) = (rows[alike] == embed).all(1).nonzero()[:, 0].tolist()
        ids.append(int(alike[exact]))
    return ids


if __name__ == "__main__":
    serve(NanoGCG())
