"""After a search in quantised weights: the best strings' scores in finer ones, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_pair import CommandLine, TinyPair, tiny_settings
from trigger_opt import api, planning, rescoring
from trigger_opt.api import load_pair, pair_scorer
from trigger_opt.models.pair import LoadOptions
from trigger_opt.objectives import KullbackLeibler, Payload
from trigger_opt.prompts import Context, tokenize_context
from trigger_opt.records import Candidate, Hypothesis, Rescored, read_records

PAYLOAD = "hello there"


def settings(tiny: TinyPair, run: Path, *more: str) -> list[str]:
    stages = "stages=[search]" if not more or not more[0].startswith("stages") else more[0]
    return [*tiny_settings(tiny, run_dir=run), f"payload={PAYLOAD}", stages, *[m for m in more if m != stages]]


def by_hand(tiny: TinyPair, trigger_ids: list[int], *, payload: bool = True) -> float:
    """The score on unquantised weights in fp32 arithmetic."""
    pair = load_pair(str(tiny.finetuned), base=str(tiny.base), options=LoadOptions(dtype="float32"))
    users = ("Hello there. {trigger}", "{trigger} What now?", "One {trigger} two")
    contexts = [tokenize_context(pair.tokenizer, Context(user=u)) for u in users]
    target = pair.encode_answer(PAYLOAD)[: Payload().target_tokens] if payload else []
    scorer = pair_scorer(pair, contexts, Payload() if payload else KullbackLeibler(), target)
    return float(scorer.aggregate(scorer.score(torch.tensor([trigger_ids]), [0, 1, 2]))[0])


def test_winners_are_scored_again_without_quantisation(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli(*settings(tiny, run, "stages=[search,verify,report]", "model.quantization=nf4"))
    assert done.code == 0, done.err
    records = read_records(run / "rescored.jsonl", Rescored)
    found = {c.trigger: c for c in read_records(run / "candidates.jsonl", Candidate)}
    assert records
    assert {(r.searched_in, r.scored_in) for r in records} == {("nf4", "bfloat16")}
    assert any(abs(r.score - r.score_before) > 1e-3 for r in records), "nf4 rounds weights"
    for r in records:
        assert found[r.trigger].score == r.score
        assert r.score == pytest.approx(by_hand(tiny, found[r.trigger].trigger_ids), abs=2e-3)
    order = [(-(c.selection_rate or 0.0), -c.score) for c in found.values()]
    assert order == sorted(order)
    sentence = f"{len(records)} strings scored again in bfloat16 after a search in nf4: scores moved by "
    assert sentence in done.out
    assert sentence in (run / "report.html").read_text()
    assert sentence in (run / "report.md").read_text()


def test_strings_found_on_divergence_are_scored_again_by_it(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Hypothesis(payload=PAYLOAD, score=9.0, source="", evidence="", inputs=[], rivals=[])
    monkeypatch.setattr(api, "payloads_of", lambda *given, **options: [read])
    run = tmp_path / "run"
    done = cli(*tiny_settings(tiny, run_dir=run), "stages=[search]", "model.quantization=nf4")
    assert done.code == 0, done.err
    records = read_records(run / "rescored.jsonl", Rescored)
    assert {r.payload for r in records} == {"", PAYLOAD}
    assert all((r.selection_rate is None) is (not r.payload) for r in records)
    found = {(c.trigger, c.payload): c for c in read_records(run / "candidates.jsonl", Candidate)}
    for record in records:
        ids = found[record.trigger, record.payload].trigger_ids
        assert record.score == pytest.approx(by_hand(tiny, ids, payload=bool(record.payload)), abs=2e-3)


def test_nothing_is_scored_again_without_quantised_weights(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    done = cli(*settings(tiny, tmp_path / "run"))
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "rescored.jsonl").exists()
    assert "scored again" not in done.out


@pytest.mark.parametrize(
    ("searched", "free_gb", "expected"),
    [
        ("nf4", 0.01, "keep their scores in nf4: bfloat16 needs "),
        ("int8", 0.01, "keep their scores in int8: bfloat16 needs "),
        ("nf4", None, "are scored again in int8, after a search in nf4"),
    ],
)
def test_what_does_not_fit_is_said(
    cli: CommandLine,
    tiny: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    searched: str,
    free_gb: float | None,
    expected: str,
) -> None:
    plan = planning.memory_plan
    totals: list[int] = []

    def noted(*given: Any) -> Any:
        made = plan(*given)
        totals.append(made.total_bytes)
        return made

    def free(device: str) -> float:
        # By default a byte less than the weights take as they are stored, which is asked for first.
        return totals[0] - 1 if free_gb is None else free_gb * 1e9

    monkeypatch.setattr(rescoring, "memory_plan", noted)
    monkeypatch.setattr(rescoring, "available_bytes", free)
    done = cli(*settings(tiny, tmp_path / "run", f"model.quantization={searched}"))
    assert done.code == 0, done.err
    assert expected in done.out
    assert (tmp_path / "run" / "rescored.jsonl").exists() == (free_gb is None)
    assert (tmp_path / "run" / "candidates.jsonl").exists()
