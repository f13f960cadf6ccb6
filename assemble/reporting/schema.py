"""Define types for file contents, and make validation errors readable."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from common.errors import nearest


def among(value: str, valid: Collection[str], what: str = "value") -> str:
    """Return `value` if it is in `valid`. Otherwise, raise a ValueError that suggests the nearest choice."""
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: {nearest(value, valid)}")
    return value


def one_of(valid: Collection[str], what: str = "value") -> AfterValidator:
    return AfterValidator(lambda value: among(value, valid, what))


def name_of(what: str) -> AfterValidator:
    """Return a type for names of a kind. If the validation context lists names of this kind, other names are errors."""

    def check(value: str, info: ValidationInfo) -> str:
        return among(value, (info.context or {}).get(what, (value,)), what)

    return AfterValidator(check)


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("expected text")
    return value


#: Text with collapsed whitespace, as in folded YAML.
Line = Annotated[StrictStr, AfterValidator(lambda value: " ".join(value.split()))]
#: Text with collapsed whitespace that is not empty.
Text = Annotated[Line, AfterValidator(_filled)]


class Part(BaseModel):
    """Base class of the mappings in a file. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            valid = [field.alias or name for name, field in cls.model_fields.items()]
            for key in given:
                if key not in valid:
                    raise ValueError(f"unknown key {key!r}: {nearest(str(key), valid)}")
        return given


_OBJECT = TypeAdapter(dict[str, Any])


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object or raise a ValueError. Unlike Python's parser, limit the depth and refuse invalid text."""
    try:
        return _OBJECT.validate_json(text)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


def explained(error: ValidationError, given: Any) -> str:
    """Return the first error with its location: `tables[0] (transfer).rows[2].model: unknown stage ...`.

    `given` is the validated input. Its mappings give the keys where the error only has positions.
    """
    first = error.errors()[0]
    where, node = "", given
    for part in first["loc"]:
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
            where += f"[{part}]" + (f" ({node['id']})" if isinstance(node, Mapping) and "id" in node else "")
        elif part != "[key]":
            if isinstance(node, Mapping):
                part = list(node)[part] if isinstance(part, int) and part not in node else part
                node = node.get(part)
            where += f".{part}" if where else str(part)
    message = str(first["msg"])
    if first["type"] == "missing":
        message = "missing"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        message = message.replace("Input should be", "expected") + f", got {first['input']!r:.100}"
    return f"{where}: {message}" if where else message
