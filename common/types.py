"""Types of fields that have a range, and the check of a configuration's values against them.

The values are plain numbers: nothing is wrapped, so checkpoints hold what they always held. Who builds a class in
Python is not checked here; what would compute wrong numbers unseen, such as a loss, checks its own arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number must be, in words; stands in the type beside the check itself."""

    words: str


def _within(inside: Callable[[float], bool]) -> AfterValidator:
    def check(value: float) -> float:
        if not (math.isfinite(value) and inside(value)):
            raise ValueError("outside its range")
        return value

    return AfterValidator(check)


_positive = _within(lambda value: value > 0)
_not_negative = _within(lambda value: value >= 0)
_share = _within(lambda value: 0 <= value <= 1)
_below_one = _within(lambda value: 0 <= value < 1)
_drawable = _within(lambda value: value >= 16)
_even = _within(lambda value: value >= 16 and value % 2 == 0)
_audible = _within(lambda value: value >= 8000)

PositiveFloat = Annotated[float, Strict(), _positive, Range("a number above 0")]
NonNegativeFloat = Annotated[float, Strict(), _not_negative, Range("a number from 0")]
#: A share or a probability.
Fraction = Annotated[float, Strict(), _share, Range("a number from 0 to 1")]
#: A share that leaves something.
PartialFraction = Annotated[float, Strict(), _below_one, Range("a number from 0 to below 1")]
#: What an optimizer keeps of its running averages.
Momentum = PartialFraction
PositiveInt = Annotated[int, Strict(), _positive, Range("a whole number from 1")]
NonNegativeInt = Annotated[int, Strict(), _not_negative, Range("a whole number from 0")]
#: Pixels per side of a generated picture.
PictureSide = Annotated[int, Strict(), _drawable, Range("a whole number from 16")]
#: Pixels per side of a generated video; encoders need an even one.
FrameSide = Annotated[int, Strict(), _even, Range("an even number from 16")]
#: Samples per second of a generated sound, whose partials reach 3.5 kHz.
SampleRate = Annotated[int, Strict(), _audible, Range("a whole number from 8000")]


def outside(cls: type, arguments: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """The arguments of a class, or of its parts that are plain mappings, that lie outside their range.

    Args:
        cls: the class; its constructor's annotations, and those of its bases, say the ranges.
        arguments: by name; those without a range are passed over.

    Returns:
        The dotted name, the value and what it must be, for each.
    """
    hints = hints_of(cls)
    for name, value in arguments.items():
        hint: Any = hints.get(name)
        part = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if isinstance(part, type) and isinstance(value, dict):
            for inner, found, words in outside(part, value):
                yield f"{name}.{inner}", found, words
        elif hint is not None and (ranges := list(dict.fromkeys(ranges_in(hint)))):
            try:
                TypeAdapter(hint).validate_python(value)
            except ValidationError:
                words = " or ".join(found.words for found in ranges)
                yield name, value, f"{words}, or null" if type(None) in typing.get_args(hint) else words


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Types of everything that the constructors of a class and of its bases take, with their ranges."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is not object and "__init__" in base.__dict__:
            try:
                found |= typing.get_type_hints(
                    base.__init__,  # type: ignore[misc]
                    vars(sys.modules[base.__module__]),
                    include_extras=True,
                )
            except NameError:  # a class of another library, whose types are there for type checkers alone
                continue
    found.pop("return", None)
    return found


def ranges_in(hint: Any) -> Iterator[Range]:
    """The ranges that a type names, at any depth."""
    yield from (entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Range))
    for inner in typing.get_args(hint):
        yield from ranges_in(inner)
