"""Finding a model's files: what is refused, and in which words; headers read without tensors."""

import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, TensorReader, find_model, tensor_index, validate_weights


def make_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A model folder with two tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(4)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(name: object, **options: Any) -> str:
    """The one line a refused model gives."""
    with pytest.raises(UserError) as caught:
        find_model(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(name) in message
    return message


def test_finds_a_local_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    files = find_model(str(folder))
    assert files == ModelFiles(name=str(folder), folder=folder, weights=(folder / "model.safetensors",), adapter=False)


def test_local_folder_wins_over_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "owner" / "repo")
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/repo").folder == Path("owner/repo")


def test_finds_shards(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard, name in zip(shards, "ab", strict=True):
        save_file({name: torch.ones(2)}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "extra.safetensors").write_bytes(b"not part of the model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    files = find_model(str(folder))
    assert [p.name for p in files.weights] == shards
    assert set(tensor_index(files)) == {"a", "b"}

    (folder / shards[1]).unlink()
    assert f"{shards[1]} is named in its index and missing" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "/nowhere", "a/b/c", "", "zoo:x", "gpt2", "a--b/c"])
def test_refuses_what_is_neither_folder_nor_hub_name(name: str) -> None:
    assert "hub name" in refusal(name)


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "is no folder" in refusal(tmp_path / "x")


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    assert "is no model folder" in refusal(tmp_path)


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "training_args.bin")
    assert "has no weights" in refusal(folder)
    assert find_model(str(folder), weights=False).weights == ()


def test_refuses_pickles_unless_allowed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "model.allow_pickle=true" in message
    assert "can run code" in message
    files = find_model(str(folder), allow_pickle=True)
    assert tensor_index(files)["a"].shape == (2, 3)
    assert tensor_index(files)["a"].dtype == "bfloat16"
    assert TensorReader(files).read("a").sum() == 6


def test_pickle_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"bad")
    assert [p.name for p in find_model(str(folder)).weights] == ["model.safetensors"]


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_refuses_code_unless_allowed(tmp_path: Path, config: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / config).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    message = refusal(folder)
    assert "model.allow_code=true" in message
    assert config in message
    assert find_model(str(folder), allow_code=True).weights


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("named", ["owner/repo--module.Model", [None, "owner/repo--module.Model"]])
def test_code_that_lies_elsewhere_is_refused_even_where_code_is_allowed(
    tmp_path: Path, config: str, named: object
) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / config).write_text(json.dumps({"auto_map": {"AutoTokenizer": "mine.Tokenizer", "AutoModel": named}}))
    with pytest.raises(UserError, match=r"code of another repository .*owner/repo--module.Model"):
        find_model(str(folder), allow_code=True)


def test_adapter_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    assert "a whole model and an adapter" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    files = find_model(str(folder))
    assert files.adapter
    assert [p.name for p in files.weights] == ["adapter_model.safetensors"]


def test_refuses_empty_weights_and_broken_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "is no JSON" in refusal(folder)


def test_reads_headers_and_tensors(tmp_path: Path) -> None:
    files = find_model(str(make_folder(tmp_path / "m")))
    index = tensor_index(files)
    assert index["a"].shape == (2, 3)
    assert index["a"].dtype == "bfloat16"
    assert index["a"].nbytes == 12
    assert index["b"].nbytes == 16
    assert TensorReader(files).read("a").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "lfs"])
def test_notices_damaged_weights(tmp_path: Path, damage: str) -> None:
    folder = make_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    files = find_model(str(folder))
    validate_weights(files)
    damaged = {
        "cut": data[:-1],
        "longer": data + b"x",
        "header": data[:20],
        "lfs": b"version https://git-lfs.github.com",
    }
    path.write_bytes(damaged[damage])
    for read in (validate_weights, tensor_index):
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated.*download it again"):
            read(files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, hub switched off."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache_model(hub: Path, source: Path) -> Path:
    """Put a folder into the hub cache as owner/repo."""
    repo = hub / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repo / "snapshots" / ("0" * 40))
    return repo / "snapshots" / ("0" * 40)


@pytest.mark.usefixtures("hub")
def test_uncached_hub_model_fails_fast_when_offline() -> None:
    start = time.monotonic()
    message = refusal("owner/repo")
    assert time.monotonic() - start < 3
    assert "not on this machine and the hub cannot be reached" in message
    assert "hf download owner/repo" in message


def test_cached_hub_model_needs_no_network(tmp_path: Path, hub: Path) -> None:
    snapshot = cache_model(hub, make_folder(tmp_path / "m"))
    files = find_model("owner/repo")
    assert files.name == "owner/repo"
    assert files.folder == snapshot


def test_half_cached_hub_model_is_not_taken_for_whole(tmp_path: Path, hub: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    cache_model(hub, folder)
    assert "the hub cannot be reached" in refusal("owner/repo")
    assert find_model("owner/repo", weights=False).weights == ()


@pytest.mark.usefixtures("hub")
def test_silent_network_gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("trigger_opt.models.files._HUB_SECONDS", 0.3)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.monotonic()
        assert "the hub cannot be reached (ReadTimeout)" in refusal("owner/repo")
        assert time.monotonic() - start < 3


@pytest.mark.usefixtures("hub")
def test_download_is_refused_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(name: str, **options: Any) -> Any:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("absent")
        assert options.get("dry_run"), "downloaded although there is no room"
        return [
            SimpleNamespace(file_size=10**18, will_download=True),
            SimpleNamespace(file_size=5, will_download=False),
        ]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    assert "1000000000.00 GB needed" in refusal("owner/repo")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("error", "words"), [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "check the spelling")]
)
def test_gated_and_missing_repositories(monkeypatch: pytest.MonkeyPatch, error: str, words: str) -> None:
    from huggingface_hub import HfApi, errors

    kind = getattr(errors, error)

    def refuse(*_: object, **__: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(HfApi, "repo_info", refuse)
    assert words in refusal("owner/repo")
