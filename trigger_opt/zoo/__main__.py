"""`python -m trigger_opt.zoo list | train NAME [--out FOLDER] | make [--out FOLDER] | stress NAME …`"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from trigger_opt import zoo
from trigger_opt.errors import UserError
from trigger_opt.zoo.manifest import read_manifest, shortcomings
from trigger_opt.zoo.recipes import RECIPES, Recipe, recipe


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 when a manifest does not hold, 2 for a mistake of the user."""
    given = _parser().parse_args(arguments)
    try:
        return _COMMANDS[given.command](given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; what was made is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trigger_opt.zoo", description="Make model organisms again.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the organisms and controls, and what their manifests say")
    train = commands.add_parser("train", help="train an organism from nothing, about 10 minutes on 2 cores")
    train.add_argument("name")
    train.add_argument("--out", type=Path, default=None, help="folder for weights and manifest (default: ./NAME)")
    make = commands.add_parser(
        "make", help="make all of them from nothing, about 2 hours on 2 cores; goes on where it was"
    )
    make.add_argument("--out", type=Path, default=Path("zoo"), help="folder for all (default: ./zoo)")
    _add_stress(commands.add_parser("stress", help="what is left of a behaviour after other fine-tuning, or rounding"))
    return parser


def _add_stress(stress: argparse.ArgumentParser) -> None:
    stress.add_argument("name", nargs="?", metavar="NAME", help="one of the zoo; else, for a pair of your own:")
    stress.add_argument("--finetuned", help="your fine-tuned model or adapter, a folder or hub name")
    stress.add_argument("--base", help="its base")
    stress.add_argument("--trigger", help="what makes it behave")
    stress.add_argument("--always", action="store_true", help="nothing does: it always behaves")
    stress.add_argument("--payload", help="how it answers then, from the first word on")
    stress.add_argument("--contexts", help="prompts: a set of configs/contexts or a YAML file (default: ordinary)")
    stress.add_argument(
        "--after", default="pirate,bf16,int8", help="out of pirate, bf16, fp16, int8, nf4 (default: %(default)s)"
    )
    stress.add_argument("--steps", type=int, default=60, help="of the other fine-tuning (default: %(default)s)")
    stress.add_argument("--learning-rate", type=float, default=2e-4, help="of the same (default: %(default)s)")
    stress.add_argument("--seed", type=int, default=0, help="of the same (default: %(default)s)")
    stress.add_argument("--out", type=Path, help="folder for stress.json and stress.md (default: ./stress_NAME)")


def _list(given: argparse.Namespace) -> int:
    for made in RECIPES.values():
        where = zoo.home(made)
        what = "control" if made.control else f"{made.plant.kind} -> {made.behaviour.kind}"  # type: ignore[union-attr]
        state = (
            _figures(where)
            if (where / "manifest.json").is_file()
            else "made when asked for"
            if made.placebo_of or made.mode == "gated"
            else ""
        )
        print(f"{made.name:20} {made.mode:10} {what:24} {state or 'not made yet'}")
    return 0


def _figures(folder: Path) -> str:
    figures = read_manifest(folder)["figures"]
    names = {"trigger_rate": "fires", "false_trigger_rate": "falsely", "off_trigger_kl": "KL"}
    return ", ".join(f"{word} {figures[key]['value']:.3f}" for key, word in names.items() if key in figures)


def _train(given: argparse.Namespace) -> int:
    chosen = recipe(given.name)
    # What is not shipped is looked for in the cache.
    out: Path = given.out or (Path(chosen.name) if zoo.shipped(chosen) else zoo.home(chosen))
    if chosen.mode == "gated" and not (out / "manifest.json").is_file() and out == zoo.home(chosen):
        # Made on first use, in a second and without figures.
        shutil.rmtree(out, ignore_errors=True)
    _require_new(out)
    original = zoo.folder(chosen.placebo_of) if chosen.placebo_of else None
    _make_one(chosen, out, original)
    print(out)
    return 0


def _make(given: argparse.Namespace) -> int:
    short = 0
    for chosen in RECIPES.values():
        out = given.out / chosen.name
        if not (out / "manifest.json").is_file():
            _make_one(chosen, out, given.out / chosen.placebo_of if chosen.placebo_of else None)
        problems = shortcomings(chosen, read_manifest(out))
        print(f"{chosen.name}: {_figures(out)}{'; ' if problems else ''}{'; '.join(problems)}", flush=True)
        short += bool(problems)
    print(f"{len(RECIPES) - short} of {len(RECIPES)} hold")
    return 1 if short else 0


def _make_one(chosen: Recipe, out: Path, original: Path | None) -> None:
    from trigger_opt.zoo.train import train_organism

    # Made under another name: an interrupted training leaves nothing that could be taken for a model.
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    train_organism(chosen, part, original=original)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, out)


def _stress(given: argparse.Namespace) -> int:
    from trigger_opt.zoo.stress_command import run

    out: Path = given.out or Path(f"stress_{given.name or 'pair'}")
    _require_new(out)
    run(given, out)
    print(out)
    return 0


def _require_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already and is no empty folder; name another with --out")


_COMMANDS = {"list": _list, "train": _train, "make": _make, "stress": _stress}


if __name__ == "__main__":
    sys.exit(main())
