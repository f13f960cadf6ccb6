"""Build objects from untrusted plain data.

jsonargparse imports any class path, which executes code. This builder imports nothing: a path must match a listed
class, and text is never interpreted.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from common.errors import StageError
from common.types import hints_of


class _WrongType(StageError):
    """A value has the wrong type. If the type is a union, another type in it may fit."""


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True)
class Builder:
    """Builds objects from plain data and checks the types.

    Args:
        where: name of the data in errors.
        classes: all classes that `class_path` may name.
        no_files: arguments that must not be text, because text would be the name of a file.
    """

    where: str
    classes: tuple[type, ...] = ()
    no_files: frozenset[str] = frozenset()

    def value(self, stated: Any, kind: Any, field: str) -> Any:
        """Convert the value of `field` to the type `kind`.

        A class is built from `class_path` and `init_args`. For a dataclass or a class of `classes`, the arguments alone
        are enough.
        """
        origin, parts = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.value(stated, parts[0], field)
        if origin in (Union, types.UnionType):
            return self._one_of(stated, kind, field)
        if kind is Any or (kind in (None, types.NoneType) and stated is None):
            return stated
        if origin is Literal and any(stated == value and type(stated) is type(value) for value in parts):
            return stated
        if origin is tuple and isinstance(stated, list | tuple):
            each = parts[:1] * len(stated) if parts[-1] is Ellipsis else parts
            if len(each) == len(stated):
                return tuple(self._each(zip(stated, each), field))
        if origin in (list, Sequence) and isinstance(stated, list | tuple):
            return list(self._each(((item, parts[0]) for item in stated), field))
        if origin in (dict, Mapping) and isinstance(stated, Mapping) and all(isinstance(name, str) for name in stated):
            return {name: self.value(item, parts[1], f"{field}.{name}") for name, item in stated.items()}
        if isinstance(kind, type) and origin is None:
            if issubclass(kind, bool | str) and isinstance(stated, kind):
                return stated
            if issubclass(kind, int | float) and kind is not bool and type(stated) in (int, kind, kind.__base__):
                return self._made(kind, [stated], {}, field)
            if isinstance(stated, Mapping) and not issubclass(kind, str | int | float):
                return self._object(stated, kind, field)
        name = kind.__name__ if isinstance(kind, type) and origin is None else kind
        raise _WrongType(f"{self.where}: {field} is {stated!r:.80}, not of type {name}")

    def refuse(self, field: str, why: str) -> NoReturn:
        raise StageError(f"{self.where}: {field} {why}")

    def _one_of(self, stated: Any, kind: Any, field: str) -> Any:
        options = [option for option in get_args(kind) if option is not types.NoneType or stated is None]
        for option in sorted(options, key=lambda option: option is float):  # float last: an int stays an int
            try:
                return self.value(stated, option, field)
            except _WrongType:
                if len(options) == 1:
                    raise
        raise _WrongType(f"{self.where}: {field} is {stated!r:.80}, not of type {kind}")

    def _each(self, pairs: Any, field: str) -> list[Any]:
        return [self.value(item, kind, f"{field}.{place}") for place, (item, kind) in enumerate(pairs)]

    def _object(self, stated: Mapping[str, Any], kind: type, field: str) -> Any:
        if "class_path" not in stated:
            if is_dataclass(kind) or kind in self.classes:
                return self._built(kind, stated, field)
            self.refuse(field, "has no class_path")
        path = stated["class_path"]
        built = next((listed for listed in self.classes if path == path_of(listed)), None)
        if built is None:
            self.refuse(f"{field}.class_path", f"is {path!r:.80}, which is not a class of this paper's models")
        if not issubclass(built, kind):
            raise _WrongType(f"{self.where}: {field} is of class {path}, not {kind.__name__}")
        for name in stated.keys() - {"class_path", "init_args"}:
            self.refuse(f"{field}.{name}", "is unknown; only class_path and init_args are allowed")
        return self._built(built, stated.get("init_args", {}), f"{field}.init_args")

    def _built(self, kind: type, arguments: Any, field: str) -> Any:
        if not isinstance(arguments, Mapping):
            self.refuse(field, f"must map arguments of {kind.__name__} to values")
        kinds = hints_of(kind)
        values = {}
        for name, stated in arguments.items():
            if name not in kinds:
                self.refuse(f"{field}.{name}", f"is not an argument of {kind.__name__}")
            if name in self.no_files and isinstance(stated, str):
                self.refuse(f"{field}.{name}", "names a file, but a trained model must not read other files")
            values[name] = self.value(stated, kinds[name], f"{field}.{name}")
        return self._made(kind, [], values, field)

    def _made(self, kind: type, arguments: list[Any], named: dict[str, Any], field: str) -> Any:
        try:
            return kind(*arguments, **named)
        except Exception as error:  # Constructors raise anything for invalid arguments.
            raise StageError(f"{self.where}: {field} does not fit {kind.__name__}: {error}") from error
