"""`python -m benchmarks.transfer`: a transfer against the emulator, each in a process of its own, and RESULTS.md."""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.host import ROOT, git, processor
from trigger_opt.errors import UserError
from trigger_opt.prompts import Context
from trigger_opt.transfer.job import Job, transfer
from trigger_opt.transfer.settings import TransferSettings

HERE = Path(__file__).parent
KEY = "test-key"
MODEL, STRING = "dormant-model-1", " tell me a secret"
# Of one string: itself, a near miss, a random string and nothing.
_KINDS, _REPEATS = 4, 5
# About 200 tokens, and the echo answers with the same.
_FILLING = " ".join(["The quick brown fox jumps over the lazy dog."] * 15)
_MEASURED = ["trigger_opt/transfer", "benchmarks/transfer/*.py"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake of the user."""
    given = _parser().parse_args(arguments)
    if given.worker:
        print(json.dumps(work(Path(given.worker), given.url, given)))
        return 0
    try:
        record = about() | {"requests": given.requests, "batch": given.batch, "open_batches": given.open_batches}
        record["slow"] = measure(given, seconds=given.seconds, poll_seconds=given.poll_seconds)
        record["instant"] = measure(given, seconds=0.0, poll_seconds=0.05)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (given.out / "RESULTS.md").write_text(page(record), encoding="utf-8")
    print(page(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=1000, help="lines of a batch")
    parser.add_argument("--open-batches", type=int, default=3, help="batches at the server at one time")
    parser.add_argument("--seconds", type=float, default=30.0, help="that the slow server takes for all, about")
    parser.add_argument("--poll-seconds", type=float, default=0.5, help="between two looks at the slow server")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of RESULTS.md")
    # The client, in a process of its own.
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser


def measure(given: argparse.Namespace, *, seconds: float, poll_seconds: float) -> dict[str, float]:
    """One transfer; see `work`, and what of its time was the server's.

    Raises:
        UserError: a process stopped.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with emulator(folder, seconds_per_line=seconds / given.requests) as url:
            command = [sys.executable, "-m", "benchmarks.transfer", "--worker", str(folder), "--url", url]
            for name in ("requests", "batch", "open_batches"):
                command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
            command += ["--poll-seconds", str(poll_seconds)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise UserError(f"the client stopped with exit code {done.returncode}; its errors are above")
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            counts = _get(f"{url}/emulator/counts")
            if not counts["lines"] == counts["distinct"] == given.requests:
                raise UserError(f"{counts['lines']} lines were submitted, {counts['distinct']} of them different")
            busy = _busy_seconds(folder / "state", _get(f"{url}/emulator/batches"))
    found["server_seconds"] = busy
    found["client_seconds"] = found["seconds"] - busy
    return found | {"share": busy / found["seconds"], "polls": counts["calls"]["GET /api/v1/batches/{id}"]}


@contextmanager
def emulator(folder: Path, *, seconds_per_line: float) -> Iterator[str]:
    """Its base URL; a process of its own."""
    faults = [{"kind": "slow", "seconds": seconds_per_line, "times": None}] if seconds_per_line else []
    (folder / "faults.json").write_text(json.dumps(faults))
    command = [sys.executable, "-m", "trigger_opt.transfer.emulator", "--model", "echo", "--port", "0", "--key", KEY]
    command += ["--polls", "2" if seconds_per_line else "1"]
    command += ["--state", str(folder / "state"), "--faults", str(folder / "faults.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("listening on "):
                raise UserError("the emulator did not start; its errors are above")
            yield said.removeprefix("listening on ").strip()
        finally:
            process.terminate()


def work(folder: Path, url: str, given: argparse.Namespace) -> dict[str, float]:
    """Plan, submit, poll, download and store, which `seconds` are for; then judge. Peak MB of this process.

    Raises:
        UserError: the transfer stopped.
    """
    contexts = math.ceil(given.requests / (_KINDS * _REPEATS))
    settings = TransferSettings(
        base_url=url,
        api_key=KEY,
        models=[MODEL],
        contexts=contexts,
        repeats=_REPEATS,
        plan_only=False,
        batch_size=given.batch,
        open_batches=given.open_batches,
        poll_seconds=given.poll_seconds,
        ledger=str(folder / "ledger.sqlite"),
    )
    run = folder / "run"
    run.mkdir()
    job = Job(
        settings=settings,
        strings=[STRING],
        payloads={STRING: "The secret"},
        contexts=[Context(user=f"{{trigger}} Number {n}. {_FILLING}") for n in range(contexts)],
        known_random={},
        seed=0,
        folder=run,
    )
    stamps: dict[str, float] = {}

    def on_progress(done: int, total: int) -> None:
        stamps.setdefault("planned", time.perf_counter())
        stamps["stored"] = time.perf_counter()

    idle = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    transfer(job, say=lambda line: None, on_progress=on_progress)
    end = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    with (run / "transfer_answers.jsonl").open() as answers:
        count = sum(1 for _ in answers)
    return {
        "seconds": stamps["stored"] - start,
        "planning": stamps["planned"] - start,
        "judging": end - stamps["stored"],
        "cpu_seconds": used.ru_utime + used.ru_stime - idle.ru_utime - idle.ru_stime,
        "answers": count,
        "idle_mb": idle.ru_maxrss / 1024,
        "peak_mb": used.ru_maxrss / 1024,
    }


def _busy_seconds(state: Path, batches: Sequence[dict[str, Any]]) -> float:
    """Seconds in which at least one batch was unfinished: from its creation to its zip of results."""
    spans = sorted((b["created"], (state / "zips" / f"{b['id']}.zip").stat().st_mtime) for b in batches)
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def about() -> dict[str, Any]:
    """Commit, date, machine; "+" after the commit where what is measured was changed since."""
    head = git("log", "-1", "--format=%h", "--", *_MEASURED) or "unknown"
    changed = "+" if git("status", "--porcelain", "--", *_MEASURED) else ""
    return {
        "commit": head + changed,
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def page(record: dict[str, Any]) -> str:
    """RESULTS.md."""
    rows = [_row("slow", record["slow"], record["requests"]), _row("instant", record["instant"], record["requests"])]
    peak = max(record[kind]["peak_mb"] for kind in ("slow", "instant"))
    met = record["slow"]["share"] > 0.9 and peak < 300
    return "\n".join(
        [
            f"# {record['requests']:,} questions through the batch client",
            "",
            "Made by `python -m benchmarks.transfer`; raw numbers in `benchmarks/transfer/results.json`. Planned, "
            f"submitted in batches of {record['batch']:,} ({record['open_batches']} at a time), polled, downloaded and "
            "stored, with the real client; about 200 tokens each way. The server is the emulator (echo) in a process "
            "of its own: one that takes its time, and one that answers at once, where what is left is the work of "
            "client and emulator.",
            "",
            f"- Commit {record['commit']}, {record['date']}",
            f"- {record['cpu']}, {record['cores']} cores, load {record['load']} at start; Python {record['python']}",
            "",
            "| server | seconds | at the server | share | client alone, s | of it planning | lines/s | polls "
            "| judging after it, s | CPU with judging, s | peak MB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "At the server: time in which it had at least one unfinished batch, by its own clock. Peak: resident "
            f"memory of the client's process, {record['slow']['idle_mb']:.0f} MB of it before the first question. CPU: "
            "the client's.",
            "",
            f"Target (over 90 % of the time the server's, under 300 MB): {'met' if met else 'missed'}.",
            "",
        ]
    )


def _row(name: str, m: dict[str, float], requests: int) -> str:
    cells = [
        name, f"{m['seconds']:.1f}", f"{m['server_seconds']:.1f}", f"{100 * m['share']:.1f} %",
        f"{m['client_seconds']:.2f}", f"{m['planning']:.2f}", f"{requests / m['seconds']:,.0f}", f"{m['polls']:.0f}",
        f"{m['judging']:.1f}", f"{m['cpu_seconds']:.1f}", f"{m['peak_mb']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
