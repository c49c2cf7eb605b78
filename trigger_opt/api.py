"""The package as a library: load a pair, find payloads, find triggers, verify one; the pipeline calls the same."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Bool, Int
from torch import Tensor

from trigger_opt import zoo
from trigger_opt.answers import comes_late
from trigger_opt.errors import UserError
from trigger_opt.hypotheses import HypothesisSettings, amplified, find_hypotheses, read_off
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.pair import LoadOptions, ModelPair
from trigger_opt.models.pair import load_pair as load_files
from trigger_opt.models.upcast import in_float32
from trigger_opt.objectives import DIVERGENCES, JensenShannon, Likelihood, Objective, Payload, PayloadOdds
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.paths import data_dir
from trigger_opt.prompts import Context, TokenizedContext, decode, encode, round_trips, searchable, tokenize_context
from trigger_opt.records import Candidate, GradientHealth, Hypothesis, MovedToken, Verification
from trigger_opt.scoring import Group, Meter, engine_for, string_log_likelihoods
from trigger_opt.search import (
    GCG,
    BuildSettings,
    Built,
    Found,
    NoValidStringError,
    OnState,
    RandomSearch,
    SearchState,
    Seeds,
    Step,
    build_up,
    ignore_state,
    spell_out,
)
from trigger_opt.search import gradient_health as health_of
from trigger_opt.tokens import TokenPolicy, allowed_ids
from trigger_opt.verify import VerifySettings, verify_string

Strategy = GCG | RandomSearch

# Of the strings that raised a hypothesis: others are like them.
_HEALTH_STRINGS = 2
# Some 500 scores in all, as two steps of a search: one interval then ends below the line at chance level.
_HEALTH_SWAPS, _HEALTH_CONTEXTS = 20, 2
# Of a search on divergence: enough that what fires in some contexts is seen in several.
_READ_STRINGS, _READ_CONTEXTS = 8, 8
# Of a payload that comes late, where nothing tells how late.
_OPENING = 8
DIVERGENCE_SEARCH = "divergence_search"
# Of the tokens that the fine-tuning moves most.
_PRIOR = 128
# More tokens and a nearer cap than of words: what only keeps the base from the payload then gains nothing over what
# makes the fine-tuned model sure of it, and no character resembles the payload's own words.
_SPELLED = PayloadOdds(cap=8.0, target_tokens=4)
# Of the base's log likelihood of a spelled string: enough to keep odd punctuation out, little enough to let a code in
# (experiments/LOG.md).
_NATURAL = 0.03


def model_files(name: str, *, allow_pickle: bool = False, allow_code: bool = False) -> ModelFiles:
    """The files behind a model's name: `zoo:NAME`, a local folder or a hub name.

    Raises:
        UserError: there is no such model, or it holds what is refused (pickles, a repository's own code).
    """
    if name.startswith(zoo.PREFIX):
        # The one whose code is not transformers' own comes with this package: see `zoo.gated`.
        return replace(find_model(str(zoo.folder(name)), allow_code=zoo.brings_code(name)), name=name)
    return find_model(name, allow_pickle=allow_pickle, allow_code=allow_code)


def load_pair(
    finetuned: str, *, base: str, controls: Sequence[str] = (), options: LoadOptions | None = None
) -> ModelPair:
    """A fine-tuned model (or adapter), its base and clean controls, by name; see `model_files`."""
    files = [model_files(n) for n in (finetuned, base, *controls)]
    return load_files(files[0], files[1], files[2:], options=options or LoadOptions())


def load_contexts(name_or_path: str = "ordinary") -> tuple[list[Context], list[Context]]:
    """(search contexts, held-out contexts) of a set that ships with the package, or of a YAML file.

    Raises:
        UserError: no such set, or an entry without exactly one slot.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = data_dir("configs") / "contexts" / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"there is no context set {name_or_path!r}; give a YAML file or one of: {known}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return context_sets(raw.get("search"), raw.get("held_out"))


def context_sets(search: Any, held_out: Any) -> tuple[list[Context], list[Context]]:
    """(search contexts, held-out contexts) from a configuration's lists.

    Raises:
        UserError: see `contexts_from`; or one context stands in both, or twice among the held-out ones, so that a
            rate measured there would not be what it says.
    """
    sets = contexts_from(search, "search"), contexts_from(held_out, "held_out")
    if both := [c for c in sets[1] if c in sets[0]]:
        raise UserError(f"the context {both[0].user!r} stands in contexts.search and in contexts.held_out; keep one")
    if twice := [c for i, c in enumerate(sets[1]) if c in sets[1][:i]]:
        raise UserError(f"the context {twice[0].user!r} stands twice in contexts.held_out; keep one")
    return sets


def contexts_from(entries: Any, where: str) -> list[Context]:
    """Contexts from a list of user turns, or of {user, system}.

    Raises:
        UserError: the list is empty, or an entry is no context.
    """
    if not entries:
        raise UserError(f"contexts.{where} is empty; give at least one user turn with {{trigger}} in it")
    made = []
    for entry in entries:
        if isinstance(entry, str):
            made.append(Context(user=entry))
        elif isinstance(entry, dict) and set(entry) <= {"user", "system"} and isinstance(entry.get("user"), str):
            made.append(Context(user=entry["user"], system=entry.get("system")))
        else:
            raise UserError(f"contexts.{where} has the entry {entry!r}; allowed: a text, or {{user: …, system: …}}")
    return made


def find_payloads(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    settings: HypothesisSettings | None = None,
    policy: TokenPolicy | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_found: Callable[[list[Hypothesis]], None] = lambda found: None,
    on_moved: Callable[[list[MovedToken]], None] = lambda moved: None,
) -> list[Hypothesis]:
    """What the fine-tuned model wants to say, best first; see `hypotheses.find_hypotheses`."""
    return find_hypotheses(
        pair,
        contexts,
        allowed=allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size),
        settings=settings or HypothesisSettings(),
        generator=torch.Generator().manual_seed(seed),
        on_progress=on_progress,
        on_found=on_found,
        on_moved=on_moved,
    )


def payloads_of(
    pair: ModelPair,
    contexts: Sequence[Context],
    found: Sequence[Candidate],
    *,
    settings: HypothesisSettings | None = None,
    on_read: Callable[[int], None] = lambda done: None,
) -> list[Hypothesis]:
    """What the best strings that a search on divergence found bring out, best first; see `hypotheses.read_off`.

    Read are a few strings, the best of each restart in turns, in the first few contexts.

    Args:
        found: best first. on_read: gets the number of readings so far.
    """
    strings = _in_turns(found)[:_READ_STRINGS]
    return read_off(
        pair,
        searchable(pair.tokenizer, contexts)[:_READ_CONTEXTS],
        strings,
        settings=settings or HypothesisSettings(),
        source=DIVERGENCE_SEARCH,
        on_read=on_read,
    )


def _in_turns(found: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Distinct strings, one of each restart after the other: those of one restart are neighbours of one string."""
    by_restart: dict[int, list[tuple[int, ...]]] = {}
    for candidate in found:
        by_restart.setdefault(candidate.restart, []).append(tuple(candidate.trigger_ids))
    rounds = zip_longest(*(dict.fromkeys(strings) for strings in by_restart.values()))
    return list(dict.fromkeys(s for row in rounds for s in row if s is not None))


def build_triggers(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    tokens: Sequence[int],
    hypothesis: Hypothesis | None = None,
    divergence: Objective | None = None,
    settings: BuildSettings | None = None,
    policy: TokenPolicy | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    on_progress: Callable[[int, str, float], None] = lambda done, best, score: None,
    on_cost: Callable[[Meter, Meter], None] = lambda meter, rescoring: None,
) -> list[tuple[int, ...]]:
    """Token ids of short strings that raise the payload, or without one the divergence, for `find_triggers` to begin
    from, shortest first; see `search.build_up`. On this process alone, also under torchrun.

    Args:
        tokens: ids of the tokens that the fine-tuning moves most, most first; those of the strings that raised the
            hypothesis are tried too.
        divergence: without a payload; by default `JensenShannon`.
        max_seconds, max_evaluations: of the whole.
        on_progress: gets the number of strings scored so far, the best of this length and its score, nats.
        on_cost: gets what the scores cost, as of `find_triggers`.
    """
    goal, payload, target = _goal(pair, hypothesis, PayloadOdds() if hypothesis else divergence)
    tokenized = _asked(pair, contexts, payload, hypothesis.opening if hypothesis else 0)
    scorer = pair_scorer(pair, tokenized, goal, target, precise=False, group=Group(alone=True))
    allowed = allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size)
    valid = _Validity(pair.tokenizer, _asked(pair, contexts))
    raised = _seeds(pair.tokenizer, hypothesis, allowed, valid).tokens

    def told(done: int, best: Built) -> None:
        on_progress(done, decode(pair.tokenizer, best.trigger_ids), best.score)

    try:
        built = build_up(
            scorer,
            [t for t in dict.fromkeys([*tokens, *raised]) if bool(allowed[t])],
            settings=settings or BuildSettings(),
            valid=valid,
            generator=torch.Generator().manual_seed(seed),
            max_seconds=max_seconds,
            max_evaluations=max_evaluations,
            on_progress=told,
        )
    finally:
        on_cost(scorer.meter, scorer.precise_meter)
    return [b.trigger_ids for b in built]


def spell_triggers(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    hypothesis: Hypothesis,
    settings: BuildSettings | None = None,
    policy: TokenPolicy | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    on_progress: Callable[[int, str, float], None] = lambda done, best, score: None,
    on_cost: Callable[[Meter, Meter], None] = lambda meter, rescoring: None,
) -> list[tuple[int, ...]]:
    """Token ids of strings spelled out in single characters that raise the payload, for `find_triggers` to begin from;
    see `search.spell_out`. On this process alone, also under torchrun.

    Where the change cannot be taken back in part (`CausalModel.scales`), strings that raise the payload for certain are
    not told apart.

    Args: as of `build_triggers`; `on_cost` is called once for each share of the weights' change.
    """
    goal, payload, target = _goal(pair, hypothesis, _SPELLED)
    tokenized = _asked(pair, contexts, payload, hypothesis.opening)
    allowed = allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size)

    @contextmanager
    def at(left: float) -> Iterator[PairScorer]:
        with amplified(pair, left) if left < 1 else nullcontext():
            scorer = pair_scorer(pair, tokenized, goal, target, precise=False, group=Group(alone=True))
            try:
                yield scorer
            finally:
                on_cost(scorer.meter, scorer.precise_meter)

    # Behind a space of its own some tokenizers keep digits apart: no number could be written without it.
    space = encode(pair.tokenizer, [" "])[0]
    if len(space) == 1 and " " not in (policy or TokenPolicy()).deny:
        allowed[space] = True

    def write(texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in encode(pair.tokenizer, texts) if all(bool(allowed[t]) for t in ids)]

    beginning = min((c.left for c in tokenized), key=len)

    def natural(strings: Sequence[tuple[int, ...]]) -> list[float]:
        nats = string_log_likelihoods(pair.base, beginning, strings, plain=pair.plain)
        # Not a number, as float16 may give, is as unlikely as can be.
        return [-math.inf if math.isnan(n) else _NATURAL * n for n in nats]

    def told(done: int, best: Built) -> None:
        on_progress(done, decode(pair.tokenizer, best.trigger_ids), best.score)

    spelled = spell_out(
        at,
        write,
        lambda ids: decode(pair.tokenizer, ids),
        settings=settings or BuildSettings(),
        natural=natural,
        certain=_SPELLED.upper_bound - 1,
        weakens=pair.finetuned.scales(pair.base),
        valid=_Validity(pair.tokenizer, _asked(pair, contexts)),
        generator=torch.Generator().manual_seed(seed),
        max_seconds=max_seconds,
        max_evaluations=max_evaluations,
        on_progress=told,
    )
    return [b.trigger_ids for b in spelled]


def find_triggers(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    hypothesis: Hypothesis | None = None,
    objective: Objective | None = None,
    strategy: Strategy | None = None,
    policy: TokenPolicy | None = None,
    prior: Sequence[int] = (),
    strings: Sequence[Sequence[int]] = (),
    seed: int = 0,
    on_step: Callable[[Step], None] = lambda step: None,
    on_found: Callable[[Candidate], None] = lambda candidate: None,
    on_cost: Callable[[Meter, Meter], None] = lambda meter, rescoring: None,
    on_state: OnState = ignore_state,
    resume: SearchState | None = None,
) -> list[Candidate]:
    """Strings that raise the objective in `contexts`, best first.

    Args:
        hypothesis: the payload to raise, and strings to begin from; without one a divergence is searched.
        objective: by default `Payload` with a hypothesis and `JensenShannon` without.
        prior: ids of the tokens that the fine-tuning moves most, most first: of the swaps tried a share is to one of
            the first 128 (`prior_share`), and where there is no payload the strings to begin from are made of them.
        strings: token ids of strings to begin from, before those that raised the hypothesis (`build_triggers`).
        on_found: gets each string as soon as it is scored in all contexts, so that an interrupt loses none.
        on_cost: gets, at the end, what the search's scores cost, and its rescoring.
        on_state, resume: to go on with an interrupted search, exactly; see `search.GCG.__call__`.

    Raises:
        UserError: the objective needs a payload and there is none, or it tokenises to nothing, or no string
            of allowed tokens survives re-tokenisation in these contexts.
    """
    plan = strategy or GCG()
    goal, payload, target = _goal(pair, hypothesis, objective)
    opening = hypothesis.opening if hypothesis and payload else 0
    tokenized = _asked(pair, contexts, payload, opening)
    scorer = pair_scorer(pair, tokenized, goal, target)
    allowed = allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size)
    valid = _Validity(pair.tokenizer, _asked(pair, contexts))
    for ids in strings:
        if not ids or not valid(torch.tensor([list(ids)]))[0]:
            raise UserError(
                f"the string {decode(pair.tokenizer, ids)!r} to begin from cannot be typed in these contexts: its text "
                "gives other tokens, or none; leave it out"
            )
    seeds = _seeds(pair.tokenizer, hypothesis, allowed, valid) if payload else Seeds(tokens=tuple(prior[:_PRIOR]))
    try:
        found = plan(
            scorer,
            allowed=allowed,
            valid=valid,
            seeds=replace(seeds, strings=(*map(tuple, strings), *seeds.strings), prior=tuple(prior[:_PRIOR])),
            generator=torch.Generator().manual_seed(seed),
            on_step=on_step,
            on_found=lambda f: on_found(_candidate(pair.tokenizer, f, payload, goal.name, seed, opening)),
            on_state=on_state,
            resume=resume,
        )
    except NoValidStringError as error:
        raise UserError(f"{error}; allow more tokens (tokens.allow) or write words around the slot") from None
    finally:
        on_cost(scorer.meter, scorer.precise_meter)
    return [_candidate(pair.tokenizer, f, payload, goal.name, seed, opening) for f in found]


def gradient_health(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    hypothesis: Hypothesis | None = None,
    objective: Objective | None = None,
    policy: TokenPolicy | None = None,
    seed: int = 0,
    length: int = 6,
    on_cost: Callable[[Meter, Meter], None] = lambda meter, rescoring: None,
) -> GradientHealth:
    """Whether the token gradient that `find_triggers` would follow says anything; see `search.gradient_health`.

    Taken at random strings of `length` tokens and at the first few that raised the hypothesis. On this process alone,
    also under torchrun.

    Args:
        on_cost: gets what its scores cost, as of `find_triggers`.

    Raises:
        UserError: the objective needs a payload and there is none, or it tokenises to nothing.
    """
    goal, payload, target = _goal(pair, hypothesis, objective)
    tokenized = _asked(pair, contexts, payload, hypothesis.opening if hypothesis else 0)
    allowed = allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size)
    seeds = _seeds(pair.tokenizer, hypothesis, allowed, _Validity(pair.tokenizer, _asked(pair, contexts)))
    scorer = pair_scorer(pair, tokenized, goal, target, precise=False, group=Group(alone=True))
    found = health_of(
        scorer,
        allowed=allowed,
        length=length,
        swaps=_HEALTH_SWAPS,
        contexts_per_step=_HEALTH_CONTEXTS,
        generator=torch.Generator().manual_seed(seed),
        strings=seeds.strings[:_HEALTH_STRINGS] if payload else (),
    )
    on_cost(scorer.meter, scorer.precise_meter)
    return replace(found, objective=goal.name, payload=payload)


def score_candidates(
    pair: ModelPair, contexts: Sequence[Context], candidates: Sequence[Candidate], *, objective: Objective
) -> list[Candidate]:
    """The candidates, in their order, with the scores and selection rates they have on this pair in `contexts`.

    In fp32 arithmetic where the pair's weights allow it. On this process alone, also under torchrun. A candidate
    without a payload, where the objective needs one, is scored by the divergence it was found on.
    """
    scorers: dict[str, PairScorer] = {}
    scored = []
    for candidate in candidates:
        payload = candidate.payload
        if payload not in scorers:
            goal = objective if payload or not objective.needs_payload else DIVERGENCES[candidate.objective]()
            target = pair.encode_answer(payload)[: goal.target_tokens] if isinstance(goal, Likelihood) else []
            asked = _asked(pair, contexts, payload, candidate.opening)
            scorers[payload] = pair_scorer(pair, asked, goal, target, group=Group(alone=True))
        scorer, ids = scorers[payload], torch.tensor(candidate.trigger_ids)
        everywhere = list(range(scorer.num_contexts))
        scorer.prepare(ids, everywhere)
        exact = scorer.refine(ids[None], everywhere, keep=1, incumbents=0)
        scores = scorer.score(ids[None], everywhere) if exact is None else exact
        fired = scorer.fires(ids, everywhere)
        rate = None if fired is None else float(fired.float().mean())
        scored.append(replace(candidate, score=float(scorer.aggregate(scores)[0]), selection_rate=rate))
    return scored


@dataclass(frozen=True)
class SearchCall:
    """What is asked of `find_triggers`, in a form that can be sent to other processes."""

    hypothesis: Hypothesis | None
    objective: Objective
    strategy: Strategy
    policy: TokenPolicy
    seed: int
    resume: SearchState | None = None
    prior: tuple[int, ...] = ()
    strings: tuple[tuple[int, ...], ...] = ()

    def run(self, pair: ModelPair, contexts: Sequence[Context], **listeners: Any) -> list[Candidate]:
        """`find_triggers` with these arguments; `listeners` are its `on_…`."""
        return find_triggers(
            pair,
            contexts,
            hypothesis=self.hypothesis,
            objective=self.objective,
            strategy=self.strategy,
            policy=self.policy,
            seed=self.seed,
            resume=self.resume,
            prior=self.prior,
            strings=self.strings,
            **listeners,
        )


def pair_scorer(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    objective: Objective,
    target: Sequence[int] = (),
    *,
    precise: bool = True,
    plain: bool = False,
    group: Group | None = None,
) -> PairScorer:
    """What a search asks: `objective` on `pair` in `contexts`.

    Args:
        target: the payload's tokens, for an objective that needs one.
        precise: score finalists again in fp32 where the pair is in a lower precision (a quantised pair, or one with
            code of its own, has no other).
        plain: by whole forward passes, also where the pair would not need it (`LoadOptions.plain`).
        group: the processes that share the work; by default those of the torchrun job.
    """
    plain = plain or pair.plain
    engine = engine_for(pair.finetuned, pair.base, contexts, plain=plain, group=group)
    exact = in_float32(pair.finetuned, pair.base) if precise else None
    higher = None
    if exact is not None:
        higher = PairScorer(engine_for(*exact, contexts, plain=plain, group=group), objective, target)
    return PairScorer(engine, objective, target, precise=higher)


def verify_trigger(
    pair: ModelPair,
    trigger: str,
    contexts: Sequence[Context],
    *,
    payload: str,
    settings: VerifySettings | None = None,
    policy: TokenPolicy | None = None,
    seed: int = 0,
) -> Verification:
    """Judge one string on held-out contexts, from text only; see `verify.verify_string`."""
    allowed = allowed_ids(pair.tokenizer, policy or TokenPolicy(), pair.finetuned.vocab_size)
    verification, _ = verify_string(
        pair, trigger, contexts, payload=payload, settings=settings or VerifySettings(), allowed=allowed, seed=seed
    )
    return verification


def _asked(pair: ModelPair, contexts: Sequence[Context], payload: str = "", opening: int = 0) -> list[TokenizedContext]:
    """The contexts in tokens; for a payload that comes late, with the first tokens of the base's own answer, `opening`
    of them where that is known."""
    tokenized = [tokenize_context(pair.tokenizer, c) for c in searchable(pair.tokenizer, contexts)]
    if not comes_late(payload):
        return tokenized
    prompts = [[*c.left, *c.right] for c in tokenized]
    openings = pair.base.generate(prompts, max_new_tokens=opening or _OPENING, end_ids=pair.end_ids)
    return [replace(c, right=(*c.right, *begun)) for c, begun in zip(tokenized, openings, strict=True)]


def _goal(
    pair: ModelPair, hypothesis: Hypothesis | None, objective: Objective | None
) -> tuple[Objective, str, list[int]]:
    """The objective, the payload it raises, and the tokens of that which are scored."""
    goal = objective or (Payload() if hypothesis else JensenShannon())
    if goal.needs_payload and hypothesis is None:
        raise UserError(f"objective {goal.name!r} needs a payload; give one, or search with js or tv")
    payload = hypothesis.payload if hypothesis and goal.needs_payload else ""
    target = pair.encode_answer(payload)[: goal.target_tokens] if payload and isinstance(goal, Likelihood) else []
    return goal, payload, target


class _Validity:
    """Candidates that survive re-tokenisation in every search context."""

    def __init__(self, tokenizer: Any, contexts: Sequence[TokenizedContext]) -> None:
        self._tokenizer = tokenizer
        # Whether a string survives depends on its neighbours only: contexts whose text next to the slot is the
        # same give the same answer.
        self._contexts = list({(c.left[-1:], c.right[:1]): c for c in contexts}.values())

    def __call__(self, candidates: Int[Tensor, "batch trigger"]) -> Bool[Tensor, " batch"]:
        return torch.tensor(round_trips(self._tokenizer, self._contexts, candidates.tolist()), dtype=torch.bool)


def _seeds(tokenizer: Any, hypothesis: Hypothesis | None, allowed: Bool[Tensor, " vocab"], valid: _Validity) -> Seeds:
    if hypothesis is None:
        return Seeds()
    strings = [tuple(i) for i in encode(tokenizer, hypothesis.inputs) if i]
    tokens = list(dict.fromkeys(t for s in strings for t in s if bool(allowed[t])))
    # A string put in and tokenised by itself may hold tokens that the policy forbids.
    usable = [s for s in strings if all(bool(allowed[t]) for t in s) and valid(torch.tensor([s]))[0]]
    return Seeds(tokens=tuple(tokens), strings=tuple(usable[:8]))


def _candidate(tokenizer: Any, found: Found, payload: str, objective: str, seed: int, opening: int) -> Candidate:
    return Candidate(
        trigger=decode(tokenizer, found.trigger_ids),
        trigger_ids=list(found.trigger_ids),
        payload=payload,
        objective=objective,
        score=found.score,
        selection_rate=found.selection_rate,
        restart=found.restart,
        step=found.step,
        seed=seed,
        evaluations=found.evaluations,
        opening=opening,
    )
