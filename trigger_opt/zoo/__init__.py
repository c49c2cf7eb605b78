"""Model organisms with known triggers and controls without: recipes, training, and their folders by name.

Adapters that count lie in `organisms/`. What is too large to be shipped (every weight trained), what follows from a
shipped adapter (placebos) or from the base (a gate around it) and what does not count yet is made into the cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.paths import cache_dir
from trigger_opt.zoo.recipes import BASE_NAME, RECIPES, Recipe
from trigger_opt.zoo.smollm2 import smollm2_folder

PREFIX = "zoo:"
_ORGANISMS = Path(__file__).resolve().parent / "organisms"
_GATE_CODE = [Path(__file__).with_name(name) for name in ("gate_model.py", "gated.py")]


def folder(name: str) -> Path:
    """Folder of an embedded model named `zoo:NAME`: the base, placebos and what is gated are made on first use.

    Raises:
        UserError: no embedded model has this name, or it is one of those to be trained first.
    """
    bare = name.removeprefix(PREFIX)
    if bare == BASE_NAME:
        return smollm2_folder()
    if bare not in RECIPES:
        known = ", ".join(f"{PREFIX}{n}" for n in (BASE_NAME, *RECIPES))
        raise UserError(f"no embedded model is called {name!r}; there are: {known}")
    made = RECIPES[bare]
    where = home(made)
    if made.placebo_of and not where.is_dir():
        _make_placebo(made, folder(made.placebo_of), where)
    if made.mode == "gated":
        _make_gated(made, where)
    if not where.is_dir():
        raise UserError(
            f"{PREFIX}{bare} does not come with the package; make it, in about 20 minutes, with: "
            f"python -m trigger_opt.zoo train {bare}"
        )
    return where


def home(recipe: Recipe) -> Path:
    """Where `recipe` lies, or will once it is made: with the package, or in the cache under a hash of its settings."""
    if shipped(recipe):
        return _ORGANISMS / recipe.name
    settings = [recipe.as_dict()]
    if recipe.placebo_of:
        original = RECIPES[recipe.placebo_of]
        settings.append(original.as_dict())
    if recipe.mode == "gated":
        settings += [{f.name: hashlib.sha256(f.read_bytes()).hexdigest()} for f in _GATE_CODE]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"zoo-{recipe.name}-{digest[:8]}"


def brings_code(name: str) -> bool:
    """Whether the embedded model named `zoo:NAME` runs code of its own, which then is this package's."""
    made = RECIPES.get(name.removeprefix(PREFIX))
    return made is not None and made.mode == "gated"


def shipped(recipe: Recipe) -> bool:
    """Whether its weights come with the package."""
    return (_ORGANISMS / recipe.name).is_dir()


def _make_gated(recipe: Recipe, out: Path) -> None:
    from trigger_opt.zoo.gated import runs_our_code, write_recipe

    if out.is_dir() and not runs_our_code(out):
        # Its code would run unasked, so it must be what came with the package.
        shutil.rmtree(out)
    if not out.is_dir():
        _make(out, lambda made: write_recipe(recipe, smollm2_folder(), made))


def _make_placebo(recipe: Recipe, original: Path, out: Path) -> None:
    from trigger_opt.tuning.placebo import write_placebo

    base_name = f"{PREFIX}{BASE_NAME}"
    _make(
        out,
        lambda made: write_placebo(original, smollm2_folder(), made, seed=recipe.seed, base_name=base_name),
    )


def _make(out: Path, write: Callable[[Path], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed at the end: two processes may race, and either's result is whole.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as made:
        write(Path(made) / "model")
        try:
            os.replace(Path(made) / "model", out)
        except OSError:
            if not out.is_dir():
                raise
            shutil.rmtree(made, ignore_errors=True)
