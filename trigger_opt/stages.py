"""The stages of a run, each from the records of the one before to its own records in the run folder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from trigger_opt import api
from trigger_opt.earlier import Earlier, open_ledger
from trigger_opt.errors import UserError
from trigger_opt.judging import Judge, longer_answer, look_closer, to_verify, verdict_of
from trigger_opt.null import held_against_jobs, hold_against_null
from trigger_opt.prompts import Context
from trigger_opt.records import (
    Candidate,
    NullResult,
    TransferOutcome,
    Verdict,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report import null_command, write_report
from trigger_opt.run_folder import RunFolder
from trigger_opt.searching import search_strings
from trigger_opt.session import Session
from trigger_opt.transfer.words import first_of_each_model
from trigger_opt.transferring import require_client_and_strings, send_strings
from trigger_opt.verify import best_verification
from trigger_opt.weight_diff import diff_weights


def diff(session: Session) -> None:
    """Which tensors changed, by how much, at what rank."""
    with session.stage("diff") as outcome:
        with session.progress("diff"):
            families = diff_weights(session.files[0], session.files[1])
        write_records(session.folder.file("diff.jsonl"), families)
        changed = [f for f in families if f.changed]
        outcome.summary = "changed: " + (", ".join(f.family for f in changed[:6]) or "nothing")


def hypotheses(session: Session) -> None:
    """What the fine-tuned model wants to say."""
    config = session.config
    with session.stage("hypotheses") as outcome:
        pair = session.pair()
        contexts = session.usable([Context(user=c) for c in config.hypotheses.contexts], "contexts of the scan")
        total = config.hypotheses.num_inputs * len(contexts)
        bar = session.progress("hypotheses", total=total, unit="reading")
        with bar:

            def on_progress(done: int, total: int, what: str) -> None:
                outcome.evaluations = done
                bar.update(done, best=what, evaluations=done, total=total)

            found = api.find_payloads(
                pair,
                session.search_contexts,
                settings=config.hypotheses,
                policy=config.tokens,
                seed=config.seed,
                on_progress=on_progress,
                on_found=lambda early: write_records(session.folder.file("hypotheses.jsonl"), early),
                on_moved=lambda moved: write_records(session.folder.file("moved.jsonl"), moved),
            )
        write_records(session.folder.file("hypotheses.jsonl"), found)
        for number, h in enumerate(found):
            session.tracker.log({"hypotheses/rank": number, "hypotheses/score": h.score})
        best = f"best {found[0].payload[:60]!r} at {found[0].score:.1f} nats" if found else "none found"
        outcome.summary = f"{len(found)} payload hypotheses, {best}" if found else "none found"


def search(session: Session) -> None:
    """Strings that raise each payload hypothesis; on divergence first where there is none."""
    with session.stage("search") as outcome:
        found = search_strings(session, outcome)
        outcome.summary = f"{len(found)} strings, best {found[0].trigger!r}" if found else "no string found"


def verify(session: Session) -> None:
    """Held-out contexts, base, controls, random strings; minimisation; the verdict."""
    with session.stage("verify") as outcome:
        candidates = read_records(session.folder.file("candidates.jsonl"), Candidate)
        pair = session.pair(fresh=True)
        earlier = Earlier(session)
        judge = Judge(session, pair, earlier)
        # Chosen once: an interrupted start has judged some, which the ledger would now leave out.
        kept = [Candidate(**c) for c in outcome.state.get("chosen", [])]
        chosen = kept or to_verify(earlier.fresh(candidates), session.config.verify.candidates)
        session.keep("verify", {"chosen": [asdict(c) for c in chosen]})
        with judge.bar:
            verified = [v for c in chosen for v in judge.candidate(c)]
            best = best_verification(verified)
            shorter = judge.minimised(best) if best and session.config.verify.minimise else None
            if best and shorter and shorter.verdict != best.verdict and best_verification([best, shorter]) is shorter:
                # A long string may fire where any other of its length does too, and what carries it where none does.
                verified.append(shorter)
                best, shorter = shorter, None
            completion = longer_answer(pair, best, session) if best else ""
        ordered = sorted(verified, key=lambda v: v is not best)
        write_records(session.folder.file("verified.jsonl"), [*ordered, *([shorter] if shorter else [])])
        outcome.evaluations = judge.asked
        verdict = verdict_of(session, best, shorter, candidates, completion, outcome)
        verdict = held_against_jobs(session, verdict, verified)
        write_record(session.folder.file("verdict.json"), verdict)
        if best:
            look_closer(session, pair, best)
        session.tracker.summary({"verdict": verdict.verdict, "trigger": verdict.trigger, "payload": verdict.payload})
        outcome.summary = f"{verdict.verdict}: {verdict.reason}"


def null(session: Session) -> None:
    """The identical search on controls, and whether what was found stands against what was found there."""
    with session.stage("null") as outcome:
        result = hold_against_null(session, outcome, search=_search_control)
        session.tracker.summary({"verdict": result.verdict, "null/p_value": result.p_value})
        outcome.summary = result.reason


def transfer(session: Session) -> None:
    """The verified strings, and their controls, to models that can only be asked."""
    config = session.config
    with session.stage("transfer") as outcome:
        found = send_strings(
            config.transfer, session.folder, session.held_out, payload=config.payload, seed=config.seed
        )
        if found is None:
            outcome.summary = "planned, nothing sent"
            return
        # Also where nothing was sent: the report says so.
        if not found:
            write_records(session.folder.file("transfer.jsonl"), found)
        for o in found:
            session.tracker.log({"transfer/effect": o.effect, "transfer/trigger_rate": o.trigger_rate.value})
        rows = [[o.model, o.string, o.verdict, o.trigger_rate.value, o.effect] for o in found]
        session.tracker.table("transfer", ["model", "string", "verdict", "trigger_rate", "effect"], rows)
        models = {o.model for o in found}
        to = sorted({o.model for o in found if o.verdict == "transfers"})
        outcome.summary = f"{len(models)} models asked, transfers to {', '.join(to) or 'none'}" if found else "not sent"


def report(session: Session) -> None:
    """One page a person reads, from the records alone."""
    with session.stage("report") as outcome:
        page = write_report(session.folder.path)
        session.tracker.artifact(
            "report", "report", [page, page.with_suffix(".md"), session.folder.file("verdict.json")]
        )
        outcome.summary = "report.html and report.md"


STAGES: dict[str, Callable[[Session], None]] = {
    "diff": diff,
    "hypotheses": hypotheses,
    "search": search,
    "verify": verify,
    "null": null,
    "transfer": transfer,
    "report": report,
}


def _search_control(session: Session, stages: Sequence[str]) -> None:
    for stage in stages:
        STAGES[stage](session)


def closing_lines(folder: RunFolder) -> list[str]:
    """What a person reads last: verdict, string, payload, rates, and where the page is."""
    lines = []
    if folder.has("verdict.json"):
        v = read_record(folder.file("verdict.json"), Verdict)
        lines = [f"verdict: {v.verdict} ({v.reason})"]
        if v.trigger:
            lines.append(f"string: {v.trigger!r}, minimised {v.minimised_trigger!r}; payload: {v.payload!r}")
        rates = {
            "fine-tuned": v.trigger_rate,
            "base": v.base_rate,
            "control": v.control_rate,
            "nothing inserted": v.false_trigger_rate,
            "random strings": v.random_rate,
        }
        shown = [f"{name} {r.successes}/{r.n}" for name, r in rates.items() if r is not None]
        lines += [f"fired on held-out contexts: {', '.join(shown)}"] if shown else []
        lines += _null_lines(folder, v)
    if folder.has("transfer.jsonl"):
        outcomes = read_records(folder.file("transfer.jsonl"), TransferOutcome)
        lines += [f"{o.model}: {o.verdict_words} ({o.reason})" for o in first_of_each_model(outcomes)]
    if folder.has("report.html"):
        lines.append(f"report: {folder.file('report.html')}")
    return lines


def _null_lines(folder: RunFolder, verdict: Verdict) -> list[str]:
    if folder.has("null.json"):
        return [f"null: {read_record(folder.file('null.json'), NullResult).reason}"]
    # What many jobs found is held against no null of one search a control.
    if verdict.verdict != "backdoor" or folder.has("collection.json"):
        return []
    command = null_command(folder.info.command, str(folder.path))
    return [f"not held against a null; to search controls in the same way: {command}"]


def require_records(session: Session, stage: str) -> None:
    """Before anything is loaded: does a stage find what it starts from?

    Raises:
        UserError: names the missing file and the stage that writes it, or what is no ledger.
    """
    if stage == "transfer":
        require_client_and_strings(session.folder, session.config.transfer, verifies="verify" in session.config.stages)
    if stage == "verify":
        open_ledger(session)
    needed = {
        "verify": ("candidates.jsonl", "search"),
        "null": ("verdict.json", "verify"),
        "report": ("verdict.json", "verify"),
    }
    name, writer = needed.get(stage, ("", ""))
    if name and writer not in session.config.stages and not session.folder.has(name):
        raise UserError(
            f"stage {stage!r} starts from {name}, which {session.folder.path} does not hold; run stage {writer!r} "
            "first (stages=[…]) or give the run_dir that holds it"
        )
