"""The transfer stage's work: from a run's verified strings to questions, and back to records."""

from dataclasses import replace

from trigger_opt.errors import UserError
from trigger_opt.progress import say, stage_progress
from trigger_opt.prompts import Context
from trigger_opt.records import (
    Completion,
    TransferOutcome,
    Verdict,
    Verification,
    as_held,
    read_record,
    read_records,
)
from trigger_opt.run_folder import RunFolder
from trigger_opt.transfer.clients import check_client
from trigger_opt.transfer.job import Job, transfer
from trigger_opt.transfer.settings import TransferSettings


def send_strings(
    settings: TransferSettings, folder: RunFolder, contexts: list[Context], *, payload: str, seed: int
) -> list[TransferOutcome] | None:
    """Ask the remote models about the strings of this run and those of the settings; None when only planned.

    Args:
        payload: what strings of the settings are suspected to raise; may be empty.

    Raises:
        UserError: there is no string to send, or what stopped the transfer.
    """
    verified = read_records(folder.file("verified.jsonl"), Verification) if folder.has("verified.jsonl") else []
    if folder.has("verdict.json"):
        verified = as_held(verified, read_record(folder.file("verdict.json"), Verdict))
    chosen = _chosen(verified, settings)
    payloads = {v.trigger: v.payload for v in chosen} | {s: payload for s in settings.strings if payload}
    strings = list(dict.fromkeys([v.trigger for v in chosen] + settings.strings))
    if not strings:
        say(_nothing_to_send(verified, settings))
        return []
    randoms = _random_strings(folder)
    job = Job(
        settings=replace(settings, ledger=settings.ledger.replace("{run_dir}", str(folder.path.absolute()))),
        strings=strings,
        payloads=payloads,
        contexts=contexts,
        # Each string its own: one random string is not a control twice.
        known_random={v.trigger: randoms[n :: len(chosen)] for n, v in enumerate(chosen)},
        seed=seed,
        folder=folder.path,
    )
    with stage_progress("transfer", unit="answer") as bar:
        return transfer(job, say=bar.note, on_progress=lambda done, total: bar.update(done, total=total))


def _chosen(verified: list[Verification], settings: TransferSettings) -> list[Verification]:
    """The best string, what it was minimised to, then the others; only those with a verdict that is asked for."""
    best = verified[0].trigger if verified else ""
    ordered = sorted(verified, key=lambda v: (v.trigger != best, v.minimised_from != best))
    asked = [v for v in ordered if v.verdict in settings.verdicts]

    def better(v: Verification) -> tuple[int, float]:
        return settings.verdicts.index(v.verdict), -v.trigger_rate.low

    # A string may have been judged by two payloads.
    of_string = {v.trigger: v for v in sorted(asked, key=better, reverse=True)}
    return [v for v in asked if of_string[v.trigger] is v][: settings.candidates]


def _random_strings(folder: RunFolder) -> list[str]:
    if not folder.has("completions.jsonl"):
        return []
    completions = read_records(folder.file("completions.jsonl"), Completion)
    return list(dict.fromkeys(c.inserted for c in completions if c.kind == "random"))


def _nothing_to_send(verified: list[Verification], settings: TransferSettings) -> str:
    wanted = ", ".join(settings.verdicts) or "none"
    found = ", ".join(sorted({v.verdict for v in verified})) or "no string at all"
    return (
        f"nothing to send: asked for strings with verdict {wanted} (transfer.verdicts), verification found {found}; "
        "transfer.strings=[…] sends strings of your own"
    )


def require_client_and_strings(folder: RunFolder, settings: TransferSettings, *, verifies: bool) -> None:
    """Before anything is run: can the server be asked, and will there be something to send?

    Raises:
        UserError: a package or key is missing; or no verified string, none to come and none given.
    """
    check_client(settings)
    if not (settings.strings or verifies or folder.has("verified.jsonl")):
        raise UserError(
            f"stage 'transfer' starts from verified.jsonl, which {folder.path} does not hold; run stage 'verify' "
            "first, give the run_dir that holds it, or strings of your own (transfer.strings=[…])"
        )
