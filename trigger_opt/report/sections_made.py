"""What fine-tuning changed in the weights, and how this page came about."""

import json

from trigger_opt.records import PairIdentity, RunInfo, StageRun, TensorFamilyDiff
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, definitions, fold, join, note, section, table, tag
from trigger_opt.report.words import (
    DASH,
    arithmetic,
    duration,
    identity_sentence,
    identity_warnings,
    layer_ranges,
    norm,
    not_run,
    number,
    versions,
)


def weights(run: RunRecords) -> Html:
    """Is it the right base, and which tensor families changed."""
    identity = [note(not_run("identity.json"))] if run.identity is None else _identity(run.identity)
    return section("Weights: what fine-tuning changed", *identity, _diff(run.diff))


def how_made(run: RunRecords) -> Html:
    """The rule, the command, the configuration, versions, stages and plan."""
    parts: list[Child] = [definitions(_facts(run))]
    if run.info is None:
        parts.append(note("run.json is not in the run folder: command, configuration and stages are unknown."))
    else:
        parts += _info(run.info)
    return section("How this was made", *parts)


def _identity(identity: PairIdentity) -> list[Child]:
    warnings = [tag("p", tag("span", "check", class_="chip amber"), " ", w) for w in identity_warnings(identity)]
    return [tag("p", identity_sentence(identity)), *warnings]


def _diff(diff: list[TensorFamilyDiff] | None) -> Html:
    if diff is None:
        return note(not_run("diff.jsonl"))
    if not diff:
        return note("No tensor was compared.")
    columns = [
        Column(title="Tensor family", kind="text"),
        Column(title="Changed", kind="num"),
        Column(title="Relative norm", kind="num"),
        Column(title="Effective rank", kind="num"),
        Column(title="Layers", kind="num"),
        Column(title="Largest layer", kind="num"),
    ]
    caption = note("Relative norm: of the change, over that of the base. Largest layer: where that is greatest.")
    return join([caption, table(columns, [_family(d) for d in diff])])


def _family(d: TensorFamilyDiff) -> list[Child]:
    largest = DASH if d.largest_layer is None else str(d.largest_layer)
    rank = number(d.effective_rank, 1).removesuffix(".0")
    name = tag("code", d.family)
    return [name, f"{d.changed} of {d.tensors}", norm(d.relative_norm), rank, layer_ranges(d.layers), largest]


def _facts(run: RunRecords) -> list[tuple[str, Child]]:
    verdict, info = run.verdict, run.info
    facts: list[tuple[str, Child]] = [("Rule of the verdict", tag("span", verdict.rule, class_="rule"))]
    if info is not None:
        facts += [("Command", tag("pre", info.command)), ("Started", info.started), ("Machine", info.machine)]
    facts += [
        ("Seed", str(verdict.seed)),
        ("Candidate evaluations", f"{verdict.evaluations:,}"),
        *([("Arithmetic of the search", arithmetic(run.cost))] if run.cost is not None else []),
        ("Wall time", duration(verdict.seconds)),
        ("Versions", versions(verdict.versions)),
    ]
    if info is not None and info.versions != verdict.versions:
        facts.append(("Versions at the start", versions(info.versions)))
    return facts


def _info(info: RunInfo) -> list[Child]:
    columns = [
        Column(title="Stage", kind="word"),
        Column(title="Started", kind="word"),
        Column(title="Wall time", kind="num"),
        Column(title="Evaluations", kind="num"),
        Column(title="Found"),
    ]
    stages = table(columns, [_stage(s) for s in info.stages]) if info.stages else note("No stage was recorded.")
    config = json.dumps(info.config, indent=2, ensure_ascii=False)
    folded = [fold("Configuration, fully resolved", tag("pre", config))]
    if info.plan:
        folded.insert(0, fold("The plan, as printed before anything ran", tag("pre", "\n".join(info.plan))))
    return [stages, *folded]


def _stage(s: StageRun) -> list[Child]:
    return [s.stage, s.started, duration(s.seconds), f"{s.evaluations:,}", s.summary]
