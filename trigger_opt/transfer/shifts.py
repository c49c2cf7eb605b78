"""How far a string moves a module's output, against a control in the same contexts; and activations on disk."""

import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trigger_opt.errors import UserError
from trigger_opt.records import ModuleShift
from trigger_opt.transfer.requests import Array

_LEAST_CONTEXTS = 3
_ALL_SIGNS_TO = 10
# Of the differences' squared norms: the same sum in another order must not count as smaller.
_ROUNDING = 1e-12
_NAMES = "names"

_Floats = npt.NDArray[np.float64]


def module_shifts(
    triggered: Mapping[int, dict[str, Array]],
    controls: Mapping[int, dict[str, Array]],
    *,
    seed: int,
    permutations: int = 2000,
) -> list[ModuleShift]:
    """The shift of each module with a p-value, smallest p-value first.

    Each array (tokens, width) is averaged over its tokens. The statistic is the norm of the mean over contexts of
    triggered minus control. Were the string nothing special, each context's two could be exchanged, which flips the
    sign of its difference: the p-value is the share of sign flips with a statistic at least as large. Up to ten
    contexts all 2^n are tried, above `permutations` random ones and the observed one. Not corrected for the number of
    modules. Fewer than three contexts have the p-value 1.

    What is tested is whether the string moves the module the same way in all contexts. Any fixed string may, for the
    controls' random strings change from context to context: a small p-value is no sign of a trigger. Compare shifts
    between strings, not to zero.

    Source: R. A. Fisher (1935), The Design of Experiments, section 21 (paired randomisation test).

    Args:
        triggered, controls: context number -> module name -> array. Contexts without either side are left out, and
            modules without any context.

    Raises:
        UserError: an array is not (tokens, width) or empty, holds no finite numbers, or differs in width; or all
            controls of a module that moved are zero.
    """
    both = sorted(set(triggered) & set(controls))
    modules = sorted({m for c in both for m in set(triggered[c]) & set(controls[c])})
    shifts = []
    for module in modules:
        contexts = [c for c in both if module in triggered[c] and module in controls[c]]
        with_string = _means([triggered[c][module] for c in contexts], module)
        without = _means([controls[c][module] for c in contexts], module)
        if with_string.shape != without.shape:
            raise _unusable(module, f"is {with_string.shape[1]} and {without.shape[1]} wide")
        shifts.append(_shift(module, with_string, without, seed=seed, permutations=permutations))
    return sorted(shifts, key=lambda s: (s.p_value, -s.shift, s.module))


def save_activations(path: Path, arrays: Mapping[str, Array]) -> None:
    """Replace `path` by the arrays, compressed, as float32; atomic. Module names may hold any characters.

    Raises:
        OSError: it cannot be written, say for a full disk; what was there stays.
    """
    # Names are data and not members of the archive, where "/", ".." or "file" would mean something.
    names = np.frombuffer(json.dumps(list(arrays)).encode(), dtype=np.uint8)
    members = {f"array{i}": np.asarray(a, dtype=np.float32) for i, a in enumerate(arrays.values())}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **{_NAMES: names}, **members)  # type: ignore[arg-type]
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_activations(path: Path) -> dict[str, Array]:
    """The arrays by module name.

    Raises:
        UserError: the file is missing or is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as members:
            names = json.loads(members[_NAMES].tobytes())
            return {name: members[f"array{i}"] for i, name in enumerate(names)}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the transfer stage that writes it first") from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no activations ({error}); delete it and run the transfer stage again") from None


def _shift(module: str, with_string: _Floats, without: _Floats, *, seed: int, permutations: int) -> ModuleShift:
    differences = with_string - without
    moved = float(np.linalg.norm(differences.mean(axis=0)))
    unit = float(np.linalg.norm(without, axis=1).mean())
    if moved and not unit:
        raise _unusable(module, "is zero in all controls")
    contexts = len(differences)
    enough = contexts >= _LEAST_CONTEXTS
    return ModuleShift(
        module=module,
        shift=moved / unit if moved else 0.0,
        p_value=_p_value(differences, seed=seed, permutations=permutations) if enough else 1.0,
        contexts=contexts,
    )


def _p_value(differences: _Floats, *, seed: int, permutations: int) -> float:
    contexts = len(differences)
    # Squared norms of all signed sums from the inner products alone: the width costs once.
    products = differences @ differences.T
    observed = products.sum() - _ROUNDING * contexts * np.trace(products)
    if contexts <= _ALL_SIGNS_TO:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=contexts)))
        return float((_norms(signs, products) >= observed).mean())
    signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(permutations, contexts))
    count = int((_norms(signs, products) >= observed).sum())
    return (1 + count) / (1 + permutations)


def _norms(signs: _Floats, products: _Floats) -> _Floats:
    norms: _Floats = ((signs @ products) * signs).sum(axis=1)
    return norms


def _means(arrays: list[Array], module: str) -> _Floats:
    for array in arrays:
        if array.ndim != 2 or not array.size:
            raise _unusable(module, f"has the shape {array.shape}; (tokens, width) is needed")
        if not np.isfinite(array).all():
            raise _unusable(module, "holds NaN or infinity")
    widths = sorted({a.shape[1] for a in arrays})
    if len(widths) > 1:
        raise _unusable(module, f"is {' and '.join(map(str, widths))} wide in different contexts")
    return np.stack([a.mean(axis=0, dtype=np.float64) for a in arrays])


def _unusable(module: str, what: str) -> UserError:
    return UserError(f"the output of module {module!r} {what}; leave it out of transfer.activations")
