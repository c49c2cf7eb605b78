"""After a search in quantised weights: its best strings scored again in the best precision that fits."""

from collections.abc import Sequence
from dataclasses import replace

from trigger_opt import api
from trigger_opt.models.pair import load_pair
from trigger_opt.models.plan import available_bytes
from trigger_opt.objectives import Objective
from trigger_opt.planning import memory_plan
from trigger_opt.progress import say
from trigger_opt.records import Candidate, Rescored, write_records
from trigger_opt.report import rescored_sentence
from trigger_opt.scoring import out_of_memory
from trigger_opt.session import Session

# Those that may be verified, and as many again that could take their place.
_MOST = 50
# Best first; "none" is the precision the weights are stored in.
_FINER = {"nf4": ("none", "int8"), "int8": ("none",)}


def rescored(session: Session, found: Sequence[Candidate], objective: Objective) -> list[Candidate] | None:
    """`found` with the scores of the best as a finer pair gives them, and in the order those make; also written into
    rescored.jsonl. None where the search was in no quantised weights, or nothing finer fits, which is said.

    Args:
        found: best first.
    """
    quantization = session.config.model.quantization
    if quantization == "none" or not found:
        return None
    session.release()
    if (finer := _finest_that_fits(session)) is None:
        return None
    say(session.title(f"the best strings are scored again in {finer}, after a search in {quantization} …"))
    options = replace(session.options, quantization="none" if finer == session.config.model.dtype else finer)
    best, rest = list(found[:_MOST]), list(found[_MOST:])
    try:
        pair = load_pair(session.files[0], session.files[1], options=options)
        again = api.score_candidates(pair, session.search_contexts, best, objective=objective)
    except RuntimeError as error:
        # The plan is an estimate, and the strings are there.
        if not out_of_memory(error):
            raise
        say(session.title(f"memory ran out: the strings keep their scores in {quantization}"))
        return None
    records = [
        Rescored(
            trigger=old.trigger, payload=old.payload, searched_in=quantization, scored_in=finer,
            score_before=old.score, score=new.score,
            selection_rate_before=old.selection_rate, selection_rate=new.selection_rate,
        )
        for old, new in zip(best, again, strict=True)
    ]  # fmt: skip
    write_records(session.folder.file("rescored.jsonl"), records)
    say(session.title(rescored_sentence(records)))
    return [*sorted(again, key=lambda c: (-(c.selection_rate or 0.0), -c.score)), *rest]


def _finest_that_fits(session: Session) -> str | None:
    """Name of the finest precision whose plan fits into the memory that is free; None, said, where none does."""
    model = session.config.model
    refused = []
    for quantization in _FINER[model.quantization]:
        finer = model.dtype if quantization == "none" else quantization
        # No other model is held meanwhile, whatever stages follow.
        config = replace(session.config, model=replace(model, quantization=quantization), stages=["search"])
        needed = memory_plan(config, session.files[:2]).total_bytes
        free = available_bytes(session.options.device_map if session.options.device_map != "auto" else "cuda")
        if needed <= free:
            return finer
        refused.append(f"{finer} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    say(session.title(f"the strings keep their scores in {model.quantization}: {'; '.join(refused)}"))
    return None
