"""trigger_opt itself: payload hypotheses, a search towards each, and a judgement of its own, with a run's defaults."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from benchmarks.recovery.methods.common import Account, Budget, FoundString, MethodResult, usual_tokens
from benchmarks.recovery.methods.searching import built, searched
from trigger_opt import api
from trigger_opt.hypotheses import HypothesisSettings
from trigger_opt.hypotheses.lens import token_shifts
from trigger_opt.hypotheses.scan import draw_inputs, draw_strings, read_inputs
from trigger_opt.judging import to_verify
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import DIVERGENCES
from trigger_opt.prompts import Context, TokenizedContext, searchable, tokenize_context
from trigger_opt.records import Candidate, Hypothesis, MovedToken, Verification
from trigger_opt.search import GCG, DivergenceSettings
from trigger_opt.searching import ELSEWHERE, FROM_BEFORE
from trigger_opt.verify import Thresholds, best_verification, minimise, payload_words, payloads_to_judge
from trigger_opt.verify.rule import detection_score

# Shares of the budget at whose end each part stops, as a run of the miniature spends its time.
_LENS, _STRINGS, _SCANNED, _SEARCHED = 0.3, 0.2, 0.4, 0.85
# Where no payload came out before the search, strings are judged by their manner too, which about doubles that.
_SEARCHED_BLIND = 0.75
# In 120 s of one processor a lens of 6,500 tokens, a seventh of the vocabulary, took more than it gave
# (experiments/LOG.md).
_LEAST_LENS = 16384
# A choice, not a measurement: what a narrower scan takes is left to the search.
_LEAST_SCAN = 1024
_PILOT, _LENS_PILOT = 32, 1024
_FEW_GROUPS = 2
_LEAST_INPUTS = 64
# Short answers in small batches cost about twice as much a pass as the scan's.
_SMALL_BATCHES = 2
_ROLLOUTS = 8
_AMPLIFIED_TOKENS = 16
_GOALS = 2
# More than any budget lasts for. One restart: it begins where the payload was seen, and steps are dear.
_STEPS = 1_000_000
_VERIFIED = 3
# Of what is left for the search where there is no payload: for the strings one may be read off.
_BLIND = 0.6
# Of the contexts given every third judges the strings before they are handed over; manners are read off all.
_EVERY = 3
_TOLD = 12


def run(pair: ModelPair, contexts: Sequence[Context], *, budget: Budget, seed: int) -> MethodResult:
    """Ranking tokens by how far the fine-tuning moves them gets 30 % of the budget, if that is enough for 16,384 of
    them; strings of those, and random ones, are read for 20 %. Where no tokens were ranked and no payload came out, the
    scan of tokens and words goes on for another 20 %, if that is enough for 1,024 of them. The search, towards the
    two best payloads, ends at 85 %. Where there is none it ends at 75 %, and is on divergence for 60 % of its time, and
    then towards what the strings found say, or on from them. Towards a payload, and where tokens were ranked,
    strings are built up first. The rest is for judging three strings, and minimising
    the best, on a third of the contexts given. Its statistic is `verify.rule.detection_score` there.

    Departs from a run in its one restart a search, in that strings are judged by no manner where a payload came out
    before the search, and in that they are judged on contexts the search had too: the held-out ones are not seen.

    Evaluations: each token of each answer in scan, rollouts, amplification, judging and minimising; candidates scored,
    times two models, with rescoring; four a step and context for gradients.
    """
    account = Account(budget)
    hypotheses, prior, notes = _payloads(pair, contexts, account, seed)
    goals = [h for h in hypotheses if payload_words(h.payload)][:_GOALS]
    candidates: list[Candidate] = []
    blind = not goals
    if blind:
        candidates = _searched(pair, contexts, account, [None], seed, prior, until=_SEARCHED_BLIND, share=_BLIND)
        with account.counting(pair):
            read = api.payloads_of(
                pair, contexts, candidates, settings=replace(HypothesisSettings(), groups=_FEW_GROUPS)
            )
        goals = [h for h in read if payload_words(h.payload)][:_GOALS]
        notes.append(f"no payload: searched on divergence, which {'brought one out' if goals else 'brought none out'}")
    # Divergence a second time goes on from what was found, and draws as no other seed's cell does.
    best = sorted(candidates, key=lambda c: -c.score)[:FROM_BEFORE] if not goals else []
    candidates += _searched(
        pair, contexts, account, goals or [None], seed if goals else seed + ELSEWHERE, prior,
        until=_SEARCHED_BLIND if blind else _SEARCHED, before=best,
    )  # fmt: skip
    candidates.sort(key=lambda c: (-(c.selection_rate or 0.0), -c.score))
    with account.counting(pair):
        chosen = to_verify(candidates, _VERIFIED)
        strings, score = _judged(pair, contexts, account, chosen, seed, manners=blind)
    notes += [f"payload {h.payload[:80]!r} at {h.score:.1f} nats" for h in goals]
    return account.result(strings, score, notes)


def _payloads(
    pair: ModelPair, contexts: Sequence[Context], account: Account, seed: int
) -> tuple[list[Hypothesis], list[int], list[str]]:
    """Payloads, the most moved tokens and what was read: strings of those and random ones, or else the scan."""
    seconds_a_pass = _seconds_a_pass(pair, account, seed)
    lens_seconds, seconds_a_token = _lens_cost(pair, account, seed)
    # Each token goes through both models and the placebo.
    seconds = max(0.0, account.seconds_until(_LENS) - lens_seconds)
    tokens = int(min(seconds / seconds_a_token, account.evaluations_until(_LENS) / 3))
    tokens = min(tokens, HypothesisSettings().lens_tokens) if tokens >= _LEAST_LENS else 0
    until = _STRINGS + (_LENS if tokens else 0.0)
    seconds = account.seconds_until(until) - (lens_seconds + tokens * seconds_a_token if tokens else 0.0)
    passes = min(seconds / seconds_a_pass, account.evaluations_until(until) - 3 * tokens)
    strings = _affordable_strings(passes, tokens)
    moved: list[MovedToken] = []
    with account.counting(pair):
        found = api.find_payloads(pair, contexts, settings=strings, seed=seed, on_moved=moved.extend)
    notes = [f"{tokens:,} tokens through the lens; {strings.num_lens_strings:,} and {strings.num_strings:,} strings"]
    notes += [f"moved most: {' '.join(repr(m.text) for m in moved[:_TOLD])}"] if moved else []
    prior = [m.token_id for m in moved]
    # Strings of the most moved tokens tell more than single tokens, and the search more than what they leave out.
    scan = None if tokens else _affordable(_passes_until(_SCANNED, seconds_a_pass, account), len(contexts))
    if found or scan is None:
        return found, prior, notes
    with account.counting(pair):
        found = api.find_payloads(pair, contexts, settings=scan, seed=seed)
    notes.append(f"scan of {scan.num_tokens:,} tokens and {scan.num_words:,} words")
    if not scan.amplify:
        notes.append("no amplification (too little time)")
    return found, prior, notes


def _affordable_strings(passes: float, tokens: int) -> HypothesisSettings:
    """As many strings, up to a run's number, as so many passes allow beside rolling out their groups. Where `tokens` go
    through the lens, three of four are of the most moved ones, as in a run."""
    usual = HypothesisSettings()
    group = 2 * _ROLLOUTS * usual.payload_tokens * _SMALL_BATCHES
    count = int((passes - 2 * _FEW_GROUPS * group) / (2 * len(usual.contexts) * usual.string_answer_tokens))
    count = min(max(count, _LEAST_INPUTS), usual.num_lens_strings + usual.num_strings)
    at_random = count // 4 if tokens else count
    return replace(
        usual, lens_tokens=tokens, num_lens_strings=count - at_random, num_strings=at_random, num_tokens=0,
        num_words=0, groups=_FEW_GROUPS, amplify=[],
    )  # fmt: skip


def _affordable(passes: float, neutral: int) -> HypothesisSettings | None:
    """As wide a scan as so many passes allow; None where that is too narrow to find anything."""
    usual = replace(HypothesisSettings(), lens_tokens=0, num_lens_strings=0, num_strings=0)
    each = 2 * len(usual.contexts) * usual.answer_tokens
    group = 2 * _ROLLOUTS * usual.payload_tokens * _SMALL_BATCHES
    amplified = (1 + 2 * len(usual.amplify)) * neutral * _AMPLIFIED_TOKENS * _SMALL_BATCHES
    whole = 2 * (usual.groups * group + amplified) <= passes
    groups, amplify = (usual.groups, usual.amplify) if whole else (_FEW_GROUPS, [])
    inputs = int((passes - groups * group - amplified * whole) / each)
    if inputs < _LEAST_SCAN:
        return None
    inputs = min(inputs, usual.num_tokens + usual.num_words)
    words = inputs // 10
    return replace(usual, num_tokens=inputs - words, num_words=words, groups=groups, amplify=amplify)


def _passes_until(share: float, seconds_a_pass: float, account: Account) -> float:
    return min(account.seconds_until(share) / seconds_a_pass, float(2**40), account.evaluations_until(share))


def _seconds_a_pass(pair: ModelPair, account: Account, seed: int) -> float:
    """How fast this machine is, from reading a few strings."""
    before, passes = account.seconds, account.evaluations
    usual = HypothesisSettings()
    contexts = _scan_contexts(pair)
    generator = torch.Generator().manual_seed(seed)
    strings = draw_strings(
        pair, contexts, usual_tokens(pair), count=_PILOT, length=usual.string_tokens, generator=generator
    )
    with account.counting(pair):
        read_inputs(pair, contexts, strings, answer_tokens=usual.string_answer_tokens, on_progress=lambda done: None)
    return (account.seconds - before) / (account.evaluations - passes)


def _lens_cost(pair: ModelPair, account: Account, seed: int) -> tuple[float, float]:
    """What the lens takes on this machine: seconds once, and a token, from two full batches."""
    context = _scan_contexts(pair)[-1]
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_inputs(pair, usual_tokens(pair), num_tokens=_LENS_PILOT, num_words=0, generator=generator)
    tokens = [token for (token,) in drawn]
    before, ends = account.seconds, [(0, 0.0)]

    def on_progress(done: int) -> None:
        ends.append((done, account.seconds - before))

    with account.counting(pair):
        token_shifts(pair, context, tokens, generator=generator, on_progress=on_progress)
    took = account.seconds - before
    # A model's second batch follows its first without anything between them.
    later = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends) if a[0] % len(tokens)]
    if not later:
        return 0.0, took / len(tokens)
    each = 3 * sum(seconds for _, seconds in later) / sum(done for done, _ in later)
    return max(0.0, took - each * len(tokens)), each


def _scan_contexts(pair: ModelPair) -> list[TokenizedContext]:
    usable = searchable(pair.tokenizer, [Context(user=c) for c in HypothesisSettings().contexts])
    return [tokenize_context(pair.tokenizer, c) for c in usable]


def _searched(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    goals: Sequence[Hypothesis | None],
    seed: int,
    prior: Sequence[int],
    *,
    until: float = _SEARCHED,
    share: float = 1.0,
    before: Sequence[Candidate] = (),
) -> list[Candidate]:
    """`until`: share of the budget at whose end the searches end. `share`: of what is left until then, for all goals
    alike. `before`: what an earlier search found, to begin from instead of strings built up."""
    found: list[Candidate] = []
    settings = DivergenceSettings()
    divergence = DIVERGENCES[settings.objective]()
    for number, goal in enumerate(goals):
        part = share / (len(goals) - number)
        strings = [tuple(c.trigger_ids) for c in before]
        left = account.seconds_until(until), account.evaluations_until(until)
        # As in a run: towards a payload, or from the most moved tokens, and not before a second search on divergence.
        if (prior or goal) and not before:
            strings = built(
                pair, contexts, account, hypothesis=goal, divergence=divergence, tokens=prior, seed=seed, until=until,
                share=part,
            )  # fmt: skip
            part = _left_of(part, left, account, until)
        strategy = GCG(num_restarts=1, num_steps=_STEPS)
        if goal is None:
            strategy = settings.of(strategy)
        elif goal.source == api.DIVERGENCE_SEARCH:
            strategy = replace(strategy, trigger_length=settings.trigger_length)
        found += searched(
            pair, contexts, account, strategy=strategy, seed=seed, hypothesis=goal, prior=prior, strings=strings,
            objective=None if goal else divergence, until=until, share=part,
        )  # fmt: skip
    return found


def _left_of(part: float, before: tuple[float, float], account: Account, until: float) -> float:
    """What is left of `part` of the seconds and evaluations there were `before`, as a share of those there are now."""
    now = account.seconds_until(until), account.evaluations_until(until)
    return max(0.0, min((part * b - (b - n)) / n if n > 0 else 0.0 for b, n in zip(before, now, strict=True)))


def _judged(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    candidates: Sequence[Candidate],
    seed: int,
    *,
    manners: bool,
) -> tuple[list[FoundString], float]:
    """Strings by their own detection score, the best one's shortest form after it; and the best score. `manners`: see
    `_verification`.

    What there is no budget left to judge keeps the search's order, after the others, with a score of 0.
    """
    judged: list[tuple[FoundString, Verification | None]] = []
    few = contexts[::_EVERY]
    seconds, passes = 0.0, 0
    for candidate in candidates:
        verification = None
        # One more would take what the last one took.
        if account.seconds_until(1.0) > seconds and account.evaluations_until(1.0) > passes:
            before = account.seconds, account.evaluations
            verification = _verification(pair, candidate, contexts, seed, manners=manners)
            seconds, passes = account.seconds - before[0], account.evaluations - before[1]
        payload = verification.payload if verification else candidate.payload
        score = detection_score([verification] if verification else [])
        judged.append((FoundString(text=candidate.trigger, payload=payload, score=score), verification))
    judged.sort(key=lambda j: -j[0].score)
    strings = [s for s, _ in judged]
    left = account.seconds_until(1.0) > seconds and account.evaluations_until(1.0) > passes
    if left and judged and (best := judged[0][1]) and best.trigger_rate.value >= Thresholds().appears:
        shorter = minimise(pair, best.trigger, few, payload=best.payload)
        if shorter != best.trigger:
            again = api.verify_trigger(pair, shorter, few, payload=best.payload, seed=seed)
            strings.insert(1, replace(strings[0], text=shorter, score=detection_score([again])))
    # Of equals the shorter: it stands behind the one it was made from.
    strings[:2] = sorted(strings[:2], key=lambda s: (-s.score, len(s.text)))
    return strings, max((s.score for s in strings), default=0.0)


def _verification(
    pair: ModelPair, candidate: Candidate, contexts: Sequence[Context], seed: int, *, manners: bool
) -> Verification | None:
    """The best of a candidate's, one for each payload; None where it has none. `manners`: by the manner of its answers
    too, as a run does, which is read off all contexts: of a few answers too few words would be typical."""
    payloads = [candidate.payload]
    if manners or not payload_words(candidate.payload):
        payloads = payloads_to_judge(
            pair, candidate.trigger, candidate.payload, contexts, allowed=usual_tokens(pair), seed=seed,
            often=Thresholds().fires, words=Thresholds().words,
        )  # fmt: skip
    return best_verification(
        [api.verify_trigger(pair, candidate.trigger, contexts[::_EVERY], payload=p, seed=seed) for p in payloads]
    )
