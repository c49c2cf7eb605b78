"""The frequent words, word pairs and beginnings of all answers together, chosen without looking at the sets.

Because the choice depends on the pool alone, it is the same for every permutation of the labels, and the p-values hold.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trigger_opt.answers import words_of

MOST = 200
LEAST_PROMPTS_WITH_IT = 5


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """One or two words as `words_of` gives them; `first` means at the beginning of the answer."""

    words: tuple[str, ...]
    first: bool

    @property
    def name(self) -> str:
        """As a feature: begins with "i", says "golden ratio"."""
        verb = "begins with" if self.first else "says"
        return f'{verb} "{" ".join(self.words)}"'

    def is_in(self, phrases: "PhrasesOf") -> bool:
        """Whether the text those phrases are of holds it."""
        if self.first:
            return phrases.first == self.words
        return self.words in phrases.anywhere


@dataclass(frozen=True, kw_only=True)
class PhrasesOf:
    """Every phrase of one text: its first word, all words, all pairs of neighbours."""

    first: tuple[str, ...]
    anywhere: frozenset[tuple[str, ...]]


def phrases_of(text: str) -> PhrasesOf:
    """The phrases of a text; signs without a letter or digit are no words."""
    words = [w for w in words_of(text) if any(c.isalnum() for c in w)]
    return PhrasesOf(first=tuple(words[:1]), anywhere=frozenset([*((w,) for w in words), *pairwise(words)]))


def frequent_phrases(
    documents: Sequence[Iterable[PhrasesOf]], *, most: int = MOST, at_least: int = LEAST_PROMPTS_WITH_IT
) -> list[Phrase]:
    """The phrases that occur in most documents, most frequent first, ties by name; those in every answer are left out.

    Args:
        documents: all answers to one prompt each. at_least: documents a phrase must occur in.
    """
    by_document: Counter[tuple[bool, tuple[str, ...]]] = Counter()
    by_answer: Counter[tuple[bool, tuple[str, ...]]] = Counter()
    answers = 0
    for document in documents:
        found = [_keys(answer) for answer in document]
        answers += len(found)
        by_document.update(set().union(*found))
        for keys in found:
            by_answer.update(keys)
    usual = [(n, key) for key, n in by_document.items() if n >= at_least and by_answer[key] < answers]
    usual.sort(key=lambda found: (-found[0], len(found[1][1]), found[1]))
    return [Phrase(words=words, first=first) for _, (first, words) in usual[:most]]


def _keys(answer: PhrasesOf) -> set[tuple[bool, tuple[str, ...]]]:
    keys = {(False, words) for words in answer.anywhere}
    return keys | {(True, answer.first)} if answer.first else keys
