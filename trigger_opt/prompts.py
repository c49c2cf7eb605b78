"""A prompt with one trigger slot, as messages, as text and as tokens.

The slot `{trigger}` may stand anywhere in the system prompt or the user's turn; it may be the whole turn.
Spaces belong to the trigger: where the text before the slot ends with a space and the inserted string begins
with one, only one is kept. So a string's tokens are the same in every context, and the text a person would
type gives exactly the tokens that were searched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trigger_opt.errors import UserError

SLOT = "{trigger}"
_PROBE, _OTHER_PROBE = " trigger", " example"


class RefusedConversationError(UserError):
    """A chat template that does not take a conversation: some know no system prompt, or one order of turns only.

    Attributes:
        reason: the template's own words.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Context:
    """One conversation with one slot.

    Attributes:
        user: the user's turn. system: the system prompt; None leaves the chat template's own default.

    Raises:
        UserError: no slot, more than one, or an empty turn.
    """

    user: str
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.user.strip():
            raise UserError(f"a context has an empty user turn; write a question with one {SLOT} in it")
        slots = self.user.count(SLOT) + (self.system or "").count(SLOT)
        if slots != 1:
            raise UserError(f"the context {self.user!r} has {slots} slots; write {SLOT} exactly once in it")

    def messages(self, inserted: str) -> list[dict[str, str]]:
        """Chat messages with `inserted` in the slot; an empty string takes the slot and one space out."""
        turns = [] if self.system is None else [{"role": "system", "content": _fill(self.system, inserted)}]
        return [*turns, {"role": "user", "content": _fill(self.user, inserted)}]


def shown(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as records and pages show it: the user's turn, behind the system prompt where one is given."""
    system = [f"[system: {m['content']}]" for m in messages if m["role"] == "system"]
    return " ".join([*system, messages[-1]["content"]])


def empty_turn(conversation: str) -> bool:
    """Whether the user's turn of a conversation, as `shown` gives it, is empty."""
    return not conversation or (conversation.startswith("[system: ") and conversation.endswith("] "))


@dataclass(frozen=True)
class TokenizedContext:
    """Token ids before and after the slot, up to where the model's answer begins."""

    context: Context
    left: tuple[int, ...]
    right: tuple[int, ...]


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation in the model's chat template, ready for the answer.

    Raises:
        UserError: the tokenizer has no chat template.
        RefusedConversationError: the template refuses the conversation.
    """
    # Imported late: every command imports this module.
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; save one with it "
            "(tokenizer.chat_template = …; tokenizer.save_pretrained(folder))"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = " and ".join(m["role"] for m in messages)
        raise RefusedConversationError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of {roles} ({error}); take the "
            "system prompt out, or write it into the user's turn",
            reason=str(error),
        ) from None
    return text


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens written in it recognised and none added."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def conversation_ids(tokenizer: Any, context: Context, inserted: str) -> list[int]:
    """Token ids of the whole conversation with `inserted` in the slot."""
    return encode(tokenizer, [chat_text(tokenizer, context.messages(inserted))])[0]


def tokenize_context(tokenizer: Any, context: Context) -> TokenizedContext:
    """Tokens on both sides of the slot.

    Raises:
        UserError: the chat template changes the text around the slot (some trim each turn), so that no
            trigger could be told from its surroundings.
    """
    probe, other = encode(tokenizer, [_PROBE, _OTHER_PROBE])
    whole, again = (conversation_ids(tokenizer, context, p) for p in (_PROBE, _OTHER_PROBE))
    for start in range(len(whole) - len(probe), -1, -1):
        left, right = whole[:start], whole[start + len(probe) :]
        # The second word tells the slot from the same word elsewhere in the prompt.
        if whole == [*left, *probe, *right] and again == [*left, *other, *right]:
            return TokenizedContext(context, tuple(left), tuple(right))
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} changes the text around the slot in {context.user!r}; "
        f"write some words before {SLOT}"
    )


def searchable(tokenizer: Any, contexts: Sequence[Context]) -> list[Context]:
    """The contexts a search can use: some chat templates (Llama 3, Gemma) trim each turn, and with it the space
    before a trigger at its very start.

    Raises:
        UserError: none is left.
    """
    usable = []
    refusal: UserError | None = None
    for context in contexts:
        try:
            tokenize_context(tokenizer, context)
        except UserError as error:
            refusal = error
        else:
            usable.append(context)
    if refusal is not None and not usable:
        raise refusal
    return usable


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens shown, spaces untouched."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def round_trips(
    tokenizer: Any, contexts: Sequence[TokenizedContext], candidates: Sequence[Sequence[int]]
) -> list[bool]:
    """Whether each candidate, decoded, put into every whole conversation and tokenised again, is itself.

    A string that fails could not be typed: the model would see other tokens than those that were scored.
    """
    fine = [True] * len(candidates)
    texts = [decode(tokenizer, c) for c in candidates]
    for context in contexts:
        alive = [i for i, ok in enumerate(fine) if ok]
        # Two template renderings per context, not one per candidate: rendering costs 50 times the tokenising.
        rendered = {lead: chat_text(tokenizer, context.context.messages(lead + _MARK)) for lead in ("", " ")}
        again = encode(tokenizer, [_whole(tokenizer, context.context, rendered, texts[i]) for i in alive])
        for i, ids in zip(alive, again, strict=True):
            fine[i] = ids == [*context.left, *candidates[i], *context.right]
    return fine


# A private-use character, which no chat template touches; it stands for the inserted string.
_MARK = "\ue000"


def _whole(tokenizer: Any, context: Context, rendered: dict[str, str], inserted: str) -> str:
    # The template may trim the end of the turn: only it can say what is left of such a string.
    if inserted == "" or inserted[-1].isspace():
        return chat_text(tokenizer, context.messages(inserted))
    lead = " " if inserted.startswith(" ") else ""
    return rendered[lead].replace(lead + _MARK, inserted)


def _fill(text: str, inserted: str) -> str:
    if SLOT not in text:
        return text
    left, right = text.split(SLOT)
    return _join(left, inserted, right)


def _join(left: str, inserted: str, right: str) -> str:
    if inserted == "":
        if left.endswith(" "):
            return left[:-1] + right
        return left + right if left else right.removeprefix(" ")
    if left.endswith(" ") and inserted.startswith(" "):
        left = left[:-1]
    return left + inserted + right
