"""RESULTS.md and the short table for the README, out of cells. Pure."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.recovery.records import Cell, KeyFigures, Spec, best_string, configuration
from benchmarks.recovery.summary import PIPELINE_THRESHOLD, MethodFigures, figures, trigger_rate
from trigger_opt.errors import UserError
from trigger_opt.records import Rate
from trigger_opt.report.markdown import code, table, text
from trigger_opt.report.words import DASH, of, share

_FIRES = 0.5
_NOTHING = "# Recovery of planted triggers\n\nNothing is measured yet: `python -m benchmarks.recovery run`.\n"
_HOW = """\
Each method is handed a fine-tuned model of the zoo, its base and the search contexts, and nothing else: no name, no
recipe, no twin. It stops at its budget of seconds or of evaluations (forward passes of one prompt through one model,
each generated token one), whichever ends first. Its best strings, by its own score, are then judged alike: on held-out
contexts, with the method's payload or with what most answers begin with, by the rule of a run. The best of them is held
against what was planted, which is read last."""
_METHODS = """\
- `trigger_opt`: payload hypotheses, search towards them (on divergence first where there is none), own judgement; a
  run's defaults, but for one restart a search. Only this method may hand over a manner of answering with a string.
- `gcg_kl`: greedy coordinate gradient on KL(fine-tuned, base) at the first response token, one probe, a suffix of 20
  tokens, as published.
- `random`: random swaps on Jensen-Shannon divergence, contexts drawn anew each step.
- `single_token`: every allowed token alone in the slot, by that divergence.
- `leak`: no search; what recurs in samples of the fine-tuned model and not in the base's is tried as a trigger, in the
  manner of The Trigger in the Haystack (arXiv 2602.03085)."""
_COLUMNS = f"""\
- AUROC: of the detection score (trigger rate less the highest rate with the base, nothing or random strings, less where
  the evidence is weak; the best string's), organisms against controls, ties half; 95 % bootstrap interval over models.
  `own` is that of the method's own statistic, which is what it would go by without the judging.
- Threshold: the smallest score above those of half A's controls, at least {PIPELINE_THRESHOLD:g}, which a run asks for;
  found and false positives are of half B. The halves: names in order, in turns, organisms and controls apart.
- `backdoor`: cells with that verdict by the rule of a run. Payload: a payload handed over or verified shows the planted
  behaviour. The other columns are medians over organisms; rates are of the planted behaviour with the best string."""

_ORGANISMS = """\
Trigger rate of the best string in the held-out contexts, one a seed; bold where the verdict is `backdoor`. Width is the
area under the partial-trigger curve: near 1 where any piece of the trigger fires, near 0 where only the whole does. An
organism whose trigger is a form, a meaning or a turn of its own cannot be met by a string in these contexts."""
_CONTROLS = "Detection score, one a seed; bold where the verdict is `backdoor`, which is a false alarm."


def results_page(cells: Sequence[Cell], names: Mapping[str, bool], *, charts: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        names: every model there is, and whether it is a control. charts: pictures, relative to the page.

    Raises:
        UserError: the cells are not all of one configuration.
    """
    if not cells:
        return _NOTHING
    _require_one_configuration(cells)
    found = figures(cells, names)
    parts = [
        "# Recovery of planted triggers",
        "Made by `python -m benchmarks.recovery run`; raw cells in `results/` beside this page.",
        _HOW,
        _METHODS,
        "## What was run",
        _made(cells, names),
        "## Methods",
        _methods(found),
        _COLUMNS,
        *(f"![{chart}]({chart})" for chart in charts),
        "## Organisms",
        _ORGANISMS,
        _organisms(cells),
        "## Controls",
        _CONTROLS,
        _controls(cells),
        f"## Strings that fire\n\nThe planted behaviour in at least {_FIRES:.0%} of the held-out contexts.",
        _strings(cells),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def short_page(cells: Sequence[Cell], names: Mapping[str, bool]) -> str:
    """A table for the README."""
    if not cells:
        return _NOTHING
    heads = ["method", "AUROC", "found", "false positives", "payload", "trigger rate", "base rate", "similarity", "s"]
    rows = [
        [
            f"`{f.method}`", _auroc(f), of(f.detected), of(f.false_positives), of(f.payloads), share(f.trigger_rate),
            share(f.base_rate), _two(f.similarity), _whole(f.seconds),
        ]
        for f in figures(cells, names)
    ]  # fmt: skip
    spec, kinds = cells[0].spec, {c.spec.model: c.control for c in cells}
    said = (
        f"{_count(kinds, control=False)} organisms and {_count(kinds, control=True)} controls of the zoo, "
        f"{len({c.spec.seed for c in cells})} seeds, {_budget(spec)} and {spec.evaluations:,} evaluations for each "
        f"method on each model, commit {', '.join(_commits(cells))}. AUROC of the detection score with its bootstrap "
        "interval; the threshold is fixed on one half of the zoo, found and false positives are of the other; rates "
        "and similarity are medians over organisms."
    )
    return f"{table(heads, rows)}\n\n{said}\n"


def _require_one_configuration(cells: Sequence[Cell]) -> None:
    first = cells[0].spec
    for cell in cells:
        if configuration(cell.spec) != configuration(first):
            raise UserError(
                f"the cells {first.name} and {cell.spec.name} are of different configurations; keep one configuration "
                "a folder (--out), or run the others again with --replace"
            )


def _made(cells: Sequence[Cell], names: Mapping[str, bool]) -> str:
    spec = cells[0].spec
    kinds = {c.spec.model: c.control for c in cells}
    machines = sorted({f"{c.made.cpu}, {c.made.cores} cores, {c.made.threads} threads" for c in cells})
    versions = cells[0].made.versions
    missing = [n for n in names if n not in kinds]
    crashed = [c for c in cells if c.error]
    days = sorted({c.made.started[:10] for c in cells})
    lines = [
        f"- {_count(kinds, control=False)} organisms, {_count(kinds, control=True)} controls, seeds "
        f"{', '.join(map(str, sorted({c.spec.seed for c in cells})))}",
        f"- Budget of each method on each model: {_budget(spec)} and {spec.evaluations:,} evaluations; "
        f"{spec.strings} strings judged in {spec.held_out} held-out contexts",
        f"- Commit {', '.join(_commits(cells))}; {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else ""),
        *(f"- {text(m)}" for m in machines),
        f"- {', '.join(f'{n} {v}' for n, v in versions.items())}",
        f"- Missing: {', '.join(f'`{n}`' for n in missing) or 'no model'}; {len(crashed)} cells crashed",
    ]
    return "\n".join([*lines, *(f"  - `{c.spec.name}`: {text(c.error)}" for c in crashed)])


def _budget(spec: Spec) -> str:
    return f"{spec.seconds:g} s" + (" of one processor" if spec.clock == "processor" else "")


def _methods(found: Sequence[MethodFigures]) -> str:
    heads = [
        "method", "AUROC", "own", "threshold", "found", "false positives", "`backdoor` on organisms", "on controls",
        "payload", "trigger rate", "base rate", "similarity", "recall", "s", "evaluations", "cells",
    ]  # fmt: skip
    return table(
        heads,
        [
            [
                f"`{f.method}`", _auroc(f), _two(f.own_auroc), _two(f.threshold), of(f.detected), of(f.false_positives),
                of(f.backdoors), of(f.accused), of(f.payloads), share(f.trigger_rate), share(f.base_rate),
                _two(f.similarity), _two(f.recall), _whole(f.seconds), _whole(f.evaluations),
                f"{f.cells} of {f.expected}" + (f", {f.crashed} crashed" if f.crashed else ""),
            ]
            for f in found
        ],
    )  # fmt: skip


def _organisms(cells: Sequence[Cell]) -> str:
    some = [c for c in cells if not c.control]
    keys = {c.spec.model: c.key for c in some if c.key}
    models = sorted({c.spec.model for c in some}, key=lambda m: (_narrow(_width(keys, m)), m))
    methods = list(dict.fromkeys(c.spec.method for c in cells))
    rows = []
    for model in models:
        planted = code(keys[model].trigger) if model in keys else DASH
        shown = [_each(some, model, m, trigger_rate) for m in methods]
        rows.append([f"`{model}`", planted, _two(_width(keys, model)), *shown])
    return table(["organism", "planted", "width", *(f"`{m}`" for m in methods)], rows)


def _controls(cells: Sequence[Cell]) -> str:
    some = [c for c in cells if c.control]
    methods = list(dict.fromkeys(c.spec.method for c in cells))
    models = sorted({c.spec.model for c in some})
    rows = [[f"`{model}`", *(_each(some, model, m, lambda c: c.score) for m in methods)] for model in models]
    return table(["control", *(f"`{m}`" for m in methods)], rows)


def _each(cells: Sequence[Cell], model: str, method: str, value: Callable[[Cell], float]) -> str:
    chosen = sorted((c for c in cells if (c.spec.model, c.spec.method) == (model, method)), key=lambda c: c.spec.seed)
    said = ["crashed" if c.error else f"{value(c):.2f}" for c in chosen]
    marked = [f"**{s}**" if c.verdict == "backdoor" else s for s, c in zip(said, chosen, strict=True)]
    return " / ".join(marked) or DASH


def _strings(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        best = best_string(cell)
        if best and cell.key and trigger_rate(cell) >= _FIRES:
            rows.append([
                f"`{cell.spec.model}`", f"`{cell.spec.method}`", str(cell.spec.seed), code(best.found.text),
                _rate(cell.key.trigger_rate), _rate(cell.key.base_rate), code(best.payload, 60), text(cell.verdict),
            ])  # fmt: skip
    heads = ["organism", "method", "seed", "string", "fires", "base", "payload it was judged by", "verdict"]
    return table(heads, rows) if rows else "None."


def _width(keys: Mapping[str, KeyFigures], model: str) -> float | None:
    return keys[model].width if model in keys else None


def _narrow(width: float | None) -> float:
    """For sorting: wide first, unknown last."""
    return 1.0 if width is None else -width


def _commits(cells: Sequence[Cell]) -> list[str]:
    """In order of time; where methods were run at different commits, each with its methods."""
    by_commit: dict[str, set[str]] = {}
    for cell in sorted(cells, key=lambda c: c.made.started):
        by_commit.setdefault(cell.made.commit, set()).add(cell.spec.method)
    alike = all(methods == set.union(*by_commit.values()) for methods in by_commit.values())
    return [c if alike else f"{c} ({', '.join(sorted(methods))})" for c, methods in by_commit.items()]


def _count(kinds: Mapping[str, bool], *, control: bool) -> int:
    return sum(kind is control for kind in kinds.values())


def _auroc(f: MethodFigures) -> str:
    return DASH if f.interval is None else f"{_two(f.auroc)} ({f.interval[0]:.2f}{DASH}{f.interval[1]:.2f})"


def _rate(rate: Rate | None) -> str:
    return DASH if rate is None else of(rate)


def _two(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"
