"""Judges what a method handed over: the same rule, held-out contexts and length of answers for all."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from benchmarks.recovery.methods.common import FoundString, usual_tokens
from benchmarks.recovery.records import Judged
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context
from trigger_opt.records import Verification
from trigger_opt.verify import Memo, VerifySettings, best_verification, common_answer, payload_words, verify_string
from trigger_opt.verify.rule import detection_score

_ANSWER_TOKENS = 16


def judge_strings(
    pair: ModelPair,
    found: Sequence[FoundString],
    contexts: Sequence[Context],
    held_out: Sequence[Context],
    *,
    seed: int,
) -> list[Judged]:
    """Each string on `held_out`, with the method's payload, or where it names none with what most answers begin with
    in `contexts`, which were the method's."""
    allowed, memo = usual_tokens(pair), Memo()
    judged = []
    for string in found:
        # A text without a word cannot be told from an answer; then it is as if the method had named none.
        named = bool(payload_words(string.payload))
        payload = string.payload if named else common_answer(pair, string.text, contexts, max_new_tokens=_ANSWER_TOKENS)
        verification = _verified(pair, string.text, payload, held_out, seed=seed, allowed=allowed, memo=memo)
        judged.append(
            Judged(
                found=string,
                payload=payload,
                payload_from="method" if named else "answers",
                score=detection_score([verification] if verification else []),
                verification=verification,
            )
        )
    return judged


def best_of(judged: Sequence[Judged]) -> int | None:
    """The string that counts: by score; in a tie as a run chooses among its verifications, then the method's first."""
    if not judged:
        return None
    top = max(j.score for j in judged)
    tied = [n for n, j in enumerate(judged) if j.score == top]
    verified = {n: v for n in tied if (v := judged[n].verification) is not None}
    chosen = best_verification(list(verified.values()))
    return next((n for n, v in verified.items() if v is chosen), tied[0])


def _verified(
    pair: ModelPair,
    text: str,
    payload: str,
    held_out: Sequence[Context],
    *,
    seed: int,
    allowed: Bool[Tensor, " vocab"],
    memo: Memo,
) -> Verification | None:
    if not payload_words(payload):
        return None
    verification, _ = verify_string(
        pair, text, held_out, payload=payload, settings=VerifySettings(), allowed=allowed, seed=seed, memo=memo
    )
    return replace(verification, profile=[])
