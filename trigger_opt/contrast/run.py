"""A contrast scan from its options to its files: read, ask, judge, write."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trigger_opt.contrast.judge import Judged, judge, why_undecided
from trigger_opt.contrast.options import Wanted
from trigger_opt.contrast.page import page, summary_markdown
from trigger_opt.contrast.permutation import smallest_p
from trigger_opt.contrast.read import read_answers, read_prompts
from trigger_opt.contrast.records import AnswerLine, ContrastResult, FeatureContrast, Prompt, Sample, Sets
from trigger_opt.contrast.sets import complete_sets, pair_up, with_base
from trigger_opt.contrast.words import lines, summary
from trigger_opt.errors import UserError
from trigger_opt.locks import held
from trigger_opt.progress import say, stage_progress
from trigger_opt.records import write_record, write_records, write_text
from trigger_opt.run_folder import now, timed, versions

RESULT, FEATURES, MARKDOWN, PAGE = "contrast.json", "contrast.jsonl", "contrast.md", "contrast.html"


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One set as read: its prompts, and the answers brought to them; None where a model is to answer."""

    prompts: Sequence[Prompt]
    samples: Sequence[Sample] | None


def run(wanted: Wanted, *, command: str) -> ContrastResult:
    """Do what is wanted, print what was found and write it into the folder.

    Args:
        command: as the user typed it, for the record.

    Raises:
        UserError: a file or a model cannot be used; the folder is in use, cannot be written or holds a scan.
    """
    started = now()
    a = _read(wanted.a, wanted.answers_a, wanted.base_answers_a)
    b = _read(wanted.b, wanted.answers_b, wanted.base_answers_b)
    partners = pair_up(a.prompts, b.prompts, by_line=wanted.paired)
    with held(wanted.out / ".lock", what=f"the folder {wanted.out}", remedy="give another --out"):
        if (wanted.out / RESULT).exists():
            raise UserError(f"the folder {wanted.out} already holds a contrast scan; give another --out")
        with timed() as seconds:
            sets = _answered(wanted, a, b, partners)
            undecided = _undecided(sets, wanted)
            judged = (
                Judged(features=[], constant=0, duplicate=0, global_p=1.0)
                if undecided
                else judge(sets, permutations=wanted.permutations, seed=wanted.seed)
            )
        result = _result(wanted, sets, judged, undecided, command=command, started=started, seconds=seconds[0])
        _write(wanted.out, result, judged.features)
    say(*lines(result, judged.features), f"report: {wanted.out / PAGE}")
    return result


def _read(prompt_file: Path | None, answer_file: Path | None, base_file: Path | None) -> _Side:
    prompts = None if prompt_file is None else read_prompts(prompt_file)
    samples = None if answer_file is None else read_answers(answer_file, prompts)
    if samples is not None and base_file is not None:
        samples = with_base(samples, read_answers(base_file, prompts), str(base_file))
    return _Side(prompts=prompts or [s.prompt for s in samples or []], samples=samples)


def _answered(wanted: Wanted, a: _Side, b: _Side, partners: Sequence[int] | None) -> Sets:
    """Both sets with their answers, which are written down before anything is made of them."""
    has_base = wanted.base is not None or wanted.base_answers_a is not None
    unanswered = [[Sample(prompt=p, answers=()) for p in side.prompts] for side in (a, b)]
    none = Sets(a=unanswered[0], b=unanswered[1], paired=partners is not None, has_base=has_base)
    if _undecided(none, wanted):
        # So few prompts decide nothing, however they are answered.
        return none
    if a.samples is None or b.samples is None:
        samples = _asked(wanted, [*a.prompts, *b.prompts])
        of_a, of_b = samples[: len(a.prompts)], samples[len(a.prompts) :]
    else:
        of_a, of_b = list(a.samples), list(b.samples)
    sets = complete_sets(of_a, of_b, partners, has_base=has_base)
    for name, side in (("a", sets.a), ("b", sets.b)):
        write_records(wanted.out / f"answers_{name}.jsonl", _answer_lines(side, base=False))
        if has_base:
            write_records(wanted.out / f"base_answers_{name}.jsonl", _answer_lines(side, base=True))
    return sets


def _undecided(sets: Sets, wanted: Wanted) -> str:
    return why_undecided(len(sets.a), len(sets.b), paired=sets.paired, permutations=wanted.permutations)


def _asked(wanted: Wanted, prompts: Sequence[Prompt]) -> list[Sample]:
    """Answers of the models on this machine."""
    # Here, for brought answers need no torch.
    from trigger_opt.models.quiet import quieten_libraries

    quieten_libraries()
    from trigger_opt.contrast.ask import Asking, ask
    from trigger_opt.contrast.source import Source, load

    assert wanted.model is not None
    source = Source(
        model=wanted.model,
        base=wanted.base,
        device=wanted.device,
        dtype=wanted.dtype,
        quantization=wanted.quantization,
        allow_pickle=wanted.allow_pickle,
        allow_code=wanted.allow_code,
    )
    asking = Asking(
        max_new_tokens=wanted.max_new_tokens,
        repeats=wanted.repeats,
        temperature=wanted.temperature,
        seed=wanted.seed,
    )
    has_base = wanted.base is not None
    pair = load(source, prompts, asking)
    total = len(prompts) * wanted.repeats * (2 if has_base else 1)
    with stage_progress("contrast", total=total, unit="answer") as bar:
        return ask(pair, prompts, asking, has_base=has_base, on_answers=bar.update)


def _answer_lines(samples: Sequence[Sample], *, base: bool) -> list[AnswerLine]:
    return [
        AnswerLine(id=s.prompt.id if s.prompt.named else None, prompt=s.prompt.text, system=s.prompt.system, answer=x)
        for s in samples
        for x in (s.base_answers if base else s.answers)
    ]


def _result(
    wanted: Wanted, sets: Sets, judged: Judged, undecided: str, *, command: str, started: str, seconds: float
) -> ContrastResult:
    samples = [*sets.a, *sets.b]
    paths = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(wanted).items()}
    return ContrastResult(
        summary=summary(judged.features, undecided=undecided),
        undecided=undecided,
        model=wanted.model or "",
        base=wanted.base or "",
        has_base=sets.has_base,
        paired=sets.paired,
        prompts_a=len(sets.a),
        prompts_b=len(sets.b),
        answers=sum(len(s.answers) + len(s.base_answers) for s in samples),
        missing_a=sets.missing_a,
        missing_b=sets.missing_b,
        features=len(judged.features),
        differing=sum(f.differs for f in judged.features),
        constant=judged.constant,
        duplicate=judged.duplicate,
        permutations=wanted.permutations,
        smallest_p=smallest_p(len(sets.a), len(sets.b), paired=sets.paired, permutations=wanted.permutations),
        global_p=None if undecided else judged.global_p,
        seed=wanted.seed,
        command=command,
        started=started,
        seconds=seconds,
        settings=paths,
        versions=versions(),
    )


def _write(folder: Path, result: ContrastResult, features: Sequence[FeatureContrast]) -> None:
    write_records(folder / FEATURES, features)
    write_text(folder / MARKDOWN, summary_markdown(result, features))
    write_text(folder / PAGE, page(result, features))
    write_record(folder / RESULT, result)
