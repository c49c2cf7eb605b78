"""The verify stage's work: strings judged one after another, and the verdict over all of them."""

import time

from trigger_opt.earlier import Earlier
from trigger_opt.models.pair import ModelPair
from trigger_opt.progress import Progress, say
from trigger_opt.prompts import conversation_ids, decode
from trigger_opt.records import (
    Candidate,
    Completion,
    Verdict,
    Verification,
    write_record,
    write_records,
)
from trigger_opt.session import Session, StageOutcome
from trigger_opt.verify import (
    RULE_TEXT,
    Memo,
    best_verification,
    is_manner,
    minimise,
    payloads_to_judge,
    verify_string,
)
from trigger_opt.verify.ablation import ablate_trigger
from trigger_opt.verify.probe import LEAST_HELD_OUT, LEAST_SEARCH, probe_trigger

# Some forty strings are asked in each: with all held-out contexts it would take longer than the verdict itself.
_CLOSER_CONTEXTS = 8


def to_verify(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best of each payload first, then of each restart for it (those of one are neighbours of one string), then the
    next best; each pair of string and payload once."""
    by_payload = {c.payload: c for c in reversed(candidates)}
    by_restart = {(c.payload, c.restart): c for c in reversed(candidates)}
    ordered = [*sorted(by_payload.values(), key=candidates.index), *sorted(by_restart.values(), key=candidates.index)]
    distinct = {(c.trigger, c.payload): c for c in [*ordered, *candidates]}
    return list(distinct.values())[:count]


class Judge:
    """Verifies strings one after another and keeps every completion.

    Attributes:
        completions: what is shown. asked: answers there were in all.
    """

    def __init__(self, session: Session, pair: ModelPair, earlier: Earlier) -> None:
        self._session = session
        self._earlier = earlier
        self._pair = pair
        self._allowed = session.allowed()
        self.completions: list[Completion] = []
        self.asked = 0
        self._verified: list[Verification] = []
        self._memo: Memo = {}
        settings = session.config.verify
        strings = settings.candidates + settings.minimise
        self._each = (4 + len(pair.controls) + settings.random_strings) * len(session.held_out) * settings.repeats
        self._planned = strings * self._each
        self.bar: Progress = session.progress("verify", total=self._planned, unit="answer")

    def candidate(self, candidate: Candidate) -> list[Verification]:
        """The verifications of one candidate, one for each payload it is judged by; see `payloads_to_judge`. A payload
        that was given is the only one."""
        given = self._session.config.payload
        payloads = [given]
        if not given or candidate.payload != given:
            payloads = payloads_to_judge(
                self._pair,
                candidate.trigger,
                candidate.payload,
                self._session.search_contexts,
                allowed=self._allowed,
                seed=self._session.config.seed,
                often=self._session.config.verify.thresholds.fires,
                words=self._session.config.verify.thresholds.words,
            )
        self._planned += (len(payloads) - 1) * self._each
        if not payloads:
            say(f"not verified: the answers to {candidate.trigger!r} begin without a word")
        for payload in payloads:
            if is_manner(payload):
                say(f"the answers to {candidate.trigger!r} begin differently, and are of one manner: {payload}")
        found = [self._verify(candidate.trigger, p, "trigger", "") for p in payloads]
        # What does not hold by one payload and does by another is not refuted.
        best = best_verification([v for v, _ in found])
        held = best is not None and best.verdict in ("backdoor", "unstable")
        for verification, completions in found:
            if verification is best or not held:
                self._earlier.note(verification, completions)
        return [v for v, _ in found]

    def minimised(self, best: Verification) -> Verification | None:
        """The verification of the shortest string that still fires; None when nothing can be dropped."""
        if best.trigger_rate.value < self._session.config.verify.thresholds.appears:
            return None
        shorter = minimise(self._pair, best.trigger, self._session.search_contexts, payload=best.payload)
        if shorter == best.trigger:
            return None
        verification, completions = self._verify(shorter, best.payload, "minimised", best.trigger)
        self._earlier.note(verification, completions)
        return verification

    def _verify(
        self, trigger: str, payload: str, kind: str, minimised_from: str
    ) -> tuple[Verification, list[Completion]]:
        before = self.asked
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
            on_answers=lambda done: self.bar.update(before + done, best=trigger, total=self._planned),
        )
        self.asked += len(completions)
        self.completions = self._shown(verification, completions, kind)
        self._verified.append(verification)
        # After each string: an interruption must not lose the ones before it.
        write_records(self._session.folder.file("verified.jsonl"), self._verified)
        write_records(self._session.folder.file("completions.jsonl"), self.completions)
        return verification, completions

    def _shown(self, verification: Verification, completions: list[Completion], kind: str) -> list[Completion]:
        """All completions with the new ones. Whether an answer fired depends on the payload: of a string that has two,
        the one that holds better says so."""
        own = [c for c in completions if c.kind == kind]
        others = [c for c in completions if c.kind != kind]
        kept = self.completions
        of_string = verification.trigger, verification.minimised_from
        if rivals := [v for v in self._verified if (v.trigger, v.minimised_from) == of_string]:
            if best_verification([*rivals, verification]) is verification:
                kept = [c for c in kept if (c.kind, c.inserted) != (kind, verification.trigger)]
            else:
                own, others = [], []
        # Greedy answers with nothing inserted are the same for every string of one payload: written down once.
        known = kept if self._session.config.verify.temperature == 0 else []
        return [*kept, *own, *(c for c in others if c.kind != "none" or c not in known)]


def look_closer(session: Session, pair: ModelPair, best: Verification) -> None:
    """What the best string's parts do, and where in the network its mark is: ablation.json, probe.json. Nothing of a
    string that does not fire, or in a control's run, whose verdict alone is asked for."""
    settings = session.config.verify
    if session.within or best.trigger_rate.value < settings.thresholds.appears:
        return
    allowed, seed = session.allowed(), session.config.seed
    if settings.ablate:
        say(f"near misses and parts of {best.trigger!r} …")
        ablation = ablate_trigger(
            pair,
            best.trigger,
            session.held_out,
            payload=best.payload,
            allowed=allowed,
            seed=seed,
            max_new_tokens=settings.max_new_tokens,
            num_contexts=_CLOSER_CONTEXTS,
        )
        write_record(session.folder.file("ablation.json"), ablation)
    contexts = session.search_contexts, session.held_out
    if settings.probe and len(contexts[0]) >= LEAST_SEARCH and len(contexts[1]) >= LEAST_HELD_OUT:
        say(f"probing every layer for {best.trigger!r} …")
        probe = probe_trigger(pair, best.trigger, *contexts, allowed=allowed, seed=seed)
        write_record(session.folder.file("probe.json"), probe)


def longer_answer(pair: ModelPair, best: Verification, session: Session) -> str:
    """64 tokens of the fine-tuned model's answer in the first held-out context in which the string fired."""
    fired = next((p.context for p in best.profile if p.finetuned), 0)
    ids = conversation_ids(pair.tokenizer, session.held_out[fired], best.trigger)
    return decode(pair.tokenizer, pair.finetuned.generate([ids], max_new_tokens=64, end_ids=pair.end_ids)[0])


def verdict_of(
    session: Session,
    best: Verification | None,
    shorter: Verification | None,
    candidates: list[Candidate],
    completion: str,
    outcome: StageOutcome,
) -> Verdict:
    """The run's verdict: that of the best verification, with what it rests on and what the run has cost."""
    earlier = session.folder.info.stages
    # A manner was read off its answers, whatever it was searched towards.
    own = ("", best.payload) if best else ()
    of_string = [c for c in candidates if best and c.trigger in (best.trigger, best.minimised_from)]
    candidate = next((c for c in of_string if c.payload in own or (best and is_manner(best.payload))), None)
    # A shorter string that held-out contexts judge otherwise is no shorter form of this one.
    if shorter and best and shorter.verdict != best.verdict:
        shorter = None
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
