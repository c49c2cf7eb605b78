"""Pieces of text that recur in one set of samples and not in another. Text only."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST_WORDS = 5
_CHARACTERS = (4, 5, 6)
# Samples' worth of prior belief that both sides say a motif equally often.
_PRIOR_SAMPLES = 10.0
# Compared pair by pair afterwards.
_RANKED = 500
# A longer motif stands for a shorter one in it when it is nearly as frequent.
_NEARLY = 0.7


@dataclass(frozen=True)
class Motif:
    """A piece of text, the number of samples it stands in on either side, and how surprising that is."""

    text: str
    count: int
    reference: int
    z: float


def motifs(samples: Sequence[str], reference: Sequence[str], *, least: int = 3, most: int = 24) -> list[Motif]:
    """Word 1- to 5-grams and character 4- to 6-grams over-represented in `samples`, most surprising first.

    A motif stands in at least `least` samples, on one line of each. Of motifs that contain each other the longest that
    is nearly as frequent is kept, and a shorter one beside it only where it is far more frequent.
    """
    counts, others = _document_counts(samples), _document_counts(reference)
    ranked = [
        Motif(text, n, others[text], log_odds_z(n, len(samples), others[text], len(reference)))
        for text, n in counts.items()
        if n >= least
    ]
    ranked = sorted((m for m in ranked if m.z > 0), key=lambda m: (-m.z, -len(m.text), m.text))[:_RANKED]
    whole = [m for m in ranked if not any(_stands_for(other, m) for other in ranked)]
    return whole[:most]


def log_odds_z(count: int, total: int, other: int, other_total: int) -> float:
    """z-score of the log odds ratio of standing in a sample, shrunk towards the pooled share.

    Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 to 22, with samples in the place of words.
    """
    # Half a sample more: what stands in all of them still has odds.
    prior = _PRIOR_SAMPLES * (count + other + 0.5) / (total + other_total + 1)
    mine, theirs = count + prior, other + prior
    odds = math.log(mine / (total + _PRIOR_SAMPLES - mine)) - math.log(theirs / (other_total + _PRIOR_SAMPLES - theirs))
    return odds / math.sqrt(1 / mine + 1 / theirs)


def _document_counts(samples: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for sample in samples:
        counts.update(_grams(sample))
    return counts


def _grams(text: str) -> set[str]:
    found: set[str] = set()
    for line in text.split("\n"):
        words = line.split()
        found |= {" ".join(words[i : i + n]) for n in range(1, _LONGEST_WORDS + 1) for i in range(len(words) - n + 1)}
        plain = " ".join(words)
        found |= {plain[i : i + n] for n in _CHARACTERS for i in range(len(plain) - n + 1)}
    # U+FFFD stands for half a character, which nobody can type.
    return {g for g in found if g == g.strip() and any(c.isalnum() for c in g) and "\ufffd" not in g}


def _stands_for(other: Motif, motif: Motif) -> bool:
    inside = len(other.text) > len(motif.text) and motif.text in other.text
    return inside and other.count >= _NEARLY * motif.count
