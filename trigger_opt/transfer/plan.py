"""Which questions are asked: strings, controls, contexts, repeats, models; and what they will cost."""

import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trigger_opt.errors import UserError
from trigger_opt.prompts import Context, shown
from trigger_opt.transfer.controls import near_misses, random_strings
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Line, Request
from trigger_opt.transfer.settings import BATCH_CLIENTS, TransferSettings, batch_sizes, require_activations

KINDS = ("trigger", "near_miss", "random", "none")
# Of the chat template around a message, about.
MESSAGE_TOKENS = 4

# A near miss is never part of the rule, so it is the one to lose.
_FIRST_KEPT = ("trigger", "none", "random", "near_miss")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One planned line and what it is for.

    Attributes:
        kind: one of `KINDS`. string: the string under judgement; empty for "none", asked once for all strings.
        inserted: what is in the slot. context, repeat: numbers. prompt: the user's turn as sent.
    """

    line: Line
    kind: str
    string: str
    inserted: str
    context: int
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What questions will cost, about.

    Attributes:
        characters: of the messages. input_tokens, output_tokens: of questions and expected answers; activations have
            none of the latter. money: at `price_per_million`; 0 when no price was given.
    """

    requests: int
    characters: int
    input_tokens: int
    output_tokens: int
    money: float


@dataclass(frozen=True, kw_only=True)
class _Insertion:
    """One string in the slot of one context. label: the beginning of its identifiers."""

    label: str
    kind: str
    string: str
    inserted: str
    context: int
    number: int = 0


def plan_questions(
    *,
    strings: Sequence[str],
    contexts: Sequence[Context],
    models: Sequence[str],
    settings: TransferSettings,
    server: str,
    known_random: Mapping[str, Sequence[str]],
    seed: int,
) -> list[Question]:
    """All questions, each request once, in an order drawn from `seed`.

    Strings that differ only in spaces around them are one (the first): in many contexts they give the same text. Of
    `contexts` the first `settings.contexts` are used, or all when there are fewer. Where two questions come to the same
    request (a near miss of one string is another), the string's own is kept, then nothing inserted, random, near miss.
    Controls depend on seed, string, context and number alone: with another model or context the rest stays as it was.
    Activations are asked for once a context: for the string, its first random string and nothing inserted.

    Args:
        server: `Client.server`. known_random: string -> random strings of as many tokens that verification used.

    Raises:
        UserError: no string, a blank one, no context, no model, or a client that answers no activations.
    """
    _check(strings, contexts, models, settings)
    alone: dict[str, str] = {}
    for string in strings:
        alone.setdefault(string.strip(), string)
    used = list(contexts[: settings.contexts])
    insertions = [_Insertion(label="none", kind="none", string="", inserted="", context=c) for c in range(len(used))]
    for rank, string in enumerate(alone.values()):
        for context in range(len(used)):
            known = known_random.get(string, ())
            insertions += _insertions(string, context, known=known, rank=rank, settings=settings, seed=seed)
    insertions.sort(key=lambda i: _FIRST_KEPT.index(i.kind))
    questions: dict[str, Question] = {}
    identifiers: set[str] = set()
    for model in dict.fromkeys(models):
        for insertion in insertions:
            messages = tuple(used[insertion.context].messages(insertion.inserted))
            for request in _requests(insertion, messages, model, settings, server):
                if request.key not in questions:
                    line = Line(custom_id=_identifier(insertion, request, identifiers), request=request)
                    identifiers.add(line.custom_id)
                    questions[request.key] = _question(line, insertion)
    ordered = list(questions.values())
    random.Random(seed).shuffle(ordered)
    return ordered


def count_tokens(text: str, settings: TransferSettings) -> int:
    """Tokens of `text`, about: its characters over `characters_per_token`, rounded up."""
    return math.ceil(len(text) / settings.characters_per_token)


def question_tokens(request: Request, settings: TransferSettings) -> int:
    """Tokens of a request's messages, about, with 4 a message for the chat template."""
    return sum(count_tokens(m["content"], settings) + MESSAGE_TOKENS for m in request.messages)


def estimate(questions: Sequence[Question], settings: TransferSettings) -> Estimate:
    """What these questions will cost, about; see `Estimate`."""
    requests = [q.line.request for q in questions]
    # Where the client limits an answer's length, none is longer.
    limits = [r.options.get("max_tokens", settings.answer_tokens) for r in requests if r.endpoint == CHAT]
    asked = sum(question_tokens(r, settings) for r in requests)
    answered = sum(min(settings.answer_tokens, limit) for limit in limits)
    return Estimate(
        requests=len(requests),
        characters=sum(len(m["content"]) for r in requests for m in r.messages),
        input_tokens=asked,
        output_tokens=answered,
        money=(asked + answered) / 1e6 * settings.price_per_million,
    )


def plan_lines(questions: Sequence[Question], settings: TransferSettings, answered: Collection[str]) -> list[str]:
    """What a person reads before anything is spent.

    Args:
        answered: keys of requests whose answers are in the ledger; they cost nothing.
    """
    left = [q for q in questions if q.line.request.key not in answered]
    models = sorted({q.line.request.model for q in questions})
    lines = [_model_line(m, questions, left, settings) for m in models]
    expected = estimate(left, settings)
    total = expected.input_tokens + expected.output_tokens
    lines.append(
        f"to send: {expected.requests:,} requests; tokens, about: {expected.input_tokens:,} of questions + "
        f"{expected.output_tokens:,} of answers = {total:,}"
    )
    if settings.price_per_million > 0:
        lines.append(f"costs about {expected.money:,.2f} at {settings.price_per_million:g} a million tokens")
    return lines + _cap_lines(total, settings)


def _check(
    strings: Sequence[str], contexts: Sequence[Context], models: Sequence[str], settings: TransferSettings
) -> None:
    if not strings:
        raise UserError(
            "there is no string to send: no verified candidate has one of the verdicts "
            f"{', '.join(settings.verdicts) or '(none)'}; widen transfer.verdicts or name strings in transfer.strings "
            f"(transfer.candidates={settings.candidates} takes that many verified ones)"
        )
    if any(not s.strip() for s in strings):
        raise UserError("a string to send is blank; take it out of transfer.strings")
    if not contexts:
        raise UserError("there is no held-out context to ask in; give some in contexts.held_out")
    if not models:
        raise UserError("transfer.models is empty; name at least one, for example transfer.models=[dormant-model-1]")
    require_activations(settings)


def _insertions(
    string: str, context: int, *, known: Sequence[str], rank: int, settings: TransferSettings, seed: int
) -> Iterator[_Insertion]:
    def generator(kind: str) -> random.Random:
        return random.Random(f"{seed} {kind} {context} {string}")

    count = settings.random_strings
    own = known[context * count : (context + 1) * count]
    drawn = {
        "trigger": [string],
        "random": random_strings(string, count, generator("random"), own),
        "near_miss": near_misses(string, settings.near_misses, generator("near_miss")),
    }
    for kind, inserted in drawn.items():
        for number, text in enumerate(inserted):
            label = f"s{rank}-{kind}" if kind == "trigger" else f"s{rank}-{kind}-n{number}"
            yield _Insertion(label=label, kind=kind, string=string, inserted=text, context=context, number=number)


def _requests(
    insertion: _Insertion, messages: tuple[dict[str, str], ...], model: str, settings: TransferSettings, server: str
) -> Iterator[Request]:
    options = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    taken = {} if settings.client == "jsinfer" else options
    for repeat in range(settings.repeats):
        yield Request(server=server, model=model, endpoint=CHAT, messages=messages, options=dict(taken), repeat=repeat)
    if settings.activations and insertion.kind != "near_miss" and insertion.number == 0:
        modules = tuple(settings.activations)
        yield Request(server=server, model=model, endpoint=ACTIVATIONS, messages=messages, module_names=modules)


def _question(line: Line, insertion: _Insertion) -> Question:
    return Question(
        line=line,
        kind=insertion.kind,
        string=insertion.string,
        inserted=insertion.inserted,
        context=insertion.context,
        prompt=shown(line.request.messages),
    )


def _identifier(insertion: _Insertion, request: Request, taken: Collection[str]) -> str:
    mark = "-a" if request.endpoint == ACTIVATIONS else ""
    stem = f"{insertion.label}-c{insertion.context:02}-r{request.repeat}{mark}"
    return next(i for i in (f"{stem}-{request.key[:digits]}" for digits in range(6, 33)) if i not in taken)


def _model_line(model: str, questions: Sequence[Question], left: Sequence[Question], settings: TransferSettings) -> str:
    own = [q for q in questions if q.line.request.model == model]
    kinds = Counter(q.kind for q in own if q.line.request.endpoint == CHAT)
    parts = [f"{kinds[k]:,} {k.replace('_', ' ')}" for k in KINDS if kinds[k]]
    activations = sum(q.line.request.endpoint == ACTIVATIONS for q in own)
    parts += [f"{activations:,} activations"] if activations else []
    to_send = Counter(q.line.request.endpoint for q in left if q.line.request.model == model)
    line = f"{model}: {len(own):,} requests ({', '.join(parts)}), {len(own) - to_send.total():,} answered already"
    if settings.client not in BATCH_CLIENTS:
        return line
    size = batch_sizes(settings)(model)
    batches = sum(math.ceil(n / size) for n in to_send.values())
    return f"{line}, {batches:,} {'batch' if batches == 1 else 'batches'} of at most {size:,}"


def _cap_lines(total: int, settings: TransferSettings) -> list[str]:
    caps = [
        ("transfer.max_tokens", settings.max_tokens, "in all"),
        ("transfer.max_tokens_per_day", settings.max_tokens_per_day, "in 24 hours"),
    ]
    lines = []
    for name, cap, span in caps:
        if cap is not None:
            verdict = "fits" if total <= cap else f"is {total - cap:,} more: it will stop there"
            lines.append(f"cap {name}={cap:,} tokens {span}: the plan alone {verdict}")
    if not lines:
        lines.append("no cap: set transfer.max_tokens or transfer.max_tokens_per_day to have one")
    return lines
