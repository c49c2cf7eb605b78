"""Strings that earlier runs on the same pair had refuted, so that this run did not verify them again."""

from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, clipped_string, join, note, section, table
from trigger_opt.report.words import clip, counted, of

KNOWN_TITLE = "Refuted by earlier runs"
_SHOWN = 12
_RUN_LIMIT = 60
_CAPTION = (
    "The search came upon these again. They were judged before on the same two models, in the same contexts and by the "
    "same rule, so other strings were verified in their place."
)
_COLUMNS = [
    Column(title="String", kind="string"),
    Column(title="Fired", kind="num"),
    Column(title="Verdict", kind="word"),
    Column(title="Refuted by", kind="word"),
    Column(title="In run", kind="word"),
]


def known_section(run: RunRecords) -> Html:
    """A table of them; nothing where there are none."""
    if not run.known:
        return join([])
    rows: list[list[Child]] = [
        [clipped_string(j.trigger, 60), of(j.trigger_rate), j.verdict, j.refuted_by, clip(j.run, _RUN_LIMIT)]
        for j in run.known[:_SHOWN]
    ]
    more = [note(f"{len(run.known) - _SHOWN} more are in known.jsonl.")] if len(run.known) > _SHOWN else []
    return section(KNOWN_TITLE, note(_CAPTION), table(_COLUMNS, rows), *more)


def known_lines(run: RunRecords) -> list[str]:
    """The same in plain sentences; empty where there is nothing to say."""
    if not run.known:
        return []
    runs = sorted({clip(j.run, _RUN_LIMIT) for j in run.known})
    shown = [
        f"{clip(j.trigger, 60)!r}: fired in {of(j.trigger_rate)}, {j.verdict}, refuted by {j.refuted_by}"
        for j in run.known[:_SHOWN]
    ]
    return [f"{counted(len(run.known), 'string')} refuted before, in {', '.join(runs[:3])}.", *shown]
