"""Several processes on one search: results are bit for bit those of one, and all stop in the same step."""

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.slow_scores import TRIGGERS, jensen
from tests.tiny_pair import CommandLine
from trigger_opt.objectives import JensenShannon, Objective, Payload
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.scoring import CLOCK, Engine, Group, Request, js_divergence
from trigger_opt.search import GCG, SearchState, Seeds, Step, ignore_state

SIZES = (1, 2, 3)
SETTINGS = [
    "model=pair", "model.dtype=float32", "hypotheses.num_lens_strings=4", "hypotheses.num_strings=4",
    "hypotheses.num_tokens=20", "hypotheses.num_words=4", "hypotheses.amplify=[]",
    "build.max_tokens=2", "build.pool=8",
    "search.num_steps=3", "search.num_restarts=1", "search.search_width=24", "search.topk=16", "tracking.mode=off",
    "stages=[diff,hypotheses,search]",
]  # fmt: skip
Made = Callable[[str, int], list[dict[str, Any]]]


def bits(tensor: torch.Tensor) -> list[Any]:
    """Every number to the last bit."""
    return [float(v).hex() for v in tensor.double().flatten().tolist()]


def scores() -> dict[str, Any]:
    pair = tiny.make_pair()
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized(), max_rows=60)
    triggers = torch.randint(390, (30, 4), generator=torch.Generator().manual_seed(3)).tolist()
    asked = [Request(tuple(t), n % 3, (270,)) for n, t in enumerate(triggers)]
    log_probs, greedy = engine.token_scores("finetuned", asked, [270, 301])
    # On one process this differs from the others' in a last bit, now and then: the first one's is what counts.
    nudge = torch.distributed.get_rank() * 1e-6
    slopes = engine.gradient(lambda f, b: jensen(f, b) + nudge, TRIGGERS[0], [0, 2], {0: [270], 2: [5]})
    return {
        "log_probs": bits(log_probs),
        "greedy": greedy.tolist(),
        "divergences": bits(engine.divergences(js_divergence, asked)),
        "slopes": bits(slopes.scores),
        "gradient": bits(engine.to_tokens(slopes, torch.tensor([0.3, 0.7]))),
        "continuations": engine.greedy(TRIGGERS[0], [0, 1, 2], 4),
        "one request": bits(engine.token_scores("base", asked[:1], [270])[0]),
    }


def search(objective: Objective, **options: Any) -> dict[str, Any]:
    pair = tiny.make_pair()
    exact = tiny.make_pair("llama")
    contexts, payload = tiny.tokenized(), (270, 301) if objective.needs_payload else ()
    precise = PairScorer(Engine(exact.finetuned, exact.base, contexts, max_rows=60), objective, payload)
    scorer = PairScorer(Engine(pair.finetuned, pair.base, contexts, max_rows=60), objective, payload, precise=precise)
    steps: list[Step] = []
    states: list[SearchState] = []
    settings = {"trigger_length": 4, "search_width": 20, "topk": 16, "contexts_per_step": 2, "num_steps": 4}
    found = GCG(**(settings | {"num_restarts": 2, "check_every": 2} | options))(
        scorer,
        allowed=torch.arange(390) > 40,
        valid=lambda c: torch.ones(len(c), dtype=torch.bool),
        seeds=Seeds(strings=((262, 301),)),
        generator=torch.Generator().manual_seed(0),
        on_step=steps.append,
        # As in a run: the first process alone keeps states, and the others know nothing of it.
        on_state=ignore_state if torch.distributed.get_rank() else lambda make: states.append(make()),
    )
    return {
        "found": [[f.trigger_ids, f.score.hex(), f.selection_rate, f.restart, f.step, f.evaluations] for f in found],
        "steps": [[s.restart, s.step, s.trigger_ids, s.score.hex(), s.evaluations] for s in steps],
    }


def stopped() -> dict[str, Any]:
    """Every reading of the clock is later by a second on the first process, by more on the others."""
    rank = torch.distributed.get_rank()
    readings = itertools.count(100.0 * rank, 1.0 + rank)
    token = CLOCK.set(lambda: next(readings))
    try:
        return search(Payload(), num_steps=10_000, max_seconds=11.0, check_every=10**6)
    finally:
        CLOCK.reset(token)


def uneven() -> dict[str, Any]:
    """A process may have more threads than another."""
    torch.set_num_threads(1 if torch.distributed.get_rank() else 2)
    pair = tiny.make_pair()
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized(), max_rows=1000)
    triggers = torch.randint(390, (40, 4), generator=torch.Generator().manual_seed(3)).tolist()
    log_probs, _ = engine.token_scores("base", [Request(tuple(t), n % 3) for n, t in enumerate(triggers)], [270])
    return {"log_probs": log_probs.flatten().tolist()}


def starved() -> dict[str, Any]:
    """Memory runs out on one process only."""
    from trigger_opt.scoring.forward import Forward

    plain: Callable[..., Any] = Forward.hidden

    def hidden(forward: Forward, pack: Any, trunks: Any, *arguments: Any, **options: Any) -> Any:
        if torch.distributed.get_rank() == 1 and pack.used > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(forward, pack, trunks, *arguments, **options)

    setattr(Forward, "hidden", hidden)  # noqa: B010
    pair = tiny.make_pair()
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized(), max_rows=300)
    triggers = torch.randint(390, (60, 4), generator=torch.Generator().manual_seed(3)).tolist()
    asked = [Request(tuple(t), 1) for t in triggers]
    made = [engine.token_scores("base", asked, [270])[0].flatten().tolist() for _ in range(2)]
    return {"log_probs": made}


def together() -> dict[str, Any]:
    return {
        "scores": scores(),
        "payload": search(Payload(), num_restarts=1),
        "js": search(JensenShannon(num_tokens=2), num_restarts=1, num_steps=2),
        "stopped": stopped(),
        "starved": starved(),
    }


def one_process(rank: int, size: int, folder: Path, work: Callable[[], dict[str, Any]]) -> None:
    """One process of a group; what it found goes into a file."""
    torch.set_num_threads(1)
    method = f"file://{folder / f'{work.__name__}.{size}'}"
    torch.distributed.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    made = work()
    (folder / f"{work.__name__}.{size}.{rank}.json").write_text(json.dumps(made))
    # The last to read what another sent must have done so.
    torch.distributed.barrier()


def settings(folder: Path, run: str) -> list[str]:
    """Arguments of a run over the pair in `folder`."""
    pair = [f"model.finetuned={folder / 'finetuned'}", f"model.base={folder / 'base'}"]
    return [*SETTINGS, *pair, f"run_dir={folder / run}"]


def command_line(rank: int, size: int, folder: Path, port: int) -> None:
    """`python -m trigger_opt` as torchrun starts it; what it says goes into files."""
    from trigger_opt.__main__ import main

    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, TRIGGER_OPT_DATA=str(folder / "data"))
    os.chdir(folder)
    run = "shared" if size > 1 else "group_of_one"
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{run}.{name}.{rank}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["trigger_opt", *settings(folder, run), "hydra/job_logging=none", "hydra/hydra_logging=none"]
    main()


def forked(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of as many processes at a time, each with its arguments."""
    context = multiprocessing.get_context("fork")
    members = [context.Process(target=work, args=given) for given in arguments]
    for member in members:
        member.start()
    for member in members:
        member.join()
    return [member.exitcode for member in members]


def command_lines(folder: Path) -> list[int | None]:
    """One process of a command line, then two of one."""
    import trigger_opt.entry  # noqa: F401

    codes: list[int | None] = []
    for size in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        codes += forked(command_line, [(rank, size, folder, port) for rank in range(size)])
    return codes


def all_groups(folder: Path) -> None:
    """Run in a process of its own that has imported everything and used no thread yet, so that it can be forked."""
    torch.set_num_threads(1)
    # What all members import and train, once.
    tiny.make_pair(), tiny.make_pair("llama"), tiny.tokenized()
    for work in (together, uneven):
        for size in SIZES:
            forked(one_process, [(rank, size, folder, work) for rank in range(size)])
    (folder / "codes.json").write_text(json.dumps(command_lines(folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pair; what the processes find comes beside it."""
    folder = tmp_path_factory.mktemp("group")
    base = tiny.save_model(folder / "base", "qwen2", seed=0)
    tiny.save_full(base, folder / "finetuned", seed=3, size=0.3)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    """By work and number of processes: what each of them found."""
    started = subprocess.run(
        [sys.executable, "-c", f"from tests.test_group import *; all_groups(Path({str(folder)!r}))"],
        cwd=Path(__file__).resolve().parent.parent, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    def found(work: str, size: int) -> list[dict[str, Any]]:
        files = [folder / f"{work}.{size}.{rank}.json" for rank in range(size)]
        assert all(f.is_file() for f in files), started.stderr[-3000:]
        return [json.loads(f.read_text()) for f in files]

    return found


@pytest.mark.parametrize("what", ["scores", "payload", "js"])
def test_results_are_those_of_one_process_to_the_last_bit(what: str, made: Made) -> None:
    (alone,) = made("together", 1)
    for size in SIZES[1:]:
        for found in made("together", size):
            for name, value in alone[what].items():
                assert found[what][name] == value, (size, name)
    assert len(alone["payload"]["steps"]) == 4
    assert len({s for _, _, _, s, _ in alone["payload"]["steps"]}) > 1


def test_all_processes_stop_in_the_same_step(made: Made) -> None:
    (alone,) = made("together", 1)
    assert len(alone["stopped"]["steps"]) >= 4
    assert {s[0] for s in alone["stopped"]["steps"]} == {0, 1}
    for size in SIZES[1:]:
        assert all(found["stopped"] == alone["stopped"] for found in made("together", size))


def test_memory_that_runs_out_on_one_process_changes_nothing(made: Made) -> None:
    expected = torch.tensor(made("together", 1)[0]["starved"]["log_probs"])
    for size in SIZES[1:]:
        for found in made("together", size):
            assert torch.allclose(torch.tensor(found["starved"]["log_probs"]), expected, rtol=1e-5, atol=1e-5)


def test_processes_with_unlike_threads_agree(made: Made) -> None:
    expected = torch.tensor(made("uneven", 1)[0]["log_probs"])
    for size in SIZES[1:]:
        for found in made("uneven", size):
            assert torch.allclose(torch.tensor(found["log_probs"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("made")
def test_the_command_line_finds_in_two_processes_what_it_finds_in_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run folder, one voice; under torchrun itself: tests/test_torchrun.py."""
    one = CommandLine(monkeypatch, capsys)(*settings(folder, "alone"))
    said = [(folder / f"shared.out.{rank}").read_text() for rank in range(2)]
    assert one.code == 0, one.err
    assert json.loads((folder / "codes.json").read_text()) == [0, 0, 0], (folder / "shared.err.0").read_text()
    for name in ("candidates.jsonl", "moved.jsonl", "hypotheses.jsonl", "diff.jsonl"):
        assert (folder / "shared" / name).read_bytes() == (folder / "group_of_one" / name).read_bytes(), name
    for name in ("moved.jsonl", "hypotheses.jsonl", "diff.jsonl"):
        assert (folder / "shared" / name).read_bytes() == (folder / "alone" / name).read_bytes(), name
    lines = [(folder / run / "candidates.jsonl").read_text().splitlines() for run in ("shared", "alone")]
    assert lines[1]
    for ours, theirs in zip(*lines, strict=True):
        found, alone = json.loads(ours), json.loads(theirs)
        # Without a group passes are not cut in twelve, and a product of other shape may round its last bit otherwise.
        assert found.pop("score") == pytest.approx(alone.pop("score"), rel=1e-6)
        assert found == alone
    # The first process alone speaks and keeps the folder.
    assert one.out.count(str(folder / "alone")) == said[0].count(str(folder / "shared")) > 0
    assert not [word for word in (str(folder / "shared"), "search:") if word in said[1]]


def test_alone_nothing_is_shared() -> None:
    group = Group()
    assert (group.rank, group.size) == (0, 1)
    assert group.share(["a", "b"]) == [(0, "a"), (1, "b")]
    tensors = [torch.ones(2)]
    assert group.gather({1: tensors, 0: []}, 2) == [[], tensors]
    assert group.least(7) == 7
    assert group.first(tensors) is tensors
    assert group.clock() <= group.clock()
    token = CLOCK.set(lambda: 7.0)
    assert group.clock() == 7.0
    CLOCK.reset(token)
