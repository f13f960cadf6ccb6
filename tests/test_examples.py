"""Run the examples in docstrings, and check that every loss, memory, metric and encoder file has an example."""

from __future__ import annotations

import doctest
import importlib
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.architecture.sources import modules

LIBRARY = ("common.losses", "common.memory", "common.metrics", "common.encoders")
#: Names that the examples use without an import.
NAMES = {"torch": torch, "np": np, "nn": nn, "F": F}
#: Files without examples: the suite's helpers, a metric that needs Java, and networks that need files.
WITHOUT = {
    "common.encoders.checkpoint_files", "common.memory.collective", "common.memory.groups", "common.metrics.gathering",
    "common.metrics.captioning.meteor", "common.metrics.captioning.caption_set",
    "common.metrics.generation.networks",
}  # fmt: skip


def library() -> list[str]:
    return [name for name in modules() if name.startswith(LIBRARY)]


@pytest.mark.parametrize("name", library())
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(module, extraglobs=NAMES | vars(module)):
        runner.run(example)
    assert not runner.failures


@pytest.mark.parametrize("name", [name for name in library() if name not in WITHOUT and not name.endswith("__")])
def test_a_file_of_the_library_has_an_example(name: str) -> None:
    module = importlib.import_module(name)
    public = [part for part in vars(module).values() if getattr(part, "__module__", "") == name]
    assert not public or any(">>>" in (inspect.getdoc(part) or "") for part in public)
