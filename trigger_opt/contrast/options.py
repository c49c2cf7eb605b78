"""The command line of a contrast scan, read and checked."""

import argparse
import math
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trigger_opt.errors import UserError

_DESCRIPTION = (
    "Do answers to two sets of prompts differ, say with and without marks of being evaluated? On one model or a pair, "
    "feature by feature, with permutation p-values corrected for their number. Needs no trigger and no weights."
)
_LEAST_PERMUTATIONS = 99
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for; None where an option was not given.

    Attributes:
        a, b: prompt files. answers_a, answers_b, base_answers_a, base_answers_b: files of brought answers.
        model, base: names; see `contrast.source`, as for device, dtype, quantization, allow_pickle and allow_code.
        paired: line i of A belongs to line i of B. out: folder for what is found.
    """

    a: Path | None
    b: Path | None
    model: str | None
    base: str | None
    answers_a: Path | None
    answers_b: Path | None
    base_answers_a: Path | None
    base_answers_b: Path | None
    paired: bool
    max_new_tokens: int
    repeats: int
    temperature: float
    permutations: int
    seed: int
    out: Path
    device: str
    dtype: str
    quantization: str
    allow_pickle: bool
    allow_code: bool


def parse(arguments: list[str]) -> Wanted:
    """The options, checked.

    Raises:
        UserError: an option is unknown, out of range or of the wrong type; or they do not go together.
    """
    try:
        given, unknown = _parser().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; `trigger-opt contrast --help` shows all options") from None
    if unknown:
        raise UserError(f"there is no option {unknown[0]!r}; `trigger-opt contrast --help` shows all options")
    if given.out is None:
        given.out = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_contrast_{secrets.token_hex(3)}"
    wanted = Wanted(**vars(given))
    _check_numbers(wanted)
    _check_sources(wanted)
    return wanted


def _parser() -> argparse.ArgumentParser:
    # Raised and not printed, so that its errors are one line like all others.
    parser = argparse.ArgumentParser(
        prog="trigger-opt contrast", description=_DESCRIPTION, allow_abbrev=False, exit_on_error=False
    )
    add = parser.add_argument
    for name in ("a", "b"):
        add(f"--{name}", type=Path, metavar="FILE", help=f"prompts of set {name.upper()}: one a line, or JSON Lines")
    add("--paired", action="store_true", help="line i of A and line i of B are a pair (equal ids make pairs too)")
    add("--model", metavar="NAME", help="zoo:NAME, a folder or a hub name; may be an adapter")
    add("--base", metavar="NAME", help="its base: features are then differences from it")
    for name in ("answers-a", "answers-b", "base-answers-a", "base-answers-b"):
        add(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help="brought answers, JSON Lines, or an export of the transfer ledger",
        )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="length of an answer (default 64)")
    add("--repeats", type=int, default=1, metavar="N", help="answers to each prompt (default 1)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--permutations", type=int, default=9999, metavar="N", help="default 9999")
    add("--seed", type=int, default=0, metavar="N", help="of every random draw (default 0)")
    add("--out", type=Path, default=None, metavar="FOLDER", help="default: a fresh folder under runs/")
    add("--device", default="auto", help="cpu, cuda, cuda:0 … or auto (default)")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    add("--quantization", default="none", choices=["none", "int8", "nf4"])
    add("--allow-pickle", action="store_true", help="accept pickled weights (model.allow_pickle of a run)")
    add("--allow-code", action="store_true", help="accept a repository's own code (model.allow_code of a run)")
    return parser


def _check_numbers(wanted: Wanted) -> None:
    least = {"max-new-tokens": 1, "repeats": 1, "permutations": _LEAST_PERMUTATIONS, "seed": 0}
    for name, lowest in least.items():
        if (found := getattr(wanted, name.replace("-", "_"))) < lowest:
            raise UserError(f"--{name} is {found}; give a whole number from {lowest}")
    if wanted.seed > _MOST_SEED:
        raise UserError(f"--seed is {wanted.seed}; give a whole number below 2^63")
    if not (math.isfinite(wanted.temperature) and wanted.temperature >= 0):
        raise UserError(f"--temperature is {wanted.temperature}; give a number from 0")
    if wanted.repeats > 1 and wanted.temperature == 0:
        raise UserError(
            f"--repeats {wanted.repeats} at temperature 0 gives the same answer {wanted.repeats} times; "
            "give --temperature 1, or leave --repeats out"
        )
    allowed = wanted.device in ("cpu", "auto", "cuda") or wanted.device.removeprefix("cuda:").isdecimal()
    if not allowed:
        raise UserError(f"--device is {wanted.device!r}; give cpu, auto, cuda or cuda:NUMBER")


def _check_sources(wanted: Wanted) -> None:
    brought = {
        f"--{name.replace('_', '-')}": getattr(wanted, name)
        for name in ("answers_a", "answers_b", "base_answers_a", "base_answers_b")
    }
    given = [name for name, path in brought.items() if path is not None]
    if wanted.model is not None and given:
        raise UserError(f"--model and {given[0]} are both given; let the model answer, or bring answers")
    if wanted.model is None and not given:
        raise UserError("nobody answers: give --model NAME, or --answers-a FILE and --answers-b FILE")
    if wanted.base is not None and wanted.model is None:
        raise UserError("--base goes with --model; bring the base's answers as --base-answers-a and --base-answers-b")
    needed = {"--a": wanted.a, "--b": wanted.b} if wanted.model is not None else {}
    if given:
        needed |= {name: path for name, path in brought.items() if not name.startswith("--base")}
        needed |= brought if any(name.startswith("--base") for name in given) else {}
        needed |= {"--a": wanted.a, "--b": wanted.b} if (wanted.a or wanted.b) else {}
    if missing := [name for name, path in needed.items() if path is None]:
        raise UserError(f"{missing[0]} is not given; give {missing[0]} FILE")
