"""Lets tropt 0.1.1 be imported below Python 3.12, which it says it supports. Standard library only.

Two of its losses (not the one measured) are dataclasses with a slice as default; slices can be hashed, and so
be defaults, only since Python 3.12.
"""

import dataclasses
import sys
from functools import partial
from typing import Any

_dataclass: Any = dataclasses.dataclass


def allow_slice_defaults() -> None:
    """From now on `dataclass` takes a slice as default on older Pythons too."""
    if sys.version_info < (3, 12):
        dataclasses.dataclass = _tolerant


def _tolerant(cls: Any = None, /, **options: Any) -> Any:
    if cls is None:
        return lambda later: _tolerant(later, **options)
    for name, value in list(vars(cls).items()):
        if isinstance(value, slice):
            setattr(cls, name, dataclasses.field(default_factory=partial(slice, value.start, value.stop, value.step)))
    return _dataclass(cls, **options)
