"""The wheel: what it carries, what it does not, and its console script."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from trigger_opt.paths import data_dir

ROOT = Path(__file__).resolve().parent.parent
HATCHLING = importlib.util.find_spec("hatchling") is not None
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_console_script_is_the_entry_point() -> None:
    assert PROJECT["project"]["scripts"] == {"trigger-opt": "trigger_opt.__main__:main"}
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "trigger-opt"]
    from trigger_opt.__main__ import main

    assert script.load() is main


def test_version_is_told_once() -> None:
    import trigger_opt

    assert trigger_opt.__version__ == PROJECT["project"]["version"]
    assert f"## {trigger_opt.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_constraint_is_a_plain_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[\w.+!]+( ;.*)?", line.strip())]
    assert odd == [], "an address or a range"
    pinned = {re.split(r"[=\[]", line)[0].lower().replace("_", "-") for line in lines}
    wanted = [re.split(r"[><=\[ ]", d)[0].lower() for d in PROJECT["project"]["dependencies"]]
    assert [d for d in wanted if d not in pinned] == []


def test_data_comes_from_the_checkout_here() -> None:
    assert data_dir("configs") == ROOT / "configs"
    assert data_dir("experiments") == ROOT / "experiments"
    with pytest.raises(FileNotFoundError, match="install it again"):
        data_dir("nowhere")


@pytest.mark.skipif(not HATCHLING, reason="hatchling is not installed; the slow test builds with one of its own")
def test_wheel(tmp_path: Path) -> None:
    check_wheel(tmp_path, "--no-build-isolation")


@pytest.mark.slow
def test_wheel_in_isolation(tmp_path: Path) -> None:
    check_wheel(tmp_path)


def check_wheel(folder: Path, *options: str) -> None:
    """Build the wheel, look at its files, and compose an experiment from it alone."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(folder / "installed")
        script = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "trigger-opt = trigger_opt.__main__:main" in script
    for kind in ("configs", "experiments"):
        files = {f"trigger_opt/_data/{kind}/{p.relative_to(ROOT / kind)}" for p in (ROOT / kind).rglob("*.yaml")}
        assert files
        assert files <= names
    organisms = ROOT / "trigger_opt" / "zoo" / "organisms"
    for file in organisms.rglob("*"):
        assert file.is_dir() or str(file.relative_to(ROOT)) in names
    assert not [n for n in names if re.match(r"(tests|runs|\.venv|benchmarks)/", n) or n.endswith((".pyc", ".part"))]
    assert not [n for n in names if not n.startswith(("trigger_opt/", "trigger_opt-"))]

    code = (
        "from trigger_opt import paths, zoo; assert '_data' in str(paths.data_dir('configs'));"
        "print(zoo.folder('zoo:warmup_mini'))"
    )
    path = {"PYTHONPATH": str(folder / "installed"), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, env=path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert str(folder / "installed") in found.stdout
