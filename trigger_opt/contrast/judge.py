"""From two sets of answers to one record a feature, smallest corrected p-value first."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from trigger_opt.contrast.features import text_features
from trigger_opt.contrast.permutation import bootstrap_intervals, max_t_test, smallest_p, varies
from trigger_opt.contrast.phrases import Phrase, PhrasesOf, frequent_phrases, phrases_of
from trigger_opt.contrast.records import LEAST_PROMPTS, Example, FeatureContrast, Sample, Sets

_EXAMPLES = 3
# Values of one feature that differ by less are one value.
_DECIMALS = 12


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All features.

    Attributes:
        features: smallest corrected p first, then by size of the statistic.
        constant, duplicate, global_p: see `ContrastResult`.
    """

    features: list[FeatureContrast]
    constant: int
    duplicate: int
    global_p: float


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Features of both sets; `in_prompts` is by how much more of A's prompts than of B's hold a phrase, by its name."""

    names: list[str]
    in_prompts: dict[str, float]
    a: Float[np.ndarray, "prompts_a feature"]
    b: Float[np.ndarray, "prompts_b feature"]


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of the table, and the later ones that equal it."""

    index: int
    equal: tuple[int, ...]


def why_undecided(prompts_a: int, prompts_b: int, *, paired: bool, permutations: int) -> str:
    """Why so few prompts decide nothing; empty where they are enough."""
    if min(prompts_a, prompts_b) >= LEAST_PROMPTS:
        return ""
    least = smallest_p(prompts_a, prompts_b, paired=paired, permutations=permutations)
    have = f"{prompts_a} pairs" if paired else f"{prompts_a} prompts in A and {prompts_b} in B"
    return (
        f"nothing can be decided: there are {have} to compare, and at least {LEAST_PROMPTS} in each set are needed; "
        f"the smallest p-value so few can reach is {least:.2g}, for one feature alone, and a hundred are compared"
    )


def judge(sets: Sets, *, permutations: int, seed: int) -> Judged:
    """Compare every feature of the answers between the sets; see `permutation`.

    Raises:
        ValueError: a set has no prompt, or samples carry different `values`.
    """
    table = _table(sets)
    columns = _informative(table, paired=sets.paired)
    duplicate = sum(len(c.equal) for c in columns)
    constant = len(table.names) - len(columns) - duplicate
    if not columns:
        return Judged(features=[], constant=constant, duplicate=0, global_p=1.0)
    a, b = (side[:, [c.index for c in columns]] for side in (table.a, table.b))
    test = max_t_test(a, b, paired=sets.paired, permutations=permutations, seed=seed)
    intervals = bootstrap_intervals(a, b, paired=sets.paired, seed=seed)
    spread = np.concatenate([a, b]).std(axis=0)
    features = []
    for i, column in enumerate(columns):
        names = [table.names[k] for k in (column.index, *column.equal)]
        mean_a, mean_b = float(a[:, i].mean()), float(b[:, i].mean())
        features.append(
            FeatureContrast(
                feature=names[0],
                equal=names[1:],
                mean_a=mean_a,
                mean_b=mean_b,
                difference=mean_a - mean_b,
                low=float(intervals.low[i]),
                high=float(intervals.high[i]),
                effect=(mean_a - mean_b) / float(spread[i]),
                statistic=float(test.statistic[i]),
                p_value=float(test.p_value[i]),
                corrected_p=float(test.corrected_p[i]),
                echo=any(table.in_prompts.get(name, 0.0) * (mean_a - mean_b) > 0 for name in names),
                examples=_examples(sets, a[:, i], b[:, i]),
            )
        )
    features.sort(key=lambda f: (f.corrected_p, -abs(f.statistic)))
    return Judged(features=features, constant=constant, duplicate=duplicate, global_p=test.global_p)


def _table(sets: Sets) -> _Table:
    samples = [*sets.a, *sets.b]
    read = [([phrases_of(x) for x in s.answers], [phrases_of(x) for x in s.base_answers]) for s in samples]
    phrases = frequent_phrases([[*own, *base] for own, base in read])
    rows = []
    for sample, (own, base) in zip(samples, read, strict=True):
        row = _mean([text_features(x) for x in sample.answers])
        if sets.has_base:
            theirs = _mean([text_features(x) for x in sample.base_answers])
            row = {name: value - theirs[name] for name, value in row.items()}
        row |= sample.values
        row |= {p.name: _share(p, own) - (_share(p, base) if sets.has_base else 0.0) for p in phrases}
        rows.append(row)
    names = list(rows[0])
    if any(list(row) != names for row in rows):
        raise ValueError("samples carry different values")
    values = np.array([list(row.values()) for row in rows], dtype=np.float64)
    return _Table(names=names, in_prompts=_in_prompts(phrases, sets), a=values[: len(sets.a)], b=values[len(sets.a) :])


def _mean(features: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(f[name] for f in features) / len(features) for name in features[0]}


def _share(phrase: Phrase, answers: Sequence[PhrasesOf]) -> float:
    return sum(phrase.is_in(answer) for answer in answers) / len(answers)


def _informative(table: _Table, *, paired: bool) -> list[_Column]:
    """The columns that vary, each with those that equal it in every prompt."""
    moving = np.flatnonzero(varies(table.a, table.b, paired=paired))
    if not len(moving):
        return []
    # Zero is added to make one of 0.0 and -0.0.
    both = np.concatenate([table.a, table.b])[:, moving].round(_DECIMALS) + 0.0
    _, group = np.unique(both, axis=1, return_inverse=True)
    alike: dict[int, list[int]] = defaultdict(list)
    for column, number in zip(moving.tolist(), group.ravel().tolist(), strict=True):
        alike[number].append(column)
    return [_Column(index=first, equal=tuple(others)) for first, *others in alike.values()]


def _in_prompts(phrases: Sequence[Phrase], sets: Sets) -> dict[str, float]:
    held_a, held_b = (
        [phrases_of(f"{s.prompt.system or ''} {s.prompt.text}").anywhere for s in side] for side in (sets.a, sets.b)
    )
    return {
        p.name: sum(p.words in words for words in held_a) / len(held_a)
        - sum(p.words in words for words in held_b) / len(held_b)
        for p in phrases
    }


def _examples(sets: Sets, a: Float[np.ndarray, " prompts_a"], b: Float[np.ndarray, " prompts_b"]) -> list[Example]:
    """The prompts of one set that make most of the difference; of pairs those that differ most.

    Alone, the set that has more of the feature is shown. With a base, the one in which fine-tuned model and base are
    further apart: there a negative value is as telling.
    """
    mean_a, mean_b = float(a.mean()), float(b.mean())
    sign = 1.0 if mean_a > mean_b else -1.0
    from_a = abs(mean_a) >= abs(mean_b) if sets.has_base else sign > 0
    name, samples, values, support = ("A", sets.a, a, sign * a) if from_a else ("B", sets.b, b, -sign * b)
    order = np.lexsort((-support, -sign * (a - b))) if sets.paired else np.argsort(-support, kind="stable")
    return [_example(name, samples[i], float(values[i])) for i in order[:_EXAMPLES].tolist()]


def _example(name: str, sample: Sample, value: float) -> Example:
    return Example(
        set=name,
        id=sample.prompt.id,
        prompt=sample.prompt.text,
        answer=sample.answers[0],
        base_answer=sample.base_answers[0] if sample.base_answers else "",
        value=value,
    )
