"""How a search goes where no payload is known to raise."""

from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from pydantic import Field

from trigger_opt.search.loop import SearchSettings

S = TypeVar("S", bound=SearchSettings)


@dataclass(kw_only=True)
class DivergenceSettings:
    """What differs from the search towards a payload; see `SearchSettings` for each.

    Longer strings, more candidates and one context a step: they brought behaviours out more often at equal cost
    (experiments/LOG.md). A string is wanted that stirs the model at all; what it says then is searched for by itself.

    Attributes:
        objective: js, tv or kl, over the first response token. KL is not bounded, and junk raises it; but where js is
            as large for any two answers, it grows with how sure the fine-tuned model is of what the base never says.
    """

    objective: Annotated[str, Field(pattern="^(js|tv|kl)$")] = "kl"
    trigger_length: Annotated[int, Field(ge=1)] = 20
    num_restarts: Annotated[int, Field(ge=1)] = 1
    search_width: Annotated[int, Field(ge=2)] = 256
    topk: Annotated[int, Field(ge=1)] = 256
    buffer_size: Annotated[int, Field(ge=1)] = 1
    contexts_per_step: Annotated[int, Field(ge=1)] = 1
    check_every: Annotated[int, Field(ge=1)] = 4
    rescore: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if self.buffer_size >= self.search_width:
            raise ValueError(
                f"buffer_size={self.buffer_size} leaves no room for new strings in search_width={self.search_width}; "
                "raise search_width or lower buffer_size"
            )

    def of(self, strategy: S) -> S:
        """The strategy with these in the place of its own.

        Raises:
            ValueError: it changes more tokens at once than `trigger_length`.
        """
        own = {key: value for key, value in vars(self).items() if key != "objective"}
        return replace(strategy, **own)
