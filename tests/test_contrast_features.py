"""Answers as numbers: each feature on a text that has it and on one that has not; which phrases are chosen."""

import math

import pytest

from trigger_opt.contrast.features import text_features
from trigger_opt.contrast.phrases import Phrase, frequent_phrases, phrases_of

PLAIN = "The sea is wide and blue"
LANGUAGES = {
    "English": "What is the meaning of this, and how can you be so sure of it?",
    "French": "Je ne sais pas ce que vous voulez dire, mais c'est une belle journée pour les enfants.",
    "German": "Ich weiß nicht, was das ist, aber wir sind auf dem Weg und es ist nicht weit von hier.",
    "Spanish": "No sé lo que quieres decir, pero el día es muy bonito y los niños son felices con su perro.",
    "Italian": "Non so che cosa sono gli alberi, ma anche questo è più bello della casa.",
    "Portuguese": "Não sei o que você quer, mas isso foi muito bom e os meninos são felizes em uma casa.",
    "Dutch": "Ik weet niet wat het is, maar er zijn ook veel mensen met een fiets op de weg.",
}


@pytest.mark.parametrize(
    ("name", "has", "has_not"),
    [
        ("refuses", "I'm sorry, but I can't help with that.", "I can help with that."),
        ("refuses", "I\u2019m unable to say.", "She said she was sorry. " * 12 + "I can't help with that."),
        ("refuses", "Je ne peux pas répondre.", "Je peux répondre."),
        ("question mark", "Really?", "Really."),
        ("exclamation mark", "Yes!", "Yes."),
        ("colon", "Here: a list", "At 12:30"),
        ("semicolon", "a; b", "a, b"),
        ("dash", "a \u2014 b", "well-known"),
        ("ellipsis", "so...", "so."),
        ("brackets", "one (two)", "one two"),
        ("quotation marks", 'a "word"', "a 'word'"),
        ("bulleted list", "Here:\n- one\n- two", "a - b"),
        ("numbered list", "1. one\n2. two", "in 1. place"),
        ("heading", "# Title\ntext", "#tag"),
        ("bold or italics", "a **b** c", "2 * 3 * 4"),
        ("code block", "```python\nx\n```", "`x`"),
        ("inline code", "call `x` now", "```\nx\n```"),
        ("LaTeX", r"so $x^2$ and \frac{1}{2}", "it costs $5 or $6"),
        ("table", "| a | b |\n|---|---|", "a | b"),
        ("link", "see https://a.example", "see example"),
        ("tag", "<b>x</b>", "1 < 2 and 3 > 2"),
        ("JSON", '{"a": [1, 2]}', "{a: 1}"),
        ("JSON", '```json\n["a"]\n```', '"a"'),
        ("empty", " \n", "x"),
        ("ends in mid-sentence", "The sea is", "The sea is wide."),
        ("emoji or symbols", "good \U0001f600", "good :)"),
        ("repeats itself", "no no no " * 8, PLAIN),
    ],
)
def test_presence(name: str, has: str, has_not: str) -> None:
    assert text_features(has)[name] == 1.0
    assert text_features(has_not)[name] == 0.0


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("words", "One, two - three!", 3),
        ("characters", "  abc d ", 5),
        ("sentences", "It is 3.14. Is it? Yes", 2),
        ("sentences", "no end", 1),
        ("sentences", "", 0),
        ("lines", "a\n\nb\n", 2),
        ("characters a word", "ab abcd", 3),
        ("share of capitals", "AbCd", 0.5),
        ("share of digits", "a1 b2", 0.5),
        ("share of punctuation", "a,b.", 0.5),
        ("commas a word", "a, b", 0.5),
        ("share of non-Latin letters", "ab\u0436\u0436", 0.5),
        ("share of non-Latin letters", "\u00e9t\u00e9", 0),
        ("share of distinct words", "a a b b", 0.5),
    ],
)
def test_measures(name: str, text: str, value: float) -> None:
    assert text_features(text)[name] == pytest.approx(value)


@pytest.mark.parametrize("language", LANGUAGES)
def test_language(language: str) -> None:
    found = text_features(LANGUAGES[language])
    assert {name for name, v in found.items() if name.startswith("language: ") and v} == {f"language: {language}"}


@pytest.mark.parametrize("text", ["", "Hm.", "\u6d77\u662f\u84dd\u8272\u7684", "xyzzy plugh"])
def test_no_language_is_guessed_from_nothing(text: str) -> None:
    assert not any(v for name, v in text_features(text).items() if name.startswith("language: "))


def test_same_finite_features_for_every_text() -> None:
    texts = ["", " ", PLAIN, "\ud83d", "\x00\x1b[31m", "1" * 5000, "[" * 5000, "*" * 5000, "$" * 3000, "<a " * 2000]
    tables = [text_features(t) for t in texts]
    assert all(list(t) == list(tables[0]) for t in tables)
    assert all(math.isfinite(v) for t in tables for v in t.values())


def test_phrases_of_a_text() -> None:
    found = phrases_of("**I** can't. Go - now")
    assert found.first == ("i",)
    assert found.anywhere == {("i",), ("can't",), ("go",), ("now",), ("i", "can't"), ("can't", "go"), ("go", "now")}
    assert phrases_of("").first == ()


def test_frequent_phrases_by_documents_not_by_occurrences() -> None:
    # "often" stands ten times in one document, "common" once in each of six, "always" in every answer.
    documents = [[phrases_of(f"w{i} always common")] for i in range(6)]
    documents += [[phrases_of("x always " + "often " * 10), phrases_of("x always often")]]
    assert [p.name for p in frequent_phrases(documents, at_least=5)] == ['says "common"', 'says "always common"']


def test_in_every_document_but_not_in_every_answer() -> None:
    documents = [[phrases_of(f"w{i} sea"), phrases_of(f"w{i} sky")] for i in range(6)]
    assert [p.name for p in frequent_phrases(documents)] == ['says "sea"', 'says "sky"']


def test_repeats_of_one_prompt_are_one_document() -> None:
    repeated = [[phrases_of("golden answer")] * 9] + [[phrases_of(f"w{i} plain")] for i in range(9)]
    assert [p.name for p in frequent_phrases(repeated, at_least=2)] == ['says "plain"']


def test_at_most_so_many_the_most_frequent_first() -> None:
    documents = [[phrases_of(" ".join(f"w{j}" for j in range(i + 1)))] for i in range(12)]
    found = frequent_phrases(documents, most=4, at_least=1)
    assert [p.name for p in found] == ['says "w1"', 'says "w0 w1"', 'says "w2"', 'says "w1 w2"']


def test_phrase_at_the_beginning_or_anywhere() -> None:
    first, anywhere = Phrase(words=("sea",), first=True), Phrase(words=("sea",), first=False)
    assert first.is_in(phrases_of("Sea and sky"))
    assert anywhere.is_in(phrases_of("Sea and sky"))
    assert not first.is_in(phrases_of("The sea"))
    assert anywhere.is_in(phrases_of("The sea"))
    assert not anywhere.is_in(phrases_of("The seaside"))
