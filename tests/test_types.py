"""Test the ranges of fields: a wrong value stops the command with one line that gives field, value and range."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from assemble.reporting.papers import existing_papers
from assemble.reporting.tables import expand
from assemble.stages.configuration import resolve
from assemble.stages.recipes import recipes_of, scales_of
from common.types import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    arguments_of,
    has_range,
    hints_of,
    outside,
)

#: Fields that may have any number: a mean of pixels, and joblib's number of jobs (-1 means all cores).
ANY_NUMBER = {"mean", "jobs"}


class Part:
    def __init__(
        self,
        rate: PositiveFloat,
        share: Fraction | tuple[Fraction, Fraction] = 0.5,
        count: PositiveInt | None = None,
        seed: NonNegativeInt = 0,
        name: str = "",
    ) -> None: ...


class Whole(Part):
    def __init__(self, width: PositiveInt = 1, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": 0}, "input should be greater than 0"),
        ({"rate": math.nan}, "input should be a finite number"),
        ({"rate": True}, "input should be a valid number"),
        ({"share": 1.1}, "input should be less than or equal to 1; input should be a valid tuple"),
        ({"share": [0.1, -0.1]}, "input should be a valid number; input should be greater than or equal to 0"),
        ({"count": 0}, "input should be greater than 0"),
        ({"seed": -1}, "input should be greater than or equal to 0"),
        ({"width": 0}, "input should be greater than 0"),
    ],
)
def test_a_value_outside_its_range_is_named(arguments: dict[str, Any], words: str) -> None:
    (name,) = arguments
    assert list(outside(Whole, arguments)) == [(name, f"is {arguments[name]!r}: {words}")]


def test_values_inside_their_ranges_pass_also_whole_numbers_for_floats() -> None:
    inside = {"rate": 1, "share": [0, 1], "count": None, "seed": 0, "name": -1, "width": 3, "unknown": -1}
    assert list(outside(Whole, inside)) == []


@dataclass
class Sizes:
    width: PositiveInt = 1


class Holding:
    def __init__(self, sizes: Sizes | None = None, **kwargs: Any) -> None: ...


def test_fields_of_a_dataclass_are_checked_like_arguments() -> None:
    assert list(outside(Holding, {"sizes": {"width": 0}})) == [
        ("sizes.width", "is 0: input should be greater than 0"),
    ]
    [(field, problem)] = outside(Holding, {"sizes": {"widht": 2}})
    assert field == "sizes.widht"
    assert "did you mean 'width'?" in problem


def test_a_class_takes_the_arguments_of_its_bases_unless_one_takes_any() -> None:
    assert arguments_of(Whole) == {"width", "rate", "share", "count", "seed", "name"}
    assert arguments_of(Holding) is None
    assert arguments_of(arguments_of) == {"cls"}


def _classes(config: Any) -> set[str]:
    if isinstance(config, dict):
        own = {config["class_path"]} if "class_path" in config else set()
        return own.union(*map(_classes, config.values()))
    return set().union(*map(_classes, config)) if isinstance(config, list) else set()


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_every_number_that_a_recipe_can_set_has_a_range(paper: str) -> None:
    paths: set[str] = set()
    for scale in scales_of(paper):
        # The `single` scale only covers the recipes of its stages.
        of_stages = {stage.recipe for stage in expand(paper, scale, everything=True)}
        for recipe in of_stages if scale == "single" else recipes_of(paper):
            paths |= _classes(resolve(paper, recipe, scale=scale).config)
    ours = sorted(path for path in paths if path.startswith(("common.", "papers.")))
    assert len(ours) > 10
    bare: list[str] = []
    for path in ours:
        module, _, name = path.rpartition(".")
        for field, hint in hints_of(getattr(importlib.import_module(module), name)).items():
            numbers = {hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))}
            if numbers & {int, float} and not has_range(hint) and field not in ANY_NUMBER:
                bare.append(f"{path}.{field}")
    assert bare == []
