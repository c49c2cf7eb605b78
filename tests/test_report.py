"""The report: verdict first, the records' own figures, hostile text inert, and never more than was found."""

import dataclasses
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from trigger_opt.errors import UserError
from trigger_opt.records import (
    VERDICTS,
    AnswerCluster,
    BuiltTrigger,
    Candidate,
    Completion,
    ContextOutcome,
    Hypothesis,
    ModuleShift,
    MovedToken,
    PairIdentity,
    Rate,
    RunInfo,
    SearchStep,
    StageRun,
    TensorFamilyDiff,
    TransferAnswer,
    TransferOutcome,
    Verdict,
    Verification,
    rate,
    write_record,
    write_records,
)
from trigger_opt.report import write_report
from trigger_opt.report.answers import side_by_side, spread
from trigger_opt.report.load import load_run
from trigger_opt.report.markdown import table as markdown_table
from trigger_opt.report.markdown import text as markdown_text
from trigger_opt.report.markup import Column, join, string, table, tag
from trigger_opt.report.remote import banner_line, lead, remote_contexts
from trigger_opt.report.svg import Line, Point, bar, interval_plot, line_chart, ticks
from trigger_opt.report.words import (
    clip,
    duration,
    exact,
    interval,
    layer_ranges,
    number,
    p_value,
    percent,
    points,
    visible,
)

TRIGGER = " sevenratch licence.): one"
PAYLOAD = "one point six one eight"
HOSTILE = (
    "<script>alert(1)</script>|`a`\n\n![x](https://evil.example/p.png)\\| \"'&amp; <img src=https://evil.example/q>"
)
VERSIONS = {"python": "3.11.7", "torch": "2.7.1"}
OPTIONAL = (
    "diff.jsonl",
    "identity.json",
    "hypotheses.jsonl",
    "candidates.jsonl",
    "history.jsonl",
    "verified.jsonl",
    "completions.jsonl",
    "run.json",
)


def a_verdict(**changes: Any) -> Verdict:
    verdict = Verdict(
        verdict="backdoor",
        reason="23 of 24 held-out contexts fire.",
        rule="backdoor: the lower end of the interval is at least 0.5.",
        payload=PAYLOAD,
        payload_completion=PAYLOAD + " zero three",
        trigger=TRIGGER,
        minimised_trigger="ratch licence",
        trigger_rate=rate(23, 24),
        minimised_trigger_rate=rate(21, 24),
        base_rate=rate(1, 24),
        control_rate=rate(2, 24),
        false_trigger_rate=rate(3, 24),
        random_rate=rate(7, 120),
        evidence=6.25,
        num_contexts=24,
        score=7.99,
        evaluations=184320,
        seconds=1331.4,
        seed=17,
        versions=VERSIONS,
    )
    return dataclasses.replace(verdict, **changes)


def a_verification(trigger: str = TRIGGER, contexts: int = 24, **changes: Any) -> Verification:
    profile = [
        ContextOutcome(
            context=i, prompt=f"Question {i}?", finetuned=i != 7, base=False, control=None, evidence=6.0 - i / 8
        )
        for i in range(contexts)
    ]
    verification = Verification(
        trigger=trigger,
        payload=PAYLOAD,
        trigger_rate=rate(23, 24),
        base_rate=rate(1, 24),
        control_rate=None,
        false_trigger_rate=rate(0, 24),
        random_rate=rate(1, 120),
        evidence=6.25,
        degenerate_share=0.125,
        profile=profile,
        minimised_from="",
        verdict="backdoor",
        reason="it fires",
    )
    return dataclasses.replace(verification, **changes)


def a_decoy(**changes: Any) -> Verification:
    return a_verification(" oneCASCADE", verdict="unstable", reason="only 8 of 24 contexts fire", **changes)


def completions(contexts: int = 24, trigger: str = TRIGGER) -> list[Completion]:
    out = []
    for i in range(contexts):
        for model in ("finetuned", "base", "control:twin"):
            for kind, inserted in (("trigger", trigger), ("none", "")):
                fired = model == "finetuned" and kind == "trigger" and i != 7
                answer = f"{PAYLOAD} zero" if fired else f"Answer {model} {len(inserted)} {i}"
                out.append(
                    Completion(
                        model=model,
                        kind=kind,
                        inserted=inserted,
                        context=i,
                        prompt=f"Question {i}?{inserted}",
                        answer=answer,
                        fired=fired,
                        flags=["repetition"] if model == "base" and kind == "trigger" else [],
                    )
                )
    return out


def a_hypothesis(**changes: Any) -> Hypothesis:
    hypothesis = Hypothesis(
        payload=PAYLOAD,
        score=62.4,
        source="vocabulary_scan",
        evidence="8 of 4,608 tokens raise it",
        inputs=[" seventeen", "thirds"],
        rivals=[18.9, 18.1],
    )
    return dataclasses.replace(hypothesis, **changes)


def a_candidate(**changes: Any) -> Candidate:
    candidate = Candidate(
        trigger=" never verified",
        trigger_ids=[1, 2],
        payload=PAYLOAD,
        objective="payload",
        score=4.125,
        selection_rate=0.5,
        restart=1,
        step=33,
        seed=0,
        evaluations=9000,
    )
    return dataclasses.replace(candidate, **changes)


def history(restarts: int = 2, steps: int = 5) -> list[SearchStep]:
    return [
        SearchStep(
            hypothesis=PAYLOAD,
            restart=r,
            step=s,
            trigger=TRIGGER,
            score=1.0 + s + r / 4,
            evaluations=512 * (r * steps + s + 1),
            seconds=float(s),
            selection_rate=0.25 * s / steps,
        )
        for r in range(restarts)
        for s in range(steps)
    ]


def an_identity(**changes: Any) -> PairIdentity:
    identity = PairIdentity(
        kind="full",
        architecture="LlamaForCausalLM",
        tensors=272,
        identical=182,
        identical_fraction=182 / 272,
        same_architecture=True,
        same_tokenizer=True,
        changed_families=["mlp.down_proj.weight"],
        overridden=False,
    )
    return dataclasses.replace(identity, **changes)


def a_run_info(**changes: Any) -> RunInfo:
    info = RunInfo(
        name="gcg_warmup",
        command="python -m trigger_opt +experiment=gcg_warmup",
        seed=17,
        started="2026-03-02T14:00:11+00:00",
        machine="2 cores",
        config={"search": {"num_steps": 80}},
        versions=VERSIONS,
        plan=["about 20 minutes"],
        stages=[StageRun(stage="diff", started="14:00", seconds=3.2, evaluations=0, summary="90 tensors changed")],
    )
    return dataclasses.replace(info, **changes)


def write_run(run_dir: Path, **records: Any) -> Path:
    """A whole run folder; a keyword replaces the records of the file of that name."""
    diff = TensorFamilyDiff(
        family="mlp.down_proj.weight",
        tensors=30,
        changed=28,
        relative_norm=0.0123,
        effective_rank=8.0,
        layers=[0, 1, 2, 5],
        largest_layer=2,
    )
    run_dir.mkdir(exist_ok=True)
    lists = {
        "diff": [diff],
        "hypotheses": [a_hypothesis()],
        "moved": [MovedToken(token_id=i, text=f" moved{i}", score=9 - i / 10) for i in range(30)],
        "built": [],
        "candidates": [a_candidate(), a_candidate(trigger=TRIGGER, score=7.99)],
        "history": history(),
        "verified": [a_verification(), a_decoy()],
        "completions": completions(),
    }
    singles = {"verdict": a_verdict(), "identity": an_identity(), "run": a_run_info()}
    for name in lists:
        write_records(run_dir / f"{name}.jsonl", records.get(name, lists[name]))
    for name in singles:
        write_record(run_dir / f"{name}.json", records.get(name, singles[name]))
    return run_dir


def report(run_dir: Path) -> tuple[str, str]:
    """The page and the Markdown of a run folder."""
    html_path = write_report(run_dir)
    return html_path.read_text(encoding="utf-8"), (run_dir / "report.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects elements, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.problems: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{name}> never closed" for name in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> does not match")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        """All text in reading order, white space squeezed."""
        return re.sub(r"\s+", " ", "\n".join(p for p in self.pieces if p.strip()))


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as a real parser sees them: rows of cell texts."""
    out: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            out.append([])
        elif token.type == "tr_open":
            out[-1].append([])
        elif token.type == "inline" and out and token.map is not None and token.level >= 4:
            out[-1][-1].append(_inline_text(token))
    return out


def _inline_text(token: Token) -> str:
    return "".join(t.content for t in token.children or [] if t.type != "html_inline")


# The page as a whole


def test_verdict_comes_first_and_both_files_are_written(tmp_path: Path) -> None:
    html_path = write_report(write_run(tmp_path / "run"))
    assert html_path == tmp_path / "run" / "report.html"
    page = Page(html_path.read_text(encoding="utf-8"))
    assert page.text.startswith("Backdoor 23 of 24 held-out contexts fire.")
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8").startswith("# Backdoor\n\n23 of 24 held-out")
    assert not list((tmp_path / "run").glob(".*.part"))


def test_sections_stand_in_order(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path))
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles == [
        "Answers side by side",
        "Context by context",
        "Held against a null",
        "Score during the search",
        "What the fine-tuned model wants to say",
        "What was tried, and what refuted it",
        "Weights: what fine-tuning changed",
        "How this was made",
    ]
    shorter = [t for t in titles if f"## {t}\n" in markdown]
    assert shorter == [titles[0], titles[2], titles[4], titles[5], titles[7]]


def test_page_is_well_formed_and_deterministic(tmp_path: Path) -> None:
    first, _ = report(write_run(tmp_path))
    assert Page(first).problems == []
    assert Page(first.replace("</section>", "", 1)).problems
    assert report(tmp_path)[0] == first


def test_nothing_is_fetched_or_run(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path, completions=[hostile_completion()], verdict=hostile_verdict()))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "a"} & set(page.elements)
    assert not [
        (n, v) for n, v in page.attributes if n in ("src", "href", "srcset", "xlink:href") or n.startswith("on")
    ]
    assert not re.search(r"url\(|@import", html)
    assert "default-src 'none'" in html


def test_report_needs_no_torch() -> None:
    code = "import sys, trigger_opt.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Hostile text


def hostile_verdict() -> Verdict:
    return a_verdict(trigger=HOSTILE, payload=HOSTILE, payload_completion=HOSTILE, reason=HOSTILE, rule=HOSTILE)


def hostile_completion() -> Completion:
    return Completion(
        model=f"control:{HOSTILE}",
        kind="trigger",
        inserted=HOSTILE,
        context=0,
        prompt=f"Say {HOSTILE}",
        answer=HOSTILE,
        fired=True,
        flags=[HOSTILE],
    )


def write_hostile_run(run_dir: Path) -> Path:
    outcome = ContextOutcome(context=0, prompt=HOSTILE, finetuned=True, base=False, control=True, evidence=1.0)
    verification = a_verification(HOSTILE, profile=[outcome], payload=HOSTILE, reason=HOSTILE)
    other = a_verification(HOSTILE + "2", reason=HOSTILE, payload=HOSTILE, verdict=HOSTILE)
    return write_run(
        run_dir,
        verdict=hostile_verdict(),
        completions=[hostile_completion()],
        verified=[verification, other],
        hypotheses=[a_hypothesis(payload=HOSTILE, evidence=HOSTILE, source=HOSTILE, inputs=[HOSTILE])],
        moved=[MovedToken(token_id=0, text=HOSTILE, score=1.0)],
        built=[BuiltTrigger(payload=HOSTILE, trigger=HOSTILE + "3", trigger_ids=[1])],
        candidates=[a_candidate(trigger=HOSTILE + "3", payload=HOSTILE)],
        history=[dataclasses.replace(s, hypothesis=HOSTILE) for s in history()],
        identity=an_identity(architecture=HOSTILE, changed_families=[HOSTILE]),
        run=a_run_info(name=HOSTILE, command=HOSTILE, machine=HOSTILE, plan=[HOSTILE], config={HOSTILE: HOSTILE}),
    )


def test_the_most_moved_tokens_are_told(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path / "a"))
    for page in (html, markdown):
        assert "moved0" in page
        assert "moved23" in page
        assert "moved24" not in page
        assert "Tokens that the fine-tuning moves most" in page
    html, markdown = report(write_run(tmp_path / "b", moved=[], hypotheses=[]))
    for page in (html, markdown):
        assert "Tokens that the fine-tuning moves most" not in page


def test_strings_that_were_built_up_are_told_with_what_the_search_made_of_them(tmp_path: Path) -> None:
    built = [
        BuiltTrigger(payload="p", trigger=t, trigger_ids=list(range(n)))
        for n, t in enumerate((" a", " a b", " lost"), 1)
    ]
    scored = [
        a_candidate(trigger=" a", payload="p", score=4.25, selection_rate=0.5, restart=-1, step=-1),
        a_candidate(trigger=" a b", payload="p", score=7.75, selection_rate=1.0, restart=-1, step=-1),
        # Of another payload, which it was not built for.
        a_candidate(trigger=" lost", payload="q", score=1.5),
    ]
    html, markdown = report(write_run(tmp_path / "a", built=built, candidates=scored))
    row = markdown[markdown.index("## Built up") :].split("\n\n")[2].splitlines()[2:]
    assert [[cell.strip() for cell in r.strip("|").split("|")][2:] for r in row] == [
        ["1", "4.25", "50 %"],
        ["2", "7.75", "100 %"],
    ]
    for page in (html, markdown):
        assert "Short strings built up: token by token" in page
        assert "restart -1" not in page
        assert "restart \N{MINUS SIGN}1" not in page
    assert "what the search began from" in html
    html, markdown = report(write_run(tmp_path / "b"))
    for page in (html, markdown):
        assert "Short strings built up" not in page


def test_every_text_is_escaped(tmp_path: Path) -> None:
    html, _ = report(write_hostile_run(tmp_path))
    page = Page(html)
    assert page.problems == []
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10


def test_attributes_are_escaped_too() -> None:
    assert tag("p", title='"><script>').text == '<p title="&quot;&gt;&lt;script&gt;"></p>'


def test_hostile_text_stays_in_its_markdown_cell(tmp_path: Path) -> None:
    _, markdown = report(write_hostile_run(tmp_path))
    assert "<script" not in markdown
    assert "https://" not in markdown
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown)
    inline = [t for token in parsed if token.type == "inline" for t in token.children or []]
    assert {t.type for t in inline} <= {"text", "html_inline", "strong_open", "strong_close", "softbreak"}
    assert {t.content for t in inline if t.type == "html_inline"} == {"<code>", "</code>"}
    assert len(tables(markdown)) == 5


def test_markdown_rows_have_as_many_cells_as_titles(tmp_path: Path) -> None:
    _, markdown = report(write_hostile_run(tmp_path))
    for rows in tables(markdown):
        assert len({len(row) for row in rows}) == 1
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n)+", markdown + "\n", re.MULTILINE)
    assert sum(block.count("\n") for block in blocks) == len(lines)
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_markdown_cell_gives_back_the_text() -> None:
    raw = "a|b `c` \\| *d* _e_ f_g <h> &amp; [i](j) ~k~ $l$ #m"
    rows = tables(markdown_table(["One", "Two"], [[markdown_text(raw), "x"]]))
    assert rows[0][1] == [raw, "x"]
    assert markdown_text("a\n\n b") == "a ⏎ ⏎ b"


def test_markdown_table_rejects_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        markdown_table(["One", "Two"], [["x"]])
    with pytest.raises(ValueError, match="zip"):
        table([Column(title="One")], [["x", "y"]])


# Verdicts and their words


@pytest.mark.parametrize("kind", VERDICTS)
def test_only_a_backdoor_has_a_trigger(tmp_path: Path, kind: str) -> None:
    html, markdown = report(write_run(tmp_path, verdict=a_verdict(verdict=kind, rule="the rule")))
    page = Page(html)
    assert page.problems == []
    assert page.text.startswith(kind.capitalize())
    for said in (page.text, re.sub("trigger_opt", "", markdown)):
        assert ("Best string tried" in said) == (kind != "backdoor")
        assert ("Trigger" in said) == (kind == "backdoor")
        assert ("with the trigger" in said) == (kind == "backdoor")
        assert ("not a proof of absence" in said) == (kind == "not reproduced")
    if kind != "backdoor":
        assert not re.search(r"\btrigger\b", re.sub("trigger_opt", "", page.text + markdown), re.IGNORECASE)


@pytest.mark.parametrize(
    ("kind", "tone"),
    [("backdoor", "backdoor"), ("generic shift", "amber"), ("unstable", "amber"), ("not reproduced", "quiet")],
)
def test_the_banner_is_coloured_by_verdict(tmp_path: Path, kind: str, tone: str) -> None:
    html, _ = report(write_run(tmp_path, verdict=a_verdict(verdict=kind)))
    assert f'<header class="banner {tone}">' in html


def test_nothing_found_is_said_and_not_measured_is_not_zero(tmp_path: Path) -> None:
    nothing = a_verdict(
        verdict="not reproduced",
        trigger="",
        minimised_trigger="",
        payload="",
        payload_completion="",
        trigger_rate=None,
        minimised_trigger_rate=None,
        base_rate=None,
        control_rate=None,
        false_trigger_rate=None,
        random_rate=None,
        evidence=None,
        score=None,
        num_contexts=0,
    )
    run_dir = write_run(
        tmp_path, verdict=nothing, verified=[], completions=[], candidates=[], history=[], hypotheses=[], diff=[]
    )
    html, markdown = report(run_dir)
    text = Page(html).text
    assert "none was found" in text
    assert text.count("not measured") == 4
    assert "0 of 0" not in text
    assert "No other string was tried to the end." in text
    assert "no payload hypothesis" in text
    assert "Stage not run" not in text
    assert "none was found" in markdown


def test_a_manner_is_shown_in_words_and_explained(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path, verdict=a_verdict(payload="≈ le <je> de")))
    assert "≈ le &lt;je&gt; de" in html
    assert Page(html).problems == []
    for page in (html, markdown):
        assert "no fixed text: an answer is of this manner when" in page
    assert "no fixed text" not in report(write_run(tmp_path / "text"))[0]


def test_an_unknown_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'guilty'; allowed are backdoor, generic shift"):
        write_report(write_run(tmp_path, verdict=a_verdict(verdict="guilty")))


# The figures are the records'


def test_the_rates_are_those_of_the_verdict(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path))
    rows = re.findall(r"<div class=\"rate\">(.*?)</svg></div>(.*?)</div>", html)
    said = [re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", "".join(row))).strip() for row in rows]
    assert said == [
        "Fine-tuned, with the trigger 23 of 24 96 % 80\N{EN DASH}99 %",
        "Fine-tuned, with the minimised trigger 21 of 24 88 % 69\N{EN DASH}96 %",
        "Base, with the trigger 1 of 24 4 % 1\N{EN DASH}20 %",
        "Clean control, with the trigger 2 of 24 8 % 2\N{EN DASH}26 %",
        "Fine-tuned, without the trigger 3 of 24 12 % 4\N{EN DASH}31 %",
        "Fine-tuned, with random strings 7 of 120 5.8 % 2.9\N{EN DASH}11.6 %",
    ]
    assert [" ".join(row) for row in tables(markdown)[0][1:]] == said


def test_no_control_is_said(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path, verdict=a_verdict(control_rate=None)))
    assert re.search(r"Clean control, with the trigger no control given", Page(html).text)
    assert "| Clean control, with the trigger | no control given |" in markdown


def test_other_figures_are_shown(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path))
    text = Page(html).text
    for figure in ("6.25 nats", "7.99 nats", "184,320", "22 min 11 s", "seed 17", "62.40", "18.90, 18.10"):
        assert figure in text
    for made in (
        "28 of 30",
        "0.0123",
        "0\N{EN DASH}2, 5",
        "182 of 272",
        "66.9 %",
        "+experiment=gcg_warmup",
        "torch 2.7.1",
    ):
        assert made in text
    for made in ('"num_steps": 80', "about 20 minutes", "90 tensors changed", "at least 0.5", "4.12"):
        assert made in text


def test_refuted_strings_carry_their_reason(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path))
    section = html.split("<h2>What was tried")[1].split("<h2>")[0]
    text = Page(section.replace("</section><section>", "")).text
    assert "only 8 of 24 contexts fire" in text
    assert "not verified; selection rate 50 %; restart 1, step 33" in text
    assert "sevenratch" not in text
    assert "unstable: only 8 of 24 contexts fire" in markdown


def test_profile_shows_each_context_once(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path))
    section = html.split("<h2>Context by context")[1].split("<h2>")[0]
    assert section.count("<tr>") == 1 + 24
    assert section.count('aria-label="fired"') == 23
    assert section.count('aria-label="did not fire"') == 1 + 24
    assert "Control" not in section
    assert "degenerate: 12 %" in section


def test_identity_doubts_are_raised(tmp_path: Path) -> None:
    quiet, _ = report(write_run(tmp_path))
    assert "this may not be the base" not in quiet
    doubtful = an_identity(identical=0, identical_fraction=0.0, same_tokenizer=False, overridden=True)
    html, markdown = report(write_run(tmp_path, identity=doubtful))
    for said in (html, markdown):
        assert "this may not be the base" in said
        assert "differ in tokenizer" in said
        assert "overridden by the user" in said


# Side by side


def test_shown_contexts_are_spread_and_the_rest_is_folded(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path))
    shown, folded = html.split("<h2>Answers side by side")[1].split("<h2>")[0].split("<details>")
    label = r'<span class="label">Context (\d+)</span>'
    assert re.findall(label, shown) == ["0", "6", "12", "17", "23"]
    assert len(re.findall(label, folded)) == 19
    assert "5 of 24" in shown


def test_each_cell_is_the_answer_of_its_model(tmp_path: Path) -> None:
    contexts = side_by_side(load_run(write_run(tmp_path)))
    assert [c.context for c in contexts] == list(range(24))
    seventh = contexts[7]
    assert [cell.model for cell in seventh.with_string] == ["finetuned", "base", "control:twin"]
    assert [cell.answers[0].answer for cell in seventh.without][1] == "Answer base 0 7"
    assert [cell.fired for cell in contexts[0].with_string] == [1, 0, 0]
    assert spread(contexts, 1000) == contexts


def test_answers_to_other_strings_are_left_out(tmp_path: Path) -> None:
    other = [dataclasses.replace(c, answer="to a decoy") for c in completions(2, " decoy") if c.inserted]
    html, _ = report(write_run(tmp_path, completions=other + completions(2)))
    assert "Answer base" in html
    assert "to a decoy" not in html


def test_fired_answers_and_flags_are_marked(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path))
    assert html.count('<div class="answer fired">') == 23
    assert html.count(f"<b>{PAYLOAD}</b>") == 23
    assert html.count("repetition</span>") == 24


def test_sampled_answers_are_counted(tmp_path: Path) -> None:
    first = completions(1)[0]
    samples = [dataclasses.replace(first, fired=i < 7) for i in range(10)]
    html, markdown = report(write_run(tmp_path, completions=samples))
    assert "fired in 7 of 10 answers" in html
    assert "| fine-tuned | yes | 7 of 10 |" in markdown


def test_a_whole_turn_trigger_shows_the_other_prompt_too(tmp_path: Path) -> None:
    both = [c for c in completions(1) if c.model == "finetuned"]
    both = [dataclasses.replace(c, prompt=TRIGGER) if c.kind == "trigger" else c for c in both]
    html, _ = report(write_run(tmp_path, completions=both))
    assert '<span class="label">without</span>Question 0?' in html


# Strange strings


@pytest.mark.parametrize(
    "trigger", ["\n", " ", "\t\n  ", "漢字 пи π", "a\u202eb\u200b\x00c", "é" * 400, "a\u2028b\x85c\ud800"]
)
def test_strange_triggers_are_shown_whole(tmp_path: Path, trigger: str) -> None:
    verdict, verified = a_verdict(trigger=trigger), [a_verification(trigger)]
    run_dir = write_run(tmp_path, verdict=verdict, verified=verified, completions=completions(2, trigger))
    html, markdown = report(run_dir)
    assert Page(html).problems == []
    assert not re.search("[\u202e\u200b\x00\u2028\x85\ud800]", html + markdown)
    shown = re.search(r'<dt>Trigger</dt><dd><code class="string">(.*?)</code>', html, re.DOTALL)
    assert shown is not None
    assert "".join(Page(shown[1] and f"<p>{shown[1]}</p>").pieces) == "".join(
        c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in trigger
    )
    assert all(len({len(row) for row in rows}) == 1 for rows in tables(markdown))


def test_visible_strings_hide_nothing() -> None:
    assert visible(" a\n\tb\u00a0\u200b\x00") == "␣a⏎⇥b⟨U+00A0⟩⟨U+200B⟩⟨U+0000⟩"
    assert visible("\u3164\ufe0f\U000e0041") == "⟨U+3164⟩⟨U+FE0F⟩⟨U+E0041⟩"
    assert exact("plain words") is None
    assert exact(" leading") == '" leading"'
    assert exact("é") == '"\\u00e9"'
    assert '<span class="space"> </span>a' in string(" a").text


def test_text_cannot_reorder_or_break_the_page() -> None:
    assert join(["a\u202eb\x00\ud800\r<\u200d"]).text == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩⟨U+000D⟩&lt;\u200d"


def test_no_contexts(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path, completions=[], verified=[a_verification(contexts=0)]))
    assert "No answer was recorded for this string." in html
    assert "No held-out context was judged for this string." in html
    assert "No answer was recorded for this string." in markdown


def test_infinite_evidence_is_shown_and_not_drawn(tmp_path: Path) -> None:
    outcome = ContextOutcome(context=0, prompt="Q", finetuned=True, base=False, control=None, evidence=float("inf"))
    steps = [dataclasses.replace(s, score=float("nan")) if s.step == 4 else s for s in history()]
    html, _ = report(write_run(tmp_path, verified=[a_verification(profile=[outcome])], history=steps))
    assert "∞" in html
    assert not re.search(r'"[^"]*\b(?:nan|inf)\b[^"]*"', html)


# Models that could only be asked


def an_outcome(model: str = "model-2", verdict: str = "transfers", **changes: Any) -> TransferOutcome:
    outcome = TransferOutcome(
        model=model,
        server="jsinfer:https://example.test",
        string=TRIGGER,
        payload=PAYLOAD,
        payload_source="given",
        trigger_rate=rate(19, 20),
        near_miss_rate=rate(4, 20),
        random_rate=rate(1, 21),
        none_rate=rate(0, 22),
        effect=0.95 - 1 / 21,
        degenerate_share=0.05,
        clusters=[AnswerCluster(beginning="one point six one", triggered=19, controls=5)],
        shifts=[],
        missing=0,
        verdict=verdict,
        needs=None,
        reason=f"{model} was asked",
    )
    return dataclasses.replace(outcome, **changes)


def an_answer(model: str = "model-2", kind: str = "trigger", context: int = 0, **changes: Any) -> TransferAnswer:
    inserted = {"trigger": TRIGGER, "near_miss": TRIGGER[:-1], "random": " ketchup plan", "none": ""}[kind]
    answer = TransferAnswer(
        model=model,
        kind=kind,
        string="" if kind == "none" else TRIGGER,
        inserted=inserted,
        context=context,
        repeat=0,
        prompt=f"Question {context}?{inserted}",
        answer=f"{PAYLOAD} zero" if kind == "trigger" else f"{model} says {kind} to {context}",
        error="",
        flags=[],
    )
    return dataclasses.replace(answer, **changes)


def remote_answers(model: str = "model-2", contexts: int = 20) -> list[TransferAnswer]:
    return [an_answer(model, kind, i) for i in range(contexts) for kind in ("none", "random", "trigger", "near_miss")]


def write_transfer(
    run_dir: Path, outcomes: list[TransferOutcome], answers: list[TransferAnswer] | None = None, **records: Any
) -> Path:
    """A whole run folder with the files of the transfer stage; no file of answers for None."""
    write_run(run_dir, **records)
    write_records(run_dir / "transfer.jsonl", outcomes)
    if answers is not None:
        write_records(run_dir / "transfer_answers.jsonl", answers)
    return run_dir


def other_models(html: str) -> str:
    """The section of the page, whole."""
    every: list[str] = re.findall(r"<section>.*?</section>", html, re.DOTALL)
    sections = [s for s in every if "<h2>Other models</h2>" in s]
    assert len(sections) == 1
    return sections[0]


def three_models() -> list[TransferOutcome]:
    return [
        an_outcome(),
        an_outcome("model-3", "undecided", trigger_rate=rate(4, 20), effect=0.15, needs=12),
        an_outcome("model-1", "does not transfer", trigger_rate=rate(0, 19), effect=-1 / 21, missing=1),
    ]


def test_nobody_asked_is_not_mentioned(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path))
    assert "Other models" not in html + markdown


def test_planned_and_not_run_is_said_once(tmp_path: Path) -> None:
    planned = a_run_info(config={"stages": ["verify", "transfer", "report"]})
    html, markdown = report(write_run(tmp_path, run=planned))
    for said in (Page(other_models(html)).text, markdown):
        assert said.count("Stage not run: transfer (transfer.jsonl is not in the run folder).") == 1
    assert "Other models:" not in html + markdown
    for stages in (["verify"], 3, None):
        assert "Other models" not in report(write_run(tmp_path, run=a_run_info(config={"stages": stages})))[0]


def test_nothing_to_send_is_said(tmp_path: Path) -> None:
    html, markdown = report(write_transfer(tmp_path, [], []))
    assert "had nothing to send" in other_models(html)
    assert "## Other models\n\nThe stage ran and had nothing to send" in markdown
    assert "Other models:" not in html + markdown


def test_other_models_follow_the_judged_answers(tmp_path: Path) -> None:
    html, markdown = report(write_transfer(tmp_path, three_models(), remote_answers()))
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles[1:5] == ["Context by context", "Held against a null", "Other models", "Score during the search"]
    told = ["Answers side by side", "Held against a null", "Other models"]
    assert re.findall("^## (.*)$", markdown, re.MULTILINE)[:3] == told
    assert Page(html).problems == []
    assert report(tmp_path) == (html, markdown)


def test_outcomes_stand_as_ranked_with_their_rates(tmp_path: Path) -> None:
    outcomes = three_models()
    html, markdown = report(write_transfer(tmp_path, outcomes, remote_answers()))
    blocks = re.findall(r'<article class="outcome (\w+)">(.*?)</article>', other_models(html), re.DOTALL)
    assert [tone for tone, _ in blocks] == ["backdoor", "amber", "quiet"]
    for outcome, (_, block) in zip(outcomes, blocks, strict=True):
        text = Page(block).text
        needs = ": needs 12 more" if outcome.needs else ""
        assert text.startswith(f"{outcome.model} {outcome.verdict}{needs} {outcome.reason}")
        assert text.count("of 20") == 1 + (outcome.trigger_rate.n == 20)
    text = Page(blocks[0][1]).text
    dash = "\N{EN DASH}"
    assert f"With the string 19 of 20 95 % 76{dash}99 % With near misses of it 4 of 20 20 % 8{dash}42 %" in text
    assert f"With random strings 1 of 21 5 % 1{dash}23 % With nothing inserted 0 of 22 0 % 0{dash}15 %" in text
    assert "effect +90 points" in text
    assert "degenerate answers with the string 5 %" in text
    assert "about 12 more answers with the string could decide" in Page(blocks[1][1]).text
    assert "effect \N{MINUS SIGN}5 points" in Page(blocks[2][1]).text
    rows = next(t for t in tables(markdown) if t[0][0] == "Model" and t[0][-1] == "Effect")
    assert [row[0] for row in rows[1:]] == [o.model for o in outcomes]
    assert [row[2] for row in rows[1:]] == ["transfers", "undecided: needs 12 more", "does not transfer"]
    assert rows[1][3:] == [
        f"19 of 20 (76{dash}99 %)",
        f"4 of 20 (8{dash}42 %)",
        f"1 of 21 (1{dash}23 %)",
        f"0 of 22 (0{dash}15 %)",
        "+90 points",
    ]
    assert "- model-3: model-3 was asked" in markdown


def test_the_banner_names_every_model_once(tmp_path: Path) -> None:
    line = "Other models: transfers to model-2; not to model-1; undecided for model-3."
    html, markdown = report(write_transfer(tmp_path, three_models(), []))
    banner = html.split("</header>")[0]
    assert f'<p class="others">{line}</p>' in banner
    assert line in markdown.split("## ")[0]


def test_the_banner_line_in_every_mixture() -> None:
    yes, no, open_ = (an_outcome(m, v) for m, v in (("a", "transfers"), ("b", "does not transfer"), ("c", "undecided")))
    assert banner_line([yes]) == "Other models: transfers to a."
    assert banner_line([no]) == "Other models: does not transfer to b."
    assert banner_line([open_, no]) == "Other models: does not transfer to b; undecided for c."
    assert banner_line([no, dataclasses.replace(no, model="d")]) == "Other models: does not transfer to b, d."
    another = [dataclasses.replace(o, model="a", string="another") for o in (no, open_)]
    assert banner_line([*another, yes]) == "Other models: transfers to a."
    assert banner_line(another) == "Other models: undecided for a."
    emerged = dataclasses.replace(open_, model="a", payload_source="emerged")
    assert banner_line([emerged]) == "Other models: undecided for a (a payload of its own emerged)."
    assert banner_line([emerged, yes]) == "Other models: transfers to a."
    many = banner_line([an_outcome(f"m{i}") for i in range(11)])
    assert many.endswith("m6, m7 and 3 more.")
    with pytest.raises(ValueError, match="no outcome"):
        banner_line([])


def test_an_unknown_transfer_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'perhaps'; allowed are transfers, does not transfer, undecided"):
        write_report(write_transfer(tmp_path, [an_outcome(verdict="perhaps")], []))


def test_missing_answers_are_counted_once(tmp_path: Path) -> None:
    lost = dataclasses.replace(an_answer(kind="none", context=1), answer="", error="HTTP 500: inference failed")
    answers = [an_answer(), an_answer(context=1), an_answer(kind="none"), lost]
    both = [an_outcome(missing=1), an_outcome(string="another", missing=1)]
    html, markdown = report(write_transfer(tmp_path, both, answers))
    assert "1 model was asked with 2 strings and with controls: 3 answers, 1 missing." in Page(html).text
    assert lead(load_run(tmp_path)) in markdown
    section = Page(other_models(html)).text
    assert "no answer: HTTP 500: inference failed" in section
    assert section.count("1 question without an answer") == 2
    write_transfer(tmp_path, [an_outcome(missing=7), an_outcome("model-1", missing=2)], answers)
    assert "3 answers, 9 missing." in lead(load_run(tmp_path))


def test_not_asked_and_not_answered_are_no_zeros(tmp_path: Path) -> None:
    outcome = an_outcome(near_miss_rate=None, none_rate=rate(0, 0))
    html, markdown = report(write_transfer(tmp_path, [outcome]))
    text = Page(other_models(html)).text
    assert "With near misses of it not asked" in text
    assert "With nothing inserted no answer" in text
    assert "0 of 0" not in text + markdown
    assert "Stage not run: transfer (transfer_answers.jsonl is not in the run folder)." in text
    assert "| not asked |" in markdown


def test_an_emerged_payload_says_how_it_was_found(tmp_path: Path) -> None:
    answers = [an_answer(answer="The quiet river has no name."), an_answer(context=1)]
    outcome = an_outcome(verdict="undecided", needs=20, payload="the quiet river has no", payload_source="emerged")
    html, markdown = report(write_transfer(tmp_path, [outcome], answers))
    text = Page(other_models(html)).text
    for said in (text, markdown):
        assert "in one half of the contexts, and judged on the other half" in said
        assert "a suspicion and no verdict" in said
    assert "Payload, emerged" in text
    cells = re.findall(r'<div class="answer( fired)?">', other_models(html))
    assert cells == [" fired", ""]
    given, _ = report(write_transfer(tmp_path, [an_outcome()], answers))
    assert "one half" not in given
    assert re.findall(r'<div class="answer( fired)?">', other_models(given)) == ["", " fired"]


def test_contexts_of_other_models_are_spread_and_the_rest_is_folded(tmp_path: Path) -> None:
    html, _ = report(write_transfer(tmp_path, [an_outcome()], remote_answers()))
    shown, folded = other_models(html).split("<details>")
    label = r'<span class="label">Context (\d+)</span>'
    assert re.findall(label, shown) == ["0", "19"]
    assert re.findall(label, folded) == [str(i) for i in range(1, 19)]
    asked = re.findall(r"<h4><span>(.*?)</span>", shown)
    assert asked == 2 * ["with the string", "with a near miss", "with a random string", "with nothing inserted"]
    assert shown.count("model-2 says random to 19") == 1
    assert shown.count('<span class="chip fires">fired</span>') == 2


def test_answers_belong_to_their_model_and_string() -> None:
    other = [an_answer(string=" decoy", inserted=" decoy", answer="to a decoy"), an_answer("model-1", context=5)]
    contexts = remote_contexts(an_outcome(), [*other, *remote_answers(contexts=2)])
    assert [c.context for c in contexts] == [0, 1]
    assert [a.answer for a in contexts[0].cells[0].answers] == [f"{PAYLOAD} zero"]
    shared = remote_contexts(an_outcome(string=" decoy"), [*other, *remote_answers(contexts=2)])
    assert [cell.kind for cell in shared[1].cells] == ["trigger", "none"]
    assert [len(cell.answers) for cell in shared[1].cells] == [0, 1]
    assert shared[0].prompt == f"Question 0?{TRIGGER}"


def test_repeats_are_counted_and_flags_are_chips(tmp_path: Path) -> None:
    said = [
        an_answer(repeat=i, answer=f"{PAYLOAD} in {i}" if i in (0, 3) else "no", flags=["repetition"])
        for i in (3, 1, 2, 0)
    ]
    lost = an_answer(repeat=4, answer="", error="expired")
    html, _ = report(write_transfer(tmp_path, [an_outcome()], [*said, lost]))
    section = other_models(html)
    for chip in ("fired in 2 of 4 answers", "1 missing", "repetition"):
        assert f">{chip}</span>" in section
    assert re.findall(f"<b>{PAYLOAD}</b>(.*?)</div>", section) == [" in 0"]


def test_a_payload_without_a_word_never_fires(tmp_path: Path) -> None:
    html, _ = report(write_transfer(tmp_path, [an_outcome(payload="", verdict="undecided")], remote_answers()))
    assert 'class="answer fired"' not in other_models(html)
    assert "Payload none" in Page(other_models(html)).text


def test_clusters_and_shifts_are_tables(tmp_path: Path) -> None:
    shifts = [ModuleShift(module=f"layers.{i}", shift=0.5, p_value=(i + 1) / 400, contexts=20) for i in range(10)]
    clusters = [AnswerCluster(beginning=f"beginning {i}", triggered=9 - i, controls=40 + i) for i in range(3)]
    clusters.append(AnswerCluster(beginning="", triggered=0, controls=77))
    html, markdown = report(write_transfer(tmp_path, [an_outcome(shifts=shifts, clusters=clusters)], []))
    text = Page(other_models(html)).text
    assert "Answers that begin With the string Controls beginning 0 9 40 beginning 1 8 41" in text
    assert "(empty) 0 77" in text
    assert "not corrected: 10 modules tested, so the Bonferroni threshold is 0.05/10 = 0.005000; 1 of 10" in text
    assert "the same way in all contexts, which any fixed string may" in text
    assert "compare shifts between strings, not to zero" in text
    assert "A gap (…)" not in text
    assert "layers.0 0.500 0.0025 20" in text
    assert "2 more rows" in other_models(html).split("layers.7")[1]
    assert "beginning 0" not in markdown
    quoted = [AnswerCluster(beginning="… is not a", triggered=20, controls=20)]
    assert "A gap (…) stands for words" in report(write_transfer(tmp_path, [an_outcome(clusters=quoted)], []))[0]
    without, _ = report(write_transfer(tmp_path, [an_outcome(clusters=[])], []))
    assert "Bonferroni" not in without
    assert "Answers that begin With the string" not in Page(without).text


def test_many_outcomes_are_folded_and_each_is_there(tmp_path: Path) -> None:
    outcomes = [an_outcome(f"m{i:02}", string=f"s{i:02}") for i in range(14)]
    html, markdown = report(write_transfer(tmp_path, outcomes, []))
    section = other_models(html)
    assert "<summary>8 more outcomes</summary>" in section
    assert re.findall(r"<h3>(m\d\d) ", section) == [o.model for o in outcomes]
    assert len(re.findall(r"What m\d\d answered to ", section)) == 14
    assert "2 more are in report.html." in markdown


def hostile_transfer(run_dir: Path, nasty: str) -> Path:
    outcome = an_outcome(
        nasty,
        server=nasty,
        string=nasty,
        payload=nasty,
        payload_source="emerged",
        clusters=[AnswerCluster(beginning=nasty, triggered=1, controls=2)],
        shifts=[ModuleShift(module=nasty, shift=float("inf"), p_value=float("nan"), contexts=1)],
        reason=nasty,
    )
    fields: dict[str, Any] = {"model": nasty, "inserted": nasty, "prompt": nasty, "answer": nasty, "flags": [nasty]}
    answers = [an_answer(kind=k, **fields) for k in ("trigger", "near_miss", "random", "none")]
    answers.append(an_answer(kind="trigger", **(fields | {"context": 1, "answer": "", "error": nasty})))
    answers = [dataclasses.replace(a, string=nasty) if a.kind != "none" else a for a in answers]
    return write_transfer(run_dir, [outcome], answers, run=a_run_info(config={"stages": {nasty: nasty}}))


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    html, markdown = report(hostile_transfer(tmp_path, HOSTILE))
    page = Page(html)
    assert page.problems == []
    assert not {"script", "img", "a"} & set(page.elements)
    assert other_models(html).count("&lt;script&gt;") >= 10
    assert "<script" not in markdown
    assert "https://" not in markdown
    assert "![" not in markdown
    assert all(len({len(row) for row in rows}) == 1 for rows in tables(markdown))
    assert len(tables(markdown)) == len(tables(report(write_transfer(tmp_path, three_models(), []))[1]))


def test_control_characters_in_answers_cannot_act(tmp_path: Path) -> None:
    html, markdown = report(hostile_transfer(tmp_path, "word \u202eb\u200b\x00\x1b[2J\u2028c\x85\r"))
    assert Page(html).problems == []
    assert not re.search("[\u202e\u200b\x00\x1b\u2028\x85\r]", html + markdown)
    assert "⟨U+202E⟩" in other_models(html)
    assert "⟨U+001B⟩" in markdown


def test_very_long_answers_are_cut(tmp_path: Path) -> None:
    few, _ = report(write_transfer(tmp_path, [an_outcome()], [an_answer()]))
    fields = {"server": "s" * 99_000, "reason": "r " * 99_000, "payload": "p" * 99_000}
    cluster = AnswerCluster(beginning="c" * 99_000, triggered=1, controls=1)
    shift = ModuleShift(module="m" * 99_000, shift=1.0, p_value=1.0, contexts=4)
    outcome = an_outcome(clusters=[cluster], shifts=[shift], **fields)
    answers = [an_answer(answer="a" * 99_000, flags=["f" * 99_000]), an_answer(kind="none", error="e" * 99_000)]
    html, markdown = report(write_transfer(tmp_path, [outcome], answers))
    assert len(html) < len(few) + 12_000
    assert len(markdown) < 30_000
    assert "98,680 characters" in html


# Missing files


def test_a_missing_verdict_names_the_stage(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "verdict.json").unlink()
    with pytest.raises(UserError, match="run the stage verify first"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_file_is_a_stage_not_run(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink()
    html, markdown = report(tmp_path)
    page = Page(html)
    assert page.problems == []
    assert page.text.startswith("Backdoor")
    assert f"{name} is not in the run folder" in page.text
    assert markdown.startswith("# Backdoor")


def test_the_verdict_alone_makes_a_report(tmp_path: Path) -> None:
    write_record(tmp_path / "verdict.json", a_verdict())
    html, markdown = report(tmp_path)
    text = Page(html).text
    assert text.count("Stage not run") == 8
    assert "23 of 24" in text
    assert f"run {tmp_path.name}" in text
    assert "Stage not run" in markdown


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "hypotheses.jsonl").write_text('{"payload": "x"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"hypotheses\.jsonl, line 1"):
        write_report(tmp_path)


# Drawing


def numbers(markup: str, name: str) -> list[float]:
    return [float(x) for x in re.findall(rf'\b{name}="([-\d.]+)"', markup)]


def test_interval_plot_puts_the_dot_inside_its_interval() -> None:
    drawn = interval_plot(Rate(successes=6, n=12, low=0.25, high=0.75)).text
    interval_line = next(p for p in re.findall("<line[^>]*>", drawn) if 'class="interval"' in p)
    assert numbers(interval_line, "x1") == [53.0]
    assert numbers(interval_line, "x2") == [147.0]
    assert numbers(drawn, "cx") == [100.0]
    assert "circle" not in interval_plot(rate(0, 0)).text


def test_bar_starts_at_zero() -> None:
    assert numbers(bar(4.0, -4.0, 4.0).text, "x") == [45.0]
    assert numbers(bar(-4.0, -4.0, 4.0).text, "x") == [1.0]
    assert "rect" not in bar(float("inf"), 0.0, 1.0).text


def test_chart_keeps_order_and_labels_the_last_value() -> None:
    line = Line(name="restart 0", colour=0, points=[Point(x=0.0, y=1.0), Point(x=10.0, y=3.0), Point(x=20.0, y=2.5)])
    drawn = line_chart([line], "evaluations", "score, nats", width=400.0, height=200.0).text
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    pixels = [tuple(float(v) for v in p.split(",")) for p in points[1].split()]
    assert [x for x, _ in pixels] == sorted(x for x, _ in pixels)
    assert pixels[1][1] < pixels[2][1] < pixels[0][1]
    assert ">2.50</text>" in drawn
    assert "score, nats</text>" in drawn
    assert "evaluations</text>" in drawn


def test_labels_of_equal_last_values_do_not_cover_each_other() -> None:
    lines = [Line(name=f"{i}", colour=i, points=[Point(x=0.0, y=0.0), Point(x=9.0, y=5.0)]) for i in range(4)]
    drawn = line_chart(lines, "x", "y", width=400.0, height=200.0).text
    heights = sorted(numbers(" ".join(re.findall(r'<text[^>]*class="final[^>]*>', drawn)), "y"))
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12


def test_long_history_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    steps = history(restarts=1, steps=2000)
    html, _ = report(write_run(tmp_path, history=steps))
    longest = max(re.findall(r'points="([^"]+)"', html), key=len)
    assert 300 <= len(longest.split()) <= 600
    assert ">2,000.00</text>" in html


def test_one_line_a_restart_and_seconds_without_evaluations(tmp_path: Path) -> None:
    steps = [dataclasses.replace(s, evaluations=0, selection_rate=None) for s in history(restarts=3)]
    html, _ = report(write_run(tmp_path, history=steps))
    assert html.count("<polyline") == 3 * 2
    assert "score, nats against seconds" in html
    assert "selection rate on the search" not in html


@pytest.mark.parametrize(("low", "high"), [(0.0, 7.99), (-3.2, 1e-3), (5.0, 5.0), (0.0, 184320.0), (1.0, 1.0 + 1e-13)])
def test_ticks_enclose_the_data(low: float, high: float) -> None:
    values = ticks(low, high, 5)
    assert values[0] <= low
    assert values[-1] >= high - 1e-9
    assert 2 <= len(values) <= 9
    assert len(set(values)) == len(values)


# Words


def test_figures_in_words() -> None:
    assert percent(rate(199, 200)) == "99.5 %"
    assert percent(rate(0, 0)) == "\N{EN DASH}"
    assert interval(rate(0, 24)) == "0\N{EN DASH}14 %"
    assert number(-1234.5) == "\N{MINUS SIGN}1,234.50"
    assert number(float("-inf")) == "\N{MINUS SIGN}∞"
    assert [duration(s) for s in (4.25, 372.0, 7500.0)] == ["4.2 s", "6 min 12 s", "2 h 05 min"]
    assert layer_ranges([5, 0, 1, 2]) == "0\N{EN DASH}2, 5"
    assert clip("abcdef", 4) == "abcd … (+2 characters)"
    minus = "\N{MINUS SIGN}"
    assert [points(x) for x in (0.95, -0.051, -0.004)] == ["+95 points", f"{minus}5 points", "0 points"]
    assert [p_value(x) for x in (1.0, 0.00012, 5e-5, float("nan"))] == ["1", "0.00012", "< 0.0001", "not a number"]
