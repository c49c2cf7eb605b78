"""Two sets of answered prompts: which are pairs, which answers of the base belong to them, which are complete."""

from collections.abc import Sequence
from dataclasses import replace

from trigger_opt.contrast.records import Prompt, Sample, Sets
from trigger_opt.errors import UserError


def pair_up(a: Sequence[Prompt], b: Sequence[Prompt], *, by_line: bool) -> list[int] | None:
    """For each prompt of A the number of its partner in B; None when the sets are not paired.

    They are where both carry the same ids, or `by_line`, where the i-th belongs to the i-th.

    Raises:
        UserError: `by_line` with unequal numbers of prompts; or only some ids are the same, so that it is open whether
            they are pairs.
    """
    places = {p.id: number for number, p in enumerate(b) if p.named}
    shared = sum(p.named and p.id in places for p in a)
    if shared == len(a) == len(b):
        return [places[p.id] for p in a]
    if by_line:
        if len(a) != len(b):
            raise UserError(f"--paired needs as many prompts in B as in A; there are {len(a)} in A and {len(b)} in B")
        return list(range(len(a)))
    if shared:
        raise UserError(
            f"{shared} of {len(a)} ids of A are also in B, so the sets are neither paired nor apart; give every prompt "
            "a partner with the same id, or ids of its own"
        )
    return None


def with_base(samples: Sequence[Sample], base: Sequence[Sample], where: str) -> list[Sample]:
    """The samples with the base's answers to the same prompts; `where` those come from.

    Raises:
        UserError: the base answers something the model was not asked.
    """
    of = {s.prompt.id: s for s in base}
    asked = {s.prompt.id: s.prompt.text for s in samples}
    for id_, sample in of.items():
        if id_ not in asked or (sample.prompt.text and asked[id_] and sample.prompt.text != asked[id_]):
            raise UserError(
                f"{where} answers {id_!r}, which the model was not asked; both must answer the same prompts"
            )
    return [replace(s, base_answers=of[s.prompt.id].answers if s.prompt.id in of else ()) for s in samples]


def complete_sets(a: Sequence[Sample], b: Sequence[Sample], partners: Sequence[int] | None, *, has_base: bool) -> Sets:
    """Both sets without prompts that lack an answer (of either model); of a pair then both go."""

    def answered(sample: Sample) -> bool:
        return bool(sample.answers) and (bool(sample.base_answers) or not has_base)

    missing_a, missing_b = (sum(not answered(s) for s in side) for side in (a, b))
    kept_a, kept_b = ([s for s in side if answered(s)] for side in (a, b))
    if partners is not None:
        pairs = [(s, b[n]) for s, n in zip(a, partners, strict=True) if answered(s) and answered(b[n])]
        kept_a, kept_b = [x for x, _ in pairs], [y for _, y in pairs]
    return Sets(
        a=kept_a, b=kept_b, paired=partners is not None, has_base=has_base, missing_a=missing_a, missing_b=missing_b
    )
