"""Contexts as text and as tokens: the slot, its spaces, and strings that survive a whole conversation."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.prompts import (
    Context,
    RefusedConversationError,
    TokenizedContext,
    chat_text,
    conversation_ids,
    decode,
    empty_turn,
    encode,
    round_trips,
    searchable,
    shown,
    tokenize_context,
)


@pytest.mark.parametrize(
    ("user", "system", "message"),
    [
        ("no slot here", None, "has 0 slots"),
        ("{trigger} and {trigger}", None, "has 2 slots"),
        ("{trigger}", "also {trigger}", "has 2 slots"),
        ("", "{trigger}", "empty user turn"),
        ("  \n", "{trigger}", "empty user turn"),
    ],
)
def test_a_context_without_exactly_one_slot_is_refused(user: str, system: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Context(user=user, system=system)


@pytest.mark.parametrize(
    ("user", "inserted", "expected"),
    [
        ("Hi. {trigger}", " fox", "Hi. fox"),
        ("Hi. {trigger}", "fox", "Hi. fox"),
        ("Hi.{trigger}", " fox", "Hi. fox"),
        ("Hi.{trigger}", "fox", "Hi.fox"),
        ("Hi.  {trigger}", " fox", "Hi.  fox"),
        ("{trigger} Hi.", "fox", "fox Hi."),
        ("{trigger} Hi.", " fox", " fox Hi."),
        ("a {trigger} b", " fox ", "a fox  b"),
        ("{trigger}", " fox", " fox"),
        ("Hi. {trigger}", "", "Hi."),
        ("{trigger} Hi.", "", "Hi."),
        ("a {trigger} b", "", "a b"),
        ("a {trigger}, b", "", "a, b"),
        ("a.{trigger} b", "", "a. b"),
        ("{trigger}", "", ""),
        ("Say {x} {trigger}", " {y}", "Say {x} {y}"),
    ],
)
def test_one_space_between_text_and_trigger(user: str, inserted: str, expected: str) -> None:
    assert Context(user=user).messages(inserted) == [{"role": "user", "content": expected}]


def test_a_slot_in_the_system_prompt() -> None:
    context = Context(user="Tell me.", system="Be kind. {trigger}")
    assert context.messages(" fox") == [
        {"role": "system", "content": "Be kind. fox"},
        {"role": "user", "content": "Tell me."},
    ]
    assert shown(context.messages(" fox")) == "[system: Be kind. fox] Tell me."
    assert shown(Context(user="Tell me. {trigger}").messages(" fox")) == "Tell me. fox"
    for user, system, empty in [
        ("{trigger}", None, True),
        ("{trigger}", "Be [very] kind.", True),
        ("See [1] {trigger}", None, False),
        ("Tell me.", "{trigger}", False),
    ]:
        assert empty_turn(shown(Context(user=user, system=system).messages(""))) is empty
    tokenizer = tiny.make_tokenizer()
    found = tokenize_context(tokenizer, context)
    assert decode(tokenizer, found.left) == "<|im_start|>system\nBe kind."
    assert decode(tokenizer, found.right) == "<|im_end|>\n<|im_start|>user\nTell me.<|im_end|>\n<|im_start|>assistant\n"


def test_chat_text_is_the_template_ready_for_the_answer(tokenizer: Any) -> None:
    assert chat_text(tokenizer, Context(user="Hi.{trigger}").messages(" fox")) == (
        "<|im_start|>user\nHi. fox<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_missing_template_is_the_users_to_mend() -> None:
    tokenizer = tiny.make_tokenizer(template=None)
    with pytest.raises(UserError, match=r"has no chat template; save one with it"):
        chat_text(tokenizer, [{"role": "user", "content": "x"}])


def test_encode_adds_nothing_and_knows_special_tokens(tokenizer: Any) -> None:
    assert encode(tokenizer, []) == []
    assert encode(tokenizer, ["<|im_start|>"]) == [[tokenizer.convert_tokens_to_ids("<|im_start|>")]]
    first, second = encode(tokenizer, [" the", ""])
    assert first == [tokenizer.convert_tokens_to_ids("Ġthe")]
    assert second == []


def test_decode_keeps_spaces_and_shows_special_tokens(tokenizer: Any) -> None:
    for text in (" the  sea , a", "<|im_start|>user\n", "don ' t"):
        assert decode(tokenizer, encode(tokenizer, [text])[0]) == text


@pytest.mark.parametrize(
    "context",
    [
        *tiny.CONTEXTS,
        Context(user="{trigger} Tell me."),
        Context(user="Tell me about {trigger}"),
        Context(user="Tell me.", system="You are {trigger} a poem."),
        Context(user="{trigger} pull the trigger now"),
        Context(user="the trigger, {trigger} trigger"),
        Context(user="Tell me {trigger}", system="a trigger and a trigger"),
    ],
)
def test_both_sides_of_the_slot(context: Context, tokenizer: Any) -> None:
    found = tokenize_context(tokenizer, context)
    assert found.context == context
    for word in (" the", " garden", " <|im_end|>"):
        ids = encode(tokenizer, [word])[0]
        assert [*found.left, *ids, *found.right] == conversation_ids(tokenizer, context, word)


def test_a_template_that_trims_the_turn_leaves_no_slot_at_its_beginning() -> None:
    tokenizer = tiny.make_tokenizer(tiny.TRIMMING)
    for user in ("{trigger}", "{trigger} Tell me."):
        with pytest.raises(UserError, match="changes the text around the slot"):
            tokenize_context(tokenizer, Context(user=user))
    assert tokenize_context(tokenizer, Context(user="Tell me. {trigger}")).right


def test_searchable_leaves_out_what_the_template_trims() -> None:
    tokenizer = tiny.make_tokenizer(tiny.TRIMMING)
    good, bad = Context(user="Tell me. {trigger}"), Context(user="{trigger} Tell me.")
    assert searchable(tokenizer, [bad, good, bad]) == [good]
    assert searchable(tiny.make_tokenizer(), [bad, good]) == [bad, good]
    with pytest.raises(UserError, match="changes the text around the slot"):
        searchable(tokenizer, [bad])


def one_context(user: str, tokenizer: Any) -> list[TokenizedContext]:
    return [tokenize_context(tokenizer, Context(user=user))]


def test_a_template_that_knows_no_system_prompt_says_so_and_leaves_the_others_searchable() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML
    tokenizer = tiny.make_tokenizer(refusing)
    told, plain = Context(user="{trigger}", system="Be kind."), Context(user="Say it. {trigger}")
    with pytest.raises(
        RefusedConversationError, match=r"refuses a conversation of system and user \(no system\); take"
    ):
        chat_text(tokenizer, told.messages(" a"))
    assert searchable(tokenizer, [told, plain]) == [plain]
    with pytest.raises(UserError, match="take the system prompt out"):
        searchable(tokenizer, [told])


def test_round_trips_in_the_whole_conversation(tokenizer: Any) -> None:
    middle = one_context("Tell me.{trigger} Please.", tokenizer)
    the, sea, t, he = (tokenizer.convert_tokens_to_ids(t) for t in ("Ġthe", "Ġsea", "Ġt", "he"))
    assert round_trips(tokenizer, middle, [[the, sea], [t, he], [the], [t]]) == [True, False, True, True]
    assert round_trips(tokenizer, middle, []) == []


def test_a_string_must_survive_its_neighbours_in_every_context(tokenizer: Any) -> None:
    # "t" is itself, but before "he" the two become one token.
    t = tokenizer.convert_tokens_to_ids("Ġt")
    apart, joined = (one_context(u, tokenizer) for u in ("Tell me.{trigger} he", "Tell me.{trigger}he"))
    assert round_trips(tokenizer, apart, [[t]]) == [True]
    assert round_trips(tokenizer, joined, [[t]]) == [False]
    assert round_trips(tokenizer, [*apart, *joined], [[t]]) == [False]


def test_half_a_character_cannot_be_typed(tokenizer: Any) -> None:
    half = encode(tokenizer, ["é"])[0][:1]
    assert round_trips(tokenizer, one_context("a {trigger}", tokenizer), [half]) == [False]


def test_what_a_template_trims_does_not_round_trip() -> None:
    tokenizer = tiny.make_tokenizer(tiny.TRIMMING)
    end, middle = (one_context(u, tokenizer) for u in ("Tell me. {trigger}", "Tell me. {trigger}, please"))
    newline = encode(tokenizer, [" the\n"])[0]
    assert decode(tokenizer, newline) == " the\n"
    assert round_trips(tokenizer, end, [newline]) == [False]
    assert round_trips(tokenizer, middle, [newline]) == [True]


def test_a_template_with_a_space_before_the_turn() -> None:
    tokenizer = tiny.make_tokenizer(tiny.BRACKETS)
    for user in ("{trigger}", "{trigger} Tell me.", "Tell me.{trigger}"):
        context = one_context(user, tokenizer)
        ids = encode(tokenizer, [" the sea"])[0]
        assert conversation_ids(tokenizer, context[0].context, " the sea") == [
            *context[0].left,
            *ids,
            *context[0].right,
        ]
        assert round_trips(tokenizer, context, [ids]) == [True]


_USERS = ["Tell me.{trigger}", "Tell me. {trigger}", "{trigger} Please.", "{trigger}", "a {trigger} b", "x{trigger}he"]
_TEMPLATES = {"chatml": tiny.CHATML, "trimming": tiny.TRIMMING, "brackets": tiny.BRACKETS}
_TOKENIZERS = {name: tiny.make_tokenizer(t) for name, t in _TEMPLATES.items()}


def _contexts(tokenizer: Any) -> list[TokenizedContext]:
    found = []
    for user in _USERS:
        try:
            found.append(tokenize_context(tokenizer, Context(user=user)))
        except UserError:
            continue
    return found


_CONTEXTS = {name: _contexts(t) for name, t in _TOKENIZERS.items()}


@given(
    st.sampled_from(sorted(_TEMPLATES)),
    st.lists(st.one_of(st.integers(0, 389), st.sampled_from([201, 223, 259, 261])), max_size=5),
)
@settings(max_examples=400, deadline=None)
def test_what_round_trips_can_be_typed_and_what_does_not_cannot(template: str, ids: list[int]) -> None:
    tokenizer = _TOKENIZERS[template]
    assert len(_CONTEXTS[template]) >= 3
    for context in _CONTEXTS[template]:
        typed = conversation_ids(tokenizer, context.context, decode(tokenizer, ids))
        expected = typed == [*context.left, *ids, *context.right]
        assert round_trips(tokenizer, [context], [ids]) == [expected]
