"""`python -m trigger_opt.zoo list | train NAME [--out FOLDER]`"""

import argparse
import sys
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.zoo.recipes import RECIPES, recipe


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trigger_opt.zoo", description="Make model organisms again.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the organisms")
    train = commands.add_parser("train", help="train an organism from nothing, about 15 minutes on 2 cores")
    train.add_argument("name")
    train.add_argument("--out", type=Path, default=None, help="folder for adapter and manifest (default: ./NAME)")
    given = parser.parse_args(arguments)
    if given.command == "list":
        print("\n".join(RECIPES))
        return 0
    try:
        chosen = recipe(given.name)
        out: Path = given.out or Path(chosen.name)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already and is no empty folder; name another with --out")
        from trigger_opt.zoo.train import train_organism

        train_organism(chosen, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
