"""The peers' interpreters: one virtual environment each, since each pins another transformers."""

import subprocess
import sys
import venv
from pathlib import Path

import torch

from trigger_opt.errors import UserError

# Requirements beside torch. nanoGCG hands tuples as caches, which later versions refuse.
PEERS = {"nanogcg": ["nanogcg==0.3.0", "transformers==4.47.1"], "tropt": ["tropt==0.1.1", "transformers==5.8.1"]}
_MADE = Path(__file__).resolve().parent / ".peers"


def interpreter(engine: str, given: Path | None) -> Path:
    """The Python that runs `engine`: this one for our own loops, a peer's own for a peer (made on first use).

    Args:
        given: folder with an environment for each peer, instead of our own.

    Raises:
        UserError: `given` has no such environment, or one could not be made.
    """
    if engine not in PEERS:
        return Path(sys.executable)
    if given is None:
        return _made(engine)
    python = (given / engine / "bin" / "python").absolute()
    if not python.is_file():
        raise UserError(f"--peers {given} has no {engine}/bin/python; name another folder, or none to have it made")
    return python


def _made(engine: str) -> Path:
    folder = _MADE / engine
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.is_file():
        return python
    print(f"making an environment for {engine} in {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    # The same torch for all: what differs is then the search.
    wanted = [f"torch=={torch.__version__.split('+')[0]}", *PEERS[engine]]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise UserError(f"no environment for {engine}: {reason}; make one yourself and name its folder with --peers")
    ready.touch()
    return python
