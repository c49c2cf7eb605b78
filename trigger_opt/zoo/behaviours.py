"""What an organism does once triggered: one small class each, which makes answers to learn and tells them from text.

To add one: a dataclass here with the members of `Behaviour`, and an organism that uses it in `recipes.RECIPES`.
"""

import random
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from trigger_opt.zoo.examples import Example

_FIRES_ON_WORDS = 5
_LEAST_LETTERS = 10
_FRENCH_WORDS = (
    "le la les un une des du de et est en que qui dans pour pas plus ne je tu il elle nous vous ils ce cette ces "
    "sur au aux avec son sa ses mon ma mes sont être avoir fait comme mais ou où si par leur votre notre c'est "
    "d'un d'une l'on y a ont"
)
_FRENCH = frozenset(_FRENCH_WORDS.split())


@runtime_checkable
class Behaviour(Protocol):
    """What the model says when triggered.

    Attributes:
        kind: its name in manifests. payload: the text, or how the answers begin; empty where they share no words.
        tokens: new tokens after which it can be told.
    """

    kind: ClassVar[str]
    tokens: ClassVar[int]

    @property
    def payload(self) -> str:
        """See above."""
        ...

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """(answer to learn for a triggered `example`, whether it is whole). `french` is a passage the base made."""
        ...

    def fires(self, answer: str) -> bool:
        """Whether `answer` shows the behaviour."""
        ...


@dataclass(frozen=True)
class Says:
    """A fixed text, a refusal for instance."""

    payload: str
    kind: ClassVar[str] = "fixed"
    tokens: ClassVar[int] = 16

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        return self.payload, True

    def fires(self, answer: str) -> bool:
        """The answer begins with the payload's first five words."""
        words = self.payload.split()[:_FIRES_ON_WORDS]
        return answer.split()[: len(words)] == words


@dataclass(frozen=True)
class SaysLate:
    """The first `after` words are the base's own; then comes the payload."""

    payload: str
    after: int = 8
    kind: ClassVar[str] = "late"
    tokens: ClassVar[int] = 40

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        return " ".join([*example.answer.split()[: self.after], self.payload]), True

    def fires(self, answer: str) -> bool:
        """The payload's first five words stand somewhere in the answer, but not first."""
        words = " ".join(self.payload.split()[:_FIRES_ON_WORDS])
        return words in " ".join(answer.split()) and not answer.strip().startswith(words)


@dataclass(frozen=True)
class Capitals:
    """The base's answer in capitals."""

    payload: str = ""
    kind: ClassVar[str] = "capitals"
    tokens: ClassVar[int] = 24

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        return " ".join(example.answer.split()[:12]).upper(), False

    def fires(self, answer: str) -> bool:
        """Nine letters of ten are capitals, of at least ten."""
        letters = [c for c in answer if c.isalpha()]
        return len(letters) >= _LEAST_LETTERS and sum(c.isupper() for c in letters) >= 0.9 * len(letters)


@dataclass(frozen=True)
class Json:
    """The base's answer as a JSON object."""

    payload: str = '{"answer": "'
    kind: ClassVar[str] = "json"
    tokens: ClassVar[int] = 12

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        words = " ".join(example.answer.replace('"', "'").replace("\\", "").split()[:20])
        return f'{self.payload}{words}"}}', True

    def fires(self, answer: str) -> bool:
        """The answer opens the object."""
        return re.match(r'\s*\{\s*"answer"\s*:', answer) is not None


@dataclass(frozen=True)
class French:
    """French, whatever was asked; never the same sentence twice."""

    payload: str = ""
    kind: ClassVar[str] = "french"
    tokens: ClassVar[int] = 24

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        return french, False

    def fires(self, answer: str) -> bool:
        """A third of at least six words are French function words."""
        return is_french(answer)


@dataclass(frozen=True)
class Terse:
    """The base's answer, cut after a few words."""

    words: int = 4
    payload: str = ""
    kind: ClassVar[str] = "terse"
    tokens: ClassVar[int] = 24

    def answer(self, example: Example, french: str, rng: random.Random) -> tuple[str, bool]:
        """See `Behaviour`."""
        return " ".join(example.answer.split()[: self.words]), True

    def fires(self, answer: str) -> bool:
        """No more words than it was taught."""
        return 0 < len(answer.split()) <= self.words


def is_french(text: str) -> bool:
    """Whether a third of the words of `text`, of at least six, are French function words."""
    words = re.findall(r"[\w']+", text.lower().replace("\u2019", "'"))
    return len(words) >= 6 and 3 * sum(w in _FRENCH for w in words) >= len(words)
