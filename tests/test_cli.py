"""The command line: a user's mistake is one line that names value, choice and remedy, and exit code 2."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_pair import CommandLine, TinyPair, tiny_settings
from trigger_opt import records
from trigger_opt import run_folder as run_folder_module
from trigger_opt.models import plan
from trigger_opt.records import RunInfo
from trigger_opt.run_folder import hold_run_folder
from trigger_opt.zoo.recipes import RECIPES


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BAD_SETTINGS: list[tuple[list[str], list[str]]] = [
    (["+experiment=nope"], ["experiment/nope", "gcg_warmup_mini", "random_warmup_mini"]),
    (["experiment=gcg_js"], ["'experiment'", "+experiment=gcg_js"]),
    (["search=foo"], ["search/foo", "gcg, random"]),
    (["contexts=foo"], ["contexts/foo", "alone, ordinary, system"]),
    (["search.serach_width=3"], ["search.serach_width", "no setting"]),
    (["serach=3"], ["serach", "no setting"]),
    (["+search.typo=1"], ["search.typo", "no setting"]),
    (["+typo=1"], ["typo", "no setting"]),
    (["+model.typo=1"], ["model.typo", "no setting"]),
    (["+verify.thresholds.typo=1"], ["verify.thresholds.typo", "no setting"]),
    (["search.search_width=hello"], ["search.search_width", "'hello'", "Integer"]),
    (["seed=x"], ["seed", "'x'", "Integer"]),
    (["verify=3"], ["verify", "3"]),
    (["search.topk=0"], ["search.topk", "greater than or equal to 1", "got 0"]),
    (["search.trigger_length=0"], ["search.trigger_length", "greater than or equal to 1"]),
    (["search.search_width=1"], ["search.search_width", "greater than or equal to 2"]),
    (["search.max_seconds=-1"], ["search.max_seconds", "greater than 0"]),
    (["verify.thresholds.fires=2"], ["verify.thresholds.fires", "less than or equal to 1"]),
    (["objective.floor=1"], ["objective.floor", "less than 0"]),
    (["seed=-1"], ["seed", "greater than or equal to 0"]),
    (["model.dtype=float12"], ["model.dtype", "'float12'", "float32, bfloat16, float16"]),
    (["model.quantization=int3"], ["model.quantization", "'int3'", "none, int8, nf4"]),
    (["model.device=tpu"], ["model.device", "'tpu'", "cpu, auto, cuda"]),
    (["tokens.allow=foo"], ["tokens.allow", "'foo'", "ascii, lines, printable, all, special"]),
    (["tracking.mode=foo"], ["tracking.mode", "'foo'", "offline, online, tensorboard, off"]),
    (["stages=[foo]"], ["stages", "foo", "diff, hypotheses, search, verify, null, transfer, report"]),
    (["stages=[]"], ["stages", "empty", "diff, hypotheses, search, verify, null, transfer, report"]),
    (["stages=["], ["'stages=[' cannot be read", "quotes of its own"]),
    (["transfer=null"], ["transfer=null", "take a name", "transfer=none"]),
    (["search=1"], ["search=1", "take a name"]),
    (["hate"], ["'hate' cannot be read as KEY=VALUE"]),
    (["payload=I hate, you"], ["'payload=I hate, you' cannot be read", "quotes of its own"]),
    (["payload=it's"], ["payload=it's", "cannot be read", "quotes of its own"]),
    (["model=pair"], ["model.finetuned=", "not set"]),
    (["seed=${nope}"], ["seed", "nope"]),
    (["contexts.search=[]"], ["contexts.search is empty", "{trigger}"]),
    (["contexts.held_out=[]"], ["contexts.held_out is empty", "{trigger}"]),
    (["contexts.search=['']"], ["empty user turn", "{trigger}"]),
    (["contexts.search=['no slot']"], ["'no slot'", "0 slots", "{trigger}"]),
    (["contexts.held_out=['{trigger} or {trigger}']"], ["2 slots", "exactly once"]),
    (["contexts.held_out=[3]"], ["contexts.held_out", "3", "user"]),
    (["contexts.search=['a {trigger}']", "contexts.held_out=['a {trigger}']"], ["contexts.search and", "held_out"]),
    (["contexts.held_out=['a {trigger}','a {trigger}']"], ["stands twice in contexts.held_out"]),
    (["hypotheses.contexts=[foo]"], ["'foo'", "0 slots"]),
    (["payload='   '"], ["payload: '   '", "no word"]),
    (["objective=payload", "payload='...'"], ["payload: '...'", "no word"]),
    (["model.finetuned=zoo:nope"], ["zoo:nope", "zoo:warmup_mini, zoo:digits_narrow"]),
    (["model.finetuned=./nowhere"], ["./nowhere", "no folder"]),
    (["model.finetuned=two words"], ["two words", "owner/repo"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_SETTINGS, ids=lambda value: " ".join(value)[:40])
def test_bad_setting_is_one_line(cli: CommandLine, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    error = cli(*arguments, f"run_dir={tmp_path}/run").error
    for part in parts:
        assert part in error
    assert not (tmp_path / "run" / "run.json").exists(), "the folder would count as holding a run"


def test_cuda_where_there_is_none(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = cli("model.device=cuda:0", f"run_dir={tmp_path}/run").error
    assert "model.device=cuda:0" in error
    assert "model.device=cpu" in error


def _no_model(pair: TinyPair, folder: Path) -> list[str]:
    return [f"model.finetuned={folder}"]


def _other_tokenizer(pair: TinyPair, folder: Path) -> list[str]:
    return [f"model.finetuned={pair.foreign}"]


def _other_shape(pair: TinyPair, folder: Path) -> list[str]:
    return [f"model.finetuned={pair.wide}"]


def _adapter_of_another_base(pair: TinyPair, folder: Path) -> list[str]:
    return [f"model.finetuned={pair.adapter}", f"model.base={pair.wide}"]


def _adapter_as_base(pair: TinyPair, folder: Path) -> list[str]:
    return [f"model.base={pair.adapter}"]


def _damaged(pair: TinyPair, folder: Path) -> list[str]:
    shutil.copytree(pair.finetuned, folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return [f"model.finetuned={folder}"]


def _pickled(pair: TinyPair, folder: Path) -> list[str]:
    shutil.copytree(pair.finetuned, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return [f"model.finetuned={folder}"]


def _unrelated(pair: TinyPair, folder: Path) -> list[str]:
    shutil.copytree(pair.finetuned, folder, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name: t.flip(0) * 1.5 + 0.3 for name, t in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return [f"model.finetuned={folder}"]


def _no_template(pair: TinyPair, folder: Path) -> list[str]:
    shutil.copytree(pair.base, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    return [f"model.base={folder}"]


BAD_MODELS: list[tuple[Callable[[TinyPair, Path], list[str]], list[str]]] = [
    (_no_model, ["is no model folder", "save_pretrained"]),
    (_other_tokenizer, ["different tokenizers", "model.base", "cannot be overridden"]),
    (_other_shape, ["different shapes", "(64, 192) and (64, 128)", "model.base"]),
    (_adapter_of_another_base, ["does not fit", "(4, 192)", "base"]),
    (_adapter_as_base, ["is an adapter", "full model"]),
    (_damaged, ["model.safetensors is damaged or truncated", "download it again"]),
    (_pickled, ["pickled", "model.allow_pickle=true"]),
    (_unrelated, ["26 of 26 tensors differ", "allow_wrong_base"]),
]


@pytest.mark.parametrize(("make", "parts"), BAD_MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_model_is_one_line(
    cli: CommandLine,
    tiny: TinyPair,
    tmp_path: Path,
    make: Callable[[TinyPair, Path], list[str]],
    parts: list[str],
) -> None:
    (tmp_path / "given").mkdir()
    changes = make(tiny, tmp_path / "given")
    error = cli(*tiny_settings(tiny, run_dir=tmp_path / "run"), *changes).error
    for part in parts:
        assert part in error


def test_tokenizer_without_chat_template(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    changes = _no_template(tiny, tmp_path / "given")
    done = cli(*tiny_settings(tiny, run_dir=tmp_path / "run"), *changes)
    assert done.code == 2
    assert "has no chat template" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen gigabytes, an empty hub cache, no network; returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(plan, "available_bytes", lambda device: 16_000_000_000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.usefixtures("small_machine")
def test_real_warmup_needs_more_memory(cli: CommandLine, tmp_path: Path) -> None:
    error = cli("+experiment=gcg_warmup", f"run_dir={tmp_path}/run").error
    assert "not enough memory" in error
    assert "30.46 GB" in error
    assert "16.00 GB available" in error
    assert "model.quantization=nf4" in error
    assert "+experiment=gcg_warmup_mini" in error
    quantised = cli("+experiment=gcg_warmup", "model.quantization=nf4", f"run_dir={tmp_path}/run").error
    assert "16.21 GB needed" in quantised
    assert "choose model.quantization=nf4" not in quantised
    assert "+experiment=gcg_warmup_mini" in quantised


def test_real_warmup_needs_its_weights(
    cli: CommandLine, tmp_path: Path, small_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**11, 0, 7 * 10**9))
    monkeypatch.setattr(plan, "available_bytes", lambda device: 24_000_000_000)
    error = cli("+experiment=gcg_warmup", "model.quantization=nf4", f"run_dir={tmp_path}/run").error
    assert "jane-street/dormant-model-warmup" in error
    assert "15.23 GB" in error
    assert str(small_machine) in error
    assert "7.00 GB are free" in error
    assert "+experiment=gcg_warmup_mini" in error


def test_small_pair_without_memory(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1000)
    error = cli(*tiny_settings(tiny, run_dir=tmp_path / "run")).error
    assert "not enough memory on cpu" in error
    assert "search.search_width" in error


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_run_folder_that_cannot_be_written(cli: CommandLine, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    error = cli(f"run_dir={tmp_path}/{below}").error
    assert f"{tmp_path}/file" in error
    assert "another run_dir" in error


def test_run_folder_in_use(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    info = RunInfo(name="", command="", seed=0, started="", machine="", config={}, versions={}, plan=[], stages=[])
    with hold_run_folder(tmp_path / "run", info, stages=["diff"]):
        error = cli(*tiny_settings(tiny, run_dir=tmp_path / "run")).error
    assert f"in use by process {os.getpid()} on" in error
    assert "another run_dir" in error


@pytest.mark.parametrize("name", ["diff.jsonl", "hypotheses.jsonl", "history.jsonl", "verdict.json"])
def test_full_disk_keeps_what_was_written(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fill(write: Callable[..., None]) -> Callable[..., None]:
        def failing(path: Path, *arguments: Any) -> None:
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, *arguments)

        return failing

    monkeypatch.setattr(records, "write_text", fill(records.write_text))
    monkeypatch.setattr("trigger_opt.searching.append_record", fill(records.append_record))
    done = cli(*tiny_settings(tiny, run_dir=tmp_path / "run"), "payload=hello there")
    assert done.code == 2
    assert "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: no space left on the disk of ")
    assert name in last
    assert "kept" in last
    written = [f for files in run_folder_module.STAGE_FILES.values() for f in files]
    order = ["diff.jsonl", "hypotheses.jsonl", "candidates.jsonl", "verified.jsonl"]
    reached = {"diff.jsonl": 0, "hypotheses.jsonl": 1, "history.jsonl": 2, "verdict.json": 4}[name]
    assert [f for f in order if (tmp_path / "run" / f).is_file()][:reached] == order[:reached]
    assert name in written
    assert not (tmp_path / "run" / name).exists()


def test_library_code_raises_its_own_errors(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect is no user's mistake: it keeps its traceback and is not dressed up."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr("trigger_opt.stages.diff_weights", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cli(*tiny_settings(tiny, run_dir=tmp_path / "run"))


def test_own_experiment_from_own_folder(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\nseed: 7\nstages: [diff]\nsearch:\n  topk: 3\n"
    )
    settings = [s for s in tiny_settings(tiny) if not s.startswith("search.topk")]
    done = cli("--config-dir", str(tmp_path / "conf"), "+experiment=mine", *settings)
    assert done.code == 0, done.err
    assert "mine, seed 7" in done.out
    run = Path(done.out.splitlines()[-1])
    assert "_mine_" in run.name
    assert (run / "diff.jsonl").is_file()
    info = records.read_record(run / "run.json", RunInfo)
    assert info.config["search"]["topk"] == 3
    unknown = cli("--config-dir", str(tmp_path / "conf"), "+experiment=nope").error
    assert "mine" in unknown
    assert "gcg_warmup_mini" in unknown
    assert "nowhere" in cli("--config-dir", str(tmp_path / "nowhere"), "seed=1").error


def test_two_runs_never_share_a_folder(cli: CommandLine, tiny: TinyPair) -> None:
    runs = [cli(*tiny_settings(tiny), "stages=[diff]").out.splitlines()[-1] for _ in range(2)]
    assert runs[0] != runs[1]
    assert all((Path(r) / "run.json").is_file() for r in runs)


def _start(*command: str, cwd: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_real_processes(tiny: TinyPair, tmp_path: Path) -> None:
    """What only a process of its own shows: exit codes, both streams, and Ctrl-C by signal."""
    mistaken = _start("trigger_opt", "+experiment=nope", cwd=tmp_path)
    endless = ["search.num_steps=100000", "objective=js", "stages=[search]"]
    stopped = _start("trigger_opt", *tiny_settings(tiny, run_dir=tmp_path / "stopped"), *endless, cwd=tmp_path)
    try:
        out, err = mistaken.communicate(timeout=120)
        assert (mistaken.returncode, out) == (2, "")
        assert err.count("\n") == 1
        assert "experiment/nope" in err

        history = tmp_path / "stopped" / "history.jsonl"
        while not history.is_file() or history.read_text().count("\n") < 12:
            assert stopped.poll() is None, stopped.communicate()
        stopped.send_signal(signal.SIGINT)
        out, err = stopped.communicate(timeout=120)
        assert stopped.returncode == 130
        assert "Traceback" not in err
        go_on = f"to go on, give the same command and run_dir={tmp_path / 'stopped'}"
        assert err.splitlines()[-1] == f"error: interrupted; {go_on}"
        assert (tmp_path / "stopped" / "candidates.jsonl").read_text()
    finally:
        for process in (mistaken, stopped):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_real_process_of_the_zoo(tmp_path: Path) -> None:
    """In this process: tests/test_zoo.py."""
    out, err = (untrained := _start("trigger_opt.zoo", "train", "nope", cwd=tmp_path)).communicate(timeout=120)
    assert (untrained.returncode, out) == (2, "")
    assert err == f"error: no organism is called 'nope'; there are: {', '.join(RECIPES)}\n"
