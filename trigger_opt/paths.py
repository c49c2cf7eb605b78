"""Where things lie: the YAML that ships with the package, and the user's cache and data folders."""

import os
from pathlib import Path

CHECKPOINT = "checkpoint.pt"
"""In a run folder: from where an interrupted stage goes on; see `checkpoint`."""

_HERE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Folder `name` ("configs" or "experiments"): inside the package in a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: the installation is damaged and has neither.
    """
    for folder in (_HERE / "_data" / name, _HERE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"trigger_opt is damaged: no folder {name!r} inside or beside {_HERE}; install it again")


def cache_dir() -> Path:
    """The user's cache folder: $TRIGGER_OPT_CACHE, else $XDG_CACHE_HOME/trigger_opt, else ~/.cache/trigger_opt."""
    if chosen := os.environ.get("TRIGGER_OPT_CACHE"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "trigger_opt"


def user_data_dir() -> Path:
    """The user's data folder, for what must not be lost: $TRIGGER_OPT_DATA, else $XDG_DATA_HOME/trigger_opt, else
    ~/.local/share/trigger_opt."""
    if chosen := os.environ.get("TRIGGER_OPT_DATA"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_DATA_HOME")
    return (Path(root) if root else Path.home() / ".local" / "share") / "trigger_opt"
