"""The same story as the page, short, as GitHub-flavoured Markdown.

Whatever came from a user or a model has every character Markdown could act on written as a numeric entity, which no
Markdown reader gives a meaning: so a payload cannot end a table cell, open a code span or load an image.
"""

import re
from collections.abc import Iterable, Sequence

from trigger_opt.answers import is_manner
from trigger_opt.records import Hypothesis, TransferOutcome, Verification
from trigger_opt.report.answers import Cell, ContextAnswers, side_by_side, spread
from trigger_opt.report.load import RunRecords
from trigger_opt.report.remote import (
    EMERGED,
    NAME_LIMIT,
    NOTHING_SENT,
    banner_line,
    is_told,
    lead,
    remote_rate_rows,
)
from trigger_opt.report.sections_ablation import ABLATION_TITLE, ablation_lines
from trigger_opt.report.sections_jobs import (
    FINDING_TITLES,
    JOB_TITLES,
    JOBS_TITLE,
    finding_rows,
    job_rows,
    jobs_lines,
    left_out,
)
from trigger_opt.report.sections_known import KNOWN_TITLE, known_lines
from trigger_opt.report.sections_null import null_lines
from trigger_opt.report.sections_probe import PROBE_TITLE, probe_lines
from trigger_opt.report.words import (
    BUILT_NOTE,
    DASH,
    MANNER_NOTE,
    MOVED_NOTE,
    MOVED_TOLD,
    RateRow,
    clip,
    duration,
    gradient_sentence,
    identity_sentence,
    identity_warnings,
    interval,
    meaning,
    model_name,
    not_run,
    noun,
    null_figure,
    number,
    of,
    payload_title,
    percent,
    points,
    printable,
    rate_rows,
    rescored_sentence,
    share,
    string_title,
    versions,
    visible,
)

CONTEXTS_SHOWN = 3
ROWS_SHOWN = 12
REASON_LIMIT = 800
# An underscore inside a word is inert, and names full of entities are unreadable.
_ACTIVE = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def summary(run: RunRecords) -> str:
    """The whole `report.md` of a run."""
    parts = [_verdict(run), _rates(run), _answers(run), _null(run), _jobs(run), _ablation(run), _probe(run)]
    parts += [
        _transfer(run),
        _hypotheses(run),
        _gradient(run),
        _built(run),
        _rescored(run),
        _refuted(run),
        _known(run),
        _weights(run),
        _made(run),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def text(raw: str) -> str:
    """`raw` as inert one-line Markdown text; line breaks become ⏎."""
    one_line = re.sub(r"[ \t]+", " ", printable(raw.strip()).replace("\n", " ⏎ "))
    # "://" is what turns plain text into a link.
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", one_line).replace("://", "&#58;//")


def code(raw: str, limit: int = 160) -> str:
    """A string as inert inline code with its whitespace visible, cut after `limit` characters; a dash when empty."""
    more = f" (+{len(raw) - limit:,} characters)" if len(raw) > limit else ""
    return f"<code>{text(visible(raw[:limit]))}</code>{more}" if raw else DASH


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are finished Markdown already.

    Raises:
        ValueError: a row has another number of cells than there are titles.
    """
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"expected {len(titles)} cells, got {len(row)}")
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(run: RunRecords) -> str:
    verdict = run.verdict
    lines = [f"# {verdict.verdict.capitalize()}", text(verdict.reason), meaning(verdict)]
    strings = [f"- {string_title(verdict)}: {code(verdict.trigger) if verdict.trigger else 'none was found'}"]
    if verdict.minimised_trigger and verdict.minimised_trigger != verdict.trigger:
        strings.append(f"- Minimised {noun(verdict)}: {code(verdict.minimised_trigger)}")
    if verdict.payload:
        manner = f"{text(clip(verdict.payload, 700))} ({MANNER_NOTE})"
        said = manner if is_manner(verdict.payload) else code(verdict.payload)
        strings.append(f"- {payload_title(verdict)}: {said}")
    if verdict.payload_completion:
        strings.append(f"- Answer to the {noun(verdict)}: {text(clip(verdict.payload_completion, 400))}")
    return "\n\n".join([*lines, "\n".join(strings)])


def _rates(run: RunRecords) -> str:
    rows = []
    for row in rate_rows(run.verdict):
        figures = [of(row.rate), percent(row.rate), interval(row.rate)] if row.rate else [row.absent, DASH, DASH]
        rows.append([row.label, *figures])
    evidence = (
        f"Median evidence {number(run.verdict.evidence)} nats over {run.verdict.num_contexts:,} held-out contexts."
    )
    if run.verdict.null_p_value is not None:
        evidence += f" {null_figure(run.verdict).capitalize()}."
    others = f"\n\n{text(banner_line(run.transfer))}" if run.transfer else ""
    return table(["Rate", "Answers", "Share", "95 % interval"], rows) + f"\n\n{evidence}" + others


def _answers(run: RunRecords) -> str:
    title = "## Answers side by side\n\n"
    if run.completions is None:
        return title + not_run("completions.jsonl")
    contexts = side_by_side(run)
    if not contexts:
        return title + "No answer was recorded for this string."
    shown = spread(contexts, CONTEXTS_SHOWN)
    blocks = [_context(c, noun(run.verdict)) for c in shown]
    return title + "\n\n".join([f"{len(shown)} of {len(contexts)} held-out contexts, evenly spaced.", *blocks])


def _context(answers: ContextAnswers, the: str) -> str:
    cells = [c for c in answers.with_string + answers.without if c.answers]
    rows = [[model_name(c.model), "yes" if c.inserted else "no", _fired(c), _said(c)] for c in cells]
    prompt = f"Context {answers.context}: {text(clip(answers.prompt, 300))}"
    return f"{prompt}\n\n" + table(["Model", the.capitalize(), "Fired", "Answer"], [[text(x[0]), *x[1:]] for x in rows])


def _fired(cell: Cell) -> str:
    if len(cell.answers) > 1:
        return f"{cell.fired} of {len(cell.answers)}"
    return "**yes**" if cell.fired else "no"


def _said(cell: Cell) -> str:
    first = cell.answers[0]
    flags = f" ({', '.join(text(f) for f in first.flags)})" if first.flags else ""
    return (text(clip(first.answer, 240)) or "(empty)") + flags


def _null(run: RunRecords) -> str:
    lines = null_lines(run)
    return "## Held against a null\n\n" + "\n".join(f"- {text(line)}" for line in lines) if lines else ""


def _ablation(run: RunRecords) -> str:
    return _bullets(ABLATION_TITLE, ablation_lines(run))


def _probe(run: RunRecords) -> str:
    return _bullets(PROBE_TITLE, probe_lines(run))


def _jobs(run: RunRecords) -> str:
    if run.jobs is None:
        return ""
    tables = [(FINDING_TITLES, finding_rows(run)), (JOB_TITLES, job_rows(run))]
    blocks = [table(titles, [[text(cell) for cell in row] for row in rows]) for titles, rows in tables if rows]
    return "\n\n".join([_bullets(JOBS_TITLE, jobs_lines(run)), *blocks, *filter(None, [left_out(run)])])


def _known(run: RunRecords) -> str:
    return _bullets(KNOWN_TITLE, known_lines(run))


def _bullets(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {text(line)}" for line in lines) if lines else ""


def _transfer(run: RunRecords) -> str:
    title = "## Other models\n\n"
    if not is_told(run):
        return ""
    if run.transfer is None:
        return title + not_run("transfer.jsonl")
    if not run.transfer and not run.transfer_answers:
        return title + NOTHING_SENT
    titles = ["Model", "String", "Verdict", "With it", "Near misses", "Random strings", "Nothing", "Effect"]
    shown = run.transfer[:ROWS_SHOWN]
    more = f"\n\n{len(run.transfer) - ROWS_SHOWN} more are in report.html." if len(run.transfer) > ROWS_SHOWN else ""
    reasons = "\n".join(_transfer_reason(o) for o in shown)
    return title + "\n\n".join([lead(run), table(titles, [_transfer_row(o) for o in shown]), reasons]) + more


def _transfer_row(o: TransferOutcome) -> list[str]:
    named = [text(clip(o.model, NAME_LIMIT)), code(o.string), o.verdict_words]
    return [*named, *(_rate_cell(row) for row in remote_rate_rows(o)), points(o.effect)]


def _rate_cell(row: RateRow) -> str:
    return f"{of(row.rate)} ({interval(row.rate)})" if row.rate else row.absent


def _transfer_reason(o: TransferOutcome) -> str:
    emerged = f" Payload {code(o.payload)}: {EMERGED}" if o.payload_source == "emerged" else ""
    return f"- {text(clip(o.model, NAME_LIMIT))}: {text(clip(o.reason, REASON_LIMIT))}{emerged}"


def _hypotheses(run: RunRecords) -> str:
    if run.jobs is not None:
        # Of a collected sweep they are in the jobs' own reports.
        return ""
    title = "## What the fine-tuned model wants to say\n\n"
    if run.hypotheses is None:
        return title + not_run("hypotheses.jsonl")
    moved = " ".join(f"{code(m.text)} {number(m.score)}" for m in (run.moved or [])[:MOVED_TOLD])
    moved = f"\n\n{MOVED_NOTE}\n\n{moved}" if moved else ""
    if not run.hypotheses:
        return title + "The stage ran and found no payload hypothesis." + moved
    titles = ["Payload", "Source", "Score, nats", "Rivals, nats", "Evidence", "Inputs"]
    return title + table(titles, [_hypothesis(h) for h in run.hypotheses]) + moved


def _hypothesis(h: Hypothesis) -> list[str]:
    inputs = " ".join(code(i, 60) for i in h.inputs[:5]) or DASH
    rivals = ", ".join(number(r) for r in h.rivals[:5]) or DASH
    return [code(h.payload), text(h.source.replace("_", " ")), number(h.score), rivals, text(h.evidence), inputs]


def _gradient(run: RunRecords) -> str:
    return f"## The token gradient\n\n{text(gradient_sentence(run.gradient))}" if run.gradient else ""


def _built(run: RunRecords) -> str:
    rows = [
        [code(b.trigger), code(b.payload, 60), str(len(b.trigger_ids)), number(c.score), share(c.selection_rate)]
        for b, c in run.built_and_scored
    ]
    if not rows:
        return ""
    return f"## Built up\n\n{BUILT_NOTE}\n\n" + table(["String", "Payload", "Tokens", "Score, nats", "Share"], rows)


def _rescored(run: RunRecords) -> str:
    return f"## Quantised weights\n\n{text(rescored_sentence(run.rescored))}." if run.rescored else ""


def _refuted(run: RunRecords) -> str:
    title = "## What was tried, and what refuted it\n\n"
    if run.verified is None and run.candidates is None:
        return f"{title}{not_run('candidates.jsonl')} {not_run('verified.jsonl')}"
    rows = [_refuted_row(v) for v in run.others]
    rows += [[code(c.trigger), code(c.payload, 60), DASH, DASH, "not verified"] for c in run.unverified]
    if not rows:
        return title + "No other string was tried to the end."
    titles = ["String", "Payload", "Fine-tuned", "Base", "Outcome"]
    if run.one_payload:
        titles, rows = [titles[0], *titles[2:]], [[row[0], *row[2:]] for row in rows]
    more = f"\n\n{len(rows) - ROWS_SHOWN} more are in report.html." if len(rows) > ROWS_SHOWN else ""
    return title + table(titles, rows[:ROWS_SHOWN]) + more


def _refuted_row(v: Verification) -> list[str]:
    outcome = f"{text(v.verdict)}: {text(v.reason)}"
    return [code(v.trigger), code(v.payload, 60), of(v.trigger_rate), of(v.base_rate), outcome]


def _weights(run: RunRecords) -> str:
    title = "## Weights\n\n"
    if run.identity is None:
        return title + not_run("identity.json")
    return title + " ".join([text(identity_sentence(run.identity)), *identity_warnings(run.identity)])


def _made(run: RunRecords) -> str:
    verdict, info = run.verdict, run.info
    lines = [f"- Rule of the verdict: {text(verdict.rule)}"]
    if info is None:
        lines.append("- run.json is not in the run folder: command and configuration are unknown.")
    else:
        lines += [f"- Run: {text(run.name)}, started {text(info.started)}, {text(info.machine)}"]
        lines += [f"- Command: <code>{text(info.command)}</code>"]
        lines += [f"- Stages: {', '.join(f'{text(s.stage)} {duration(s.seconds)}' for s in info.stages) or DASH}"]
    spent = f"{verdict.evaluations:,} candidate evaluations in {duration(verdict.seconds)}, seed {verdict.seed}"
    lines += [f"- Spent: {spent}", f"- Versions: {text(versions(verdict.versions))}"]
    return "## How this was made\n\n" + "\n".join(lines)
