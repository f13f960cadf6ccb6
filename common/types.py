"""Number types with a range, and a check of configured values against them.

Only configurations are checked. Code that could silently compute wrong numbers, such as a loss, also checks arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.errors import nearest

_number = functools.partial(Field, strict=True, allow_inf_nan=False)
_whole = functools.partial(Field, strict=True)

PositiveFloat = Annotated[float, _number(gt=0)]
NonNegativeFloat = Annotated[float, _number(ge=0)]
Fraction = Annotated[float, _number(ge=0, le=1)]
PartialFraction = Annotated[float, _number(ge=0, lt=1)]
PositiveFraction = Annotated[float, _number(gt=0, le=1)]
#: Decay rate of a running average.
Momentum = PartialFraction
PositiveInt = Annotated[int, _whole(gt=0)]
NonNegativeInt = Annotated[int, _whole(ge=0)]
AtLeastTwo = Annotated[int, _whole(ge=2)]
#: Pixels per side of a generated picture.
PictureSide = Annotated[int, _whole(ge=16)]
#: Pixels per side of a generated video; video encoders need an even number.
FrameSide = Annotated[int, _whole(ge=16, multiple_of=2)]
#: Samples per second of generated audio, whose highest frequency is 3.5 kHz.
SampleRate = Annotated[int, _whole(ge=8000)]


def class_at(path: str) -> Any:
    """Import a class or function by its dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def outside(cls: Any, arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and problem of each argument out of range. Fields of dataclasses have dotted names."""
    hints = hints_of(cls) if isinstance(cls, type) else {}
    for name, value in arguments.items():
        hint: Any = hints.get(name)
        part = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if isinstance(part, type) and isinstance(value, dict) and "class_path" not in value:
            fields = hints_of(part)
            unknown = [key for key in value if key not in fields]
            yield from ((f"{name}.{key}", f"is unknown; {nearest(str(key), fields)}") for key in unknown)
            yield from ((f"{name}.{inner}", problem) for inner, problem in outside(part, value))
        elif has_range(hint):
            try:
                TypeAdapter(hint).validate_python(value)
            except ValidationError as error:
                problems = dict.fromkeys(details["msg"].lower() for details in error.errors())
                yield name, f"is {value!r}: {'; '.join(problems)}"


@functools.cache
def arguments_of(cls: Any) -> frozenset[str] | None:
    """Return the argument names of a function, or of a class and its bases. None if any name is accepted."""
    names: set[str] = set()
    for base in cls.__mro__[:-1] if isinstance(cls, type) else (cls,):
        function = base.__dict__.get("__init__") if isinstance(cls, type) else cls
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            names |= {item.name for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}
            if all(item.kind is not item.VAR_KEYWORD for item in parameters):
                return frozenset(names - {"self"})
    return None


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the annotated types of the constructor arguments of a class and its bases, with their ranges."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is not object and "__init__" in base.__dict__:
            try:
                hints |= typing.get_type_hints(
                    base.__init__,  # type: ignore[misc]
                    vars(sys.modules[base.__module__]),
                    include_extras=True,
                )
            except NameError:  # a third-party class imports its types under TYPE_CHECKING
                continue
    return {name: kind for name, kind in hints.items() if name not in ("args", "kwargs", "return")}


def has_range(hint: Any) -> bool:
    """Return whether a type, or a type inside it such as `list[PositiveInt]`, has a range."""
    ranged = any(isinstance(entry, FieldInfo) for entry in getattr(hint, "__metadata__", ()))
    return ranged or any(map(has_range, typing.get_args(hint)))
