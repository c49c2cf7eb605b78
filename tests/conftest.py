"""Fixtures that several test files share: everything tiny, seeded, on one thread."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from tests import tiny
from trigger_opt.models.files import ModelFiles

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state() -> Iterator[None]:
    """Nothing may depend on, or disturb, the global generator of another test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's ledgers, or another test's."""
    monkeypatch.setenv("TRIGGER_OPT_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads: then passes run in two lanes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer; treat it as read-only."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A saved tiny Qwen2 with its tokenizer."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "base", "qwen2", seed=0)


@pytest.fixture(scope="session")
def full_files(base_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A full fine-tune of the base: its MLPs moved, every other tensor equal."""
    return tiny.save_full(base_files, tmp_path_factory.mktemp("tiny") / "full", seed=1)


@pytest.fixture(scope="session")
def adapter_files(base_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, Path]:
    """A LoRA adapter with random factors, and the folder of the same weights merged by PEFT."""
    return tiny.save_adapter(base_files, tmp_path_factory.mktemp("tiny") / "adapter", seed=2)


@pytest.fixture(scope="session")
def control_files(base_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, Path]:
    """A second adapter, of another rank."""
    return tiny.save_adapter(base_files, tmp_path_factory.mktemp("tiny") / "control", seed=3, rank=2)
