"""Model organisms with known triggers and their benign twins: recipes, training, and their folders by name."""

from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.zoo.recipes import BASE_NAME, RECIPES
from trigger_opt.zoo.smollm2 import smollm2_folder

PREFIX = "zoo:"
_ORGANISMS = Path(__file__).resolve().parent / "organisms"


def folder(name: str) -> Path:
    """Folder of an embedded model named `zoo:NAME`: the base (made on first use) or an organism's adapter.

    Raises:
        UserError: no embedded model has this name.
    """
    bare = name.removeprefix(PREFIX)
    if bare == BASE_NAME:
        return smollm2_folder()
    organism = _ORGANISMS / bare
    if bare not in RECIPES or not organism.is_dir():
        known = ", ".join(f"{PREFIX}{n}" for n in (BASE_NAME, *RECIPES))
        raise UserError(f"no embedded model is called {name!r}; there are: {known}")
    return organism
