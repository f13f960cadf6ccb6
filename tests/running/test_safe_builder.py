"""Test building objects from plain data: types, allowed classes, and what is rejected."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from torch import nn

from assemble.reporting.papers import existing_papers
from assemble.stages.paper_modules import optional_part, trained_model
from common.encoders.audio import AudioConvNet
from common.encoders.image import ImageResNet
from common.errors import StageError
from common.models.safe_builder import Builder, path_of
from common.types import hints_of

NETWORK = "common.encoders.audio.AudioConvNet"


@dataclass(frozen=True)
class Sizes:
    width: int = 3
    betas: tuple[float, float] = (0.9, 0.99)


builder = Builder("config.json", (AudioConvNet,), frozenset({"pretrained"}))


@pytest.mark.parametrize(
    ("stated", "kind", "expected"),
    [
        (1, int, 1),
        (1, float, 1.0),
        (None, int | None, None),
        (3, float | str, 3.0),
        (2, float | int, 2),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([1, 2], Sequence[int], [1, 2]),
        ([0.5, 0.9], float | tuple[float, float], (0.5, 0.9)),
        ({"a": [1]}, dict[str, list[float]], {"a": [1.0]}),
        ("mean", Literal["mean", "sum"], "mean"),
        ({"width": 4, "betas": [0, 1]}, Sizes, Sizes(4, (0.0, 1.0))),
    ],
)
def test_values_come_as_their_types(stated: Any, kind: Any, expected: Any) -> None:
    found = builder.value(stated, kind, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("stated", "kind", "message"),
    [
        ("1", int, "x is '1', not of type int"),
        (True, int, "x is True, not of type int"),
        ([1, "a"], list[int], "x.1 is 'a', not of type int"),
        ("max", Literal["mean", "sum"], "x is 'max', not of type .*Literal"),
        ({"depth": 1}, Sizes, "x.depth is not an argument of Sizes"),
        ({"width": 4}, nn.Module, "x has no class_path"),
        ({"class_path": "common.encoders.audio.nn.Linear"}, nn.Module, "x.class_path is "),
        ({"class_path": "common.files.os.system"}, nn.Module | None, "x.class_path is "),
        ({"class_path": path_of(ImageResNet)}, nn.Module, "x.class_path is "),
        ({"class_path": NETWORK}, ImageResNet, "x is of class common.encoders.audio.AudioConvNet, not ImageResNet"),
        ({"class_path": NETWORK, "init_args": {"wide": 1}}, nn.Module, "x.init_args.wide is not an argument"),
        ({"class_path": NETWORK, "init_args": {"pretrained": "/a"}}, nn.Module, "x.init_args.pretrained is not an "),
        ({"class_path": NETWORK, "init_args": {"width": -1}}, nn.Module, "x.init_args does not fit AudioConvNet"),
    ],
)
def test_what_is_refused(stated: Any, kind: Any, message: str) -> None:
    with pytest.raises(StageError, match=f"^config.json: {message}"):
        builder.value(stated, kind, "x")


@pytest.mark.parametrize("paper", [one.name for one in existing_papers() if optional_part(one.name, "use")])
def test_the_classes_of_trained_models_are_known(paper: str) -> None:
    """Check that the listed classes, of the model or of its training module, exist at their path with known types."""
    model = trained_model(paper)
    for module, _, name in (kind.rpartition(".") for kind in model.kinds):
        assert hasattr(importlib.import_module(module), name)
    modules_are_built = set(model.kinds) <= {path_of(one) for one in model.classes}
    for one in model.classes if modules_are_built else (model, *model.classes):
        assert isinstance(one, type)
        assert one.__module__.startswith(("common.", f"papers.{paper}."))
        assert getattr(sys.modules[one.__module__], one.__name__) is one
        assert hints_of(one)
        for name, kind in hints_of(one).items():
            assert kind is not Any, f"{one.__name__}.{name} could be anything"
