"""An emulator of the batch server for the length of one run, as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trigger_opt.transfer.client import TransferError

EMULATOR_KEY = "test-key"
# Loading small models on a busy machine.
_START_SECONDS = 300.0
_READY = "listening on "


@contextmanager
def emulator(models: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Serve `models` (alias -> model) on a free loopback port; its base URL. State and log stay in `folder`.

    Raises:
        TransferError: it did not start; says where its log is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "emulator.log"
    command = [sys.executable, "-m", "trigger_opt.transfer.emulator", "--port", "0", "--state", str(folder / "state")]
    # Its stdin ends with this process, however that ends.
    command += ["--until-stdin-closes", "--key", EMULATOR_KEY]
    command += ["--model", *(f"{alias}={model}" for alias, model in models.items())]
    # On the other half of the cores: the run that asks it is idle meanwhile, but its threads are not.
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
            # Ctrl-C is for the run, which still has questions to it when it is pressed.
            start_new_session=True,
        )
    with process:
        try:
            yield _wait_until_ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def server_name(models: Mapping[str, str]) -> str:
    """What stands in the ledger for an emulator: its port changes from run to run, its models decide the answers."""
    return "emulator of " + ", ".join(f"{alias}={model}" for alias, model in sorted(models.items()))


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if urls := [line.removeprefix(_READY) for line in lines if line.startswith(_READY)]:
            return urls[0]
        if process.poll() is not None:
            said = lines[-1] if lines else "nothing"
            raise TransferError(f"the emulator stopped before it was ready; it said: {said} (log: {log})")
        time.sleep(0.1)
    raise TransferError(f"the emulator was not ready within {_START_SECONDS:.0f} s; its log is {log}")
