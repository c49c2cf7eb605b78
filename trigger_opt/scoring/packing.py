"""Where every token of a pass lies: many candidates of many lengths packed into one row of tokens.

A job is one candidate in one context, computed from its first changed token on. Packing puts the jobs' computed
tokens end to end, so that all token-wise layers do exactly the work the candidates need and no padding; only
attention looks at jobs side by side, through the indices kept here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Packed rows are padded to a multiple of this: a matrix product of a new shape costs a kernel build on CPUs.
_ROW_STEP = 16
# Keys are padded to a multiple of this: the softmax kernel of CPUs takes twice as long for 80 keys as for 96 (bf16).
_KEY_STEP = 32
# Fewer tokens than this in a pass and a lane of its own costs more than it brings.
_WORTH_A_PASS = 128


@dataclass(frozen=True)
class Job:
    """One candidate in one context.

    Attributes:
        owner: the caller's number for it. trunk: which of the pass's trunks it continues.
        start: tokens of that trunk it keeps. tokens: what it computes itself, at positions start, start + 1, …
    """

    owner: int
    trunk: int
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive jobs that continue the same trunk: `first` up to, not including, `last`.

    `limit`: how many of its tokens the one that keeps most keeps.
    """

    trunk: int
    first: int
    last: int
    limit: int


@dataclass
class Pack:
    """The layout of one pass over `jobs`, which must be grouped by trunk.

    Attributes:
        rows: tokens in the pass, padding included; `used` of them are the jobs'. window: tokens of the longest job.
        segments: runs of jobs with one trunk. trunk_length: tokens of a trunk that some job looks at.
        visible: the first so many of them are seen by all jobs. padding: key columns that nobody looks at.
    """

    jobs: Sequence[Job]
    rows: int = field(init=False)
    window: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(j.tokens) for j in self.jobs])
        self.window = int(lengths.max())
        self._lengths = lengths
        self._starts = torch.tensor([j.start for j in self.jobs])
        self._firsts = lengths.cumsum(0) - lengths
        self.used = int(lengths.sum())
        self.rows = padded(self.jobs)
        self._index: dict[tuple[torch.device, int], Tensor] = {}
        self._bias: dict[tuple[torch.device, torch.dtype, int | None], Tensor] = {}
        self._home: dict[torch.device, Tensor] = {}
        self.segments = _segments(self.jobs)
        self.trunk_length = int(self._starts.max())
        self.visible = int(self._starts.min())
        self.padding = -(self.trunk_length + self.window) % _KEY_STEP

    def token_ids(self) -> Int[Tensor, "one rows"]:
        """All jobs' tokens end to end; the padding repeats token 0."""
        flat = [t for j in self.jobs for t in j.tokens]
        return torch.tensor([flat + [0] * (self.rows - self.used)])

    def positions(self) -> Int[Tensor, "one rows"]:
        """Each token's place in its conversation."""
        steps = torch.arange(self.used) - torch.repeat_interleave(self._firsts, self._lengths)
        positions = torch.zeros(1, self.rows, dtype=torch.long)
        positions[0, : self.used] = steps + torch.repeat_interleave(self._starts, self._lengths)
        return positions

    def last_rows(self, count: int) -> Int[Tensor, " job_count"]:
        """Rows of the last `count` tokens of every job, job by job."""
        ends = self._firsts + self._lengths
        return (ends[:, None] - count + torch.arange(count)).flatten()

    def first_row(self, job: int) -> int:
        """The row of a job's first token."""
        return int(self._firsts[job])

    def aligned(self, groups: int, device: torch.device) -> Int[Tensor, " job_groups_window"]:
        """For jobs side by side, (job, group, window), right-aligned: which row of (groups · rows) each cell reads.

        Cells before a job's first token read its first row; their results are never used.
        """
        key = (device, groups)
        if key not in self._index:
            cells = self._cells().clamp(min=0) + self._firsts[:, None]
            offsets = torch.arange(groups)[None, :, None] * self.rows
            self._index[key] = (cells[:, None, :] + offsets).flatten().to(device)
        return self._index[key]

    def home(self, device: torch.device) -> Int[Tensor, " rows"]:
        """Inverse of `aligned` for one group: which (job, window) cell each packed row is in; padding reads cell 0."""
        if device not in self._home:
            job = torch.repeat_interleave(torch.arange(len(self.jobs)), self._lengths)
            step = torch.arange(self.used) - torch.repeat_interleave(self._firsts, self._lengths)
            cell = job * self.window + self.window - self._lengths[job] + step
            padded = torch.zeros(self.rows, dtype=torch.long)
            padded[: self.used] = cell
            self._home[device] = padded.to(device)
        return self._home[device]

    def bias(
        self, sliding_window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "job one window keys"]:
        """0 where a token may look, -inf where not. Keys are those of the trunk, the job's own, and the padding;
        the trunk's `visible` ones are left out, unless a sliding window may hide them."""
        key = (device, dtype, sliding_window)
        if key not in self._bias:
            allowed = self._allowed(sliding_window)[:, :, 0 if sliding_window else self.visible :]
            bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
            self._bias[key] = bias[:, None].to(device)
        return self._bias[key]

    def _cells(self) -> Int[Tensor, "job window"]:
        return torch.arange(self.window)[None] - (self.window - self._lengths)[:, None]

    def _allowed(self, sliding_window: int | None) -> Bool[Tensor, "job window keys"]:
        cells = self._cells()
        queries = cells + self._starts[:, None]
        trunk = torch.arange(self.trunk_length).expand(len(self.jobs), -1)
        nothing = torch.zeros(len(self.jobs), self.padding, dtype=torch.bool)
        # A trunk key counts only where the job continues the trunk; own keys only where there is a token.
        present = torch.cat([trunk < self._starts[:, None], cells >= 0, nothing], 1)
        keys = torch.cat([trunk, queries, nothing.long()], 1)
        allowed = present[:, None, :] & (keys[:, None, :] <= queries[:, :, None])
        if sliding_window is not None:
            allowed &= queries[:, :, None] - keys[:, None, :] < sliding_window
        # Cells without a token look at something, or their softmax is not a number.
        return allowed | (cells < 0)[:, :, None]


def padded(jobs: Sequence[Job]) -> int:
    """Rows of a pass over `jobs`: their tokens, and the padding."""
    return -(-sum(len(j.tokens) for j in jobs) // _ROW_STEP) * _ROW_STEP


def _segments(jobs: Sequence[Job]) -> list[Segment]:
    made: list[Segment] = []
    for number, job in enumerate(jobs):
        if made and made[-1].trunk == job.trunk:
            before = made[-1]
            made[-1] = Segment(job.trunk, before.first, number + 1, max(before.limit, job.start))
        else:
            made.append(Segment(job.trunk, number, number + 1, job.start))
    return made


def split(jobs: Sequence[Job], max_rows: int, multiple: int) -> list[list[Job]]:
    """Jobs in passes of about equal size, at most `max_rows` tokens each where a single job allows it.

    Jobs are ordered by trunk and length, so that attention pads little. Passes come in a `multiple` when there is
    enough to do, so that no lane is idle.
    """
    ordered = sorted(jobs, key=lambda j: (j.trunk, len(j.tokens)))
    total = sum(len(j.tokens) for j in ordered)
    # A pass may hold one job more than its share.
    share = max(max_rows - max(len(j.tokens) for j in ordered), max_rows // 2, 1)
    fewest = 1 if total <= max_rows else -(-total // share)
    count = max(fewest, min(-(-fewest // multiple) * multiple, total // _WORTH_A_PASS))
    passes: list[list[Job]] = [[]]
    filled = before = 0
    for job in ordered:
        size = len(job.tokens)
        due = before + size / 2 > total / count * len(passes)
        if passes[-1] and (due or filled + size > max_rows):
            passes.append([])
            filled = 0
        passes[-1].append(job)
        filled += size
        before += size
    return passes
