"""The YAML and the tables of config.py: everything composes, validates and agrees."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from trigger_opt import run_folder, stages
from trigger_opt.api import contexts_from, load_contexts
from trigger_opt.config import (
    OBJECTIVES,
    SEARCHES,
    STAGES,
    ModelConfig,
    NullConfig,
    RunConfig,
    register,
    register_resolvers,
    validated,
)
from trigger_opt.errors import UserError
from trigger_opt.hypotheses import HypothesisSettings
from trigger_opt.models.plan import MemoryPlan, PlanItem
from trigger_opt.objectives import Payload
from trigger_opt.paths import data_dir
from trigger_opt.planning import largest, search_loads
from trigger_opt.search import GCG, RandomSearch
from trigger_opt.tokens import TokenPolicy
from trigger_opt.verify import VerifySettings

EXPERIMENTS = sorted(p.stem for p in data_dir("experiments").glob("*.yaml"))
GROUP_FILES = sorted(
    (folder.name, file.stem)
    for folder in data_dir("configs").iterdir()
    if folder.is_dir() and folder.name != "hydra"
    for file in folder.glob("*")
)


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    register_resolvers()
    register()
    with initialize_config_dir(str(data_dir("configs")), version_base="1.3"):
        yield


def composed(*overrides: str, **options: Any) -> DictConfig:
    """The configuration of a command line."""
    cfg: DictConfig = compose("config", overrides=list(overrides), **options)
    return cfg


def test_defaults_are_those_of_the_classes() -> None:
    run = validated(composed())
    assert run.search == GCG()
    assert run.objective == Payload()
    assert run.hypotheses == HypothesisSettings()
    assert run.tokens == TokenPolicy()
    assert run.verify == VerifySettings()
    assert run.stages == [s for s in STAGES if s not in ("null", "transfer")]
    assert run.null == NullConfig()
    assert isinstance(run.model, ModelConfig)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_validates_and_bears_its_name(name: str) -> None:
    run = validated(composed(f"+experiment={name}"))
    assert run.name == name
    assert type(run.search) in SEARCHES.values()
    assert type(run.objective) in OBJECTIVES.values()
    for where, entries in (("search", run.contexts.search), ("held_out", run.contexts.held_out)):
        assert contexts_from(entries, where)
    assert len(run.contexts.held_out) >= run.verify.thresholds.contexts, "could never come out as a backdoor"


def test_the_issue_s_experiments_are_there() -> None:
    assert {"gcg_warmup", "gcg_warmup_mini", "gcg_js", "random_warmup_mini"} <= set(EXPERIMENTS)


def test_comparisons_have_the_budget_of_the_main_job() -> None:
    main, other, js = (
        validated(composed(f"+experiment={n}")) for n in ("gcg_warmup_mini", "random_warmup_mini", "gcg_js")
    )
    assert isinstance(main.search, GCG)
    assert isinstance(other.search, RandomSearch)
    shared = {f.name for f in dataclasses.fields(GCG)} - {"name"}
    assert {k: getattr(main.search, k) for k in shared} == {k: getattr(other.search, k) for k in shared}
    assert main.search.max_seconds == js.search.max_seconds
    assert main.hypotheses == other.hypotheses
    assert main.seed == other.seed == js.seed


@pytest.mark.parametrize(("group", "name"), GROUP_FILES)
def test_every_group_file_composes(group: str, name: str) -> None:
    needed = ["model.finetuned=a", "model.base=b"] if (group, name) == ("model", "pair") else []
    validated(composed(f"{group}={name}", *needed))


@pytest.mark.parametrize(("group", "table"), [("search", SEARCHES), ("objective", OBJECTIVES)])
def test_tables_and_yaml_agree(group: str, table: dict[str, type[Any]]) -> None:
    files = {p.stem for p in (data_dir("configs") / group).glob("*.yaml")}
    assert files == set(table)
    for name, kind in table.items():
        assert kind().name == name
        run = validated(composed(f"{group}={name}"))
        assert getattr(run, group) == kind(), f"configs/{group}/{name}.yaml and its class have other defaults"


def test_every_stage_has_a_function_and_files() -> None:
    assert tuple(stages.STAGES) == tuple(run_folder.STAGE_FILES) == STAGES


def test_contexts_are_disjoint_and_many() -> None:
    for file in (data_dir("configs") / "contexts").glob("*.yaml"):
        search, held_out = load_contexts(file.stem)
        assert not {(c.user, c.system) for c in search} & {(c.user, c.system) for c in held_out}
        assert len(search) >= 8
        assert len(held_out) >= VerifySettings().thresholds.contexts


def test_stages_run_in_their_order() -> None:
    assert validated(composed("stages=[report,diff,verify]")).stages == ["diff", "verify", "report"]


def test_all_problems_are_told_at_once_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        validated(composed("search.topk=0", "model.dtype=float12", "stages=[foo,diff]"))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("search.topk", "model.dtype: 'float12'", "stages: unknown foo"):
        assert part in message


def test_every_setting_can_be_named() -> None:
    assert {f.name for f in dataclasses.fields(RunConfig)} == set(composed())


def test_run_folders_are_unique_within_one_second() -> None:
    folders = set()
    for _ in range(8):
        cfg = composed("name=twice", return_hydra_config=True)
        folder = OmegaConf.select(cfg, "hydra.run.dir")
        assert folder == OmegaConf.select(cfg, "hydra.run.dir"), "one run, one folder"
        assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_twice_[0-9a-f]{6}", folder)
        folders.add(folder)
    assert len(folders) == 8


def test_given_run_folder_is_taken_as_it_is() -> None:
    cfg = composed("run_dir=some/where", return_hydra_config=True)
    assert OmegaConf.select(cfg, "hydra.run.dir") == "some/where"


def test_experiments_hold_settings_only() -> None:
    """A number that decides a result stands in a class, a group file or an experiment: nowhere else."""
    known = {f.name for f in dataclasses.fields(RunConfig)} | {"defaults"}
    for file in data_dir("experiments").glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text())) <= known, file
        assert Path(file).read_text().startswith("#"), f"{file}: the first line says what it is for"


def test_a_search_without_a_payload_has_settings_of_its_own() -> None:
    with pytest.raises(UserError, match=r"divergence.objective: 'payload' is not allowed; choose from js, tv, kl"):
        validated(composed("divergence.objective=payload"))
    few = "divergence.trigger_length: 2 tokens are fewer than search.n_replace=3; raise the one or lower the other"
    with pytest.raises(UserError, match=re.escape(few)):
        validated(composed("divergence.trigger_length=2", "search.n_replace=3"))


def test_the_plan_is_of_the_larger_of_both_searches() -> None:
    def tokens(*given: str) -> list[int]:
        return [load.tokens_per_candidate for load in search_loads(validated(composed(*given)))]

    short, long = tokens("divergence.trigger_length=2"), tokens("divergence.trigger_length=40")
    assert short[0] == long[0], "towards a payload"
    assert long[1] - short[1] == 38
    # Towards a payload that is given, or where the divergence is all that is asked for, no other search runs.
    for alone in ("payload=hello there", "objective=js"):
        assert len(tokens(alone)) == 1
    plans = [MemoryPlan(items=(PlanItem(what="logits", nbytes=n),)) for n in (3, 5, 4)]
    assert largest(plans) is plans[1]
