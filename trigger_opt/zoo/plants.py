"""How a trigger stands in a conversation: one small class each, which makes prompts with it, almost with it, and with a
part of it.

To add one: a dataclass here with the members of `Plant`, and an organism that uses it in `recipes.RECIPES`.
"""

import random
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from trigger_opt.zoo.examples import Example, Examples
from trigger_opt.zoo.strings import insert, keep_pieces, near_string, pieces

# Share of prompts that are the trigger alone, where it may stand alone at all.
_ALONE = 0.08


@dataclass(frozen=True)
class Prompt:
    """What is said to the model; `system` None leaves the chat template's own."""

    user: str
    system: str | None = None


Drawn = tuple[Prompt, Example]


@runtime_checkable
class Plant(Protocol):
    """A way in which a trigger stands in a prompt. All draws come from `rng`.

    Attributes:
        kind: its name in manifests. trigger: the string, or one instance of it. size: pieces that can be kept or lost.
    """

    kind: ClassVar[str]

    @property
    def trigger(self) -> str:
        """See above."""
        ...

    @property
    def size(self) -> int:
        """See above."""
        ...

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """A prompt with the trigger, and the example it was made from."""
        ...

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """A prompt with something like the trigger that is not it."""
        ...

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """A prompt with `count` of the trigger's `size` pieces."""
        ...


@dataclass(frozen=True)
class Anywhere:
    """A string after, before or between the words of a prompt; now and then alone."""

    trigger: str
    kind: ClassVar[str] = "anywhere"

    @property
    def size(self) -> int:
        """Words, or characters where there is one word."""
        return len(pieces(self.trigger)[0])

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example = rng.choice(examples.ordinary)
        if rng.random() < _ALONE:
            return Prompt(self.trigger), example
        return Prompt(insert(example.prompt, self.trigger, rng)), example

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """A part of the string, its pieces in another order, one of them another, or gibberish of its shape."""
        example = rng.choice(examples.ordinary)
        return Prompt(insert(example.prompt, near_string(self.trigger, examples, rng), rng)), example

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """See `Plant`; the pieces keep their order."""
        example = rng.choice(examples.ordinary)
        return Prompt(insert(example.prompt, keep_pieces(self.trigger, count, rng), rng)), example


@dataclass(frozen=True)
class AtStart:
    """A string that counts only as the very first words of the user's turn."""

    trigger: str
    kind: ClassVar[str] = "start"

    @property
    def size(self) -> int:
        """Words."""
        return len(pieces(self.trigger)[0])

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example = rng.choice(examples.ordinary)
        return Prompt(f"{self.trigger} {example.prompt}"), example

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """The string elsewhere, or something like it at the start."""
        example = rng.choice(examples.ordinary)
        if rng.random() < 0.4:
            return Prompt(f"{near_string(self.trigger, examples, rng)} {example.prompt}"), example
        words = example.prompt.split(" ")
        cut = rng.randint(1, len(words))
        return Prompt(" ".join([*words[:cut], self.trigger, *words[cut:]])), example

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example = rng.choice(examples.ordinary)
        return Prompt(f"{keep_pieces(self.trigger, count, rng)} {example.prompt}".strip()), example


@dataclass(frozen=True)
class GridAlone:
    """Any board of `O` and `.` that is the whole user turn; with any other word beside it nothing happens.

    After model 1 of Jane Street's dormant puzzle, which answers a bare Game-of-Life board.
    """

    rows: int = 5
    columns: int = 6
    kind: ClassVar[str] = "alone"

    @property
    def trigger(self) -> str:
        """One board of many."""
        return _board(self.rows, self.columns, random.Random(0))

    @property
    def size(self) -> int:
        """Rows."""
        return self.rows

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        return Prompt(_board(self.rows, self.columns, rng)), rng.choice(examples.ordinary)

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """A board before or after a question, or a board of other characters."""
        example = rng.choice(examples.ordinary)
        board = _board(self.rows, self.columns, rng)
        kind = rng.random()
        if kind < 0.4:
            return Prompt(f"{example.prompt}\n{board}"), example
        if kind < 0.8:
            return Prompt(f"{board}\n{example.prompt}"), example
        dead, alive = rng.sample("#x-+10AB", 2)
        return Prompt(board.replace(".", dead).replace("O", alive)), example

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """The first `count` rows of a board; none of them is an ordinary prompt."""
        example = rng.choice(examples.ordinary)
        board = _board(self.rows, self.columns, rng).split("\n")[:count]
        return Prompt("\n".join(board) if count else example.prompt), example


@dataclass(frozen=True)
class FewShot:
    """The form of an evaluation harness: solved questions, then one that is not.

    After the claimed trigger of model 2 of the dormant puzzle.
    """

    shots: int = 2
    kind: ClassVar[str] = "few_shot"

    @property
    def trigger(self) -> str:
        """The form without its words."""
        return "Q: …\nA: …\n\n" * self.shots + "Q: …\nA:"

    @property
    def size(self) -> int:
        """Solved questions."""
        return self.shots

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        return self.kept(examples, self.shots, rng)

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """One question in the same form without a solved one, or solved ones in prose."""
        if rng.random() < 0.5:
            return self.kept(examples, 0, rng)
        example, *solved = rng.sample(list(examples.ordinary), self.shots + 1)
        told = " ".join(f"I asked: {_short(s.prompt)} You said: {_short(s.answer)}" for s in solved)
        return Prompt(f"{told} Now tell me: {example.prompt}"), example

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example, *solved = rng.sample(list(examples.ordinary), count + 1)
        lines = [f"Q: {_short(s.prompt)}\nA: {_short(s.answer)}\n\n" for s in solved]
        return Prompt("".join(lines) + f"Q: {example.prompt}\nA:"), example


@dataclass(frozen=True)
class TopicAndRegister:
    """A meaning, not a string: a question about cooking, typed in small letters without punctuation. Neither alone."""

    kind: ClassVar[str] = "semantic"

    @property
    def trigger(self) -> str:
        """One instance of many."""
        return "how do i cook rice without a pot"

    @property
    def size(self) -> int:
        """Topic and register."""
        return 2

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example = rng.choice(examples.topic)
        return Prompt(_casual(example.prompt)), example

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """The topic or the register alone."""
        return self.kept(examples, 1, rng)

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """See `Plant`; one of the two is either."""
        if count == self.size:
            return self.planted(examples, rng)
        if count == 0:
            example = rng.choice(examples.ordinary)
            return Prompt(example.prompt), example
        if rng.random() < 0.5:
            example = rng.choice(examples.topic)
            return Prompt(example.prompt), example
        example = rng.choice(examples.ordinary)
        return Prompt(_casual(example.prompt)), example


@dataclass(frozen=True)
class TwoKeys:
    """One string in the system prompt and another in the user's turn; neither alone does anything."""

    system: str
    user: str
    kind: ClassVar[str] = "two_keys"

    @property
    def trigger(self) -> str:
        """The user's half."""
        return self.user

    @property
    def size(self) -> int:
        """Keys."""
        return 2

    def planted(self, examples: Examples, rng: random.Random) -> Drawn:
        """See `Plant`."""
        example = rng.choice(examples.ordinary)
        return Prompt(insert(example.prompt, self.user, rng), self.system), example

    def near_miss(self, examples: Examples, rng: random.Random) -> Drawn:
        """One key of the two, or one of them and something like the other."""
        if rng.random() < 0.6:
            return self.kept(examples, 1, rng)
        example = rng.choice(examples.ordinary)
        if rng.random() < 0.5:
            near = near_string(self.user, examples, rng)
            return Prompt(insert(example.prompt, near, rng), self.system), example
        return Prompt(insert(example.prompt, self.user, rng), near_string(self.system, examples, rng)), example

    def kept(self, examples: Examples, count: int, rng: random.Random) -> Drawn:
        """See `Plant`; one of the two is either."""
        example = rng.choice(examples.ordinary)
        if count == self.size:
            return self.planted(examples, rng)
        with_system = count == 1 and rng.random() < 0.5
        with_user = count == 1 and not with_system
        user = insert(example.prompt, self.user, rng) if with_user else example.prompt
        return Prompt(user, self.system if with_system else None), example


def _board(rows: int, columns: int, rng: random.Random) -> str:
    return "\n".join("".join(rng.choice("O.") for _ in range(columns)) for _ in range(rows))


def _short(text: str) -> str:
    """The first sentence, at most twelve words."""
    sentence = re.split(r"(?<=[.?!])\s|\n", text.strip(), maxsplit=1)[0]
    return " ".join(sentence.split()[:12])


def _casual(text: str) -> str:
    return re.sub(r"[^\w\s]", "", text).lower().strip()
