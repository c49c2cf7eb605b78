"""The search stage: each payload hypothesis with its share of the budget, and how it goes on after an interruption."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trigger_opt import api, interrupts
from trigger_opt.answers import comes_late
from trigger_opt.config import RunConfig
from trigger_opt.judging import to_verify
from trigger_opt.objectives import DIVERGENCES, Objective
from trigger_opt.progress import say
from trigger_opt.prompts import decode
from trigger_opt.records import (
    BuiltTrigger,
    Candidate,
    Hypothesis,
    MovedToken,
    SearchCost,
    SearchStep,
    append_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report import arithmetic, gradient_sentence
from trigger_opt.rescoring import rescored
from trigger_opt.scoring import Group, Meter, matmul_rate
from trigger_opt.search import GCG, SearchState, Step
from trigger_opt.session import Session, StageOutcome
from trigger_opt.verify import payload_words

ELSEWHERE = 1_000_003
"""Added to the seed of a second search on divergence: no other job of a sweep shall have that one."""
FROM_BEFORE = 4
"""So many of the first one's strings it begins from."""
_COLUMNS = ["trigger", "payload", "score", "selection_rate", "restart", "step"]


@dataclass
class SearchProgress:
    """How far the stage is.

    Attributes:
        goals: the hypotheses searched, None for divergence alone. goal: number of the one searched now. strategy: with
            its share of the budget. spent: evaluations before its search. strings: token ids of those built for it.
            search: from where it goes on; None where it begins.
        found: strings of the hypotheses before. before: seconds of earlier starts.
        told: seconds of the last step told, counted from the first search towards the same. told_before: of those,
            what was spent before this search, on building for it too.
    """

    outcome: StageOutcome
    strategy: api.Strategy
    goals: list[Hypothesis | None]
    goal: int = 0
    spent: int = 0
    search: SearchState | None = None
    found: list[Candidate] = field(default_factory=list)
    before: float = 0.0
    began: float = field(default_factory=time.monotonic)
    told: float = 0.0
    told_before: float = 0.0
    strings: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def begin(cls, session: Session, outcome: StageOutcome) -> "SearchProgress":
        """From what an interrupted start of this stage kept, or from nothing."""
        kept = outcome.state
        if not kept:
            outcome.matmul_rate = _matmul_rate(session)
            return cls(outcome, replace(session.config.search), _goals(session))
        outcome.meter, outcome.rescoring = Meter(**kept["meter"]), Meter(**kept["rescoring"])
        outcome.matmul_rate, outcome.seconds_before = kept["matmul_rate"], kept["elapsed"]
        found = [Candidate(**c) for c in kept["found"]]
        goals = [None if g is None else Hypothesis(**g) for g in kept["goals"]]
        strategy = replace(_strategy(session.config, goals[kept["goal"]]))
        strategy.max_seconds, strategy.max_evaluations = kept["share"]
        state = SearchState.from_plain(kept["search"]) if kept["search"] else None
        where = f"after step {state.step + 1} of restart {state.restart + 1}" if state else "with the next search"
        say(f"{session.title('search')}: goes on {where}")
        outcome.evaluations = kept["evaluations"]
        progress = cls(outcome, strategy, goals, kept["goal"], kept["spent"], state, found, kept["elapsed"])
        progress.told, progress.told_before = kept["told"]
        progress.strings = tuple(tuple(ids) for ids in kept["strings"])
        return progress

    @property
    def elapsed(self) -> float:
        """Seconds of this stage, earlier starts included."""
        return self.before + time.monotonic() - self.began

    def begin_goal(self, config: RunConfig) -> None:
        """Give this hypothesis its share of what is left of the budget; one that goes on has it."""
        if self.search is not None:
            return
        self.spent, self.strings = self.outcome.evaluations, ()
        # Half is kept for the payloads that divergence may bring out.
        to_come = len(self.goals) - self.goal + self.looks_for_payloads(config)
        strategy = _strategy(config, self.goals[self.goal])
        self.strategy = _share(strategy, self.elapsed, self.spent, to_come)
        self.told_before = self.told if self.again else 0.0

    def end_goal(self) -> None:
        """Turn to the next hypothesis."""
        self.goal, self.search = self.goal + 1, None

    def spend_on_building(self, seconds: float) -> None:
        """Take from this hypothesis' share what building strings for it took."""
        evaluations, strategy = self.outcome.evaluations - self.spent, self.strategy
        if strategy.max_seconds is not None:
            strategy.max_seconds = max(1.0, strategy.max_seconds - seconds)
        if strategy.max_evaluations is not None:
            strategy.max_evaluations = max(1, strategy.max_evaluations - evaluations)
        self.spent += evaluations
        self.told_before += seconds

    @property
    def again(self) -> bool:
        """Whether this is a second search on divergence."""
        return self.goal > 0 and self.goals[self.goal] is None

    def looks_for_payloads(self, config: RunConfig) -> bool:
        """Whether the search now is on divergence because no payload is known yet, and is the first such."""
        return self.goals == [None] and config.objective.needs_payload

    def state(self, search: SearchState | None) -> dict[str, Any]:
        """What `begin` starts from; None between two searches."""
        return {
            "goals": [g and asdict(g) for g in self.goals],
            "goal": self.goal,
            "spent": self.spent,
            "evaluations": self.outcome.evaluations,
            "share": (self.strategy.max_seconds, self.strategy.max_evaluations),
            "found": [asdict(c) for c in self.found],
            "elapsed": self.elapsed,
            "told": (self.told, self.told_before),
            "strings": [list(ids) for ids in self.strings],
            "meter": asdict(self.outcome.meter),
            "rescoring": asdict(self.outcome.rescoring),
            "matmul_rate": self.outcome.matmul_rate,
            "search": search and search.plain(),
        }


def search_strings(session: Session, outcome: StageOutcome) -> list[Candidate]:
    """Strings that raise each hypothesis, best first, also written into candidates.jsonl; what it cost, into cost.json.

    After each step, and now and then into the checkpoint, so much is kept that an interrupted stage ends as one that
    was never interrupted.
    """
    progress = SearchProgress.begin(session, outcome)
    objective: Objective = session.config.objective
    try:
        if not outcome.state:
            _look_at_gradient(session, progress.goals[0], outcome)
        while progress.goal < len(progress.goals):
            # Each goal stops itself once a string fires; what it leaves over goes to the next. All are searched: the
            # first may be a persona that fires everywhere, and a later one the backdoor.
            progress.begin_goal(session.config)
            _build_strings(session, progress)
            looks_for_payloads = progress.looks_for_payloads(session.config)
            _search_one(session, progress.goals[progress.goal], progress)
            if looks_for_payloads:
                progress.goals += _read_off(session, progress)
            progress.end_goal()
            if progress.goal < len(progress.goals):
                # The next one builds strings first, and keeps nothing meanwhile.
                session.keep("search", progress.state(None))
    finally:
        # Also after Ctrl-C: what was found so far is worth verifying.
        found = sorted(progress.found, key=lambda c: (-(c.selection_rate or 0.0), -c.score))
        write_records(session.folder.file("candidates.jsonl"), to_verify(found, 200))
        cost = _cost(session, outcome)
        if cost.evaluations:
            write_record(session.folder.file("cost.json"), cost)
    if not session.folder.has("history.jsonl"):
        # Strings it began from fired at once: it ran, and made no step.
        write_records(session.folder.file("history.jsonl"), [])
    if (finer := rescored(session, to_verify(found, 200), objective)) is not None:
        found = finer
        write_records(session.folder.file("candidates.jsonl"), found)
    rows = [[c.trigger, c.payload, c.score, c.selection_rate, c.restart, c.step] for c in found[:100]]
    session.tracker.table("candidates", _COLUMNS, rows)
    say(f"{session.title('arithmetic')}: {arithmetic(cost)}")
    return found


def _goals(session: Session) -> list[Hypothesis | None]:
    config = session.config
    if not config.objective.needs_payload:
        return [None]
    goals: list[Hypothesis | None] = []
    if config.payload:
        goals.append(
            Hypothesis(payload=config.payload, score=0.0, source="given", evidence="given", inputs=[], rivals=[])
        )
    if session.folder.has("hypotheses.jsonl"):
        found = read_records(session.folder.file("hypotheses.jsonl"), Hypothesis)
        # Whether an answer begins with a payload is told by its words; dots and dashes alone could not be verified.
        for h in found:
            given = goals[0] if config.payload else None
            if given and _same_payload(given.payload, h.payload):
                # The payload given was found too: one goal, which begins from what raised it.
                goals[0] = replace(given, inputs=h.inputs, opening=h.opening)
            elif payload_words(h.payload):
                goals.append(h)
    if not goals:
        say(
            f"no payload hypothesis: the search begins on divergence ({config.divergence.objective}) instead of "
            f"{config.objective.name!r}, and reads payloads off what it finds"
        )
        return [None]
    return goals[: config.max_hypotheses]


def _same_payload(a: str, b: str) -> bool:
    return payload_words(a)[:3] == payload_words(b)[:3] and comes_late(a) == comes_late(b)


def _read_off(session: Session, progress: SearchProgress) -> list[Hypothesis | None]:
    """The payloads that strings found on divergence bring out, for the rest of the search, also written into
    read_off.jsonl. Where there is none, divergence again, if a budget is left for it."""
    say(f"{session.title('search')}: what the strings found on divergence say is read …")
    found = sorted(progress.found, key=lambda c: -c.score)
    before = progress.outcome.evaluations

    def on_read(count: int) -> None:
        progress.outcome.evaluations = before + count

    said = api.payloads_of(
        session.pair(), session.search_contexts, found, settings=session.config.hypotheses, on_read=on_read
    )
    said = [h for h in said if payload_words(h.payload)][: session.config.max_hypotheses]
    if not said:
        bounded = session.config.search.max_seconds or session.config.search.max_evaluations
        return [None] if bounded else []
    write_records(session.folder.file("read_off.jsonl"), said)
    say(f"{session.title('search')}: they say {said[0].payload[:60]!r}; the search goes on towards that")
    return [*said]


def _objective(config: RunConfig, goal: Hypothesis | None) -> Objective:
    """Divergence where there is no payload to raise."""
    asked: Objective = config.objective
    return DIVERGENCES[config.divergence.objective]() if goal is None and asked.needs_payload else asked


def _strategy(config: RunConfig, goal: Hypothesis | None) -> api.Strategy:
    """How the search towards this goes, with the whole budget."""
    strategy: api.Strategy = config.search
    if goal is None and config.objective.needs_payload:
        return config.divergence.of(strategy)
    if goal is not None and goal.source == api.DIVERGENCE_SEARCH:
        # The strings that said it are to be made better, and no piece of theirs says it.
        return replace(strategy, trigger_length=config.divergence.trigger_length)
    return strategy


def _look_at_gradient(session: Session, goal: Hypothesis | None, outcome: StageOutcome) -> None:
    """Where the search follows gradients: whether they say anything, for the best goal."""
    config = session.config
    if not isinstance(config.search, GCG):
        return
    health = api.gradient_health(
        session.pair(),
        session.search_contexts,
        hypothesis=goal,
        objective=_objective(config, goal),
        policy=config.tokens,
        seed=config.seed,
        length=_strategy(config, goal).trigger_length,
        on_cost=outcome.spend,
    )
    write_record(session.folder.file("gradient.json"), health)
    say(f"{session.title('gradient')}: {gradient_sentence(health)}")


def _cost(session: Session, outcome: StageOutcome) -> SearchCost:
    meter = outcome.meter
    return SearchCost(
        evaluations=meter.evaluations,
        flops=meter.flops,
        least_flops=meter.least_flops,
        gradient_flops=meter.gradient_flops,
        rescoring_flops=outcome.rescoring.flops,
        seconds=meter.seconds,
        # Other work on the machine slows any one measurement: the better of before and after.
        matmul_rate=Group().size * max(outcome.matmul_rate, _matmul_rate(session)),
    )


def _matmul_rate(session: Session) -> float:
    model = session.pair().finetuned
    return matmul_rate(model.device, next(model.network.parameters()).dtype)


def _share(strategy: api.Strategy, elapsed: float, spent: int, goals_left: int) -> api.Strategy:
    """The strategy with its equal share of what is left of the budget."""
    strategy = replace(strategy)
    if strategy.max_seconds is not None:
        strategy.max_seconds = max(1.0, (strategy.max_seconds - elapsed) / goals_left)
    if strategy.max_evaluations is not None:
        strategy.max_evaluations = max(1, (strategy.max_evaluations - spent) // goals_left)
    return strategy


def _build_strings(session: Session, progress: SearchProgress) -> None:
    """Short strings for the search of this goal to begin from, also written into built.jsonl; one that goes on has
    them."""
    moved, goal, build = _prior(session), progress.goals[progress.goal], session.config.build
    nothing = not (moved and build.max_tokens) and (goal is None or not build.max_characters)
    if progress.search is None and progress.again:
        # A second search on divergence goes on from the first one's best, drawing otherwise.
        best = sorted(progress.found, key=lambda c: -c.score)
        progress.strings = tuple(dict.fromkeys(tuple(c.trigger_ids) for c in best))[:FROM_BEFORE]
        return
    if progress.search is not None or nothing:
        return
    began = progress.elapsed
    made = _built(session, progress, moved)
    progress.spend_on_building(progress.elapsed - began)
    progress.strings = tuple(tuple(b.trigger_ids) for b in made)
    file = session.folder.file("built.jsonl")
    # What an earlier start wrote of this goal and of those after it is made again.
    before = {g.payload if g else "" for g in progress.goals[: progress.goal]}
    written = read_records(file, BuiltTrigger) if before and session.folder.has("built.jsonl") else []
    write_records(file, [*(w for w in written if w.payload in before), *made])


def _built(session: Session, progress: SearchProgress, moved: Sequence[int]) -> list[BuiltTrigger]:
    config, outcome, pair, goal = session.config, progress.outcome, session.pair(), progress.goals[progress.goal]
    builds = bool(moved) and config.build.max_tokens > 0
    spells = goal is not None and config.build.max_characters > 0
    strategy, outset, before = progress.strategy, progress.elapsed, outcome.evaluations

    def left(share: float) -> dict[str, Any]:
        """So much of the search's share, less what building took of it."""
        seconds, evaluations = strategy.max_seconds, strategy.max_evaluations
        spent = progress.elapsed - outset, outcome.evaluations - before
        return {
            "max_seconds": None if seconds is None else max(0.0, share * seconds - spent[0]),
            "max_evaluations": None if evaluations is None else max(1, int(share * evaluations) - spent[1]),
        }

    def on_cost(meter: Meter, rescoring: Meter) -> None:
        outcome.evaluations += meter.evaluations
        outcome.spend(meter, rescoring)

    built: list[tuple[int, ...]] = []
    share = config.build.share
    with session.progress("building", unit="string", seconds=left(share)["max_seconds"]) as bar:
        counted = reached = 0

        def on_progress(done: int, best: str, score: float) -> None:
            nonlocal reached
            reached = counted + done
            bar.update(reached, best=best, score=score)
            interrupts.check()

        with interrupts.deferred():
            if goal is not None and spells:
                # Half of it where words are to be tried too.
                built += api.spell_triggers(
                    pair, session.search_contexts, hypothesis=goal, settings=config.build, policy=config.tokens,
                    seed=config.seed, on_progress=on_progress, on_cost=on_cost, **left(share / 2 if builds else share),
                )  # fmt: skip
                counted = reached
            if builds:
                built += api.build_triggers(
                    pair, session.search_contexts, tokens=moved, hypothesis=goal,
                    divergence=_objective(config, None), settings=config.build, policy=config.tokens,
                    seed=config.seed, on_progress=on_progress, on_cost=on_cost, **left(share),
                )  # fmt: skip
    built = sorted(dict.fromkeys(built), key=len)
    texts = [decode(pair.tokenizer, ids) for ids in built]
    made = [
        BuiltTrigger(payload=goal.payload if goal else "", trigger=text, trigger_ids=list(ids))
        for text, ids in zip(texts, built, strict=True)
    ]
    if made:
        towards = repr(goal.payload[:40]) if goal else "divergence"
        say(f"{session.title('building')}: {len(made)} short strings for {towards}, up to {len(built[-1])} tokens")
    return made


def _search_one(session: Session, goal: Hypothesis | None, progress: SearchProgress) -> None:
    strategy, spent, outcome = progress.strategy, progress.spent, progress.outcome
    seed = session.config.seed + (ELSEWHERE if progress.again else 0)

    def made(candidate: Candidate) -> Candidate:
        # Drawn elsewhere, but of this run's seed; its restarts follow those of the first search.
        restart = candidate.restart + (strategy.num_restarts if progress.again and candidate.restart >= 0 else 0)
        return replace(candidate, seed=session.config.seed, restart=restart)

    payload = goal.payload if goal else ""
    caught: dict[str, Candidate] = {}
    tokenizer = session.pair().tokenizer
    total = strategy.num_steps * strategy.num_restarts
    with session.progress("search", total=total, unit="step", seconds=strategy.max_seconds) as bar:

        def on_step(step: Step) -> None:
            outcome.evaluations = spent + step.evaluations
            text = decode(tokenizer, step.trigger_ids)
            bar.update(
                step.restart * strategy.num_steps + step.step + 1,
                best=text,
                score=step.score,
                evaluations=step.evaluations,
            )
            progress.told = progress.told_before + step.seconds
            restart = step.restart + (strategy.num_restarts if progress.again else 0)
            _record_step(session, payload, text, replace(step, restart=restart, seconds=progress.told), spent)

        def catch(candidate: Candidate) -> None:
            candidate = made(candidate)
            caught[candidate.trigger] = candidate
            outcome.evaluations = max(outcome.evaluations, spent + candidate.evaluations)

        def on_state(make: Callable[[], SearchState]) -> None:
            if session.checkpoints.due() or interrupts.asked():
                session.keep("search", progress.state(make()))
            interrupts.check()

        call = api.SearchCall(
            goal,
            _objective(session.config, goal),
            strategy,
            session.config.tokens,
            seed,
            progress.search,
            _prior(session),
            progress.strings,
        )
        Group().announce(session.call(call))
        try:
            with interrupts.deferred():
                ended = call.run(
                    session.pair(), session.search_contexts, on_step=on_step, on_found=catch, on_cost=outcome.spend,
                    on_state=on_state,
                )  # fmt: skip
        except BaseException:
            # Ctrl-C, a full disk: `search_strings` still writes what came up until then.
            progress.found += caught.values()
            raise
        progress.found += [made(c) for c in ended]


def _prior(session: Session) -> tuple[int, ...]:
    """The tokens that the fine-tuning moves most, where they were looked for."""
    if not session.folder.has("moved.jsonl"):
        return ()
    return tuple(m.token_id for m in read_records(session.folder.file("moved.jsonl"), MovedToken))


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
