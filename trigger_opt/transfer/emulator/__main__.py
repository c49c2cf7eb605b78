"""`python -m trigger_opt.transfer.emulator --model warmup_mini --port 8765`: the batch server on this machine."""

import argparse
import asyncio
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.paths import cache_dir
from trigger_opt.transfer.emulator.answers import KEY, answering, parse_models
from trigger_opt.transfer.emulator.faults import read_rules
from trigger_opt.transfer.emulator.server import Emulator


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        asyncio.run(_serve(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Before the handlers are set, while models load.
        return 130
    return 0


async def _serve(given: argparse.Namespace) -> None:
    faults = read_rules(given.faults) if given.faults else []
    models = parse_models(given.model)
    emulator = Emulator(
        given.state or cache_dir() / "emulator",
        answers=answering(models),
        port=given.port,
        key=given.key,
        polls=given.polls,
        nested=given.layout == "nested",
        balance=given.balance,
        faults=faults,
    )
    stop = asyncio.Event()
    async with emulator:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        print(f"listening on {emulator.url}", flush=True)
        await stop.wait()


def _end_with_stdin() -> None:
    # An error is a stdin that was closed from the beginning.
    with suppress(OSError):
        while os.read(0, 1 << 16):
            pass
    # At once, also while models load: nobody waits for an answer any more, and the next one needs the folder.
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trigger_opt.transfer.emulator",
        # The usage would stand above every error, which is to be one line.
        usage=argparse.SUPPRESS,
        description="The batch server that jsinfer talks to, on 127.0.0.1, with answers from a small model.",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME",
        help="one for all aliases, or dormant-model-1=NAME …; NAME: an embedded organism, a folder, or echo",
    )
    parser.add_argument("--port", type=_port, default=8765, help="0 takes a free one")
    parser.add_argument("--state", type=Path, help="folder that survives it (default: emulator in the cache folder)")
    parser.add_argument("--key", default=KEY, help="the key it accepts")
    parser.add_argument(
        "--faults", type=Path, help="JSON list of rules (see emulator/faults.py); begins anew at each start"
    )
    parser.add_argument("--polls", type=int, default=1, help="least polls before a batch completes")
    parser.add_argument("--layout", choices=("flat", "nested"), default="flat", help="of the zip of results")
    parser.add_argument("--balance", type=int, help="each line costs 1; below 0 there is 428 (default: no end)")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end when stdin does, so with the process that holds it"
    )
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 to 65535")
    return int(text)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A model in the middle of a batch would hold an ordinary exit for seconds; all there is to keep is on disk.
    os._exit(code)
