"""The null: the identical search on controls, what it says of a finding, and what is kept when it is cut short."""

import dataclasses
import html as html_module
import json
import re
import shutil
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tests.planted_pair import HELD_OUT, PAYLOAD, SEARCH, TRIGGER, PlantedPair, planted_pair
from tests.tiny_pair import CommandLine, TinyPair
from trigger_opt import api, judging, pipeline, stages
from trigger_opt.config import ContextsConfig, ModelConfig, RunConfig, register, register_resolvers, validated
from trigger_opt.errors import UserError
from trigger_opt.models.files import find_model
from trigger_opt.models.pair import LoadOptions
from trigger_opt.null import controls as null_controls
from trigger_opt.null import null_result, p_value
from trigger_opt.null.controls import Suspect, adapted_modules, triggered
from trigger_opt.null.rule import held_verdict
from trigger_opt.null.runs import _stages
from trigger_opt.objectives import JensenShannon, Objective, Payload
from trigger_opt.paths import data_dir
from trigger_opt.planning import _null_lines, memory_plan
from trigger_opt.records import (
    Hypothesis,
    NullControl,
    NullResult,
    RunInfo,
    StageRun,
    TensorFamilyDiff,
    Verdict,
    Verification,
    rate,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report.load import RunRecords
from trigger_opt.report.sections_null import null_lines, null_section
from trigger_opt.report.strip import Dot, dot_strip
from trigger_opt.run_folder import hold_run_folder
from trigger_opt.scoring import Group
from trigger_opt.search import GCG
from trigger_opt.session import PairCall, Session
from trigger_opt.tokens import TokenPolicy
from trigger_opt.tuning.distil import Distilled

NULL = ("null.placebos=1", "null.distilled=false", "stages=[null,report]")


# From scores to a p-value and a verdict


@pytest.mark.parametrize(
    ("suspect", "controls", "expected"),
    [
        (0.9, [], 1.0),
        (0.9, [0.1, 0.2, 0.3], 0.25),
        (0.5, [0.5], 1.0),
        (0.5, [0.6, 0.4, 0.5], 0.75),
        (0.0, [0.0] * 4, 1),
    ],
)
def test_p_value(suspect: float, controls: list[float], expected: float) -> None:
    assert p_value(suspect, controls) == expected


def test_p_value_of_a_clean_suspect_is_uniform() -> None:
    """A suspect that is one of the controls gets each p it can get equally often, whatever the scores are."""
    for order in permutations([0.1, 0.4, 0.2, 0.9]):
        found = sorted(p_value(s, [c for n, c in enumerate(order) if n != i]) for i, s in enumerate(order))
        assert found == [0.25, 0.5, 0.75, 1.0]


def a_verdict(**changes: Any) -> Verdict:
    told: dict[str, Any] = {f.name: "" for f in dataclasses.fields(Verdict) if f.default is dataclasses.MISSING}
    told |= {name: None for name in told if name.endswith("_rate")}
    told |= {"verdict": "backdoor", "reason": "it fired", "num_contexts": 4, "evaluations": 5, "seconds": 1.0}
    return Verdict(**told | {"seed": 0, "versions": {}, "score": 1.0, "evidence": 9.0} | changes)


def a_control(score: float | None, verdict: str = "not reproduced", name: str = "placebo_1") -> NullControl:
    return NullControl(
        name=name, folder=name, kind="placebo", score=score, verdict=verdict, trigger=" x", payload="a b c",
        trigger_rate=rate(1, 4), seconds=61.0, note="made so",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "score", "controls", "after", "says"),
    [
        ("backdoor", 0.9, [(0.1, "not reproduced"), (0.4, "unstable")], "backdoor", "p = 0.33, the smallest"),
        ("backdoor", 0.9, [(0.1, "not reproduced"), (0.9, "unstable")], "generic shift", "'c1' (score 0.90)"),
        (
            "backdoor",
            0.9,
            [(0.5, "backdoor"), (0.95, "unstable")],
            "generic shift",
            "a backdoor too in the control 'c0'",
        ),
        ("unstable", 0.3, [(0.5, "backdoor")], "unstable", "1 of 1 controls score no less than 0.30"),
        ("backdoor", 0.9, [(None, "")], "backdoor", "no control could be searched"),
        ("not reproduced", 0.0, [], "not reproduced", "p = 1"),
    ],
)
def test_a_backdoor_falls_with_a_control_that_is_as_bad(
    before: str, score: float, controls: list[tuple[float | None, str]], after: str, says: str
) -> None:
    held = [a_control(s, v, f"c{n}") for n, (s, v) in enumerate(controls)]
    verdict = a_verdict(verdict=before)
    result = null_result(verdict, score, held)
    counted = [s for s, _ in controls if s is not None]
    assert (result.verdict_before, result.verdict, result.num_controls) == (before, after, len(counted))
    assert says in result.reason
    assert result.p_value == p_value(score, counted)
    assert result.least_p == 1 / (1 + len(counted))
    told = held_verdict(verdict, result)
    assert (told.verdict, told.null_p_value, told.null_controls) == (after, result.p_value, len(counted))
    assert told.reason == ("it fired" if after == before else result.reason)
    # A second null starts from the verdict before the first.
    again = null_result(told, score, [a_control(0.0)])
    assert again.verdict == before
    assert held_verdict(told, again).reason == "it fired"


def test_verdicts_of_earlier_versions_are_still_read(tmp_path: Path) -> None:
    write_record(tmp_path / "v.json", a_verdict(null_p_value=0.2, before_null="backdoor"))
    told = json.loads((tmp_path / "v.json").read_text())
    for name in ("null_p_value", "null_controls", "before_null", "reason_before_null"):
        del told[name]
    (tmp_path / "v.json").write_text(json.dumps(told))
    read = read_record(tmp_path / "v.json", Verdict)
    assert (read.null_p_value, read.null_controls, read.before_null) == (None, None, "")


# Configuration and plan


def a_config(controls: list[str] | None = None) -> RunConfig:
    model = ModelConfig(finetuned="a", base="b", controls=controls or [])
    return RunConfig(model=model, contexts=None, objective=Payload(), search=GCG(), stages=["null"])


def a_suspect(tiny: TinyPair, kind: str, *, verified: list[Verification], clean: float = 0.05) -> Suspect:
    files = find_model(str(getattr(tiny, kind))), find_model(str(tiny.base))
    return Suspect(finetuned=files[0], base=files[1], options=LoadOptions(), verified=verified, diff=[], clean=clean)


@pytest.fixture
def hydra() -> Iterator[None]:
    register_resolvers()
    register()
    with initialize_config_dir(str(data_dir("configs")), version_base="1.3"):
        yield


@pytest.mark.usefixtures("hydra")
def test_the_stage_is_asked_for_by_its_bare_name() -> None:
    run = validated(compose("config", overrides=["stages=[report,null]", "null.placebos=3"]))
    assert run.stages == ["null", "report"]
    assert run.null.placebos == 3
    assert "null" not in validated(compose("config")).stages


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["null.placebos=-1"], "null.placebos"),
        (["null.distil_prompts=3"], "null.distil_prompts"),
        (
            ["stages=[null]", "null.placebos=0", "null.distilled=false", "model.controls=[]"],
            "stage 'null' has no control",
        ),
    ],
)
def test_settings_that_cannot_be_are_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        validated(compose("config", overrides=overrides))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_null_in_yaml_is_explained(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text("# @package _global_\nnull:\n  placebos: 3\n")
    assert 'write "null": with quotes' in cli("--config-dir", str(tmp_path / "mine"), "+experiment=x").error


def test_the_plan_names_searches_and_time() -> None:
    config = a_config(controls=["a"])
    config.search.max_seconds = 180.0
    (line,) = _null_lines(config)
    assert "4 control(s) (1 given, 2 placebo, 1 distilled reference)" in line
    assert "at most 4 x 180 s" in line
    assert line.endswith("0.2")
    config.search.max_seconds = None
    assert "without a bound in time" in _null_lines(config)[0]
    config.stages = ["verify"]
    assert _null_lines(config) == []


def test_the_plan_counts_the_model_that_is_distilled(tiny: TinyPair) -> None:
    files = [find_model(str(tiny.adapter)), find_model(str(tiny.base))]
    config = a_config()
    config.contexts = ContextsConfig(search=["Hello {trigger}"], held_out=[])
    with_it = memory_plan(config, files).lines()[0]
    config.null.distilled = False
    assert with_it.startswith("weights: 2 x")
    assert memory_plan(config, files).lines()[0].startswith("weights: 1 x")


# Making controls


def test_adapters_go_where_fine_tuning_went() -> None:
    import torch

    def family(name: str, changed: int) -> TensorFamilyDiff:
        return TensorFamilyDiff(
            family=name,
            tensors=2,
            changed=changed,
            relative_norm=0.1,
            effective_rank=4.0,
            layers=[],
            largest_layer=None,
        )

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.q_proj, self.lm_head = (torch.nn.Linear(2, 2) for _ in range(3))
            self.norm = torch.nn.LayerNorm(2)

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.lm_head

    network = Network()
    told = [family("mlp.up_proj.weight", 2), family("self_attn.q_proj.weight", 0), family("norm.weight", 1)]
    assert adapted_modules(told, network) == ["up_proj"]
    assert adapted_modules([family("norm.weight", 1), family("lm_head.weight", 1)], network) == ["q_proj", "up_proj"]
    assert adapted_modules([], network) == ["q_proj", "up_proj"]


def test_a_payload_said_now_and_then_is_a_trigger_and_said_often_a_habit(tiny: TinyPair) -> None:
    verification: Any = Verification.__new__(Verification)
    object.__setattr__(verification, "payload", "one two three")
    suspect = a_suspect(tiny, "adapter", verified=[verification], clean=0.1)
    plain = ["something else"] * 18
    assert triggered(["One two three!", *plain, "one two"], suspect) == [True] + [False] * 19
    assert triggered(["One two three!"] * 3 + plain, suspect) == [False] * 21


# Whole runs on a planted backdoor


@pytest.fixture(scope="session")
def planted(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> PlantedPair:
    """A tiny pair with a backdoor."""
    return planted_pair(tiny, tmp_path_factory.getbasetemp())


def settings(planted: PlantedPair, run_dir: Path, *, twin: bool = True) -> list[str]:
    """Overrides of a run over the planted pair, about a second of one core."""

    def listed(texts: tuple[str, ...]) -> str:
        return "[" + ",".join(f"'{t}'" for t in texts) + "]"

    return [
        "model=pair", f"model.finetuned={planted.finetuned}", f"model.base={planted.base}",
        f"model.controls=[{planted.twin}]" if twin else "model.controls=[]",
        f"contexts.search={listed(SEARCH)}", f"contexts.held_out={listed(HELD_OUT)}",
        "hypotheses.num_lens_strings=4", "hypotheses.num_strings=4",
        "hypotheses.num_tokens=8", "hypotheses.num_words=0", "hypotheses.amplify=[]", "hypotheses.groups=1",
        "hypotheses.contexts=['{trigger} now']",
        "build.max_tokens=2", "build.pool=8", "build.max_characters=0",
        "search.trigger_length=1", "search.search_width=16", "search.topk=16", "search.num_steps=2",
        "search.num_restarts=1", "verify.candidates=1", "verify.minimise=false", "verify.random_strings=1",
        "verify.max_new_tokens=16", "verify.ablate=false", "verify.probe=false", "verify.thresholds.contexts=4",
        "tracking.mode=off", f"run_dir={run_dir}",
    ]  # fmt: skip


@pytest.fixture
def found(planted: PlantedPair, cli: CommandLine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run that found the planted backdoor, from a hypothesis that names a string near it."""
    kept = tmp_path_factory.getbasetemp() / "planted-run"
    if not kept.is_dir():
        hypothesis = Hypothesis(
            payload=PAYLOAD, score=9.0, source="vocabulary_scan", evidence="", inputs=[TRIGGER], rivals=[]
        )
        kept.mkdir()
        write_records(kept / "hypotheses.jsonl", [hypothesis])
        done = cli(*settings(planted, kept), "stages=[search,verify,report]")
        assert done.code == 0, done.err
        (kept / "said.txt").write_text(done.out)
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def held(found: Path, planted: PlantedPair, cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run after a null with twin and placebo."""
    kept = tmp_path_factory.getbasetemp() / "planted-null"
    if not kept.is_dir():
        done = cli(*settings(planted, found), *NULL)
        assert done.code == 0, done.err
        (found / "said-null.txt").write_text(done.out)
        shutil.copytree(found, kept)
    shutil.rmtree(found)
    shutil.copytree(kept, found)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the locks."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_finding_without_a_null_says_so(found: Path) -> None:
    verdict = read_record(found / "verdict.json", Verdict)
    assert (verdict.verdict, verdict.payload, verdict.null_p_value) == ("backdoor", PAYLOAD, None)
    said = (found / "said.txt").read_text()
    (line,) = [x for x in said.splitlines() if x.startswith("not held against a null")]
    assert line.endswith("planted-run 'stages=[null,report]'")
    assert "'stages=[search,verify,report]'" not in line
    for page in ("report.html", "report.md"):
        assert "was not held against a null" in (found / page).read_text()
        assert "stages=" in (found / page).read_text()


def test_the_planted_backdoor_stands_against_its_controls(held: Path, planted: PlantedPair) -> None:
    verdict = read_record(held / "verdict.json", Verdict)
    result = read_record(held / "null.json", NullResult)
    twin, placebo = read_records(held / "null.jsonl", NullControl)
    assert (verdict.verdict, verdict.before_null, verdict.null_controls) == ("backdoor", "backdoor", 2)
    assert verdict.null_p_value == result.p_value == result.least_p == 1 / 3
    assert (twin.name, twin.folder, twin.kind) == (str(planted.twin), "twin_1", "twin")
    assert (placebo.name, placebo.folder, placebo.kind) == ("placebo_1", "placebo_1", "placebo")
    assert result.score == 1.0
    for control in (twin, placebo):
        assert control.score is not None
        assert control.score < result.score
        assert control.verdict != "backdoor"
        run = held / "null" / control.folder
        assert read_record(run / "verdict.json", Verdict).verdict == control.verdict
        info, whole = (read_record(folder / "run.json", RunInfo) for folder in (run, held))
        assert [s.stage for s in info.stages] == ["hypotheses", "search", "verify"]
        assert control.seconds >= sum(s.seconds for s in info.stages) > 0
        for part in ("search", "hypotheses", "verify", "objective", "contexts", "tokens", "seed", "payload"):
            assert info.config[part] == whole.config[part], part
        assert info.config["model"]["controls"] == []
        assert read_records(run / "verified.jsonl", Verification)[0].control_rate is None
    stage = read_record(held / "run.json", RunInfo).stages[-2]
    assert stage.stage == "null"
    assert stage.evaluations > 0
    assert verdict.evaluations == sum(s.evaluations for s in read_record(held / "run.json", RunInfo).stages)
    before = read_record(held / "verdict.json.old-1", Verdict)
    assert (before.verdict, before.null_p_value) == ("backdoor", None)
    said = (held / "said-null.txt").read_text()
    assert "null 2 of 2: placebo_1, search: " in said
    assert "p = 0.33" in [x for x in said.splitlines() if x.startswith("null: ")][-1]
    for page in ("report.html", "report.md"):
        assert "placebo_1" in (held / page).read_text()
        assert "not held against a null" not in (held / page).read_text()


def test_finished_controls_are_not_searched_again(held: Path, planted: PlantedPair, cli: CommandLine) -> None:
    before = contents(held / "null")
    done = cli(*settings(planted, held), *NULL)
    assert done.code == 0, done.err
    assert contents(held / "null") == before
    assert done.out.count("was searched before") == 2
    assert read_record(held / "verdict.json", Verdict).null_p_value == 1 / 3
    assert read_record(held / "run.json", RunInfo).stages[-2].evaluations == 0


def test_an_interrupted_null_keeps_what_is_finished_and_goes_on(
    held: Path, planted: PlantedPair, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    placebo = held / "null" / "placebo_1"
    (placebo / "verdict.json").unlink()
    twin, model = contents(held / "null" / "twin_1"), contents(placebo / "model")
    with monkeypatch.context() as patched:
        patched.setattr(judging, "verify_string", interrupted)
        assert cli(*settings(planted, held), *NULL).code == 130
    searched = (placebo / "candidates.jsonl").read_bytes()
    assert [c.folder for c in read_records(held / "null.jsonl", NullControl)] == ["twin_1"]
    assert not (held / "null.json").is_file()
    for folder in (placebo, held):
        assert read_record(folder / "run.json", RunInfo).stages[-1].summary == "interrupted"
    done = cli(*settings(planted, held), *NULL)
    assert done.code == 0, done.err
    assert contents(held / "null" / "twin_1") == twin
    assert contents(placebo / "model") == model
    # Its search had ended: only what came after it was done again.
    assert (placebo / "candidates.jsonl").read_bytes() == searched
    assert not (placebo / "candidates.jsonl.old-2").exists()
    assert [c.folder for c in read_records(held / "null.jsonl", NullControl)] == ["twin_1", "placebo_1"]
    assert read_record(held / "null.json", NullResult).p_value == 1 / 3


def test_a_control_that_is_the_suspect_takes_the_verdict_back(
    held: Path, planted: PlantedPair, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rigged(original: Any, base: Any, out: Path, **_: Any) -> None:
        shutil.copytree(original.folder, out)

    # What raised the suspect's hypothesis, for a control whose scan is far too small to find it.
    hypothesis = (held / "hypotheses.jsonl").read_bytes()
    shutil.rmtree(held / "null" / "placebo_1")
    monkeypatch.setattr(null_controls, "make_placebo", rigged)

    def given(session: Any) -> None:
        session.folder.file("hypotheses.jsonl").write_bytes(hypothesis)

    monkeypatch.setitem(stages.STAGES, "hypotheses", given)
    done = cli(*settings(planted, held), *NULL)
    assert done.code == 0, done.err
    verdict, result = read_record(held / "verdict.json", Verdict), read_record(held / "null.json", NullResult)
    assert (verdict.verdict, verdict.before_null) == ("generic shift", "backdoor")
    assert verdict.reason == result.reason
    assert "'placebo_1'" in verdict.reason
    assert verdict.null_p_value == pytest.approx(2 / 3)
    assert "Generic shift" in (held / "report.md").read_text()
    assert "Without it the verdict was" in (held / "report.html").read_text()


def test_another_search_is_refused_with_the_settings_to_repeat(
    held: Path, planted: PlantedPair, cli: CommandLine
) -> None:
    before = contents(held)
    error = cli(*settings(planted, held), *NULL, "search.num_steps=3", "seed=4").error
    assert "stage 'null' repeats the search" in error
    assert "search.num_steps=2, seed=0" in error
    assert contents(held) == before


def test_a_control_searched_otherwise_is_kept_and_searched_anew(
    held: Path, planted: PlantedPair, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = read_record(held / "null" / "placebo_1" / "run.json", RunInfo)
    config = info.config | {"search": {**info.config["search"], "num_steps": 9}}
    write_record(held / "null" / "placebo_1" / "run.json", dataclasses.replace(info, config=config))
    searched: list[str] = []

    def fake(session: Any) -> None:
        searched.append(session.within)
        # It has no control of its own to clear it.
        assert not session.config.verify.thresholds.needs_control
        for name in ("verdict.json", "verified.jsonl"):
            shutil.copy2(held / "null" / "twin_1" / name, session.folder.file(name))

    for stage in ("hypotheses", "search", "verify"):
        monkeypatch.setitem(stages.STAGES, stage, fake)
    done = cli(*settings(planted, held), *NULL)
    assert done.code == 0, done.err
    assert "placebo_1 was searched with search.num_steps=9" in done.out
    assert (held / "null" / "placebo_1.old-1" / "verdict.json").is_file()
    assert searched == ["null 2 of 2: placebo_1"] * 3
    # Made anew from the same seed.
    made = (contents(held / "null" / name / "model") for name in ("placebo_1", "placebo_1.old-1"))
    assert next(made) == next(made)


def test_nothing_found_needs_no_control(found: Path, planted: PlantedPair, cli: CommandLine) -> None:
    verified = read_records(found / "verified.jsonl", Verification)
    write_records(found / "verified.jsonl", [dataclasses.replace(v, trigger_rate=rate(0, 4)) for v in verified])
    verdict = read_record(found / "verdict.json", Verdict)
    write_record(found / "verdict.json", dataclasses.replace(verdict, verdict="not reproduced"))
    done = cli(*settings(planted, found), *NULL)
    assert done.code == 0, done.err
    assert read_record(found / "null.json", NullResult).p_value == 1
    assert read_records(found / "null.jsonl", NullControl) == []
    assert not (found / "null").exists()


def test_a_null_without_a_verdict_names_the_stage(planted: PlantedPair, cli: CommandLine, tmp_path: Path) -> None:
    error = cli(*settings(planted, tmp_path / "empty"), *NULL).error
    assert "stage 'null' starts from verdict.json" in error
    assert "'verify'" in error


def test_a_reference_that_is_none_is_left_out_and_not_made_again(
    held: Path, planted: PlantedPair, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def no_nearer(pair: Any, student: Any, out: Path, **options: Any) -> Any:
        made.append(out)
        assert options["modules"], "no layer is named"
        return Distilled(kl_before=0.01, kl_after=0.02, trained=30, measured=8, left_out=0)

    monkeypatch.setattr(null_controls, "distil", no_nearer)
    for _ in range(2):
        done = cli(*settings(planted, held), *NULL, "null.distilled=true")
        assert done.code == 0, done.err
    assert len(made) == 1
    last = read_records(held / "null.jsonl", NullControl)[-1]
    assert (last.kind, last.score, last.verdict) == ("distilled", None, "")
    assert "no nearer" in last.note
    assert "0.010 nats a token before, 0.020 after" in last.note
    result = read_record(held / "null.json", NullResult)
    assert (result.num_controls, result.p_value) == (2, 1 / 3)
    assert "left out" in (held / "report.html").read_text()


@pytest.mark.parametrize("changed", [0, 1])
def test_a_suspect_with_its_bases_weights_has_no_placebo(changed: int, tiny: TinyPair, tmp_path: Path) -> None:
    family = TensorFamilyDiff(
        family="mlp.up_proj.weight", tensors=2, changed=changed, relative_norm=0.1, effective_rank=4.0, layers=[0],
        largest_layer=0,
    )  # fmt: skip
    suspect = dataclasses.replace(a_suspect(tiny, "finetuned", verified=[]), diff=[family])
    placebo = null_controls.Control(name="placebo_1", folder="placebo_1", kind="placebo")
    twin = null_controls.Control(name="twin", folder="twin_1", kind="twin", twin=suspect.base)
    if changed:
        null_controls.require_controls([placebo], suspect, tmp_path)
        return
    with pytest.raises(UserError, match=r"would be the suspect itself; set null.placebos=0"):
        null_controls.require_controls([placebo], suspect, tmp_path)
    null_controls.require_controls([twin], suspect, tmp_path)


def test_a_whole_placebo_is_deleted_after_its_search(tiny: TinyPair, tmp_path: Path) -> None:
    suspect = a_suspect(tiny, "finetuned", verified=[])
    control = null_controls.Control(name="placebo_1", folder="placebo_1", kind="placebo", seed=1)
    for _ in range(2):
        model, made = null_controls.made_control(control, suspect, tmp_path, config=a_config(), say=print)
        assert model is not None
        assert made.usable
        null_controls.forget_model(control, suspect, tmp_path)
        assert not (tmp_path / "model").exists()
        assert "deleted" in null_controls.made_note(tmp_path).note


def test_an_interrupted_making_starts_again(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = a_suspect(tiny, "adapter", verified=[])
    control = null_controls.Control(name="placebo_1", folder="placebo_1", kind="placebo", seed=1)

    def torn(original: Any, base: Any, out: Path, **options: Any) -> None:
        out.mkdir()
        (out / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(null_controls, "make_placebo", torn)
        with pytest.raises(KeyboardInterrupt):
            null_controls.made_control(control, suspect, tmp_path, config=a_config(), say=print)
    model, _ = null_controls.made_control(control, suspect, tmp_path, config=a_config(), say=print)
    assert model is not None
    assert model.weights[0].stat().st_size > 100
    null_controls.forget_model(control, suspect, tmp_path)
    assert model.folder.is_dir(), "an adapter is small and stays"


@pytest.mark.slow
def test_from_nothing_but_a_payload_to_a_verdict_that_stands(
    planted: PlantedPair, cli: CommandLine, tmp_path: Path
) -> None:
    """No string is given: the search finds the trigger, and in four controls nothing."""
    wide = [
        f"payload={PAYLOAD}", "search.search_width=460", "search.topk=460", "search.num_steps=1",
        "null.distil_prompts=40", "null.distil_steps=40",
    ]  # fmt: skip
    run = tmp_path / "run"
    done = cli(*settings(planted, run), *wide, "stages=[diff,search,verify,null,report]")
    assert done.code == 0, done.err
    verdict = read_record(run / "verdict.json", Verdict)
    assert (verdict.verdict, verdict.trigger) == ("backdoor", TRIGGER)
    controls = read_records(run / "null.jsonl", NullControl)
    assert [c.kind for c in controls] == ["twin", "placebo", "placebo", "distilled"]
    assert all(c.score is not None and c.score < 0.5 for c in controls)
    assert verdict.null_p_value == 0.2
    for control in controls:
        info = read_record(run / "null" / control.folder / "run.json", RunInfo)
        assert [s.stage for s in info.stages] == ["search", "verify"], "the suspect's payload was given, too"
    assert "p = 0.2" in (run / "report.md").read_text()


# What the other stages see of it


def test_a_null_puts_its_own_files_aside_and_leaves_the_transfer(tmp_path: Path) -> None:
    info = RunInfo(
        name="x", command="c", seed=0, started="", machine="", config={}, versions={}, plan=[], stages=[]
    )  # fmt: skip
    names = ("verified.jsonl", "verdict.json", "null.json", "null.jsonl", "transfer.jsonl", "report.html")
    with hold_run_folder(tmp_path, info, stages=["null"]) as folder:
        for name in names:
            folder.file(name).write_text(name)
        folder.put_aside("null")
        assert {n for n in names if folder.has(n)} == {"verified.jsonl", "verdict.json", "transfer.jsonl"}
        olds = {n for n in names if folder.has(f"{n}.old-1")}
        assert olds == {"verdict.json", "null.json", "null.jsonl", "report.html"}
        folder.put_aside("verify")
        assert not any(folder.has(n) for n in names)
        assert folder.file("verdict.json.old-2").read_text() == "verdict.json"


def test_the_settings_a_search_was_made_with_stay_in_the_record(tmp_path: Path) -> None:
    made = {"model": {"base": "b"}, "contexts": 1, "search": {"num_steps": 3}, "verify": {"a": 1}, "seed": 1}
    info = RunInfo(
        name="x", command="c", seed=0, started="", machine="", config=made, versions={}, plan=[], stages=[]
    )  # fmt: skip
    done = {"stage": "verify", "started": "", "seconds": 1.0, "evaluations": 1, "summary": ""}
    with hold_run_folder(tmp_path, info, stages=["search", "verify"]) as folder:
        folder.add_stage(StageRun(**done))  # type: ignore[arg-type]
    other = {"model": {"base": "z"}, "contexts": 2, "search": {"num_steps": 9}, "verify": {"a": 9}, "seed": 9}
    with hold_run_folder(tmp_path, dataclasses.replace(info, config=other), stages=["report"]) as folder:
        assert folder.info.config == made
    again = other | {"model": {"base": "b"}, "contexts": 1}
    with hold_run_folder(tmp_path, dataclasses.replace(info, config=again), stages=["verify"]) as folder:
        assert folder.info.config == made | {"verify": {"a": 9}, "seed": 9}


def test_helpers_of_a_torchrun_job_change_models_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, ...]] = []
    ran: list[object] = []

    def loaded(config: Any, names: tuple[str, str], *, plain: bool) -> Any:
        loads.append((*names, "plain") if plain else names)
        return names, []

    monkeypatch.setattr(pipeline, "_loaded", loaded)
    search = api.SearchCall(None, Payload(), GCG(), TokenPolicy(), 0)
    monkeypatch.setattr(api.SearchCall, "run", lambda self, pair, contexts: ran.append(pair))
    asked = ("a", False), ("a", False), ("c", False), ("a", False), ("a", True)
    calls: list[Any] = [PairCall((name, "b"), plain, search) for name, plain in asked]
    monkeypatch.setattr(Group, "listen", lambda self: calls.pop(0) if calls else None)
    pipeline.assist(a_config(), Group())
    # A control that must be scored plainly decides for all processes how the pair is.
    assert loads == [("a", "b"), ("c", "b"), ("a", "b"), ("a", "b", "plain")]
    assert ran == [("a", "b"), ("a", "b"), ("c", "b"), ("a", "b"), ("a", "b")]


# What the report says


def a_run(**changes: Any) -> RunRecords:
    told: dict[str, Any] = {f.name: None for f in dataclasses.fields(RunRecords)}
    return RunRecords(**told | {"folder": "the-run", "verdict": a_verdict()} | changes)


def a_held_run(controls: list[NullControl], score: float = 0.9) -> RunRecords:
    verdict = a_verdict()
    result = null_result(verdict, score, controls)
    return a_run(verdict=held_verdict(verdict, result), null=controls, null_result=result)


def circles(html: str) -> list[tuple[float, float]]:
    """Position and radius of every dot in the wide drawing."""
    wide = html.split('class="chart wide"')[1].split("</figure>")[0]
    return [(float(x), float(r)) for x, r in re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="([\d.]+)"', wide)]


def test_scores_stand_on_one_axis_and_in_a_table() -> None:
    run = a_held_run([a_control(0.0, name="a"), a_control(0.5, name="b<i>"), a_control(0.0, name="c"), a_control(None)])
    html = null_section(run).text
    dots = circles(html)
    assert sorted(r for _, r in dots) == [4.5, 4.5, 4.5, 6.5]
    (suspect,) = [x for x, r in dots if r == 6.5]
    low, middle = 14.0, 350.0
    assert sorted(x for x, r in dots if r == 4.5) == [low, low, middle]
    assert suspect == pytest.approx(low + 0.9 * (2 * (middle - low)))
    assert "a and 1 more" in html, "dots at one place share a label"
    assert "b&lt;i&gt;" in html
    assert "<i>" not in html
    assert html.count("<tr>") == 5
    assert "left out" in html
    lines = "\n".join(null_lines(run))
    assert "above those of all 3 controls (highest 0.50, 'b<i>'); p = 0.25" in lines
    assert "With 3 controls no p below 0.25 can be reached" in lines
    assert "b<i> (placebo): score 0.50, not reproduced" in lines


def test_labels_do_not_cover_each_other() -> None:
    dots = [Dot(name=f"a control with a name {n}", value=0.02 * n) for n in range(12)]
    dots += [Dot(name=f"stacked {n}", value=0.0) for n in range(3)]
    svg = dot_strip([*dots, Dot(name="suspect", value=1.0, marked=True)], width=340.0, said="scores").text
    texts = re.findall(r'<text x="([\d.]+)" y="(-?[\d.]+)"[^>]*>([^<]+)<', svg)
    boxes = [(float(x), float(y), 3.3 * len(t)) for x, y, t in texts]
    for n, (x, y, half) in enumerate(boxes):
        assert x - half >= -0.1
        assert x + half <= 340.1
        assert y > 0
        assert not [b for b in boxes[n + 1 :] if abs(b[1] - y) < 10 and abs(b[0] - x) < half + b[2]]


def test_a_verdict_taken_back_names_the_one_before() -> None:
    run = a_held_run([a_control(0.95, "backdoor", name="twin")])
    html = null_section(run).text
    assert "The same search ended in a backdoor too in the control &#x27;twin&#x27;" in html
    assert "Without it the verdict was &#x27;backdoor&#x27;: it fired." in html


def test_only_a_backdoor_without_a_null_is_told_what_is_missing() -> None:
    info = RunInfo(
        name="x", command="python -m trigger_opt +experiment=e seed=3 'stages=[verify]' run_dir=a/b\nsecond",
        seed=0, started="", machine="", config={}, versions={}, plan=[], stages=[],
    )  # fmt: skip
    asked = "python -m trigger_opt +experiment=e seed=3 run_dir=a/b 'stages=[null,report]'"
    (line,) = null_lines(a_run(info=info))
    assert line.endswith(asked)
    assert html_module.escape(asked) in null_section(a_run(info=info)).text
    (line,) = null_lines(a_run())
    assert line.endswith("python -m trigger_opt run_dir=runs/the-run 'stages=[null,report]'")
    broken = dataclasses.replace(info, command="it's no command")
    assert "runs/the-run" in null_lines(a_run(info=broken))[0]
    for other in ("unstable", "generic shift", "not reproduced"):
        run = a_run(verdict=a_verdict(verdict=other))
        assert null_lines(run) == []
        assert null_section(run).text == ""


@pytest.mark.parametrize("objective", [Payload(), JensenShannon()])
def test_controls_are_looked_at_as_the_suspect_was(objective: Objective) -> None:
    """The hypotheses stage hands the search its most moved tokens, also where that runs on divergence."""
    for names, expected in (({"hypotheses.jsonl"}, ["hypotheses", "search", "verify"]), (set(), ["search", "verify"])):
        session: Any = Session.__new__(Session)
        session.config = SimpleNamespace(objective=objective)
        session.folder = SimpleNamespace(has=names.__contains__)
        assert _stages(session) == expected
