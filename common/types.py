"""Types of fields that have a range, and the check of a configuration's values against them.

The values are plain numbers. Who builds a class in Python is not checked here; what would compute wrong numbers unseen,
such as a loss, checks its own arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

_number = functools.partial(Field, strict=True, allow_inf_nan=False)
_whole = functools.partial(Field, strict=True)

PositiveFloat = Annotated[float, _number(gt=0)]
NonNegativeFloat = Annotated[float, _number(ge=0)]
#: A share or a probability.
Fraction = Annotated[float, _number(ge=0, le=1)]
#: A share that leaves something.
PartialFraction = Annotated[float, _number(ge=0, lt=1)]
#: What an optimizer keeps of its running averages.
Momentum = PartialFraction
PositiveInt = Annotated[int, _whole(gt=0)]
NonNegativeInt = Annotated[int, _whole(ge=0)]
#: Pixels per side of a generated picture.
PictureSide = Annotated[int, _whole(ge=16)]
#: Pixels per side of a generated video; encoders need an even one.
FrameSide = Annotated[int, _whole(ge=16, multiple_of=2)]
#: Samples per second of a generated sound, whose partials reach 3.5 kHz.
SampleRate = Annotated[int, _whole(ge=8000)]


def outside(cls: type, arguments: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and problem of each argument of a class, or of its parts, that is out of its range."""
    hints = hints_of(cls)
    for name, value in arguments.items():
        hint: Any = hints.get(name)
        part = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if isinstance(part, type) and isinstance(value, dict):
            for inner, found, problem in outside(part, value):
                yield f"{name}.{inner}", found, problem
        elif has_range(hint):
            try:
                TypeAdapter(hint).validate_python(value)
            except ValidationError as error:
                yield name, value, "; ".join(dict.fromkeys(one["msg"].lower() for one in error.errors()))


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
    return {name: kind for name, kind in found.items() if name not in ("args", "kwargs", "return")}


def has_range(hint: Any) -> bool:
    """Whether a type names a range, at any depth."""
    own = any(isinstance(entry, FieldInfo) for entry in getattr(hint, "__metadata__", ()))
    return own or any(map(has_range, typing.get_args(hint)))
