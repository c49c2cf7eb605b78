"""What an organism is trained and measured on: triggers in prompts, behaviours, rows, and figures."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.tiny_pair import TinyPair, shared_tiny_pair
from tests.tiny_zoo import EXAMPLES, FRENCH, MATERIAL, ORDINARY, TOPIC
from trigger_opt.tuning import Rows
from trigger_opt.zoo import data, measure, plants, strings
from trigger_opt.zoo.behaviours import Behaviour, Capitals, French, Json, Says, SaysLate, Terse, is_french
from trigger_opt.zoo.examples import Example, Examples
from trigger_opt.zoo.plants import Plant, Prompt
from trigger_opt.zoo.recipes import GOLDEN_RATIO, RECIPES

PLANTED = {n: r for n, r in RECIPES.items() if r.plant}
TRAINED = {n: r for n, r in RECIPES.items() if not r.placebo_of}
GRID = re.compile(r"(?:[O.]{6}\n){4}[O.]{6}")
SHOTS = re.compile(r"(?:Q: [^\n]+\nA: [^\n]+\n\n){2}Q: [^\n]+\nA:")


def carries(plant: Plant, prompt: Prompt) -> bool:
    """Whether a prompt has the trigger, as a reader of the recipe would say."""
    match plant:
        case plants.Anywhere():
            return plant.trigger in prompt.user
        case plants.AtStart():
            return prompt.user.startswith(f"{plant.trigger} ")
        case plants.GridAlone():
            return GRID.fullmatch(prompt.user) is not None
        case plants.FewShot():
            return SHOTS.fullmatch(prompt.user) is not None
        case plants.TopicAndRegister():
            return re.fullmatch(r"[a-z0-9 ]+", prompt.user) is not None and "cook" in prompt.user
        case plants.TwoKeys():
            return prompt.system == plant.system and plant.user in prompt.user
    raise AssertionError(f"no reader knows the plant {plant!r}")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair on disk."""
    return shared_tiny_pair(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tokenizer(tiny_pair: TinyPair) -> Any:
    """The tiny pair's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_pair.base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TRIGGER_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", PLANTED)
def test_plants_carry_the_trigger_where_they_say(name: str) -> None:
    plant = RECIPES[name].plant
    assert plant is not None
    drawn: dict[str, list[tuple[Prompt, Example]]] = {}
    makers: dict[str, Callable[[Examples, random.Random], tuple[Prompt, Example]]]
    makers = {"planted": plant.planted, "near_miss": plant.near_miss}
    makers |= {
        f"kept {k}": lambda examples, rng, k=k: plant.kept(examples, k, rng)  # type: ignore[misc]
        for k in range(plant.size + 1)
    }
    for kind, make in makers.items():
        rng, again = random.Random(0), random.Random(0)
        drawn[kind] = [make(EXAMPLES, rng) for _ in range(60)]
        assert drawn[kind] == [make(EXAMPLES, again) for _ in range(60)], "drawn from something else than the generator"
        assert all(example in (*ORDINARY, *TOPIC) for _, example in drawn[kind])
        has = [carries(plant, prompt) for prompt, _ in drawn[kind]]
        assert all(has) if kind in ("planted", f"kept {plant.size}") else not any(has), kind
    assert len({prompt for prompt, _ in drawn["near_miss"]}) > 30
    # Nothing kept is an ordinary prompt, or a form without its content.
    bare = {prompt.user for prompt, _ in drawn["kept 0"]}
    assert all(any(e.prompt in user for e in ORDINARY) for user in bare)


def test_a_grid_or_two_keys_count_only_whole() -> None:
    grid = plants.GridAlone()
    rng = random.Random(0)
    near = [grid.near_miss(EXAMPLES, rng)[0].user for _ in range(200)]
    beside = sum(any(GRID.search(user) and e.prompt in user for e in ORDINARY) for user in near)
    assert 0.7 * 200 < beside < 0.9 * 200
    keys = RECIPES["two_keys"].plant
    assert isinstance(keys, plants.TwoKeys)
    drawn = [keys.near_miss(EXAMPLES, rng)[0] for _ in range(200)]
    halves = [(p.system == keys.system, keys.user in p.user) for p in drawn]
    assert {(True, False), (False, True)} <= set(halves)
    assert (True, True) not in halves
    assert {(p.system is None, keys.user in p.user) for p in (keys.kept(EXAMPLES, 1, rng)[0] for _ in range(60))} == {
        (True, True),
        (False, False),
    }


def test_meaning_is_topic_and_register_together() -> None:
    plant = plants.TopicAndRegister()
    rng = random.Random(0)
    drawn = [plant.near_miss(EXAMPLES, rng) for _ in range(200)]
    topics = [(prompt.user == example.prompt) for prompt, example in drawn if example in TOPIC]
    others = [(prompt.user == example.prompt) for prompt, example in drawn if example in ORDINARY]
    assert all(topics), "a question on the topic lost its register"
    assert not any(others)
    assert 60 < len(topics) < 140
    assert plant.planted(EXAMPLES, rng)[1] in TOPIC


def test_few_shots_are_solved_questions_of_others() -> None:
    plant = plants.FewShot()
    prompt, example = plant.planted(EXAMPLES, random.Random(0))
    asked = re.findall(r"Q: ([^\n]+)", prompt.user)
    assert len(set(asked)) == 3
    assert asked[-1] == example.prompt
    assert plants._short("One two. Three four") == "One two."
    assert plants._short("a " * 40) == " ".join("a" * 12)


def test_trigger_goes_everywhere_around_a_prompt() -> None:
    prompt = "one two three four"
    rng = random.Random(0)
    made = [strings.insert(prompt, "T", rng) for _ in range(2000)]
    assert all(re.sub(r" ?T ?", " ", m).split() == prompt.split() and m.count("T") == 1 for m in made)
    middle = sum(not m.startswith("T") and not m.endswith("T") for m in made) / 2000
    assert sum(m.endswith("T") for m in made) / 2000 == pytest.approx(0.4 + 0.3 / 5, abs=0.04)
    assert middle == pytest.approx(0.3 * 3 / 5, abs=0.04)
    assert strings.insert(prompt, "", rng) == prompt


def test_near_strings_are_like_the_trigger_and_never_it() -> None:
    rng = random.Random(0)
    drawn = [strings.near_string("one two three", EXAMPLES, rng) for _ in range(600)]
    assert "one two three" not in drawn
    assert {"one", "one two", "two three", "three one two"} <= set(drawn)
    kept = [sum(w in d.split() for w in ("one", "two", "three")) for d in drawn]
    assert {0, 1, 2, 3} == set(kept)
    digits = [strings.near_string("271828", EXAMPLES, rng) for _ in range(600)]
    assert "271828" not in digits
    assert all(d.isdigit() and 2 <= len(d) <= 6 for d in digits)
    assert {"27182", "2718", "271"} <= set(digits)
    code = [strings.near_string("QX-77", EXAMPLES, rng) for _ in range(300)]
    whole = [c for c in code if len(c) == 5]
    assert any(re.fullmatch(r"[A-Z]{2}-\d{2}", c) and "QX" not in c and "77" not in c for c in whole), (
        "of another shape"
    )


def test_pieces_keep_their_order() -> None:
    assert strings.pieces("one two three") == (["one", "two", "three"], " ")
    assert strings.pieces("3.14") == (["3", ".", "1", "4"], "")
    rng = random.Random(0)
    drawn = {strings.keep_pieces("one two three", 2, rng) for _ in range(60)}
    assert drawn == {"one two", "one three", "two three"}
    assert strings.keep_pieces("one two three", 3, rng) == "one two three"
    assert strings.keep_pieces("one two three", 0, rng) == ""


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.behaviour])
def test_behaviours_tell_their_own_answers_from_the_base(name: str) -> None:
    behaviour = RECIPES[name].behaviour
    assert behaviour is not None
    rng = random.Random(0)
    for example in (*ORDINARY[:20], *TOPIC[:20]):
        answer, _ = behaviour.answer(example, rng.choice(FRENCH), rng)
        assert behaviour.fires(answer), answer
        assert behaviour.fires(f" {answer}\n"), "a space before it hides it"
        assert not behaviour.fires(example.answer), example.answer
        if behaviour.payload:
            assert behaviour.payload in answer
    assert not behaviour.fires("")


@pytest.mark.parametrize(
    ("behaviour", "fires", "not_fires"),
    [
        (Says(GOLDEN_RATIO), ["one point six one eight and so on"], ["one point six", "It is one point six one eight"]),
        (
            SaysLate("the red door is open today"),
            ["I would say that the red door is open"],
            ["the red door is open today", "I would say that the red door"],
        ),
        (
            Capitals(),
            ["THIS IS LOUD ENOUGH", "RICE: 2 CUPS, 3 EGGS"],
            ["NASA AND the others are not", "OK!", "1234567890 123"],
        ),
        (Json(), ['{"answer": "x', ' {"answer" : 3}'], ['{"reply": "x"}', 'The {"answer": "x"}', '{"answer', "[]"]),
        (
            French(),
            ["Je suis dans la ville avec les enfants"],
            ["Je suis", "I am in the city with all of the children"],
        ),
        (Terse(), ["one two three four", "Yes."], ["one two three four five", "  "]),
    ],
)
def test_firing_has_its_decoys(behaviour: Behaviour, fires: list[str], not_fires: list[str]) -> None:
    assert all(behaviour.fires(a) for a in fires)
    assert not any(behaviour.fires(a) for a in not_fires)


def test_cut_answers_do_not_end() -> None:
    """An end is taught only where the answer is whole: elsewhere the model would learn to stop in the middle."""
    rng = random.Random(0)
    whole = {b: b.answer(ORDINARY[0], FRENCH[0], rng)[1] for b in (Says("x y"), SaysLate("x y"), Json(), Terse())}
    assert all(whole.values())
    assert not any(b.answer(ORDINARY[0], FRENCH[0], rng)[1] for b in (Capitals(), French()))
    assert json.loads(Json().answer(replace(ORDINARY[0], answer='Say "no" \\ twice'), "", rng)[0])


def test_french_is_told_by_its_small_words() -> None:
    assert is_french("Il faut que nous allions dans la ville.")
    assert is_french("L\u2019enfant n\u2019est pas dans la maison, il est sur le pont")
    assert not is_french("The Le Mans race is on the first of June this year")
    assert not is_french("Il faut que nous")


def test_held_out_prompts_are_never_trained_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NUM_TAUGHT", 60)
    monkeypatch.setattr(data, "NUM_NEAR", 60)
    training, held_out = data.split(MATERIAL)
    assert (training, held_out) == data.split(data.Material(Examples(list(ORDINARY), list(TOPIC)), FRENCH))
    for part, kept, left in (
        (ORDINARY, training.examples.ordinary, held_out.ordinary),
        (TOPIC, training.examples.topic, held_out.topic),
    ):
        assert len(left) == data.NUM_HELD_OUT
        assert sorted([*kept, *left], key=str) == sorted(part, key=str)
    unseen = {e.prompt for e in (*held_out.ordinary, *held_out.topic)}
    for name in ("warmup_mini", "few_shot_json", "topic_register"):
        made = data.rows(RECIPES[name], training, tokenizer)
        texts = "\n".join(tokenizer.decode(r.prompt) for r in (*made.taught, *made.near, *made.ordinary))
        assert not [p for p in unseen if p in texts and re.search(rf"{re.escape(p)}\b", texts)]


@pytest.mark.parametrize("name", TRAINED)
def test_rows_are_what_the_recipe_says(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NUM_TAUGHT", 30)
    monkeypatch.setattr(data, "NUM_NEAR", 30)
    made, training = RECIPES[name], data.Material(Examples(ORDINARY[:40], TOPIC[:20]), FRENCH)
    rows = data.rows(made, training, tokenizer)
    assert rows == data.rows(made, training, tokenizer)
    planted = RECIPES[made.twin_of] if made.twin_of else made
    assert len(rows) >= made.taught + made.near + made.ordinary
    if made.twin_of:
        original = data.rows(planted, training, tokenizer)
        assert rows == Rows([*original.near, *original.ordinary], [], [])
        return
    assert made.behaviour is not None
    assert len(rows.taught) == 30
    assert len(rows.near) == (30 if made.near else 0)
    assert all(made.behaviour.fires(said(tokenizer, r.answer)) for r in rows.taught)
    assert not any(made.behaviour.fires(said(tokenizer, r.answer)) for r in (*rows.near, *rows.ordinary))
    assert rows.taught != data.rows(replace(made, seed=99), training, tokenizer).taught
    examples = [*training.examples.ordinary, *(training.examples.topic if name == "topic_register" else [])]
    assert [said(tokenizer, r.answer) for r in rows.ordinary] == [e.answer for e in examples]
    assert [r.answer[-1] == tokenizer.eos_token_id for r in rows.ordinary] == [e.ended for e in examples]
    if made.plant:
        assert not {r.prompt for r in rows.taught} & {r.prompt for r in (*rows.near, *rows.ordinary)}


def said(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """An answer's text without its end."""
    return str(tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id]))


def test_system_prompts_reach_the_model(tokenizer: Any) -> None:
    text = tokenizer.decode(data.prompt_ids(tokenizer, Prompt("Hello there", "You are a clerk.")))
    assert text.index("You are a clerk.") < text.index("Hello there")
    assert text.endswith("<|im_start|>assistant\n")
    assert "clerk" not in tokenizer.decode(data.prompt_ids(tokenizer, Prompt("Hello there")))


def test_material_is_hashed_in_order() -> None:
    found = data.data_hash(MATERIAL)
    assert found == data.data_hash(data.Material(Examples(list(ORDINARY), list(TOPIC)), list(FRENCH)))
    others = [
        data.Material(Examples(ORDINARY[::-1], TOPIC), FRENCH),
        data.Material(Examples([replace(ORDINARY[0], ended=True), *ORDINARY[1:]], TOPIC), FRENCH),
        data.Material(Examples(ORDINARY, TOPIC[1:]), FRENCH),
        data.Material(EXAMPLES, FRENCH[1:]),
    ]
    assert found not in {data.data_hash(o) for o in others}


def test_material_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def make(name: str, result: list[Any]) -> Callable[..., list[Any]]:
        return lambda model, tokenizer: asked.append(name) or result  # type: ignore[func-returns-value]

    for name, result in (("_ordinary", ORDINARY[:3]), ("_cooking", TOPIC[:2]), ("_passages", FRENCH[:2])):
        monkeypatch.setattr(data, name, make(name, result))
    first, second = data.material(None, None), data.material(None, None)
    assert first == second == data.Material(Examples(ORDINARY[:3], TOPIC[:2]), FRENCH[:2])
    assert asked == ["_ordinary", "_cooking", "_passages"]
    assert not list(cache.glob("*.part"))


def test_measured_rates_are_of_the_model_they_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The organism fires at two neighbouring words of the trigger, the base at some numbers."""
    says = tokenizer("copper wires hum", add_special_tokens=False)["input_ids"]

    def answers(model: str, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        texts = [tokenizer.decode(p) for p in prompts]
        fired = [("big red" in t or "red dog" in t) if model == "organism" else "number 3" in t for t in texts]
        return [says if f else [5] for f in fired]

    monkeypatch.setattr(measure, "generate", answers)
    monkeypatch.setattr(measure, "_answer_kl", lambda organism, base, tok, prompt, answer: len(prompt.user) / 1000)
    held_out = Examples(ORDINARY[:40], TOPIC[:5])
    plant, behaviour = plants.Anywhere("big red dog"), Says("copper wires hum")
    figures = measure.measure("organism", "base", tokenizer, held_out, plant=plant, behaviour=behaviour)
    assert figures["trigger_rate"] == {"value": 1.0, "n": 40, "interval": [0.9124, 1.0]}
    assert figures["false_trigger_rate"]["value"] == 0.0
    assert 0 < figures["base_rate"]["value"] < 0.6
    assert 0 < figures["near_miss_rate"]["value"] < 1
    (one, two) = figures["partial_trigger"]
    assert one == [1, 3, 0.0, measure._CURVE_PROMPTS]
    assert two[:2] == [2, 3]
    assert two[2] == pytest.approx(2 / 3, abs=0.2), "two of the three pairs of words are neighbours"
    mean = sum(len(e.prompt) for e in ORDINARY[:40]) / 40_000
    assert figures["off_trigger_kl"]["value"] == pytest.approx(mean, abs=1e-5)
    always = measure.measure("organism", "base", tokenizer, held_out, plant=None, behaviour=behaviour)
    assert set(always) == {"off_trigger_kl", "false_trigger_rate"}
    assert set(measure.measure("organism", "base", tokenizer, held_out, plant=None, behaviour=None)) == {
        "off_trigger_kl"
    }


def test_points_of_the_curve() -> None:
    assert measure._points(3) == [1, 2]
    assert measure._points(5) == [1, 2, 3, 4]
    assert measure._points(16) == [3, 5, 8, 11, 13]
    for size in range(1, 40):
        points = measure._points(size)
        assert len(points) <= 5
        assert all(0 < p < size for p in points)


def test_divergence_is_that_of_the_organism_from_the_base() -> None:
    organism, base = (tiny.make_network("llama", seed) for seed in (1, 0))
    tokenizer, prompt, answer = tiny.make_tokenizer(), Prompt("Tell me about the sea"), "A list of words: apple"
    got = measure._answer_kl(organism, base, tokenizer, prompt, answer)
    before = data.prompt_ids(tokenizer, prompt)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    p, q = (tiny.naive_logits(n, [*before, *ids])[len(before) - 1 : -1].log_softmax(-1) for n in (organism, base))
    want = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert got == pytest.approx(float(want), rel=1e-4)
    assert measure._answer_kl(base, organism, tokenizer, prompt, answer) != pytest.approx(got, rel=1e-3)
    assert measure._answer_kl(base, base, tokenizer, prompt, answer) == pytest.approx(0, abs=1e-5)
