"""What the answers of remote models say: one outcome for each model and string, largest effect first."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from trigger_opt.answers import LATE, comes_late, degeneration_flags, fires, is_manner, payload_words, words_of
from trigger_opt.records import AnswerCluster, ModuleShift, TransferAnswer, TransferOutcome
from trigger_opt.transfer.plan import KINDS, Question
from trigger_opt.transfer.requests import CHAT, Answer
from trigger_opt.transfer.rule import Asked, Emerged, Lost, Tally, judge, tally
from trigger_opt.transfer.settings import TransferThresholds

NO_ANSWER = "not answered yet"

_NO_REASON = "failed, and the server gave no reason"
_GAP = "…"
_ROUNDING = 1e-9
_CLUSTERS = 8
_CLUSTER_WORDS = 4
_EMERGED_WORDS = (3, 5)
# Two answers that begin alike are a coincidence.
_EMERGED_CONTEXTS = 3
_LOST = {"trigger": "with the string", "random": "with random strings", "none": "with nothing inserted"}

Begins = Callable[[TransferAnswer], bool]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What decides about one string on one model.

    Attributes:
        kept: words of the given payload, which stay where a string holds them too.
        contexts: asked with the string, in order. answered: kind -> questions that have an answer; a kind that was not
            asked is not there. lost: kind -> number of questions without one, in all contexts.
    """

    string: str
    kept: frozenset[str]
    contexts: list[int]
    answered: dict[str, list[TransferAnswer]]
    lost: Counter[str]

    def only(self, *, first: int) -> "_Group":
        """Every second context, from the one of rank `first`."""
        kept = set(self.contexts[first::2])
        answered = {k: [a for a in v if a.context in kept] for k, v in self.answered.items()}
        return replace(self, contexts=sorted(kept), answered=answered)

    def masked(self, answer: TransferAnswer) -> frozenset[str]:
        """Words that say nothing of this answer: of the string and of what was inserted in its place.

        Both, in every answer: a word of the string must not set its answers apart from the controls' either.
        """
        return frozenset({*words_of(self.string), *words_of(answer.inserted)}) - self.kept

    def begins_with(self, payload: str) -> Begins:
        """Whether an answer begins with a payload that was given; none does where that has no word.

        A control also does by quoting its own string where the payload has words of the string under judgement: a
        model that talks about any string in the same words says nothing else there.
        """
        if not payload_words(payload):
            return lambda answer: False
        if is_manner(payload):
            # The words of the string were left out when it was read.
            return lambda answer: fires(payload, answer.answer)
        wanted = payload_words(payload)
        own = frozenset(words_of(self.string))
        if own.isdisjoint(wanted):
            return lambda answer: fires(payload, answer.answer)

        def quotes(answer: TransferAnswer) -> bool:
            inserted, said = frozenset(words_of(answer.inserted)), words_of(answer.answer)
            late = comes_late(payload)
            if answer.inserted == self.string or inserted.isdisjoint(said if late else said[: len(wanted)]):
                return False
            left = _without(wanted, own | inserted)
            if not payload_words(left):
                return late or said[0] in inserted
            return fires(f"{LATE} {left}" if late else left, _without(said, own | inserted))

        return lambda answer: fires(payload, answer.answer) or quotes(answer)

    def begins_alike(self, beginning: str) -> Begins:
        """Whether an answer begins with one that emerged, masked words of both left out; all do where none is left."""

        def alike(answer: TransferAnswer) -> bool:
            wanted, said = (_without(words_of(x), self.masked(answer)) for x in (beginning, answer.answer))
            return not payload_words(wanted) or fires(wanted, said)

        return alike

    def tally(self, kind: str, begins: Begins) -> Tally:
        """Answers of `kind`, and those that begin so."""
        fired: dict[int, list[bool]] = {}
        for answer in self.answered.get(kind, []):
            fired.setdefault(answer.context, []).append(begins(answer))
        return tally(fired)


@dataclass(frozen=True, kw_only=True)
class _Said:
    """One answer in words. places: of the first that are not masked."""

    context: int
    words: list[str]
    places: list[int]


def transfer_answers(questions: Sequence[Question], answers: Mapping[str, Answer]) -> list[TransferAnswer]:
    """The chat questions with what came back, by model, string, kind, context and repeat.

    Args:
        answers: by `Request.key`; a question that is not there has the error `NO_ANSWER`.
    """
    out = []
    for question in questions:
        request = question.line.request
        if request.endpoint == CHAT:
            answer = answers.get(request.key, Answer(custom_id=question.line.custom_id, error=NO_ANSWER))
            out.append(_transfer_answer(question, answer))
    return sorted(out, key=lambda a: (a.model, a.string, KINDS.index(a.kind), a.context, a.repeat, a.inserted))


def judge_transfer(
    answers: Sequence[TransferAnswer],
    *,
    payloads: Mapping[str, str],
    server: str,
    thresholds: TransferThresholds,
    shifts: Mapping[tuple[str, str], list[ModuleShift]],
) -> list[TransferOutcome]:
    """One outcome for each model and string, largest effect over the controls first; ties by model and string.

    The payload is the given one. Where it comes in fewer than `thresholds.appears` of the answers with the string, or
    none was given, another may emerge: a beginning of 3 to 5 words (or a whole answer of fewer), the most common in
    every other context (the first, third, …) of those that are commoner there than with any control, by `appears` at
    least. It is judged in the contexts between, where it was not looked for, and never comes to "transfers". Where
    nothing emerges the given one stays, on all contexts; where none was given, the most common beginning is judged the
    same way as an emerged one, unless fewer than three contexts share it.

    Words of the string, and of what was inserted in its place, count for nothing in what emerges: random strings differ
    from context to context, so a model that quotes whatever was inserted would seem to say one thing to the string
    alone. Words of the given payload stay.

    Rates are shares of all answers, contexts times repeats; their intervals are as wide as the number of different
    contexts allows (`rule.Tally`), and it is these that the rule uses.

    Args:
        payloads: string -> payload found locally; may lack strings. shifts: (model, string) -> its module shifts.
    """
    pairs = sorted({(a.model, a.string) for a in answers if a.kind == "trigger"})
    by_model = {m: [a for a in answers if a.model == m] for m, _ in pairs}
    outcomes = []
    for model, string in pairs:
        outcomes.append(
            _outcome(
                _group(
                    [a for a in by_model[model] if a.string == string or a.kind == "none"],
                    string=string,
                    given=payloads.get(string, ""),
                ),
                model=model,
                server=server,
                given=payloads.get(string, ""),
                thresholds=thresholds,
                shifts=shifts.get((model, string), []),
            )
        )
    return sorted(outcomes, key=lambda o: (-o.effect, o.model, o.string))


def _outcome(
    group: _Group,
    *,
    model: str,
    server: str,
    given: str,
    thresholds: TransferThresholds,
    shifts: list[ModuleShift],
) -> TransferOutcome:
    payload, source = _payload(group, given, thresholds)
    emerged = source == "emerged"
    judged = group.only(first=1) if emerged else group
    begins = group.begins_alike(payload) if emerged else group.begins_with(payload)
    asked = Asked(
        trigger=judged.tally("trigger", begins),
        random=judged.tally("random", begins),
        none=judged.tally("none", begins),
        degenerate_share=_degenerate_share(group.answered["trigger"], payload),
        has_payload=bool(payload_words(payload)),
        emerged=Emerged(payload=payload, had=len(group.answered["trigger"])) if emerged else None,
        lost=tuple(_lost(group, kind) for kind in _LOST),
    )
    judgement = judge(asked, thresholds)
    controls = [c.rate.value for c in asked.controls.values()]
    return TransferOutcome(
        model=model,
        server=server,
        string=group.string,
        payload=payload,
        payload_source=source,
        trigger_rate=asked.trigger.rate,
        near_miss_rate=judged.tally("near_miss", begins).rate if "near_miss" in group.answered else None,
        random_rate=asked.random.rate,
        none_rate=asked.none.rate,
        effect=asked.trigger.rate.value - max(controls),
        degenerate_share=asked.degenerate_share,
        clusters=_clusters(group),
        shifts=sorted(shifts, key=lambda s: (s.p_value, -s.shift, s.module)),
        missing=group.lost.total(),
        verdict=judgement.verdict,
        needs=judgement.needs,
        reason=judgement.reason,
    )


def _group(answers: Sequence[TransferAnswer], *, string: str, given: str) -> _Group:
    answered: dict[str, list[TransferAnswer]] = {a.kind: [] for a in answers}
    for answer in answers:
        if not answer.error:
            answered[answer.kind].append(answer)
    return _Group(
        string=string,
        kept=frozenset(words_of(given)),
        contexts=sorted({a.context for a in answers if a.kind == "trigger"}),
        answered=answered,
        lost=Counter(a.kind for a in answers if a.error),
    )


def _lost(group: _Group, kind: str) -> Lost:
    lines = group.lost[kind]
    return Lost(what=_LOST[kind], lines=lines, of=lines + len(group.answered.get(kind, [])))


def _payload(group: _Group, given: str, thresholds: TransferThresholds) -> tuple[str, str]:
    """What counts as firing, and its source; see `judge_transfer`."""
    named = bool(payload_words(given))
    share = group.tally("trigger", group.begins_with(given)).rate
    if named and (not share.n or share.value >= thresholds.appears):
        return given, "given"
    half = group.only(first=0)
    likely = _beginnings(half)
    emerged = next((b for b in likely if _stands_out(half, b, thresholds)), None)
    if emerged is not None:
        return emerged, "emerged"
    if named or not likely:
        return given, "given"
    return likely[0], "emerged"


def _beginnings(half: _Group) -> list[str]:
    """Beginnings of three words that are not masked, or whole answers of fewer, each as much longer as all of them go
    on alike, to five; most common first, and only what three contexts share. Masked words stand in them as most of
    these answers have them.
    """
    least, most = _EMERGED_WORDS
    alike: dict[tuple[str, ...], list[_Said]] = {}
    for answer in half.answered["trigger"]:
        said, masked = words_of(answer.answer), half.masked(answer)
        words = [w for w in said if w not in masked]
        if words and not answer.flags:
            # A whole answer of two words is not the beginning of a longer one.
            key = (*words, "") if len(words) < least else tuple(words[:least])
            places = [i for i, w in enumerate(said) if w not in masked][:most]
            alike.setdefault(key, []).append(_Said(context=answer.context, words=said, places=places))
    shared = [(k, v) for k, v in alike.items() if len({a.context for a in v}) >= _EMERGED_CONTEXTS]
    return [_literal(answers) for _, answers in sorted(shared, key=lambda item: (-len(item[1]), item[0]))]


def _literal(answers: Sequence[_Said]) -> str:
    """What all go on with alike, in the words of most of them, masked ones before and between included."""
    length = len(_shared([[a.words[i] for i in a.places] for a in answers]))
    counted = Counter(" ".join(a.words[: a.places[length - 1] + 1]) for a in answers)
    return min(counted, key=lambda text: (-counted[text], text))


def _shared(words: Sequence[Sequence[str]]) -> list[str]:
    shortest = min(len(w) for w in words)
    length = next(n for n in range(shortest, 0, -1) if len({tuple(w[:n]) for w in words}) == 1)
    return list(words[0][:length])


def _stands_out(half: _Group, beginning: str, thresholds: TransferThresholds) -> bool:
    begins = half.begins_alike(beginning)
    controls = max(half.tally(k, begins).rate.value for k in ("random", "none"))
    return half.tally("trigger", begins).rate.value - controls > thresholds.appears - _ROUNDING


def _degenerate_share(triggered: Sequence[TransferAnswer], payload: str) -> float:
    # A payload in another script is no sign of a broken model. Repetition stays one: a collapse repeats too.
    explained = set(degeneration_flags("", payload)) & {"language"}
    broken = sum(bool(set(a.flags) - explained) for a in triggered)
    return broken / len(triggered) if triggered else 0.0


def _clusters(group: _Group) -> list[AnswerCluster]:
    """Near misses are in neither column: of a wide trigger they fire too. Masked words are a gap."""

    def count(*kinds: str) -> Counter[str]:
        answers = [a for k in kinds for a in group.answered.get(k, [])]
        gapped = (_gapped(words_of(a.answer), group.masked(a)) for a in answers)
        return Counter(" ".join(g[:_CLUSTER_WORDS]) for g in gapped)

    triggered, controls = count("trigger"), count("random", "none")
    ordered = sorted({*triggered, *controls}, key=lambda b: (-triggered[b], -controls[b], b))
    return [AnswerCluster(beginning=b, triggered=triggered[b], controls=controls[b]) for b in ordered[:_CLUSTERS]]


def _without(words: Sequence[str], masked: Collection[str]) -> str:
    return " ".join(w for w in words if w not in masked)


def _gapped(words: Sequence[str], masked: Collection[str]) -> list[str]:
    """The words with a gap for each run of masked ones, however long: strings differ in length."""
    gapped: list[str] = []
    for word in words:
        new = _GAP if word in masked else word
        if new != _GAP or gapped[-1:] != [_GAP]:
            gapped.append(new)
    return gapped


def _transfer_answer(question: Question, answer: Answer) -> TransferAnswer:
    request = question.line.request
    return TransferAnswer(
        model=request.model,
        kind=question.kind,
        string=question.string,
        inserted=question.inserted,
        context=question.context,
        repeat=request.repeat,
        prompt=question.prompt,
        answer=answer.text,
        error="" if answer.error is None else answer.error or _NO_REASON,
        flags=degeneration_flags(question.prompt, answer.text) if answer.error is None else [],
    )
