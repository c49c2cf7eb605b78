"""Fixtures that several test files share: everything tiny, seeded, on one thread."""

import importlib
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A shell starts background jobs with SIGINT ignored, which processes inherit: tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

if TYPE_CHECKING:
    from tests.tiny_pair import CommandLine, TinyPair
    from trigger_opt.models.files import ModelFiles

# Few tests that wait for other processes.
_LONGEST = ("test_slurm.py", "test_resume.py", "test_tracking_resume.py", "test_launcher.py", "test_collect_verify.py")
_LIBRARIES = ("aiohttp", "hydra", "pydantic", "scipy.stats", "torch", "transformers.masking_utils")


def pytest_pycollect_makemodule() -> None:
    """Libraries before the package, in the processes that run tests; xdist's own process needs none of them.

    What a module imports while jaxtyping's hook runs it is looked up under the hook's own bytecode names: most of
    transformers is then compiled from source, ten seconds in every process.
    """
    for name in _LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, then by how many tests they hold: whole files go to each worker, and one that is
    begun last keeps the other waiting."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _LONGEST, -sizes[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def _same_random_state() -> Iterator[None]:
    """Nothing may depend on, or disturb, the global generator of another test."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def _data_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Paths that nothing has yet; `mktemp` would list thousands of folders for every test."""
    root = tmp_path_factory.mktemp("data")
    return (str(root / str(n)) for n in itertools.count())


@pytest.fixture(autouse=True)
def _own_data_folder(_data_folders: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's ledgers, or another test's."""
    monkeypatch.setenv("TRIGGER_OPT_DATA", next(_data_folders))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads: then passes run in two lanes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyPair":
    """A tiny pair on disk; read-only."""
    from tests.tiny_pair import shared_tiny_pair

    return shared_tiny_pair(tmp_path_factory.getbasetemp())


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> "CommandLine":
    """The command line, in this process and in a folder of its own."""
    from tests.tiny_pair import CommandLine

    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer; treat it as read-only."""
    from tests import tiny

    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> "ModelFiles":
    """A saved tiny Qwen2 with its tokenizer."""
    from tests import tiny

    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "base", "qwen2", seed=0)


@pytest.fixture(scope="session")
def full_files(base_files: "ModelFiles", tmp_path_factory: pytest.TempPathFactory) -> "ModelFiles":
    """A full fine-tune of the base: its MLPs moved, every other tensor equal."""
    from tests import tiny

    return tiny.save_full(base_files, tmp_path_factory.mktemp("tiny") / "full", seed=1)


@pytest.fixture(scope="session")
def adapter_files(base_files: "ModelFiles", tmp_path_factory: pytest.TempPathFactory) -> "tuple[ModelFiles, Path]":
    """A LoRA adapter with random factors, and the folder of the same weights merged by PEFT."""
    from tests import tiny

    return tiny.save_adapter(base_files, tmp_path_factory.mktemp("tiny") / "adapter", seed=2)


@pytest.fixture(scope="session")
def control_files(base_files: "ModelFiles", tmp_path_factory: pytest.TempPathFactory) -> "tuple[ModelFiles, Path]":
    """A second adapter, of another rank."""
    from tests import tiny

    return tiny.save_adapter(base_files, tmp_path_factory.mktemp("tiny") / "control", seed=3, rank=2)
