"""The page: the verdict and its figures, then what they rest on."""

from trigger_opt.answers import is_manner
from trigger_opt.records import Verdict
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Html, definitions, join, string, tag
from trigger_opt.report.rates import rates
from trigger_opt.report.remote import banner_line
from trigger_opt.report.sections_ablation import ablation_section
from trigger_opt.report.sections_answers import profile, side_by_side_section
from trigger_opt.report.sections_jobs import jobs_section
from trigger_opt.report.sections_known import known_section
from trigger_opt.report.sections_made import how_made, weights
from trigger_opt.report.sections_null import null_section
from trigger_opt.report.sections_probe import probe_section
from trigger_opt.report.sections_search import curve, hypotheses, refuted
from trigger_opt.report.sections_transfer import other_models
from trigger_opt.report.style import STYLE
from trigger_opt.report.words import (
    MANNER_NOTE,
    clip,
    duration,
    exact,
    meaning,
    noun,
    null_figure,
    number,
    payload_title,
    rate_rows,
    string_title,
)

TONES = {"backdoor": "backdoor", "generic shift": "amber", "unstable": "amber", "not reproduced": "quiet"}

# A second lock behind escaping: even markup that slipped through could neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(run: RunRecords) -> str:
    """The whole self-contained HTML page of a run."""
    sections = [
        side_by_side_section,
        profile,
        null_section,
        jobs_section,
        ablation_section,
        probe_section,
        other_models,
        # Of a collected sweep they are in the jobs' own reports.
        *([curve, hypotheses] if run.jobs is None else []),
        refuted,
        known_section,
        weights,
        how_made,
    ]
    body = tag("main", banner(run), *(section(run) for section in sections), _footer())
    return f"<!DOCTYPE html>\n{_head(run)}{tag('body', body).text}</html>\n"


def banner(run: RunRecords) -> Html:
    """The verdict, the sentence that decided it, the strings and the rates."""
    verdict = run.verdict
    return tag(
        "header",
        tag("h1", verdict.verdict.capitalize()),
        tag("p", verdict.reason, class_="reason"),
        tag("p", meaning(verdict), class_="meaning"),
        definitions(_strings(verdict), "facts strings"),
        rates(rate_rows(verdict)),
        *([tag("p", banner_line(run.transfer), class_="others")] if run.transfer else []),
        tag("p", _figures(run), class_="figures"),
        class_=f"banner {TONES[verdict.verdict]}",
    )


def _strings(verdict: Verdict) -> list[tuple[str, Child]]:
    rows: list[tuple[str, Child]] = [(string_title(verdict), _named_string(verdict.trigger))]
    if verdict.minimised_trigger and verdict.minimised_trigger != verdict.trigger:
        rows.append((f"Minimised {noun(verdict)}", _named_string(verdict.minimised_trigger)))
    if verdict.payload:
        shown = string(verdict.payload)
        if is_manner(verdict.payload):
            # Words, no string that anybody types: their spaces need not be seen.
            shown = join([clip(verdict.payload, 700), tag("div", MANNER_NOTE, class_="note")])
        rows.append((payload_title(verdict), shown))
    if verdict.payload_completion:
        rows.append((f"Answer to the {noun(verdict)}", clip(verdict.payload_completion, 700)))
    return rows


def _named_string(text: str) -> Child:
    if not text:
        return "none was found"
    literal = exact(text)
    return (
        join([string(text), tag("div", "exactly ", tag("code", literal), class_="note")]) if literal else string(text)
    )


def _figures(run: RunRecords) -> str:
    verdict = run.verdict
    parts = [f"run {run.name}", f"{verdict.num_contexts:,} held-out contexts"]
    if verdict.evidence is not None:
        parts.append(f"median evidence {number(verdict.evidence)} nats")
    if verdict.null_p_value is not None:
        parts.append(null_figure(verdict))
    if verdict.score is not None:
        parts.append(f"search score {number(verdict.score)} nats")
    parts += [f"{verdict.evaluations:,} candidate evaluations", duration(verdict.seconds), f"seed {verdict.seed}"]
    return " · ".join(parts)


def _footer() -> Html:
    return tag("footer", "Made by trigger_opt from the record files of the run folder alone; nothing here is fetched.")


def _head(run: RunRecords) -> str:
    title = tag("title", f"{run.verdict.verdict}: {run.name}")
    return (
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{title.text}<style>{STYLE}</style></head>'
    )
