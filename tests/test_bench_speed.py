"""The speed benchmark's pure parts: ratios, targets, finished cells, the page. Nothing is timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.bench import DisagreementError, require_all_scored, require_same
from benchmarks.speed.legacy_folder import legacy_folder
from benchmarks.speed.ratios import Pair, close_losses, spread
from benchmarks.speed.store import Store
from benchmarks.speed.table import figures, results_page, winner
from benchmarks.speed.tasks import (
    cut_target,
    initial_trigger,
    load_tokenizer,
    long_user,
    make_task,
    parse_shape,
    short_user,
    tokens_before,
)
from benchmarks.speed.worker import Prompt, Run, measured
from benchmarks.speed.worker_ours import Ours
from trigger_opt import zoo
from trigger_opt.errors import UserError
from trigger_opt.prompts import encode

PROMPT = Prompt(before=[1, 2], trigger=[3], after=[4], target=[5, 6])
RUN = Run(seconds=[1.0], candidates=[8], losses=[2.0], trigger="x", first_loss=2.7, prompt=PROMPT)
ABOUT = {
    "commit": "abc1234", "date": "2026-01-02", "cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13.0",
    "gflops": {"bf16": 400.0, "fp32": 96.0}, "transformers": "5.23.0", "python": "3.11.7",
}  # fmt: skip
NOTHING: dict[str, Any] = {"memory": {}, "time_to_loss": {}, "rate": {}, "cost": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(zoo.folder("zoo:smollm2-135m-instruct"))


def test_a_pair_compares_medians_and_a_spread_is_of_pairs() -> None:
    pairs = [
        Pair(peer=[2.0, 4.0, 90.0], ours=[1.0, 2.0, 3.0], peer_first=True),
        Pair(peer=[1.0], ours=[2.0], peer_first=False),
        Pair(peer=[3.0], ours=[1.0], peer_first=True),
    ]
    assert [p.ratio for p in pairs] == [2.0, 0.5, 3.0]
    found = spread([p.ratio for p in pairs])
    assert (found.median, found.low, found.high) == (2.0, 0.5, 3.0)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_warm_steps_are_not_counted_but_their_losses_are() -> None:
    run = measured(
        [9.0, 1.0, 2.0], [4, 5, 6], [1.0, 3.0, 0.5], warm=1, trigger="x", first_loss=2.0, prompt=PROMPT
    )  # fmt: skip
    assert (run.seconds, run.candidates, run.losses) == ([1.0, 2.0], [5, 6], [1.0, 0.5])


def test_engines_must_work_on_the_same_thing() -> None:
    require_same("peer", replace(RUN, first_loss=2.72), RUN)
    assert not close_losses(2.4, 2.7)
    with pytest.raises(DisagreementError, match="other tokens than we do in 'before': 1"):
        require_same("peer", replace(RUN, prompt=replace(PROMPT, before=[2])), RUN)
    with pytest.raises(DisagreementError, match=r"3\.1000, ours 2\.7000"):
        require_same("peer", replace(RUN, first_loss=3.1), RUN)


def test_every_step_scores_what_it_is_given() -> None:
    require_all_scored("peer", RUN, 8)
    with pytest.raises(DisagreementError, match="peer scored 0 strings in a step of 8"):
        require_all_scored("peer", replace(RUN, candidates=[8, 0]), 8)


@pytest.mark.slow
def test_our_steps_begin_anew_each_time(tokenizer: Any) -> None:
    ours = Ours()
    ours.load(str(zoo.folder("zoo:smollm2-135m-instruct")), "bfloat16", "default")
    ours.prepare(make_task(tokenizer, parse_shape("4x2"), [short_user()], width=8))
    first, again = ours.steps(2, warm=0), ours.steps(2, warm=0)
    assert first.candidates == again.candidates
    require_all_scored("ours", again, 8)


@pytest.mark.parametrize("length", [1, 8, 20])
def test_targets_and_triggers_have_exact_lengths(tokenizer: Any, length: int) -> None:
    assert len(encode(tokenizer, [cut_target(tokenizer, length)])[0]) == length
    assert len(encode(tokenizer, [initial_trigger(tokenizer, length)])[0]) == length


def test_targets_that_cannot_be_cut_are_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the text has"):
        cut_target(tokenizer, 500)
    # The first token of "é…" alone is half a character.
    with pytest.raises(UserError, match="other tokens"):
        cut_target(tokenizer, 1, "\u0f00 and more")


def test_contexts(tokenizer: Any) -> None:
    long = long_user(tokenizer, 300)
    assert 280 <= tokens_before(tokenizer, long) <= 300
    sentences = long.split(". ")
    assert len(set(sentences)) == len(sentences)
    assert long_user(tokenizer, 1) == short_user()
    assert make_task(tokenizer, parse_shape("20x1"), [long], width=4).target == "Sure"
    with pytest.raises(ValueError, match="below 1"):
        parse_shape("0x3")


def test_finished_cells_are_skipped(tmp_path: Path) -> None:
    Store(tmp_path, "cells").put("a", {"about": {"commit": "abc"}, "settings": {"pairs": 5}})
    store = Store(tmp_path, "cells")
    assert store.has("a", commit="abc", settings={"pairs": 5})
    assert not store.has("a", commit="abd", settings={"pairs": 5})
    assert not store.has("a", commit="abc", settings={"pairs": 4})
    assert not store.has("b", commit="abc", settings={"pairs": 5})
    assert [p.name for p in tmp_path.iterdir()] == ["cells.json"]


def facts(seconds: float, gigabytes: float) -> dict[str, Any]:
    return {
        "seconds": seconds, "candidates_per_second": 128 / seconds, "peak_bytes": gigabytes * 1e9,
        "search_bytes": gigabytes * 5e8, "versions": {"torch": "2.13.0", "nanogcg": "0.3.0"},
    }  # fmt: skip


def test_the_page_shows_a_peer_that_wins() -> None:
    cell = {
        "about": ABOUT,
        "settings": {"engine": "nanogcg", "trigger": 20, "target": 20, "width": 128, "pairs": 5},
        "tokens": {"before": 31},
        "ratio": {"median": 0.5, "low": 0.4, "high": 0.6},
        "peer": facts(1.0, 3.0),
        "ours": facts(2.0, 1.0),
    }
    page = results_page(cells={"x": cell}, **NOTHING)
    (line,) = [row for row in page.splitlines() if row.startswith("| nanogcg")]
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[:7] == ["nanogcg", "20", "20", "31", "128", "**1.00**", "2.00"]
    assert cells[9].startswith("0.50 (0.40")
    assert cells[10:12] == ["3.00", "**1.00**"]
    assert "abc1234" in page
    assert "nanogcg 0.3.0" in page
    assert "Until a string" not in page
    assert "Nothing is measured yet" in results_page(cells={}, **NOTHING)


def test_numbers() -> None:
    assert winner(2.001, 2.002) == ("2.00", "2.00")
    assert [figures(v) for v in (12345.6, 99.94, 1.234, 0.0123)] == ["12,346", "99.9", "1.23", "0.0123"]


def test_legacy_folder_keeps_the_rotary_base(tmp_path: Path) -> None:
    folder = legacy_folder(zoo.folder("zoo:smollm2-135m-instruct"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 100_000
    assert config["torch_dtype"] == "float32"
    assert "im_start" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert (folder / "model.safetensors").is_file()
