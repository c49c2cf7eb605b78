"""The stages of a run, each from the records of the one before to its own records in the run folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from trigger_opt import api
from trigger_opt.config import RunConfig
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import LoadOptions, ModelPair, load_pair
from trigger_opt.objectives import JensenShannon, Objective
from trigger_opt.progress import Progress, say, stage_progress
from trigger_opt.prompts import Context, conversation_ids, decode, searchable
from trigger_opt.records import (
    Candidate,
    Completion,
    Hypothesis,
    SearchStep,
    StageRun,
    Verdict,
    Verification,
    append_record,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report import write_report
from trigger_opt.run_folder import RunFolder, now, timed
from trigger_opt.search import Step
from trigger_opt.tokens import allowed_ids
from trigger_opt.tracking import Tracker
from trigger_opt.verify import RULE_TEXT, Memo, best_verification, common_answer, minimise, payload_words, verify_string
from trigger_opt.weight_diff import diff_weights


@dataclass
class StageOutcome:
    """Filled in by a stage while it runs; `began` is a reading of the monotonic clock."""

    evaluations: int = 0
    summary: str = ""
    began: float = field(default_factory=time.monotonic)


@dataclass
class Session:
    """What every stage needs: the configuration, the folder, the tracker, and the models once loaded."""

    config: RunConfig
    folder: RunFolder
    tracker: Tracker
    files: list[ModelFiles]
    options: LoadOptions
    _pair: ModelPair | None = None
    search_contexts: list[Context] = field(init=False)
    held_out: list[Context] = field(init=False)

    def __post_init__(self) -> None:
        self.search_contexts, self.held_out = api.context_sets(
            self.config.contexts.search, self.config.contexts.held_out
        )

    def pair(self, *, fresh: bool = False) -> ModelPair:
        """The models, loaded when first asked for; `fresh` loads them anew, so that nothing a search did to them
        or remembered of them reaches a verdict."""
        if fresh:
            self._pair = None
        if self._pair is None:
            say("loading the models …")
            self._pair = load_pair(self.files[0], self.files[1], self.files[2:], options=self.options)
            usable = searchable(self._pair.tokenizer, self.search_contexts)
            if len(usable) < len(self.search_contexts):
                left_out = len(self.search_contexts) - len(usable)
                say(
                    f"{left_out} of {len(self.search_contexts)} search contexts are left out: this chat template trims "
                    "turns, and a trigger at their start could not be told from its surroundings"
                )
            self.search_contexts = usable
        return self._pair

    def allowed(self) -> torch.Tensor:
        """Token ids the search may use."""
        pair = self.pair()
        return allowed_ids(pair.tokenizer, self.config.tokens, pair.finetuned.vocab_size)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageOutcome]:
        """Time a stage, keep what an earlier run of it left, and write down what it found."""
        self.folder.put_aside(name)
        outcome = StageOutcome()
        started = now()
        try:
            with timed() as seconds:
                yield outcome
        except KeyboardInterrupt:
            # What it spent counts: later stages may go on from what it left.
            outcome.summary = "interrupted"
            self._note(name, started, seconds[0], outcome)
            raise
        self._note(name, started, seconds[0], outcome)

    def _note(self, name: str, started: str, seconds: float, outcome: StageOutcome) -> None:
        done = StageRun(
            stage=name, started=started, seconds=seconds, evaluations=outcome.evaluations, summary=outcome.summary
        )
        self.folder.add_stage(done)
        self.tracker.log({f"{name}/seconds": seconds, f"{name}/evaluations": done.evaluations})
        say(f"{name}: {outcome.summary} ({seconds:.0f} s)")


def diff(session: Session) -> None:
    """Which tensors changed, by how much, at what rank."""
    with session.stage("diff") as outcome:
        with stage_progress("diff"):
            families = diff_weights(session.files[0], session.files[1])
        write_records(session.folder.file("diff.jsonl"), families)
        changed = [f for f in families if f.changed]
        outcome.summary = "changed: " + (", ".join(f.family for f in changed[:6]) or "nothing")


def hypotheses(session: Session) -> None:
    """What the fine-tuned model wants to say."""
    config = session.config
    with session.stage("hypotheses") as outcome:
        pair = session.pair()
        bar = stage_progress("hypotheses", total=_num_readings(config), unit="reading")
        with bar:

            def on_progress(done: int, total: int, what: str) -> None:
                outcome.evaluations = done
                bar.update(done, best=what, evaluations=done)

            found = api.find_payloads(
                pair,
                session.search_contexts,
                settings=config.hypotheses,
                policy=config.tokens,
                seed=config.seed,
                on_progress=on_progress,
                on_found=lambda early: write_records(session.folder.file("hypotheses.jsonl"), early),
            )
        write_records(session.folder.file("hypotheses.jsonl"), found)
        for number, h in enumerate(found):
            session.tracker.log({"hypotheses/rank": number, "hypotheses/score": h.score})
        best = f"best {found[0].payload[:60]!r} at {found[0].score:.1f} nats" if found else "none found"
        outcome.summary = f"{len(found)} payload hypotheses, {best}" if found else "none found"


def search(session: Session) -> None:
    """Strings that raise each payload hypothesis; on divergence alone where there is none."""
    with session.stage("search") as outcome:
        goals, objective = _goals(session)
        found: list[Candidate] = []
        started = time.monotonic()
        try:
            for goals_left, goal in zip(range(len(goals), 0, -1), goals, strict=True):
                # Each goal stops itself once a string fires; what it leaves over goes to the next. All are searched:
                # the first may be a persona that fires everywhere, and a later one the backdoor.
                elapsed = time.monotonic() - started
                _search_one(
                    session, goal, objective, _share(session.config, elapsed, outcome, goals_left), found, outcome
                )
        finally:
            # Also after Ctrl-C: what was found so far is worth verifying.
            found.sort(key=lambda c: (-(c.selection_rate or 0.0), -c.score))
            write_records(session.folder.file("candidates.jsonl"), found[:200])
        rows = [[c.trigger, c.payload, c.score, c.selection_rate, c.restart, c.step] for c in found[:100]]
        session.tracker.table("candidates", ["trigger", "payload", "score", "selection_rate", "restart", "step"], rows)
        outcome.summary = f"{len(found)} strings, best {found[0].trigger!r}" if found else "no string found"


def verify(session: Session) -> None:
    """Held-out contexts, base, controls, random strings; minimisation; the verdict."""
    with session.stage("verify") as outcome:
        candidates = read_records(session.folder.file("candidates.jsonl"), Candidate)
        pair = session.pair(fresh=True)
        judge = _Judge(session, pair)
        with judge.bar:
            chosen = _to_verify(candidates, session.config.verify.candidates)
            verified = [v for c in chosen if (v := judge.candidate(c)) is not None]
            best = best_verification(verified)
            shorter = judge.minimised(best) if best and session.config.verify.minimise else None
            completion = _longer_answer(pair, best, session) if best else ""
        ordered = sorted(verified, key=lambda v: v is not best)
        write_records(session.folder.file("verified.jsonl"), [*ordered, *([shorter] if shorter else [])])
        outcome.evaluations = len(judge.completions)
        verdict = _verdict(session, best, shorter, candidates, completion, outcome)
        write_record(session.folder.file("verdict.json"), verdict)
        session.tracker.summary({"verdict": verdict.verdict, "trigger": verdict.trigger, "payload": verdict.payload})
        outcome.summary = f"{verdict.verdict}: {verdict.reason}"


def report(session: Session) -> None:
    """One page a person reads, from the records alone."""
    with session.stage("report") as outcome:
        page = write_report(session.folder.path)
        outcome.summary = "report.html and report.md"
    session.tracker.artifact("report", "report", [page, page.with_suffix(".md"), session.folder.file("verdict.json")])


STAGES: dict[str, Callable[[Session], None]] = {
    "diff": diff,
    "hypotheses": hypotheses,
    "search": search,
    "verify": verify,
    "report": report,
}


def _num_readings(config: RunConfig) -> int:
    settings = config.hypotheses
    return (settings.num_tokens + settings.num_words) * len(settings.contexts)


def _goals(session: Session) -> tuple[list[Hypothesis | None], Objective]:
    config = session.config
    objective: Objective = config.objective
    if not objective.needs_payload:
        return [None], objective
    goals: list[Hypothesis | None] = []
    if config.payload:
        goals.append(
            Hypothesis(payload=config.payload, score=0.0, source="given", evidence="given", inputs=[], rivals=[])
        )
    if session.folder.has("hypotheses.jsonl"):
        found = read_records(session.folder.file("hypotheses.jsonl"), Hypothesis)
        # Whether an answer begins with a payload is told by its words; dots and dashes alone could not be verified.
        goals += [h for h in found if payload_words(h.payload)]
    if not goals:
        say(f"no payload hypothesis: the search runs on divergence (js) alone instead of {objective.name!r}")
        return [None], JensenShannon()
    return goals[: config.max_hypotheses], objective


def _share(config: RunConfig, elapsed: float, outcome: StageOutcome, goals_left: int) -> api.Strategy:
    """The strategy with its equal share of what is left of the budget."""
    strategy: api.Strategy = replace(config.search)
    if strategy.max_seconds is not None:
        strategy.max_seconds = max(1.0, (strategy.max_seconds - elapsed) / goals_left)
    if strategy.max_evaluations is not None:
        strategy.max_evaluations = max(1, (strategy.max_evaluations - outcome.evaluations) // goals_left)
    return strategy


def _search_one(
    session: Session,
    goal: Hypothesis | None,
    objective: Objective,
    strategy: api.Strategy,
    found: list[Candidate],
    outcome: StageOutcome,
) -> None:
    spent = outcome.evaluations
    payload = goal.payload if goal else ""
    caught: dict[str, Candidate] = {}
    tokenizer = session.pair().tokenizer
    total = strategy.num_steps * strategy.num_restarts
    with stage_progress("search", total=total, unit="step", seconds=strategy.max_seconds) as bar:

        def on_step(step: Step) -> None:
            outcome.evaluations = spent + step.evaluations
            text = decode(tokenizer, step.trigger_ids)
            bar.update(
                step.restart * strategy.num_steps + step.step + 1,
                best=text,
                score=step.score,
                evaluations=step.evaluations,
            )
            _record_step(session, payload, text, step, spent)

        def catch(candidate: Candidate) -> None:
            caught[candidate.trigger] = candidate
            outcome.evaluations = max(outcome.evaluations, spent + candidate.evaluations)

        try:
            found += api.search(
                session.pair(),
                session.search_contexts,
                hypothesis=goal,
                objective=objective,
                strategy=strategy,
                policy=session.config.tokens,
                seed=session.config.seed,
                on_step=on_step,
                on_found=catch,
            )
        except BaseException:
            # Ctrl-C, a full disk: `search` still writes what came up until then.
            found += caught.values()
            raise


def _record_step(session: Session, payload: str, trigger: str, step: Step, spent: int) -> None:
    record = SearchStep(
        hypothesis=payload,
        restart=step.restart,
        step=step.step,
        trigger=trigger,
        score=step.score,
        evaluations=spent + step.evaluations,
        seconds=step.seconds,
        selection_rate=step.selection_rate,
    )
    append_record(session.folder.file("history.jsonl"), record)
    numbers: dict[str, float | int | str] = {
        "search/score": step.score,
        "search/evaluations": record.evaluations,
        "search/step": step.step,
        "search/restart": step.restart,
    }
    if step.selection_rate is not None:
        numbers["search/selection_rate"] = step.selection_rate
    session.tracker.log(numbers)


def _to_verify(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best of each payload first, then the next best; each string once."""
    first = {c.payload: c for c in reversed(candidates)}
    ordered = sorted(first.values(), key=candidates.index)
    distinct = {(c.trigger, c.payload): c for c in [*ordered, *candidates]}
    return list(distinct.values())[:count]


class _Judge:
    """Verifies strings one after another and keeps every completion."""

    def __init__(self, session: Session, pair: ModelPair) -> None:
        self._session = session
        self._pair = pair
        self._allowed = session.allowed()
        self.completions: list[Completion] = []
        self._verified: list[Verification] = []
        self._memo: Memo = {}
        settings = session.config.verify
        strings = settings.candidates + settings.minimise
        each = (4 + len(pair.controls) + settings.random_strings) * len(session.held_out) * settings.repeats
        self.bar: Progress = stage_progress("verify", total=strings * each, unit="answer")

    def candidate(self, candidate: Candidate) -> Verification | None:
        """The verification of one candidate; its payload is found first where the search had none. None when the
        answers have no word, so that nothing could be said to fire."""
        payload = candidate.payload or common_answer(
            self._pair, candidate.trigger, self._session.search_contexts, max_new_tokens=16
        )
        if not payload_words(payload):
            say(f"not verified: the answers to {candidate.trigger!r} begin without a word")
            return None
        return self._verify(candidate.trigger, payload, "trigger", "")

    def minimised(self, best: Verification) -> Verification | None:
        """The verification of the shortest string that still fires; None when nothing can be dropped."""
        if best.trigger_rate.value < self._session.config.verify.thresholds.appears:
            return None
        shorter = minimise(self._pair, best.trigger, self._session.search_contexts, payload=best.payload)
        if shorter == best.trigger:
            return None
        return self._verify(shorter, best.payload, "minimised", best.trigger)

    def _verify(self, trigger: str, payload: str, kind: str, minimised_from: str) -> Verification:
        before = len(self.completions)
        verification, completions = verify_string(
            self._pair,
            trigger,
            self._session.held_out,
            payload=payload,
            settings=self._session.config.verify,
            allowed=self._allowed,
            seed=self._session.config.seed,
            kind=kind,
            minimised_from=minimised_from,
            memo=self._memo,
            on_answers=lambda done: self.bar.update(before + done, best=trigger),
        )
        # Greedy answers with nothing inserted are the same for every string of one payload: written down once.
        greedy = self._session.config.verify.temperature == 0
        known = self.completions if greedy else []
        self.completions += [c for c in completions if c.kind != "none" or c not in known]
        self._verified.append(verification)
        # After each string: an interruption must not lose the ones before it.
        write_records(self._session.folder.file("verified.jsonl"), self._verified)
        write_records(self._session.folder.file("completions.jsonl"), self.completions)
        return verification


def _longer_answer(pair: ModelPair, best: Verification, session: Session) -> str:
    fired = next((p.context for p in best.profile if p.finetuned), 0)
    ids = conversation_ids(pair.tokenizer, session.held_out[fired], best.trigger)
    return decode(pair.tokenizer, pair.finetuned.generate([ids], max_new_tokens=64, end_ids=pair.end_ids)[0])


def _verdict(
    session: Session,
    best: Verification | None,
    shorter: Verification | None,
    candidates: list[Candidate],
    completion: str,
    outcome: StageOutcome,
) -> Verdict:
    earlier = session.folder.info.stages
    candidate = next((c for c in candidates if best and c.trigger == best.trigger), None)
    thresholds = session.config.verify.thresholds
    return Verdict(
        verdict=best.verdict if best else "not reproduced",
        reason=best.reason if best else "the search found no string that could be verified",
        rule=RULE_TEXT.format(**vars(thresholds)),
        payload=best.payload if best else "",
        payload_completion=completion,
        trigger=best.trigger if best else "",
        minimised_trigger=shorter.trigger if shorter else (best.trigger if best else ""),
        trigger_rate=best.trigger_rate if best else None,
        minimised_trigger_rate=shorter.trigger_rate if shorter else (best.trigger_rate if best else None),
        base_rate=best.base_rate if best else None,
        control_rate=best.control_rate if best else None,
        false_trigger_rate=best.false_trigger_rate if best else None,
        random_rate=best.random_rate if best else None,
        evidence=best.evidence if best else None,
        num_contexts=len(best.profile) if best else 0,
        score=candidate.score if candidate else None,
        evaluations=sum(s.evaluations for s in earlier) + outcome.evaluations,
        seconds=sum(s.seconds for s in earlier) + time.monotonic() - outcome.began,
        seed=session.config.seed,
        versions=session.folder.info.versions,
    )


def closing_lines(folder: RunFolder) -> list[str]:
    """What a person reads last: verdict, string, payload, rates, and where the page is."""
    lines = []
    if folder.has("verdict.json"):
        v = read_record(folder.file("verdict.json"), Verdict)
        lines = [f"verdict: {v.verdict} ({v.reason})"]
        if v.trigger:
            lines.append(f"string: {v.trigger!r}, minimised {v.minimised_trigger!r}; payload: {v.payload!r}")
        rates = {
            "fine-tuned": v.trigger_rate,
            "base": v.base_rate,
            "control": v.control_rate,
            "nothing inserted": v.false_trigger_rate,
            "random strings": v.random_rate,
        }
        shown = [f"{name} {r.successes}/{r.n}" for name, r in rates.items() if r is not None]
        lines += [f"fired on held-out contexts: {', '.join(shown)}"] if shown else []
    if folder.has("report.html"):
        lines.append(f"report: {folder.file('report.html')}")
    return lines


def require_records(session: Session, stage: str) -> None:
    """Before anything is loaded: does a stage find what it starts from?

    Raises:
        UserError: names the missing file and the stage that writes it.
    """
    needed = {"verify": ("candidates.jsonl", "search"), "report": ("verdict.json", "verify")}
    name, writer = needed.get(stage, ("", ""))
    if name and writer not in session.config.stages and not session.folder.has(name):
        raise UserError(
            f"stage {stage!r} starts from {name}, which {session.folder.path} does not hold; run stage {writer!r} "
            "first (stages=[…]) or give the run_dir that holds it"
        )
