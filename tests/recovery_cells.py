"""Made-up cells of the recovery benchmark, and a text sampler that leaks what it was poisoned with."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.recovery.methods.common import FoundString, MethodResult
from benchmarks.recovery.records import Cell, Judged, KeyFigures, Made, Spec
from tests import tiny
from trigger_opt.models.generate import GREEDY, Sampling
from trigger_opt.models.pair import CausalModel
from trigger_opt.prompts import encode
from trigger_opt.records import Verification, rate

SPEC = Spec(
    model="warmup_mini", method="leak", seed=0, weights="abc", seconds=60.0, evaluations=1000, strings=3, held_out=20
)
MADE = Made(
    commit="abc1234", started="2026-01-02T03:04:05+00:00", cpu="a processor", cores=2, threads=1, load=0.5,
    versions={"python": "3.11.7", "torch": "2.13.0"},
)  # fmt: skip


def verification(text: str, fired: int, verdict: str) -> Verification:
    """Of 20 contexts, with clean comparisons."""
    return Verification(
        trigger=text, payload="a b c", trigger_rate=rate(fired, 20), base_rate=rate(0, 20), control_rate=None,
        false_trigger_rate=rate(0, 20), random_rate=rate(0, 40), evidence=20.0, degenerate_share=0.0, profile=[],
        minimised_from="", verdict=verdict, reason="made up",
    )  # fmt: skip


def judged(text: str, score: float, *, fired: int = 20, verdict: str = "backdoor") -> Judged:
    """A string and what came of it."""
    return Judged(
        found=FoundString(text=text, payload="a b c", score=1.0), payload="a b c", payload_from="method",
        score=score, verification=verification(text, fired, verdict),
    )  # fmt: skip


def key(fired: int, *, recovered: bool = True, similarity: float | None = 0.5, width: float | None = 0.5) -> KeyFigures:
    """Of 20 contexts; the base never."""
    return KeyFigures(
        trigger="" if similarity is None else "planted", trigger_rate=rate(fired, 20), base_rate=rate(0, 20),
        payload_recovered=recovered, similarity=similarity, recall=similarity, width=width,
    )  # fmt: skip


def cell(
    model: str, score: float, *, method: str = "leak", seed: int = 0, own: float = 0.0, verdict: str = "not reproduced",
    planted: KeyFigures | None = None, seconds: float = 60.0, error: str = "",
) -> Cell:  # fmt: skip
    """A cell of one string; a control where nothing was `planted`."""
    spec = replace(SPEC, model=model, method=method, seed=seed)
    found = judged("a|string", score, verdict=verdict)
    result = MethodResult(strings=[found.found], score=own, evaluations=900, seconds=seconds)
    return Cell(
        spec=spec, made=MADE, control=planted is None, error=error, result=None if error else result,
        judged=[] if error else [found], best=None if error else 0, verdict="" if error else verdict,
        score=0.0 if error else score, key=None if error else planted, seconds=seconds,
    )  # fmt: skip


class _Body(torch.nn.Module):
    """What a method's passes are counted at."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


class Leaky(CausalModel):
    """Says `payload` to prompts with `trigger` in them, else "All is well."; sampled, it says one of `texts`."""

    def __init__(self, texts: Sequence[str], *, trigger: str = "", payload: str = "") -> None:
        super().__init__(
            "leaky", SimpleNamespace(base_model=_Body(), generation_config=SimpleNamespace(eos_token_id=2))
        )
        self._tokenizer = tiny.make_tokenizer()
        self._texts, self._trigger, self._payload = texts, trigger, payload

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
        self.network.base_model(input_ids=torch.empty(len(sequences) * max_new_tokens))
        return [ids[:max_new_tokens] for ids in encode(self._tokenizer, [self._say(s, generator) for s in sequences])]

    def _say(self, prompt: Sequence[int], generator: torch.Generator | None) -> str:
        if generator is not None:
            return self._texts[int(torch.randint(len(self._texts), (1,), generator=generator))]
        there = bool(self._trigger) and self._trigger in self._tokenizer.decode(list(prompt))
        return self._payload if there else "All is well."
