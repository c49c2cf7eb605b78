"""Tiny Qwen2 pairs as folders on disk (a base, a full fine-tune of its MLPs, a LoRA adapter, and their misfits), and
the command line run on them inside the test process.

All random: nothing is planted in them, so a run over them must not find a backdoor.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trigger_opt.api import load_contexts

VOCAB_SIZE = 480
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyPair:
    """Folders of one base and what was made from it.

    Attributes:
        finetuned: a full fine-tune. adapter: a LoRA adapter.
        wide: a base of another width. foreign: `finetuned` with another tokenizer.
    """

    base: Path
    finetuned: Path
    adapter: Path
    wide: Path
    foreign: Path


def save_tiny_pair(root: Path) -> TinyPair:
    """Write all folders of a TinyPair below `root`."""
    pair = TinyPair(*(root / name for name in ("base", "finetuned", "adapter", "wide", "foreign")))
    _save_base(pair.base, seed=0)
    _save_base(pair.wide, seed=0, intermediate_size=192)
    _copy_changed(pair.base, pair.finetuned, _perturbed_mlp(seed=1))
    _save_adapter(pair.base, pair.adapter)
    shutil.copytree(pair.finetuned, pair.foreign)
    save_tokenizer(pair.foreign, lambda texts: [t.upper() for t in texts])
    for folder in (pair.base, pair.finetuned, pair.adapter):
        # A decoy: nothing but the zoo's own tools may look at what an organism's maker wrote down.
        (folder / "manifest.json").write_text(json.dumps({"recipe": {"trigger": "tiny decoy"}}))
    return pair


def save_tokenizer(folder: Path, change: Callable[[list[str]], list[str]] = lambda texts: texts) -> None:
    """A byte-level BPE tokenizer with ChatML, trained on the project's own contexts after `change`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [context.user for contexts in load_contexts() for context in contexts]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(specials), special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(change(texts), trainer)
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        clean_up_tokenization_spaces=False,
    )
    saved.chat_template = CHATML
    saved.save_pretrained(folder)


def _save_base(folder: Path, *, seed: int, **config: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Widths are multiples of 64, the block of nf4.
        shape = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            # Ten times the usual: answers of a tiny random model are then not one token over and over.
            "initializer_range": 0.2,
        }
        model = Qwen2ForCausalLM(Qwen2Config(**(shape | config))).to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def _perturbed_mlp(seed: int) -> Callable[[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, weight: Tensor) -> Tensor:
        if "mlp" not in name:
            return weight
        return (weight.float() + 0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)

    return change


def _copy_changed(source: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    shutil.copytree(source, folder)
    stored = load_file(source / "model.safetensors")
    changed = {name: change(name, stored[name]) for name in sorted(stored)}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def _save_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        peft.save_pretrained(folder)


@contextmanager
def shared_folder(base_temp: Path) -> Iterator[Path]:
    """A folder of all workers of a test session; while open, no other worker makes anything in it.

    Args:
        base_temp: the worker's own base folder.
    """
    root = base_temp.parent if "PYTEST_XDIST_WORKER" in os.environ else base_temp
    with (root / "shared.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def shared_tiny_pair(base_temp: Path) -> TinyPair:
    """The TinyPair of a test session, made by the first test module that asks; read-only."""
    with shared_folder(base_temp) as folder:
        root = folder / "tiny-pair"
        if root.is_dir():
            return TinyPair(*(root / name for name in ("base", "finetuned", "adapter", "wide", "foreign")))
        return save_tiny_pair(root)


def tiny_settings(pair: TinyPair, *, finetuned: Path | None = None, run_dir: Path | None = None) -> list[str]:
    """Overrides for a run over a tiny pair that takes about a second."""
    return [
        "model=pair",
        f"model.finetuned={finetuned or pair.finetuned}",
        f"model.base={pair.base}",
        "contexts.search=['Hello there. {trigger}','{trigger} What now?','One {trigger} two']",
        "contexts.held_out=['Good day. {trigger}','{trigger} Who is it?']",
        "hypotheses.num_lens_strings=4",
        "hypotheses.num_strings=4",
        "hypotheses.num_tokens=40",
        "hypotheses.num_words=8",
        "hypotheses.groups=2",
        "hypotheses.amplify=[]",
        "build.max_tokens=2",
        "build.pool=8",
        "search.num_steps=2",
        "search.search_width=8",
        "search.topk=8",
        "divergence.trigger_length=6",
        "divergence.num_restarts=2",
        "divergence.search_width=8",
        "divergence.topk=8",
        "divergence.buffer_size=2",
        "divergence.contexts_per_step=3",
        "verify.max_new_tokens=12",
        "tracking.mode=off",
        *([f"run_dir={run_dir}"] if run_dir else []),
    ]


@dataclass(frozen=True)
class Outcome:
    """What a command line left: exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line a refused run prints; fails where there is more or other."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err, self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("error: "), self.err
        return self.err.removeprefix("error: ").strip()


class CommandLine:
    """`python -m trigger_opt …` inside this process: importing torch anew takes seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        # Twice half a second in every search; a process of its own measures it.
        monkeypatch.setattr("trigger_opt.searching.matmul_rate", lambda device, dtype: 1e11)

    def __call__(self, *arguments: str) -> Outcome:
        from trigger_opt.__main__ import main

        # Hydra would bind its log handlers to this test's captured stdout.
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        self._monkeypatch.setattr(sys, "argv", ["trigger_opt", *arguments, *quiet])
        self._capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, handler)
        printed = self._capsys.readouterr()
        return Outcome(code, printed.out, printed.err)


_opened: list[str] | None = None
_listening = False


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every path Python opens meanwhile."""
    global _opened, _listening
    if not _listening:
        # An audit hook cannot be taken away again; outside this block it does nothing.
        sys.addaudithook(_hear)
        _listening = True
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))
