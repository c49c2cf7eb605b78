"""What a search asks of a scorer, and what it tells: records and callbacks, no loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Scorer(Protocol):
    """What a search may ask. Scores are in nats, higher is more suspicious; contexts are named by number."""

    @property
    def num_contexts(self) -> int:
        """How many contexts there are."""
        ...

    @property
    def evaluations(self) -> int:
        """Candidates scored so far, counted once per context."""
        ...

    def seconds(self) -> float:
        """A monotonic clock; where several processes share a search, the same on all."""
        ...

    def prepare(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> None:
        """Called before a step's scores with the incumbent and the contexts drawn."""
        ...

    def score(
        self,
        candidates: Int[Tensor, "batch trigger"],
        contexts: Sequence[int],
        *,
        keep: int | None = None,
        incumbents: int = 0,
    ) -> Float[Tensor, "batch context"]:
        """Score of each candidate in each context.

        With `keep` only the best so many are asked for, and of those only what reaches the worst of the first
        `incumbents` rows: others may hold -inf.
        """
        ...

    def refine(
        self,
        candidates: Int[Tensor, "batch trigger"],
        contexts: Sequence[int],
        *,
        keep: int,
        incumbents: int,
        ahead: tuple[Int[Tensor, " trigger"], Sequence[int]] | None = None,
    ) -> Float[Tensor, "batch context"] | None:
        """As `score` in the best precision there is; None where `score` is that already.

        `ahead`: the incumbent and contexts that the next step will probably have.
        """
        ...

    def known(self, candidates: Int[Tensor, "batch trigger"], contexts: Sequence[int]) -> Bool[Tensor, " batch"]:
        """Which candidates were scored before in exactly these contexts."""
        ...

    def aggregate(self, scores: Float[Tensor, "batch context"]) -> Float[Tensor, " batch"]:
        """One score a candidate."""
        ...

    def token_gradient(
        self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]
    ) -> Float[Tensor, "trigger vocab"]:
        """Derivative of the aggregated score to each one-hot token."""
        ...

    def fires(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> Bool[Tensor, " context"] | None:
        """In which contexts the payload comes out; None where there is no payload."""
        ...

    def state(self) -> dict[str, Any]:
        """All that decides what later calls answer, in plain values and tensors; where several processes share a
        search, asked for on one of them."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Answer from now on as the scorer did that gave this state."""
        ...


Validity = Callable[[Int[Tensor, "batch trigger"]], Bool[Tensor, " batch"]]
Propose = Callable[[Int[Tensor, " trigger"], Sequence[int], int], Int[Tensor, "batch trigger"]]


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Where to begin.

    Attributes:
        tokens: ids that earlier stages found to raise the payload, strongest first; may be empty.
        strings: whole strings to begin from, as token ids.
        prior: ids more likely than others to belong to a trigger; a share of the swaps tried is to one of them, see
            `SearchSettings.prior_share`.
    """

    tokens: tuple[int, ...] = ()
    strings: tuple[tuple[int, ...], ...] = ()
    prior: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """State after one step, for progress and records."""

    restart: int
    step: int
    trigger_ids: tuple[int, ...]
    score: float
    evaluations: int
    seconds: float
    selection_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A string with its score over all contexts, and the share of them in which the payload comes out."""

    trigger_ids: tuple[int, ...]
    score: float
    selection_rate: float | None
    restart: int
    step: int
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """A search between two steps: one that goes on from it ends as one that was never interrupted.

    Attributes:
        restart, step: the step just done; both from 0. ended: it was the last of its restart.
        buffer: the best strings, best first. upcoming: contexts drawn for the next step.
        generator: state of the random generator. rivals_win: whether the last rival rescored beat the incumbents.
        seconds, evaluations: spent so far. scorer: see `Scorer.state`.
    """

    restart: int
    step: int
    ended: bool
    buffer: Int[Tensor, "batch trigger"]
    upcoming: list[int]
    generator: Tensor
    rivals_win: bool
    found: list[Found]
    seconds: float
    evaluations: int
    scorer: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """In plain values and tensors; see `from_plain`."""
        return {**vars(self), "found": [asdict(f) for f in self.found]}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "SearchState":
        """The state that `plain` gave."""
        return cls(**{**values, "found": [Found(**f) for f in values["found"]]})


def ignore_found(found: Found) -> None:
    """For callers who wait for the end of a search."""


OnState = Callable[[Callable[[], SearchState]], None]
"""Called after each step with what makes its state: that takes a while, so only where it is kept."""


def ignore_state(make: Callable[[], SearchState]) -> None:
    """For callers who do not go on with a search that was interrupted."""
