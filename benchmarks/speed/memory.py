"""What a large vocabulary costs in memory: a small random body under a head of 151,936 tokens."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.bench import OURS, Bench, engine_facts, require_same
from benchmarks.speed.cells import NAIVE
from benchmarks.speed.client import WorkerError
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import Shape, make_task, short_user
from benchmarks.speed.worker import Run, Task

WIDTH, SHAPE = 512, Shape(trigger=20, target=20)
# Qwen's; SmolLM2's tokenizer reaches the first 49,152 of them.
VOCABULARY = 151_936


def run_memory(bench: Bench) -> list[WorkerError]:
    """One step of each peer and of ours, alone in memory; those cells that failed."""
    store = Store(bench.options.results, "memory")
    task = make_task(bench.tokenizer, SHAPE, [short_user()], width=WIDTH)
    settings: dict[str, Any] = {"width": WIDTH, "trigger": SHAPE.trigger, "target": SHAPE.target}
    settings |= {"vocabulary": VOCABULARY, "attention": bench.options.attention}
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = big_head(bench, Path(scratch), VOCABULARY)
        for peer in [e for e in bench.options.engines if e != NAIVE]:

            def measure(peer: str = peer) -> Record:
                return measure_memory(bench, peer, task, folder)

            failures.append(bench.cell(store, peer, {"engine": peer, **settings}, measure))
    return [f for f in failures if f is not None]


def big_head(bench: Bench, folder: Path, vocabulary: int) -> Path:
    """The random model with the tokenizer of the real one, saved in `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    return folder


def measure_memory(bench: Bench, peer: str, task: Task, folder: Path) -> Record:
    """Peaks of one step, one engine after the other.

    Raises:
        WorkerError: one of them failed, or they do not work on the same thing.
    """
    facts: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for engine in (peer, OURS):
        with bench.worker(engine, task, folder) as (worker, versions):
            runs[engine] = worker.steps(1, warm=0)
            facts[engine] = engine_facts([runs[engine]], worker.memory(), versions)
    require_same(peer, runs[peer], runs[OURS])
    ratio = facts[peer]["peak_bytes"] / facts[OURS]["peak_bytes"]
    return {"peer": facts[peer], "ours": facts[OURS], "ratio": ratio, "said": f"{peer} peaks at {ratio:.2f} times ours"}
