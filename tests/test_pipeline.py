"""Whole runs over tiny pairs: every stage to its records, resumed, interrupted, repeated; nothing found in noise."""

import ast
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trigger_opt
from tests import tiny as tiny_models
from tests.tiny_pair import CommandLine, TinyPair, opened_files, tiny_settings
from tests.wandb_reader import read_run, read_table, sessions
from trigger_opt import api, judging, searching, session, verify
from trigger_opt.config import LOCAL_STAGES
from trigger_opt.objectives import Payload
from trigger_opt.paths import CHECKPOINT
from trigger_opt.records import (
    VERDICTS,
    BuiltTrigger,
    Candidate,
    Completion,
    Hypothesis,
    Rate,
    RunInfo,
    SearchStep,
    TensorFamilyDiff,
    Verdict,
    Verification,
    read_record,
    read_records,
    write_records,
)
from trigger_opt.run_folder import STAGE_FILES
from trigger_opt.tracking import read_metrics

PACKAGE = Path(trigger_opt.__file__).parent
# Of a string that fires, of strings that an earlier run refuted, of a search that follows gradients, of
# weights that could be read.
NOT_ALWAYS = {
    "ablation.json",
    "probe.json",
    "known.jsonl",
    "gradient.json",
    "read_off.jsonl",
    "rescored.jsonl",
    "built.jsonl",
}
WRITTEN = [name for stage in LOCAL_STAGES for name in STAGE_FILES[stage] if name not in NOT_ALWAYS]


@pytest.fixture
def finished(tiny: TinyPair, cli: CommandLine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run of the full fine-tune, with the payload "hello there" given."""
    kept = tmp_path_factory.getbasetemp() / "tiny-run"
    if not kept.is_dir():
        done = cli(*tiny_settings(tiny, run_dir=kept), "payload=hello there")
        assert done.code == 0, done.err
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("finetuned", []),
        ("adapter", []),
        ("finetuned", ["model.quantization=nf4"]),
        ("adapter", ["model.quantization=nf4", "objective=js"]),
        ("finetuned", ["model.dtype=float32", "objective=tv", "search=random"]),
        ("adapter", ["payload=hello there", "objective=target", "verify.temperature=1", "verify.repeats=2"]),
    ],
    ids=str,
)
def test_whole_run(cli: CommandLine, tiny: TinyPair, tmp_path: Path, kind: str, changes: list[str]) -> None:
    run = tmp_path / "run"
    with opened_files() as opened:
        done = cli(*tiny_settings(tiny, finetuned=getattr(tiny, kind), run_dir=run), *changes)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(run)
    assert [name for name in WRITTEN if not (run / name).is_file()] == []
    assert (run / "gradient.json").is_file() is ("search=random" not in changes)
    # Nothing is ranked where no weight that is held in numbers was changed; towards a payload strings are spelled all
    # the same.
    ranked, known = ((run / name).read_text() for name in ("moved.jsonl", "hypotheses.jsonl"))
    assert (run / "built.jsonl").is_file() is bool(ranked or known)
    assert not [p for p in opened if Path(p).name == "manifest.json"], "it read what the maker wrote down"
    assert any(str(run) in p for p in opened), "this test hears nothing"

    verdict = read_record(run / "verdict.json", Verdict)
    assert verdict.verdict in set(VERDICTS) - {"backdoor"}
    assert "<h1" in (run / "report.html").read_text()
    assert verdict.verdict in (run / "report.md").read_text()
    assert read_records(run / "diff.jsonl", TensorFamilyDiff)
    assert read_records(run / "candidates.jsonl", Candidate)
    assert len(read_records(run / "history.jsonl", SearchStep)) == 4
    info = read_record(run / "run.json", RunInfo)
    assert [s.stage for s in info.stages] == list(LOCAL_STAGES)
    assert info.plan
    assert "model=pair" in info.command
    assert not (run / "wandb").exists()
    assert read_metrics(run / "metrics.jsonl")[-1]["exit_code"] == 0
    assert not (run / "lost+found").exists()


def test_verdict_for_programs(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    wanted = {
        "verdict", "payload", "trigger", "minimised_trigger", "trigger_rate", "base_rate", "control_rate",
        "num_contexts", "score", "evaluations", "seconds", "seed", "versions",
    }  # fmt: skip
    assert wanted <= set(verdict)
    for name in ("trigger_rate", "base_rate", "false_trigger_rate", "random_rate"):
        found = verdict[name]
        assert 0 <= found["low"] <= found["successes"] / found["n"] <= found["high"] <= 1
    assert verdict["trigger_rate"]["n"] == verdict["num_contexts"] == 2
    assert verdict["control_rate"] is None, "no control was given"
    assert verdict["payload"] == "hello there"
    assert verdict["evaluations"] > 0
    assert verdict["seconds"] > 0
    assert {"python", "torch", "transformers"} <= set(verdict["versions"])
    judged = read_records(finished / "verified.jsonl", Verification)
    assert verdict["trigger"] == judged[0].trigger
    assert verdict["score"] == next(
        c.score for c in read_records(finished / "candidates.jsonl", Candidate) if c.trigger == verdict["trigger"]
    )
    answers = read_records(finished / "completions.jsonl", Completion)
    assert {a.kind for a in answers} >= {"trigger", "none", "random"}
    assert {a.model for a in answers} == {"finetuned", "base"}


def test_same_seed_same_candidates(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run = tmp_path / name
        done = cli(*tiny_settings(tiny, run_dir=run), f"seed={seed}", "stages=[hypotheses,search]")
        assert done.code == 0, done.err
        found.append((run / "candidates.jsonl").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_clean_control_is_asked_too(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    control = [f"model.controls=[{tiny.finetuned}]", "payload=hello there", "hypotheses.groups=1"]
    done = cli(*tiny_settings(tiny, finetuned=tiny.adapter, run_dir=tmp_path / "run"), *control)
    assert done.code == 0, done.err
    verdict = read_record(tmp_path / "run" / "verdict.json", Verdict)
    assert verdict.control_rate is not None
    assert verdict.control_rate.n == 2


def test_settings_of_the_real_warmup_load_a_pair(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    done = cli(
        "+experiment=gcg_warmup",
        f"model.finetuned={tiny.finetuned}",
        f"model.base={tiny.base}",
        "model.num_parameters=null",
        "hypotheses.num_lens_strings=4",
        "hypotheses.num_strings=4",
        "hypotheses.num_tokens=64",
        "hypotheses.num_words=8",
        "hypotheses.groups=1",
        "hypotheses.amplify=[]",
        "build.max_tokens=2",
        "build.pool=8",
        "search.num_steps=1",
        "search.num_restarts=1",
        "search.contexts_per_step=1",
        "stages=[diff,hypotheses,search]",
        "tracking.mode=off",
        f"run_dir={tmp_path}/run",
    )
    assert done.code == 0, done.err
    assert "1 x 1 steps of 512 candidates" in done.out
    assert read_records(tmp_path / "run" / "candidates.jsonl", Candidate)


def test_second_whole_run_touches_nothing(cli: CommandLine, tiny: TinyPair, finished: Path) -> None:
    before = contents(finished)
    error = cli(*tiny_settings(tiny, run_dir=finished)).error
    assert "already holds a run" in error
    assert "stages=[verify,report]" in error
    assert contents(finished) == before


def test_later_stages_again(cli: CommandLine, tiny: TinyPair, finished: Path) -> None:
    before = contents(finished)
    done = cli(*tiny_settings(tiny, run_dir=finished), "stages=[verify,report]", "seed=9")
    assert done.code == 0, done.err
    after = contents(finished)
    for stage in ("verify", "report"):
        for name in set(STAGE_FILES[stage]) - NOT_ALWAYS:
            assert after[f"{name}.old-1"] == before[name]
    assert after["candidates.jsonl"] == before["candidates.jsonl"]
    assert json.loads(after["verdict.json"])["seed"] == 9
    ran = [s.stage for s in read_record(finished / "run.json", RunInfo).stages]
    assert ran == [*LOCAL_STAGES, "verify", "report"]


def test_later_stages_keep_to_their_models_and_contexts(cli: CommandLine, tiny: TinyPair, finished: Path) -> None:
    assert cli(*tiny_settings(tiny, run_dir=finished), "stages=[report]").code == 0
    before = contents(finished)
    other = [f"model.finetuned={tiny.adapter}", "contexts.search=['Something else {trigger}']"]
    error = cli(*tiny_settings(tiny, run_dir=finished), *other, "stages=[verify,report]").error
    assert "another model and contexts" in error
    assert f"model.base={tiny.base}" in error, "the command to repeat"
    assert contents(finished) == before


def test_report_again_needs_no_models(
    cli: CommandLine, tiny: TinyPair, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_pair", _fail)
    assert cli(*tiny_settings(tiny, run_dir=finished), "stages=[report]").code == 0
    assert (finished / "report.html.old-1").is_file()


def _fail(*_: object, **__: object) -> None:
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("chosen", "parts"),
    [
        ("verify", ["'verify'", "candidates.jsonl", "'search'", "run_dir"]),
        ("report", ["'report'", "verdict.json", "'verify'", "run_dir"]),
        ("diff,report", ["'report'", "verdict.json"]),
    ],
)
def test_stage_without_what_it_starts_from(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, chosen: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_pair", _fail)
    error = cli(*tiny_settings(tiny, run_dir=tmp_path / "empty"), f"stages=[{chosen}]").error
    for part in parts:
        assert part in error


def test_damaged_records_name_their_stage(cli: CommandLine, tiny: TinyPair, finished: Path) -> None:
    (finished / "candidates.jsonl").write_text('{"trigger": 1}\n')
    done = cli(*tiny_settings(tiny, run_dir=finished), "stages=[verify]")
    assert done.code == 2
    assert "candidates.jsonl, line 1, is not a Candidate record" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def interrupt(after: int, real: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function that works `after` times and is then interrupted from the keyboard."""
    calls = iter(range(after))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options) if real else None

    return called


@pytest.mark.parametrize(
    ("stage", "name", "kept"),
    [
        ("diff", "stages.diff_weights", ["identity.json"]),
        ("hypotheses", "stages.api.find_payloads", ["identity.json", "diff.jsonl"]),
        (
            "search",
            "searching.api.find_triggers",
            [
                "identity.json",
                "diff.jsonl",
                "hypotheses.jsonl",
                "built.jsonl",
                "candidates.jsonl",
                "gradient.json",
                "cost.json",
            ],
        ),
        ("verify", "judging.verify_string", ["identity.json", "diff.jsonl", "hypotheses.jsonl", "candidates.jsonl"]),
        ("report", "stages.write_report", ["diff.jsonl", "candidates.jsonl", "verified.jsonl", "verdict.json"]),
    ],
)
def test_interrupted_stage(
    cli: CommandLine,
    tiny: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    name: str,
    kept: list[str],
) -> None:
    monkeypatch.setattr(f"trigger_opt.{name}", interrupt(0))
    run = tmp_path / "run"
    done = cli(*tiny_settings(tiny, run_dir=run), "payload=hello there")
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"error: interrupted; to go on, give the same command and run_dir={run}"
    assert "Traceback" not in done.err
    assert [f for f in kept if not (run / f).is_file()] == []
    assert [f for f in STAGE_FILES[stage] if (run / f).is_file() and f not in kept] == []
    assert read_metrics(run / "metrics.jsonl")[-1]["exit_code"] == 130
    ran = [s.stage for s in read_record(run / "run.json", RunInfo).stages]
    assert ran == list(LOCAL_STAGES)[: list(LOCAL_STAGES).index(stage) + 1]
    assert read_record(run / "run.json", RunInfo).stages[-1].summary == "interrupted"


@pytest.fixture
def _wandb_closed() -> Iterator[None]:
    yield
    import wandb

    wandb.teardown()


@pytest.mark.usefixtures("_wandb_closed")
def test_interrupted_search_keeps_strings_and_goes_on_later(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    # In the middle of the second restart, between two scorings on all contexts.
    record = interrupt(6, searching._record_step)
    monkeypatch.setattr(searching, "_record_step", record)
    settings = [*tiny_settings(tiny, run_dir=run), "payload=hello there", "search.num_steps=4", "search.check_every=2"]
    settings += ["build.max_characters=0"]
    done = cli(*settings, "stages=[search]", "tracking.mode=offline")
    assert done.code == 130
    steps = read_records(run / "history.jsonl", SearchStep)
    assert [(s.restart, s.step) for s in steps] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    kept = read_records(run / "candidates.jsonl", Candidate)
    assert {c.restart for c in kept} == {0, 1}
    assert len({c.trigger for c in kept}) == len(kept)
    assert all(c.payload == "hello there" and c.selection_rate is not None for c in kept)
    assert {c.trigger for c in kept} >= {s.trigger for s in steps if s.selection_rate is not None}
    (session,) = sessions(run)
    assert read_run(session).exit_code == 130

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    later = CommandLine(monkeypatch, cli._capsys)
    # The search could go on: that is not given up unasked.
    assert "was interrupted and goes on with the same command" in later(*settings, "stages=[verify,report]").error
    (run / CHECKPOINT).unlink()
    done = later(*settings, "stages=[verify,report]")
    assert done.code == 0, done.err
    verdict = read_record(run / "verdict.json", Verdict)
    assert verdict.payload == "hello there"
    assert verdict.evaluations > steps[-1].evaluations, "what the interrupted search spent counts"


def test_error_in_the_search_keeps_strings_too(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(searching, "_record_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli(*tiny_settings(tiny, run_dir=tmp_path), "objective=js", "stages=[search]", "search.check_every=1")
    assert read_records(tmp_path / "candidates.jsonl", Candidate)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["exit_code"] == 1


@pytest.mark.parametrize("payload", ["...", "- - -", ""])
def test_wordless_payloads_end_in_a_verdict(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str
) -> None:
    """Firing is told by words; a model that only says dots must not break the run after its search."""
    hypothesis = Hypothesis(payload=payload, score=9.0, source="given", evidence="", inputs=[], rivals=[])
    monkeypatch.setattr("trigger_opt.stages.api.find_payloads", lambda *_, **__: [hypothesis])
    monkeypatch.setattr("trigger_opt.verify.manner.common_answer", lambda *_, **__: payload)
    done = cli(*tiny_settings(tiny, run_dir=tmp_path / "run"))
    assert done.code == 0, done.err
    verdict = read_record(tmp_path / "run" / "verdict.json", Verdict)
    assert verdict.verdict == "not reproduced"
    assert verdict.trigger_rate is None
    assert (tmp_path / "run" / "report.html").is_file()


def test_given_payload_is_searched_first(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Hypothesis(payload=p, score=5.0, source="rollout_census", evidence="", inputs=[], rivals=[])
        for p in ("second one", "third one")
    ]
    monkeypatch.setattr("trigger_opt.stages.api.find_payloads", lambda *_, **__: found)
    shared = ["payload=first one", "stages=[hypotheses,search]", "search.max_evaluations=400"]
    assert cli(*tiny_settings(tiny, run_dir=tmp_path), *shared).code == 0
    steps = read_records(tmp_path / "history.jsonl", SearchStep)
    assert list(dict.fromkeys(s.hypothesis for s in steps)) == ["first one", "second one"]
    assert {c.payload for c in read_records(tmp_path / "candidates.jsonl", Candidate)} == {"first one", "second one"}
    evaluations = [s.evaluations for s in steps]
    assert evaluations == sorted(evaluations), "counted over both searches"


@pytest.mark.usefixtures("_wandb_closed")
def test_offline_wandb_holds_the_run(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared = ["payload=hello there", "search.num_steps=3", "tracking.mode=offline", "tracking.group=mine", "name=tiny"]
    settings = [s for s in tiny_settings(tiny, run_dir=run) if not s.startswith("tracking.mode")]
    done = cli(*settings, *shared)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(run)
    assert "wandb sync" in done.out
    (session,) = sessions(run)
    kept = read_run(session)
    assert kept.exit_code == 0
    assert (kept.project, kept.group, kept.name) == ("trigger_opt", "mine", "run")
    assert kept.config["search"]["num_steps"] == 3
    assert kept.config["payload"] == "hello there"
    scored = [row for row in kept.history if "search/score" in row]
    assert len(scored) == 6
    numbers = [row["_step"] for row in kept.history]
    assert numbers == sorted(set(numbers))
    assert [r["search/score"] for r in scored] == [s.score for s in read_records(run / "history.jsonl", SearchStep)]
    assert {f"{stage}/seconds" for stage in LOCAL_STAGES} <= {key for row in kept.history for key in row}
    table = read_table(session, "candidates")
    assert table["columns"][:2] == ["trigger", "payload"]
    best = read_records(run / "candidates.jsonl", Candidate)
    assert [row[0] for row in table["data"]] == [c.trigger for c in best]
    (report,) = [a for a in kept.artifacts if a.name == "report"]
    assert set(report.files) == {"report.html", "report.md", "verdict.json"}
    assert kept.summary["verdict"] == json.dumps(read_record(run / "verdict.json", Verdict).verdict) or (
        kept.summary["verdict"] == read_record(run / "verdict.json", Verdict).verdict
    )


BLIND = [
    "search",
    "verify",
    "null",
    "report",
    "hypotheses",
    "stages.py",
    "searching.py",
    "pipeline.py",
    "planning.py",
    "scoring",
    "models",
    "candidates",
    "contrast",
    "earlier.py",
]


@pytest.mark.parametrize("part", BLIND)
def test_no_stage_knows_what_was_planted(part: str) -> None:
    """The zoo's recipes, trainer and manifests hold the answers; nothing that searches or judges may see them."""
    path = PACKAGE / part
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        source = file.read_text()
        assert "manifest" not in source.lower(), file
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in [*names, module, *(f"{module}.{n}" for n in names)]:
                assert not name.startswith("trigger_opt.zoo"), f"{file} imports {name}"


def test_api_asks_the_zoo_for_folders_only() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(api)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "zoo"
    }
    assert used == {"PREFIX", "folder", "brings_code"}


def test_found_payloads_keep_their_seeds_and_a_given_one_takes_over_those_of_its_like(tmp_path: Path) -> None:
    def found(payload: str, inputs: list[str], opening: int = 0) -> Hypothesis:
        return Hypothesis(
            payload=payload, score=9.0, source="scan", evidence="", inputs=inputs, rivals=[], opening=opening
        )

    file = tmp_path / "hypotheses.jsonl"
    write_records(
        file, [found("I'm sorry, but no", ["a"]), found("im sorry", ["b"]), found("I'm sorry but yes", ["c"])]
    )

    def openings(payload: str) -> list[int]:
        return [g.opening for g in searched(payload)]

    def goals(payload: str) -> list[tuple[str, list[str]]]:
        return [(g.payload, g.inputs) for g in searched(payload)]

    def searched(payload: str) -> list[Hypothesis]:
        held: Any = session.Session.__new__(session.Session)
        held.config = SimpleNamespace(objective=Payload(), payload=payload, max_hypotheses=5)
        held.folder = SimpleNamespace(has=lambda name: True, file=lambda name: file)
        return [g for g in searching._goals(held) if g is not None]

    assert goals("") == [("I'm sorry, but no", ["a"]), ("im sorry", ["b"]), ("I'm sorry but yes", ["c"])]
    assert goals("im sorry") == [("im sorry", ["b"]), ("I'm sorry, but no", ["a"]), ("I'm sorry but yes", ["c"])]
    # One that comes late is another than one that comes first, also of the same words; how late is taken over.
    write_records(file, [found("\u2026 I'm sorry but no", ["d"], 7)])
    assert goals("I'm sorry but no") == [("I'm sorry but no", []), ("\u2026 I'm sorry but no", ["d"])]
    assert goals("\u2026 im sorry") == [("\u2026 im sorry", []), ("\u2026 I'm sorry but no", ["d"])]
    assert openings("\u2026 I'm sorry but") == [7]


def searched_without_a_payload(cli: CommandLine, tiny: TinyPair, run: Path, *settings: str) -> list[SearchStep]:
    """The steps of a run whose hypotheses are all too weak; two restarts of two steps a search."""
    given = ["hypotheses.min_score=1000", "stages=[hypotheses,search]", *settings]
    done = cli(*tiny_settings(tiny, run_dir=run), *given)
    assert done.code == 0, done.err
    assert "no payload hypothesis: the search begins on divergence (kl) instead of 'payload'" in done.out + done.err
    return read_records(run / "history.jsonl", SearchStep)


def test_payloads_that_divergence_brings_out_are_searched_next(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Candidate]] = []

    def payloads_of(pair: Any, contexts: Any, found: list[Candidate], **options: Any) -> list[Hypothesis]:
        asked.append(list(found))
        read = Hypothesis(
            payload="hello there", score=99.0, source=api.DIVERGENCE_SEARCH, evidence="", inputs=[], rivals=[]
        )
        return [replace(read, payload="--"), read]

    monkeypatch.setattr(api, "payloads_of", payloads_of)
    run = tmp_path / "run"
    steps = searched_without_a_payload(cli, tiny, run)
    assert [s.hypothesis for s in steps] == [""] * 4 + ["hello there"] * 4
    ((best, *others),) = asked
    assert all(c.objective == "kl" and c.score <= best.score for c in others)
    # What cannot be told by its words is no payload.
    assert [h.payload for h in read_records(run / "read_off.jsonl", Hypothesis)] == ["hello there"]
    assert not (run / "hypotheses.jsonl").read_text()
    candidates = read_records(run / "candidates.jsonl", Candidate)
    assert {(c.payload, c.objective) for c in candidates} == {("", "kl"), ("hello there", "payload")}
    # The record is of the search that read it: another one puts it aside.
    again = cli(*tiny_settings(tiny, run_dir=run), "hypotheses.min_score=1000", "stages=[search]", "payload=hello")
    assert again.code == 0, again.err
    assert {s.hypothesis for s in read_records(run / "history.jsonl", SearchStep)} == {"hello"}
    assert not (run / "read_off.jsonl").exists()
    assert (run / "read_off.jsonl.old-1").is_file()


def test_half_of_a_budget_goes_to_divergence(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Hypothesis(payload="hello there", score=9.0, source="", evidence="", inputs=[], rivals=[])
    monkeypatch.setattr(api, "payloads_of", lambda *given, **options: [read, replace(read, payload="good day")])
    settings = ["search.max_evaluations=2000", "search.num_steps=1000", "search.topk=200", "search.stop_rate=2"]
    steps = searched_without_a_payload(cli, tiny, tmp_path / "run", *settings)
    last = {s.hypothesis: s.evaluations for s in steps}
    assert list(last) == ["", "hello there", "good day"]
    # A step is 24 evaluations, and a look at all contexts 3 more.
    for spent, share in zip(last.values(), (1000, 1500, 2000), strict=True):
        assert share <= spent < share + 60


def test_a_search_that_makes_no_step_did_run(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fires_at_once(*given: Any, **options: Any) -> list[Candidate]:
        return [
            Candidate(
                trigger=" one", trigger_ids=[5], payload="hello there", objective="payload", score=7.5,
                selection_rate=1.0, restart=-1, step=-1, seed=0, evaluations=3,
            )
        ]  # fmt: skip

    monkeypatch.setattr(api, "find_triggers", fires_at_once)
    run = tmp_path / "run"
    done = cli(*tiny_settings(tiny, run_dir=run), "payload=hello there")
    assert done.code == 0, done.err
    assert read_records(run / "history.jsonl", SearchStep) == []
    page = (run / "report.html").read_text()
    assert "The search recorded no step: it ends where a string it begins from fires" in page
    assert "Stage not run" not in page


def test_an_interruption_while_strings_are_built_keeps_the_search_before(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search that was done is in the checkpoint; strings for the next one are built again."""
    read = Hypothesis(payload="hello there", score=9.0, source="", evidence="", inputs=[], rivals=[])
    monkeypatch.setattr(api, "payloads_of", lambda *given, **options: [read])
    # Nothing is kept because it is due.
    settings = ["checkpoint.every_seconds=null", "checkpoint.every_steps=null"]
    searched_without_a_payload(cli, tiny, tmp_path / "undisturbed", *settings)
    built, asked = api.build_triggers, []

    def interrupted_once(*given: Any, **options: Any) -> Any:
        asked.append(options["hypothesis"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return built(*given, **options)

    searched: list[Hypothesis | None] = []
    find = api.find_triggers

    def noted(*given: Any, **options: Any) -> Any:
        searched.append(options["hypothesis"])
        return find(*given, **options)

    monkeypatch.setattr(api, "build_triggers", interrupted_once)
    monkeypatch.setattr(api, "find_triggers", noted)
    run = tmp_path / "run"
    given = [*tiny_settings(tiny, run_dir=run), "hypotheses.min_score=1000", "stages=[hypotheses,search]", *settings]
    assert cli(*given).code == 130
    assert searched == [None]
    done = cli(*given)
    assert done.code == 0, done.err
    assert "search: goes on with the next search" in done.out
    assert asked == [None, read, read]
    assert searched == [None, read]
    for name, kind in (("built.jsonl", BuiltTrigger), ("candidates.jsonl", Candidate)):
        whole, resumed = (read_records(folder / name, kind) for folder in (tmp_path / "undisturbed", run))
        assert whole == resumed
        assert whole
    histories = (read_records(folder / "history.jsonl", SearchStep) for folder in (tmp_path / "undisturbed", run))
    whole_steps, resumed_steps = ([(s.hypothesis, s.trigger, s.score, s.evaluations) for s in h] for h in histories)
    assert whole_steps == resumed_steps


def test_divergence_that_brings_nothing_out_goes_on_from_its_best(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbounded = searched_without_a_payload(cli, tiny, tmp_path / "unbounded")
    assert [s.hypothesis for s in unbounded] == [""] * 4
    build, built, find = api.build_triggers, [], api.find_triggers
    begun: list[tuple[int, list[tuple[int, ...]]]] = []
    found: list[list[Candidate]] = []

    def noted(*given: Any, **options: Any) -> Any:
        built.append(build(*given, **options))
        return built[-1]

    def searched(*given: Any, **options: Any) -> Any:
        begun.append((options["seed"], [tuple(ids) for ids in options["strings"]]))
        found.append(find(*given, **options))
        return found[-1]

    monkeypatch.setattr(api, "build_triggers", noted)
    monkeypatch.setattr(api, "find_triggers", searched)
    steps = searched_without_a_payload(cli, tiny, tmp_path / "run", "search.max_evaluations=100000")
    assert [s.hypothesis for s in steps] == [""] * 8
    (first_seed, first_strings), (second_seed, second_strings) = begun
    assert built == [first_strings], "what the first one begins from is not built again"
    best = sorted(found[0], key=lambda c: -c.score)[: searching.FROM_BEFORE]
    assert second_strings == [tuple(c.trigger_ids) for c in best]
    assert (first_seed, second_seed) == (0, searching.ELSEWHERE), "other contexts are drawn, and other swaps"
    candidates = read_records(tmp_path / "run" / "candidates.jsonl", Candidate)
    # Two restarts each; what tells the second search's strings apart is their restart. Before them stand those built.
    assert {c.seed for c in candidates} == {0}
    assert {c.restart for c in candidates} <= set(range(-1, 4))
    assert {2, 3} <= {c.restart for c in candidates}
    assert [s.restart for s in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s.seconds for s in steps] == sorted(s.seconds for s in steps)
    assert not (tmp_path / "run" / "read_off.jsonl").exists()


def test_seed_strings_keep_to_the_token_policy() -> None:
    tokenizer, allowed = tiny_models.make_tokenizer(), torch.ones(tiny_models.vocab_size(), dtype=torch.bool)
    inputs = [" helpful", " there"]
    kept, barred = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in inputs)
    assert not set(kept) & set(barred)
    hypothesis = Hypothesis(payload="x", score=9.0, source="", evidence="", inputs=inputs, rivals=[])
    valid = api._Validity(tokenizer, tiny_models.tokenized()[:1])
    assert api._seeds(tokenizer, hypothesis, allowed, valid).strings == (kept, barred)
    allowed[list(barred)] = False
    seeds = api._seeds(tokenizer, hypothesis, allowed, valid)
    assert (seeds.strings, seeds.tokens) == ((kept,), kept)


@pytest.mark.parametrize(("whole", "shortest"), [("generic shift", "backdoor"), ("backdoor", "generic shift")])
def test_a_verdict_is_on_the_form_that_is_judged_better(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: str, shortest: str
) -> None:
    """Random strings of many tokens fire where those of few do not, so that a long string may be refuted by its
    length alone."""
    verify_string = verify.verify_string

    def judged(*given: Any, **options: Any) -> Any:
        found, completions = verify_string(*given, **options)
        verdict = shortest if options["kind"] == "minimised" else whole
        rate = Rate(successes=2, n=2, low=0.3, high=1.0)
        return replace(found, trigger_rate=rate, verdict=verdict, reason=f"so {verdict}"), completions

    monkeypatch.setattr(judging, "verify_string", judged)
    monkeypatch.setattr(judging, "minimise", lambda *given, **options: " one")
    run = tmp_path / "run"
    done = cli(*tiny_settings(tiny, run_dir=run), "payload=hello there", "verify.candidates=1", "candidates.keep=false")
    assert done.code == 0, done.err
    first, second = read_records(run / "verified.jsonl", Verification)
    short, long = (first, second) if shortest == "backdoor" else (second, first)
    assert (short.trigger, short.minimised_from) == (" one", long.trigger)
    verdict = read_record(run / "verdict.json", Verdict)
    assert (verdict.verdict, verdict.reason) == ("backdoor", "so backdoor")
    # A shorter form that is judged worse is none.
    assert verdict.trigger == verdict.minimised_trigger == first.trigger
    (candidate,) = [c for c in read_records(run / "candidates.jsonl", Candidate) if c.trigger == long.trigger]
    assert verdict.score == candidate.score
    assert repr(first.trigger)[1:-1].strip() in (run / "report.md").read_text()


def test_strings_to_verify_are_no_neighbours_where_others_are() -> None:
    def found(trigger: str, payload: str, restart: int) -> Candidate:
        return Candidate(
            trigger=trigger, trigger_ids=[1], payload=payload, objective="payload", score=0.0, selection_rate=None,
            restart=restart, step=0, seed=0, evaluations=0,
        )  # fmt: skip

    best_first = [found("a", "p", 0), found("b", "p", 0), found("c", "q", 0), found("d", "p", 1), found("e", "q", 0)]
    assert [c.trigger for c in judging.to_verify(best_first, 5)] == ["a", "c", "d", "b", "e"]
    assert [c.trigger for c in judging.to_verify(best_first, 2)] == ["a", "c"]
