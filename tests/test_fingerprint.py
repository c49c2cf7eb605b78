"""The hash of a pair: what must not change it, what must, and what a sample can miss."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_pair import TinyPair, opened_files
from trigger_opt.errors import UserError
from trigger_opt.models.files import find_model, tensor_index
from trigger_opt.models.fingerprint import (
    Span,
    _layout,
    _pieces,
    _shares,
    model_fingerprint,
    pair_fingerprint,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def mine(tiny: TinyPair, tmp_path: Path) -> TinyPair:
    """A copy that a test may change."""
    folders = {name: shutil.copytree(folder, tmp_path / "other" / name) for name, folder in vars(tiny).items()}
    return TinyPair(**folders)


def of(finetuned: Path, base: Path) -> str:
    return pair_fingerprint(find_model(str(finetuned)), find_model(str(base)))


def flip(path: Path, at: int) -> None:
    """Change the lowest bit of one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flipped(path: Path, positions: list[int]) -> Iterator[int]:
    """Each position in turn, changed while it is yielded."""
    for at in positions:
        flip(path, at)
        yield at
        flip(path, at)


def test_copies_agree_wherever_they_lie_and_whenever_they_were_made(tiny: TinyPair, mine: TinyPair) -> None:
    for file in [*mine.finetuned.iterdir(), *mine.base.iterdir(), *mine.adapter.iterdir()]:
        os.utime(file, (1, 1))
    (mine.finetuned / "README.md").write_text("another")
    with opened_files() as opened:
        assert of(mine.finetuned, mine.base) == of(tiny.finetuned, tiny.base)
        assert of(mine.adapter, mine.base) == of(tiny.adapter, tiny.base)
    assert not [path for path in opened if path.endswith("manifest.json")], "what the organism's maker wrote down"


def test_different_pairs_differ(tiny: TinyPair) -> None:
    folders = [tiny.base, tiny.finetuned, tiny.adapter, tiny.wide]
    found = {of(one, other) for one in folders for other in folders}
    assert len(found) == 16
    assert all(len(f) == 64 for f in found)


def test_one_changed_weight_of_any_tensor_changes_it(mine: TinyPair) -> None:
    places = [(mine.finetuned, WEIGHTS), (mine.base, WEIGHTS), (mine.adapter, "adapter_model.safetensors")]
    draw = random.Random(0)
    for folder, name in places:
        finetuned = mine.adapter if folder == mine.adapter else mine.finetuned
        spans = _layout(folder / name)[1]
        assert len(spans) == len(tensor_index(find_model(str(folder)))) > 10
        positions = [span.start + draw.randrange(span.size) for span in spans]
        seen = {of(finetuned, mine.base)}
        seen |= {of(finetuned, mine.base) for _ in flipped(folder / name, positions)}
        assert len(seen) == 1 + len(spans)


def test_a_sample_sees_what_moves_a_whole_tensor_and_misses_what_lies_outside_it(mine: TinyPair) -> None:
    budget = 20_000
    path = mine.base / WEIGHTS
    spans = _layout(path)[1]
    assert sum(s.size for s in spans) > 5 * budget
    shares = _shares([s.size for s in spans], budget)
    read = {at for s, n in zip(spans, shares, strict=True) for p in _pieces(s, n) for at in _bytes(p)}
    assert len(read) <= budget

    def now() -> str:
        return model_fingerprint(find_model(str(mine.base)), sampled_bytes=budget)

    before = now()
    draw = random.Random(0)
    positions = [p for s in spans for p in (s.start, s.start + s.size - 1, *draw.sample(_bytes(s), 4))]
    assert {at for at in flipped(path, positions) if now() != before} == set(positions) & read
    assert not set(positions) <= read
    stored = {name: weight.clone() for name, weight in load_file(path).items()}
    for name, weight in stored.items():
        save_file(stored | {name: weight + 0.01}, path, {"format": "pt"})
        assert now() != before, name
    save_file(stored, path, {"format": "pt"})
    assert now() == before


def _bytes(span: Span) -> range:
    return range(span.start, span.start + span.size)


def test_shares_are_those_of_handing_out_one_byte_after_another() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.choice([0, 3, 10, 50, 400]) for _ in range(draw.randrange(1, 12))]
        budget = draw.randrange(600)
        slow, left = [0] * len(sizes), budget
        while left and slow != sizes:
            for i in range(len(sizes)):
                if slow[i] < sizes[i] and left:
                    slow[i], left = slow[i] + 1, left - 1
        shares = _shares(sizes, budget)
        assert sum(shares) <= budget
        assert all(abs(a - b) <= 1 for a, b in zip(shares, slow, strict=True)), (sizes, budget)
        if sum(sizes) <= budget:
            assert shares == sizes


@pytest.mark.parametrize("share", [0, 1, 2, 5, 8191, 8192, 20_000, 99_999])
def test_pieces_reach_from_the_first_byte_to_the_last_and_never_meet(share: int) -> None:
    span = Span(1_000, 100_000)
    pieces = list(_pieces(span, share))
    assert sum(p.size for p in pieces) <= share
    assert pieces[0].start == 1_000
    assert pieces[-1].start + pieces[-1].size == 101_000
    assert all(a.start + a.size <= b.start for a, b in pairwise(pieces))
    gaps = [b.start - a.start for a, b in pairwise(pieces)]
    assert max(gaps) - min(gaps) <= 1
    assert list(_pieces(span, 100_000)) == [span]
    assert list(_pieces(Span(7, 0), 0)) == [Span(7, 0)]


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_settings_count_and_places_do_not(mine: TinyPair) -> None:
    before = of(mine.adapter, mine.base)
    change_json(mine.adapter / "adapter_config.json", base_model_name_or_path="/elsewhere")
    change_json(mine.base / "config.json", _name_or_path="/elsewhere", transformers_version="9")
    assert of(mine.adapter, mine.base) == before
    change_json(mine.adapter / "adapter_config.json", lora_alpha=9)
    scaled = of(mine.adapter, mine.base)
    change_json(mine.base / "config.json", rope_theta=77.0)
    assert len({before, scaled, of(mine.adapter, mine.base)}) == 3


def test_the_chat_template_of_the_base_counts_as_it_is_the_one_in_use(mine: TinyPair) -> None:
    before = of(mine.finetuned, mine.base)
    for folder in (mine.finetuned, mine.base):
        assert of(mine.finetuned, mine.base) == before
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    assert of(mine.finetuned, mine.base) != before


def test_shards_and_their_names_count(mine: TinyPair, tmp_path: Path) -> None:
    stored = load_file(mine.base / WEIGHTS)
    names = sorted(stored)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, held in parts.items():
        save_file({n: stored[n] for n in held}, mine.base / shard, {"format": "pt"})
    index = {"weight_map": {n: shard for shard, held in parts.items() for n in held}}
    (mine.base / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    whole = of(mine.finetuned, mine.base)
    (mine.base / WEIGHTS).unlink()
    assert of(mine.finetuned, mine.base) != whole
    found = {of(mine.finetuned, mine.base)}
    for shard in parts:
        last = (mine.base / shard).stat().st_size - 1
        found |= {of(mine.finetuned, mine.base) for _ in flipped(mine.base / shard, [last])}
    assert len(found) == 3


def test_pickled_weights(mine: TinyPair) -> None:
    stored = load_file(mine.base / WEIGHTS)
    (mine.base / WEIGHTS).unlink()
    path = mine.base / "pytorch_model.bin"

    def saved(change: str = "") -> str:
        torch.save({n: w + 1 if n == change else w for n, w in stored.items()}, path)
        return model_fingerprint(find_model(str(mine.base), allow_pickle=True), sampled_bytes=20_000)

    before = saved()
    assert saved() == before
    assert len({before, *(saved(name) for name in stored)}) == 1 + len(stored)


def test_what_is_damaged_is_refused(mine: TinyPair) -> None:
    base = find_model(str(mine.base))
    with pytest.raises(ValueError, match="found without its weights"):
        pair_fingerprint(find_model(str(mine.finetuned), weights=False), base)
    os.truncate(mine.finetuned / WEIGHTS, 5_000)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated"):
        of(mine.finetuned, mine.base)
    for text in ("{", "3"):
        (mine.base / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json is no JSON object"):
            of(mine.adapter, mine.base)


def test_code_that_builds_a_model_counts(mine: TinyPair) -> None:
    base = find_model(str(mine.base))
    own = replace(base, own_code=True)
    before = model_fingerprint(own)
    assert before == model_fingerprint(base), "there is none yet"
    (base.folder / "modeling_own.py").write_text("gate = 1\n")
    first = model_fingerprint(own)
    (base.folder / "modeling_own.py").write_text("gate = 2\n")
    assert len({before, first, model_fingerprint(own)}) == 3
    assert model_fingerprint(base) == before, "what is not run does not count"
