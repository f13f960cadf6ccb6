"""Check that the suite calls every function it defines."""

from __future__ import annotations

import ast
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch.utils.data.distributed import DistributedSampler

from tests.architecture.sources import ROOT, docstrings, file_of, modules

#: Classes of libraries that call our methods by name.
CALLERS = (
    pl.LightningModule, pl.LightningDataModule, pl.Callback, LightningCLI, Logger, Strategy, TorchCheckpointIO,
    torch.nn.Module, torch.optim.Optimizer, DistributedSampler, pickle.Unpickler, pickle.Pickler,
    ThreadingHTTPServer, SimpleHTTPRequestHandler,
)  # fmt: skip
#: Methods that libraries find without a base class, and data sets that `--data.dataset folder` finds by name.
LOOKED_UP = {"readinto", "reducer_override", "FolderOfAudio", "FolderOfClips"}
#: Packages whose public functions users call: losses to choose from, and conversions of released weights.
FOR_OTHERS = re.compile(r"common\.losses\.\w+|papers\.\w+\.weights")


def names_in(tree: ast.AST, documented: set[ast.expr]) -> Iterator[str]:
    """Yield every name that code uses, including names in strings: class paths, and method names for `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented:
            yield from set(re.findall(r"\w+", node.value))


def prefixes_in(tree: ast.AST) -> tuple[str, ...]:
    """Return the prefixes from which a module builds names for `getattr`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr")
    parts = (call.args[1].values[0] for call in calls if isinstance(call.args[1], ast.JoinedStr))
    return tuple(str(part.value) for part in parts if isinstance(part, ast.Constant))


def pages() -> Iterator[Path]:
    """Yield the files that name code: configurations, tables, pages, the Makefile and templates."""
    named = ("*.md", "docs/**/*.md", "papers/**/*.md", "common/**/*.md", "tests/**/*.md")
    for pattern in ("configs/**/*.yaml", "papers/*/tables.yaml", *named, "Makefile", "pyproject.toml"):
        yield from ROOT.glob(pattern)
    yield from (ROOT / "assemble" / "reporting" / "templates").iterdir()


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield a module's functions, classes and methods. Leave out decorated methods, which the decorator may call."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node
            yield from (one for one in node.body if isinstance(one, ast.FunctionDef) and not one.decorator_list)
        elif isinstance(node, ast.FunctionDef):
            yield node


def test_everything_is_called_from_somewhere() -> None:
    hooks = {name for caller in CALLERS for name in dir(caller)} | LOOKED_UP
    documented = {module: docstrings(tree) for module, tree in modules().items()}
    used = Counter(name for module, tree in modules().items() for name in names_in(tree, documented[module]))
    written = {word for path in pages() for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    dead = []
    for module, tree in modules().items():
        # The base class of the worlds finds the method that writes a data set by name.
        prefixes = (*prefixes_in(tree), *(["_fill_"] if module.startswith("common.data.worlds.") else []))
        for node in definitions(tree):
            name = node.name
            if name.startswith("__") or name in hooks or name in written or name.startswith(prefixes):
                continue
            if FOR_OTHERS.fullmatch(module) and not name.startswith("_"):
                continue
            if used[name] <= Counter(names_in(node, documented[module]))[name]:
                dead.append(f"{file_of(module)}:{node.lineno} {name}")
    assert not dead, "nothing but tests, if anything, calls\n" + "\n".join(dead)
