"""README, changelog and log: what they name exists, and what they show runs."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks import scale
from trigger_opt import api
from trigger_opt.config import register, register_resolvers, validated
from trigger_opt.hypotheses import HypothesisSettings, find_hypotheses
from trigger_opt.models.plan import ModelSize
from trigger_opt.paths import data_dir
from trigger_opt.records import Hypothesis
from trigger_opt.search import GCG, BuildSettings
from trigger_opt.verify import VerifySettings
from trigger_opt.zoo.recipes import BASE_NAME, GOLDEN_RATIO, RECIPES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ["README.md", "CHANGELOG.md", "experiments/LOG.md", "docs/scale.md"]
# Made by setting up or by running; a fresh checkout has none of them.
MADE = re.compile(r"^(\.venv|runs|wandb|multirun|~)(/|$)")


def text_of(doc: str) -> str:
    """The file's text."""
    return (ROOT / doc).read_text(encoding="utf-8")


def code_spans(text: str) -> list[str]:
    """What stands in single backticks, and the lines of code blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)$", rest, re.M)
    return [*re.findall(r"`([^`\n]+)`", rest), *lines]


def python_blocks(text: str) -> list[str]:
    """The blocks marked python."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("doc", DOCS)
def test_is_there_and_finished(doc: str) -> None:
    text = text_of(doc)
    assert len(text) > 200
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX|RESULTS_TABLE|PLACEHOLDER)\b", text)


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc: str) -> None:
    text = text_of(doc)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not path or ((ROOT / doc).parent / path).exists(), target
        if anchor and not path:
            heads = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)]
            assert anchor in heads, target


@pytest.mark.parametrize("doc", DOCS)
def test_files_named_exist(doc: str) -> None:
    suffix = r"\.(py|yaml|md|toml|txt|json|sh|cfg)"
    for span in code_spans(text_of(doc)):
        for word in re.split(r"[\s,;]+", span):
            name = word.strip("'\"()[]:.")
            inside = re.match(r"^(trigger_opt|tests|configs|experiments|benchmarks)/[\w./-]+$", name)
            if not inside and not re.match(rf"^[\w-]+(/[\w.-]+)+{suffix}$", name):
                continue
            if MADE.match(name) or "*" in name or re.search(r"[A-Z]{3,}/", name):
                continue
            assert (ROOT / name).exists(), f"{doc} names {name}"


@pytest.mark.parametrize("doc", DOCS)
def test_make_targets_exist(doc: str) -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    named = {t for span in code_spans(text_of(doc)) for t in re.findall(r"\bmake ([a-z][\w-]*)", span)}
    assert named <= targets
    if doc == "README.md":
        assert {"demo", "test"} <= named


@pytest.mark.parametrize("doc", DOCS)
def test_experiments_and_zoo_names_exist(doc: str) -> None:
    text = text_of(doc)
    known = {p.stem for p in (ROOT / "experiments").glob("*.yaml")}
    named = set(re.findall(r"\+experiment=([a-z]\w*)", text))
    assert named <= known
    assert set(re.findall(r"\bzoo:([a-z][\w-]*[a-z0-9])", text)) <= {BASE_NAME, *RECIPES}


def test_readme_commands_compose() -> None:
    """Every command line of the README is one that the configuration accepts."""
    lines = [s for s in code_spans(text_of("README.md")) if s.startswith("python -m trigger_opt ")]
    assert lines
    register_resolvers()
    register()
    with initialize_config_dir(str(data_dir("configs")), version_base="1.3"):
        for line in lines:
            words = [w for w in shlex.split(line.split("  #")[0])[3:] if not w.startswith("-")]
            # One job, or those of a sweep.
            (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
            for job in jobs:
                validated(compose("config", overrides=list(job)))


def test_readme_settings_exist() -> None:
    """Each `setting=value` and `group.setting` of the README's table of settings."""
    register_resolvers()
    register()
    table = text_of("README.md").split("| setting | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.M)
    spans = [s for row in rows for s in re.findall(r"`([^`]+)`", row) if re.fullmatch(r"[a-z_.]+(=.*)?", s)]
    assert "tracking.mode=online" in spans
    with initialize_config_dir(str(data_dir("configs")), version_base="1.3"):
        plain = compose("config")
        for span in spans:
            key, _, value = span.partition("=")
            at: Any = compose("config", overrides=[f"{key}={value}"]) if value and "…" not in value else plain
            for part in key.split("."):
                assert part in at, f"README names the setting {key}"
                at = at[part]


def shrink(monkeypatch: pytest.MonkeyPatch, kind: type[Any], **smaller: Any) -> None:
    """Let `kind` be made with small settings, whatever is asked for."""
    original: Callable[..., None] = kind.__init__

    def init(self: Any, **given: Any) -> None:
        original(self, **(given | smaller))

    monkeypatch.setattr(kind, "__init__", init)


def test_readme_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The library example word for word, on the real embedded pair, with little work for each step."""
    (example,) = [b for b in python_blocks(text_of("README.md")) if "load_pair" in b]
    shrink(
        monkeypatch,
        HypothesisSettings,
        lens_tokens=16,
        num_lens_strings=4,
        num_strings=4,
        num_tokens=16,
        num_words=0,
        groups=1,
        amplify=[],
        answer_tokens=2,
    )
    shrink(monkeypatch, GCG, num_steps=1, num_restarts=1, search_width=4, topk=4, contexts_per_step=1)
    shrink(monkeypatch, VerifySettings, random_strings=1, max_new_tokens=8)
    real_contexts = api.contexts_from
    monkeypatch.setattr(api, "contexts_from", lambda entries, where: real_contexts(entries, where)[:2])

    def found(*arguments: Any, **options: Any) -> list[Hypothesis]:
        # Sixteen readings stir nothing; the rest of the example needs a payload to go on with.
        find_hypotheses(*arguments, **options)
        return [Hypothesis(payload=GOLDEN_RATIO, score=9.0, source="given", evidence="", inputs=[" 3.14"], rivals=[])]

    monkeypatch.setattr(api, "find_hypotheses", found)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_scale_page_holds_what_the_program_computes() -> None:
    page, config = text_of("docs/scale.md"), scale.experiment()
    assert scale.rate_table(config) in page
    assert scale.memory_table(config) in page
    assert scale.plan_table(config) in page
    assert f"takes {scale.flops_of(config) / 1e9:,.0f} GFLOP an evaluation" in page
    search = config.search
    assert f"at most {search.search_width} strings in {search.contexts_per_step} contexts" in page


def test_stages_of_a_run_by_hand() -> None:
    config = scale.experiment()
    config.hypotheses = HypothesisSettings(
        lens_tokens=100,
        num_lens_strings=4,
        num_strings=6,
        string_tokens=5,
        num_tokens=20,
        num_words=2,
        answer_tokens=4,
        string_answer_tokens=7,
        contexts=["{trigger}"],
    )
    config.build = BuildSettings(max_tokens=3, pool=7, singles=3, beam=2, contexts=3, finalists=5, max_characters=3)
    config.search = replace(config.search, num_restarts=1, num_steps=3, search_width=4, contexts_per_step=2)
    config.verify = VerifySettings(candidates=1, minimise=True, random_strings=2, max_new_tokens=8)
    size = scale.QWEN_7B
    token = 2 * 2 * size.linear_parameters / 1e15
    stages, counts, pflop = zip(*scale.stages(config), strict=True)
    assert stages == ("hypotheses", "search: spelling", "search: building", "search", "verify")
    # All that were ranked; two at two places, two at three; the best five of each length in two more contexts.
    built = 512 + (2 * 2 + 2 * 3) * 10 + 3 * 5 * 2
    # 94 characters: alone; behind two strings and within the best of one, then of two; sixteen of each length in two
    # more contexts.
    spelled = 94 * (1 + (2 + 1) + (2 + 2)) + 3 * 16 * 2
    assert counts[1] == f"{spelled} evaluations"
    assert (counts[0], *counts[2:]) == (
        "100 tokens ranked, 32 readings",
        f"{built} evaluations",
        "24 evaluations",
        "360 answers",
    )
    read, answered = (50 + 20 + 6 + 10 * (12 + 6) + 22 * (12 + 3) + 150) * token, 360 * (60 + 8) * token / 2
    each = scale.flops_of(config) / 1e15
    assert pflop == pytest.approx((read, spelled * each, built * each, 24 * each, answered))
    config.build.max_tokens = 0
    config.build.max_characters = 0
    assert scale.building(config.build) == scale.spelling(config.build) == 0


def test_operations_of_an_evaluation_by_hand() -> None:
    size = ModelSize(
        num_parameters=1000,
        linear_parameters=920,
        num_layers=1,
        d_model=4,
        d_ff=8,
        vocab=10,
        num_kv_heads=1,
        head_dim=4,
    )
    assert scale.flops(size, length=3, after=2, scored=1) == 2 * (2 * 920 * (2 + 2) + 2 * 10 * 4)
