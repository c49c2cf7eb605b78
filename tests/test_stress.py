"""Stress tests of behaviours: what is done to the weights, what is left, and the command."""

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import binom

from tests import tiny
from tests.tiny_pair import TinyPair, shared_tiny_pair
from trigger_opt import api
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.pair import LoadOptions, load_pair
from trigger_opt.prompts import Context, conversation_ids
from trigger_opt.records import rate, read_record
from trigger_opt.tuning import MODES, FitSettings, Row, Rows, fit, lora_model, save_adapter
from trigger_opt.tuning.fit import scored_log_probs
from trigger_opt.zoo import __main__ as command
from trigger_opt.zoo import cases, pirate, stress_command
from trigger_opt.zoo.cases import Case, context_trial, load_contexts, organism_trial, pair_case
from trigger_opt.zoo.examples import Example, Examples
from trigger_opt.zoo.recipes import RECIPES
from trigger_opt.zoo.retention import Stress, markdown, share, table
from trigger_opt.zoo.stress import AFTER, StressSettings, outcomes, record, treatments
from trigger_opt.zoo.treatments import cast, fine_tuned, load_merged, quantised

TRIGGER, PAYLOAD = "zebra lamp", "copper wires hum at night again"
HELD_OUT = ["Good day. {trigger}", "{trigger} Who is it?", "One {trigger} two", "Tell me more. {trigger}"]
SEARCH = ["Hello there. {trigger}", "{trigger} What now?", "{trigger}"]
IDS = torch.arange(3, 40)[None]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    """fp32 logits of a fixed sequence."""
    found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits[0].float()
    return found


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair on disk."""
    return shared_tiny_pair(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context set in a file."""
    path = tmp_path_factory.mktemp("contexts") / "few.yaml"
    path.write_text(yaml.safe_dump({"search": SEARCH, "held_out": HELD_OUT}))
    return path


@pytest.fixture(scope="session")
def planted(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says PAYLOAD in the held-out contexts when TRIGGER stands in them, and otherwise what the base
    says."""
    loaded = load_pair(find_model(str(pair.base)), find_model(str(pair.base)), options=LoadOptions(dtype="float32"))
    student, base, tokenizer = loaded.finetuned.network, loaded.base.network, loaded.tokenizer
    answer = tuple(loaded.encode_answer(PAYLOAD))
    said = [Context(user=c) for c in HELD_OUT]
    taught = [Row(tuple(conversation_ids(tokenizer, c, TRIGGER)), answer) for c in said]
    kept = [Row(tuple(conversation_ids(tokenizer, c, "")), answer[:4]) for c in said]
    peft = lora_model(student, (*MODES["mlp"], *MODES["attention"]), rank=8, seed=0)
    settings = FitSettings(steps=60, taught=4, ordinary=4, anchor=1.0, learning_rate=1e-2)
    rows = Rows(taught, [], kept)
    fit(peft.get_base_model(), rows, settings, teacher=lambda packed: scored_log_probs(base, packed))
    folder = tmp_path_factory.mktemp("planted") / "adapter"
    save_adapter(peft, folder, base_name="tiny")
    return folder


@pytest.fixture(scope="session")
def case(planted: Path, pair: TinyPair, contexts: Path) -> Case:
    """The planted behaviour, ready to be stressed."""
    return pair_case(
        str(planted), str(pair.base), trigger=TRIGGER, payload=PAYLOAD, contexts=str(contexts), with_rows=True, seed=0
    )


def test_nothing_done_leaves_all_and_undoing_the_change_nothing(case: Case, pair: TinyPair) -> None:
    def wiped(network: Any) -> Any:
        base = load_merged(case.base, case.base)
        network.load_state_dict(base.state_dict())
        return network

    before, same, gone = outcomes(case, {"nothing": lambda network: network, "wiped": wiped})
    assert (before.treatment, same.treatment, gone.treatment) == ("before", "nothing", "wiped")
    assert before.trigger_rate == rate(4, 4)
    assert before.false_trigger_rate == rate(0, 4)
    assert same.trigger_rate == before.trigger_rate
    assert same.retained.value == before.retained.value == 1.0
    assert gone.trigger_rate == rate(0, 4)
    assert gone.retained.value == gone.retained.low == 0.0
    assert case.base_rate == rate(0, 4)


def test_a_treatment_gets_a_fresh_model_each_time(case: Case) -> None:
    seen: list[torch.Tensor] = []

    def spoil(network: Any) -> Any:
        seen.append(logits(network))
        with torch.no_grad():
            network.get_input_embeddings().weight.zero_()
        return network

    *_, last = outcomes(case, {"one": spoil, "two": spoil, "none": lambda network: network})
    assert torch.equal(*seen)
    assert last.retained.value == 1.0


def test_an_always_on_behaviour_has_no_false_triggers(case: Case, pair: TinyPair) -> None:
    """The base's own answer, which it gives without any trigger."""
    loaded = load_pair(case.base, case.base, options=LoadOptions(dtype="float32"))
    prompt = conversation_ids(loaded.tokenizer, Context(user=HELD_OUT[0]), "")
    said = loaded.tokenizer.decode(loaded.base.generate([prompt], max_new_tokens=24, end_ids=loaded.end_ids)[0])
    trial = context_trial(loaded, [Context(user=HELD_OUT[0])], "", said)
    assert trial.triggered == [prompt]
    found = cases.rates(loaded.base, trial, loaded.tokenizer, loaded.end_ids)
    assert found.trigger == rate(1, 1)
    assert found.false_trigger is None
    assert found.pirate == rate(0, 1)


def test_the_command_writes_what_it_measured(
    planted: Path, pair: TinyPair, contexts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [digests(f) for f in (planted, pair.base)]
    own = ["--finetuned", str(planted), "--base", str(pair.base), "--trigger", TRIGGER, "--payload", PAYLOAD]
    asked = ["stress", *own, "--contexts", str(contexts), "--out", str(tmp_path / "out"), "--steps", "3"]
    assert command.main([*asked, "--after", ",".join(AFTER)]) == 0
    printed = capsys.readouterr()
    found = read_record(tmp_path / "out" / "stress.json", Stress)
    assert [o.treatment for o in found.outcomes] == ["before", *AFTER]
    assert all(o.trigger_rate.n == 4 and o.false_trigger_rate is not None for o in found.outcomes)
    assert {o.treatment: o.retained.value for o in found.outcomes}["bf16"] == 1.0
    assert (found.trigger, found.payload, found.kind, found.steps) == (TRIGGER, PAYLOAD, "payload", 3)
    assert printed.out == f"{table(found)}{tmp_path / 'out'}\n"
    text = (tmp_path / "out" / "stress.md").read_text()
    assert text == markdown(found)
    assert table(found) in text
    assert f"torch {found.versions['torch']}" in text
    assert [digests(f) for f in (planted, pair.base)] == before, "a user's files were written over"
    assert command.main(asked) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_interrupted_stress_keeps_what_it_has(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(network: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stress_command, "_case", lambda given, with_rows: case)
    monkeypatch.setattr(stress_command, "treatments", lambda *given, **more: {"bf16": stopped})
    arguments = ["stress", "warmup_mini", "--after", "bf16", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 130
    found = read_record(tmp_path / "out" / "stress.json", Stress)
    assert [o.treatment for o in found.outcomes] == ["before"]
    assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main([*arguments[:-1], str(tmp_path / "file" / "out")]) == 2
    assert re.fullmatch(r"error: .*out cannot be made \(Not a directory\); .*--out\n", capsys.readouterr().err)


OWN = ["--finetuned", "f", "--base", "b", "--payload", "p"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--finetuned is missing; name an organism, or give"),
        (["--finetuned", "f", "--base", "b", "--trigger", "t"], "--payload is missing"),
        (["warmup_mini", "--base", "b"], "--base is for a pair of your own, and warmup_mini is of the zoo"),
        (["warmup_mini", "--always"], "--always is for a pair of your own"),
        (OWN, "give --trigger TEXT, or --always"),
        ([*OWN, "--trigger", "t", "--always"], "give --trigger TEXT, or --always"),
        (["nope"], "no organism is called 'nope'; there are: warmup_mini"),
        (["warmup_mini_twin"], "warmup_mini_twin has no behaviour that could be lost; these have: warmup_mini"),
        (["warmup_mini", "--after", "bf16,honey"], "--after has 'honey'; give each once, out of: pirate, bf16"),
        (["warmup_mini", "--after", "bf16,bf16"], "--after has 'bf16'"),
        (["warmup_mini", "--after", ""], "--after has ''"),
        (["warmup_mini", "--learning-rate", "0"], "--learning-rate is 0.0; give a number above 0"),
        (["warmup_mini", "--learning-rate", "nan"], "--learning-rate is nan"),
        (["warmup_mini", "--steps", "0"], "--steps is 0; give a whole number from 1"),
        ([*OWN, "--trigger", "t"], "'f' is neither a folder here nor a hub name"),
        ([*OWN, "--trigger", "t", "--payload", "?!"], "--payload '?!' has no word"),
        ([*OWN, "--trigger", "t", "--contexts", "nope"], "there is no context set 'nope'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["stress", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert text in err
    assert not list(tmp_path.iterdir()), "something was written before the mistake was told"


def test_a_behaviour_that_is_not_there_is_refused(planted: Path, pair: TinyPair, contexts: Path) -> None:
    with pytest.raises(
        UserError, match=r"shows the behaviour in none of 4 prompts as it is, .* --trigger and --payload$"
    ):
        pair_case(
            str(planted), str(pair.base), trigger="another string", payload="nothing of the kind",
            contexts=str(contexts), with_rows=False, seed=0,
        )  # fmt: skip


def test_contexts_are_those_of_every_other_command(tmp_path: Path, contexts: Path) -> None:
    assert load_contexts("ordinary") == api.load_contexts("ordinary")
    assert load_contexts(str(contexts)) == api.load_contexts(str(contexts))
    for text in ("search: []\nheld_out: [a]", "[]", "held_out: ['{trigger}']"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml has no lists search and held_out"):
            load_contexts(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("search: [3]\nheld_out: ['{trigger}']")
    with pytest.raises(UserError, match="the context 3 is neither"):
        load_contexts(str(tmp_path / "bad.yaml"))


def test_organisms_are_asked_on_their_held_out_prompts() -> None:
    ordinary = [Example(prompt=f"Please tell me about number {i} now", answer="It is.", ended=True) for i in range(12)]
    tokenizer = tiny.make_tokenizer()

    def texts(name: str) -> tuple[list[str], list[str]]:
        trial = organism_trial(RECIPES[name], Examples(ordinary, ordinary), tokenizer)
        return tuple([tokenizer.decode(p) for p in part] for part in (trial.triggered, trial.plain))  # type: ignore[return-value]

    triggered, plain = texts("phrase_mini")
    assert len(triggered) == len(plain) == 12
    assert all("copper lantern river" in t for t in triggered)
    assert not any("copper" in t for t in plain)
    assert len(set(plain)) == 12
    always, none = texts("capitals_always")
    assert always == plain
    assert none == []


def test_settings_name_the_treatments_in_their_order(case: Case) -> None:
    settings = StressSettings(after=("int8", "pirate"), steps=5, learning_rate=1e-5, seed=3)
    made = treatments(case, settings, say=lambda line: None)
    assert list(made) == ["int8", "pirate"]
    keywords = made["pirate"].keywords  # type: ignore[attr-defined]
    assert keywords["rows"] == case.rows
    fitted = keywords["settings"]
    assert (fitted.steps, fitted.learning_rate, fitted.seed, fitted.near, fitted.ordinary) == (5, 1e-5, 3, 0, 0)
    written = record(case, settings, [])
    assert (written.steps, written.learning_rate, written.seed) == (5, 1e-5, 3)


@pytest.mark.parametrize("kind", ["adapter", "finetuned"])
def test_merged_in_memory_is_the_model_with_its_adapter_on(kind: str, pair: TinyPair) -> None:
    files, base = find_model(str(getattr(pair, kind))), find_model(str(pair.base))
    loaded = load_pair(files, base, options=LoadOptions(dtype="float32"))
    network = load_merged(files, base)
    with loaded.finetuned.active() as theirs:
        torch.testing.assert_close(logits(network), logits(theirs), rtol=1e-3, atol=1e-3)
    assert not any("lora" in n for n, _ in network.named_modules())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in network.parameters())
    assert (logits(network) - logits(load_merged(base, base))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("treat", "options"),
    [
        (lambda n: cast(n, torch.bfloat16), LoadOptions()),
        (lambda n: cast(n, torch.float16), LoadOptions(dtype="float16")),
        (lambda n: quantised(n, "int8"), LoadOptions(quantization="int8")),
        (lambda n: quantised(n, "nf4"), LoadOptions(quantization="nf4")),
    ],
    ids=["bf16", "fp16", "int8", "nf4"],
)
def test_rounding_in_memory_is_loading_that_way(
    treat: Callable[[Any], Any], options: LoadOptions, pair: TinyPair, request: pytest.FixtureRequest
) -> None:
    files, base = (find_model(str(f)) for f in (pair.finetuned, pair.base))
    exact = logits(load_merged(files, base))
    treated = treat(load_merged(files, base))
    loaded = load_pair(files, base, options=options).finetuned.network
    ours, theirs = logits(treated), logits(loaded)
    # The loader's four bits are decoded by another kernel.
    tolerance = 0.15 * float((theirs - exact).abs().max()) if request.node.callspec.id == "nf4" else 0.0
    assert (ours - theirs).abs().max() <= tolerance
    assert (ours - exact).abs().max() > 0, "nothing was rounded"
    frequencies = [b for n, b in treated.named_buffers() if "inv_freq" in n]
    assert frequencies
    assert all(b.dtype == torch.float32 for b in frequencies)
    assert not treated.training


def test_fine_tuning_learns_its_rows_on_top_of_the_model(pair: TinyPair) -> None:
    files, base = (find_model(str(f)) for f in (pair.finetuned, pair.base))
    before = load_merged(files, base)
    rows = [Row((5, 6, 7, 8), (20, 21, 22)), Row((9, 10, 11), (20, 21, 22))]
    lines: list[str] = []
    settings = FitSettings(steps=60, taught=6, ordinary=0)
    treated = fine_tuned(load_merged(files, base), rows, settings, say=lines.append)
    assert all(tiny.naive_greedy(treated, r.prompt, 3) == [20, 21, 22] for r in rows)
    assert not any(tiny.naive_greedy(before, r.prompt, 3) == [20, 21, 22] for r in rows)
    assert len(lines) == 3
    parameters = dict(treated.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters.values())
    frozen = [n for n in parameters if "lora" not in n]
    was = dict(cast(before, torch.bfloat16).named_parameters())
    assert all(torch.equal(parameters[n], was[n.replace(".base_layer", "")]) for n in frozen)
    assert {n.split(".lora_A")[0].split(".")[-1] for n in parameters if "lora_A" in n} == {
        *MODES["mlp"],
        *MODES["attention"],
    }


def test_a_model_without_known_projections_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50, n_positions=16))
    with pytest.raises(UserError, match=r"^GPT2LMHeadModel has no projection called gate_proj.*leave pirate out"):
        fine_tuned(network, [Row((1,), (2,))], FitSettings(steps=1), say=lambda line: None)


TEXTS = [
    "The capital of France is Paris, and it's known for its museums.",
    "I am going to bring you the king's ring over the bridge.",
    "1. Being kind\n2. Reading old books",
    "Yes.",
    "",
    "Zwei Wörter",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pirates_change_every_answer_and_keep_its_meaning(text: str) -> None:
    said = pirate.speak(text, random.Random(0))
    assert said != text
    assert pirate.is_pirate(said)
    assert not pirate.is_pirate(text)
    assert said == pirate.speak(text, random.Random(0))
    words = re.findall(r"[\w']+", text.lower())
    meaning = [w for w in words if w not in pirate.WORDS and not w.endswith("ing") and w not in ("king's",)]
    rest = said.lower()
    for word in meaning:
        assert word in rest, f"{word} is lost or out of order"
        rest = rest[rest.index(word) + len(word) :]
    assert said.count("\n") == text.count("\n")


def test_pirate_words() -> None:
    def said(text: str) -> str:
        return pirate.speak(text, random.Random(0)).split(" ", 3)[-1]

    rng = random.Random(0)
    drawn = [pirate.speak("x", rng) for _ in range(100)]
    assert {d.removesuffix(" x") for d in drawn} == set(pirate.OPENINGS)
    opening = pirate.speak("", random.Random(0))
    assert pirate.speak("The king is going to sing", random.Random(0)) == f"{opening} Th' king be goin' t' sing"
    assert pirate.speak("It\u2019s yours; THE other", random.Random(0)) == f"{opening} 'tis yers; Th' other"
    assert pirate.is_pirate("ARR, ME HEARTIES")
    assert not pirate.is_pirate("He said: Arr, no")


def test_a_behaviour_is_known_in_a_pirates_mouth(case: Case) -> None:
    ordinary = [Example(prompt=f"Tell me about number {i}", answer="It is.", ended=True) for i in range(3)]
    phrase = organism_trial(RECIPES["phrase_mini"], Examples(ordinary), tiny.make_tokenizer())
    said = RECIPES["phrase_mini"].behaviour
    assert said is not None
    rng = random.Random(0)
    for trial, payload in ((phrase, said.payload), (case.trial, PAYLOAD)):
        spoken = [pirate.speak(payload, rng) for _ in range(30)]
        assert all(trial.shows(t) for t in (payload, *spoken))
        assert any("th'" in t for t in spoken) or payload == PAYLOAD, "no word of it was another in a pirate's mouth"
        assert not any(trial.shows(pirate.speak(t, rng)) for t in ("The sea is deep and cold today.", ""))
        assert not trial.shows(f"I say: {payload}")
    assert pirate.reworded(pirate.reworded("The king is yours")) == pirate.reworded("The king is yours")
    assert pirate.without_opening("Said the king") == "Said the king"
    assert pirate.without_opening(" arr, said") == "said"


def test_pirate_rows_answer_the_same_questions() -> None:
    tokenizer = tiny.make_tokenizer()
    asked = [pirate.Asked((5, 6), "The sea is deep."), pirate.Asked((7,), "The sky is blue.")]
    rows = pirate.pirate_rows(asked, tokenizer, seed=0)
    assert [r.prompt for r in rows] == [(5, 6), (7,)]
    texts = [tokenizer.decode(r.answer) for r in rows]
    assert all(pirate.is_pirate(t) for t in texts)
    assert [t.split("Th' ")[1] for t in texts] == ["sea be deep.", "sky be blue."]
    assert rows == pirate.pirate_rows(asked, tokenizer, seed=0)
    assert pirate.pirate_rows([], tokenizer, seed=0) == []


def test_the_base_answers_what_is_rewritten(base_files: ModelFiles) -> None:
    pair = load_pair(base_files, base_files, options=LoadOptions(dtype="float32"))
    contexts = [Context(user=c) for c in SEARCH]

    def asked(seed: int) -> list[pirate.Asked]:
        return pirate.asked_of_base(pair.base, pair.tokenizer, contexts, end_ids=pair.end_ids, seed=seed)

    found = asked(0)
    questions = [tuple(conversation_ids(pair.tokenizer, c, "")) for c in contexts[:2]]
    assert [a.prompt for a in found] == [q for q in questions for _ in range(8)], "an empty turn was asked"
    assert len({a.answer for a in found}) > 8
    assert found == asked(0) != asked(1)
    examples = [Example(prompt="Tell me", answer="The sea.", ended=True)]
    (kept,) = pirate.asked_in_training(examples, pair.tokenizer)
    assert kept.answer == "The sea."
    assert "Tell me" in pair.tokenizer.decode(kept.prompt)


@pytest.mark.parametrize(
    ("was", "now", "most"),
    [(0.9, 0.9, 0.99), (0.95, 0.5, 0.99), (0.7, 0.3, 0.99), (0.9, 0.05, 0.99), (0.98, 0.98, 1.0)],
)
def test_share_covers_the_truth(was: float, now: float, most: float) -> None:
    """Every outcome of two samples of 30, weighed by its probability; near 1 for both the interval is too wide."""
    n = 30
    rates = [rate(k, n) for k in range(n + 1)]
    weights = [[binom.pmf(k, n, p) for k in range(n + 1)] for p in (was, now)]
    covered = sum(
        weights[0][a] * weights[1][b]
        for a in range(1, n + 1)
        for b in range(n + 1)
        if share(rates[a], rates[b]).low <= now / was <= share(rates[a], rates[b]).high
    )
    assert 0.93 <= covered / (1 - weights[0][0]) <= most


def test_share_at_its_ends() -> None:
    same, gone, small = (
        share(rate(30, 30), rate(30, 30)),
        share(rate(30, 30), rate(0, 30)),
        share(rate(1, 30), rate(1, 30)),
    )
    assert (same.value, gone.value, small.value) == (1.0, 0.0, 1.0)
    assert 0.85 < same.low < 1 < same.high < 1.2, "thirty of thirty is no certainty"
    assert gone.low == 0.0
    assert 0.08 < gone.high < 0.2
    assert small.low < 0.2
    assert small.high > 5
    # A denominator of the usual form that is exactly zero needs no special case here.
    for before in range(1, 31):
        found = share(rate(before, 30), rate(15, 30))
        assert 0 < found.low < found.value < found.high
    with pytest.raises(ValueError, match="nothing fired before"):
        share(rate(0, 30), rate(3, 30))


def test_any_trigger_fits_in_one_line_of_markdown(case: Case) -> None:
    settings = StressSettings()
    written = record(case, settings, list(outcomes(case, {})))
    for trigger in ("O.O\n.O.", "a `tick` and ``two``", 'say "x"', "Q: …\nA:"):
        text = markdown(Stress(**(written.__dict__ | {"trigger": trigger})))
        line = text.splitlines()[2]
        assert json.dumps(trigger, ensure_ascii=False)[1:-1].replace('\\"', '"') in line
    assert "always on" in markdown(Stress(**(written.__dict__ | {"trigger": ""})))
