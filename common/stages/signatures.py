"""Argument names of a class, read from its source without importing it, so plans stay fast."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path


@functools.cache
def arguments_of(path: str) -> frozenset[str] | None:
    """Arguments of a class, bases included, or of a function; None if it takes any or has no source."""
    found = _find(path)
    names, complete = _arguments(*found) if found else (set(), False)
    return frozenset(names) if complete else None


def is_missing(path: str) -> bool:
    """Whether a path in `common` or `papers` does not exist."""
    return path.partition(".")[0] in ("common", "papers") and _find(path) is None


def _arguments(module: str, node: ast.ClassDef | ast.FunctionDef) -> tuple[set[str], bool]:
    """Argument names, and whether they are complete."""
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    names: set[str] = set()
    initializer = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if initializer is not None:
        names, complete = _parameters(initializer)
        if complete:
            return names, True
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
        names = {one.id for one in fields if isinstance(one, ast.Name)}
    for base in node.bases:
        if found := _find(f"{module}.{ast.unparse(base).partition('[')[0]}"):
            more, complete = _arguments(*found)
            names |= more
            if complete and more:
                return names, True
    return names, initializer is None and bool(names)


def _parameters(function: ast.FunctionDef) -> tuple[set[str], bool]:
    given = function.args
    names = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self"}
    return names, given.kwarg is None


@functools.cache
def _find(path: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The module that defines a class or function, through imports, and its definition."""
    module, _, name = path.rpartition(".")
    source = _source(module)
    # Parsing whole modules took a quarter of a plan's time.
    if found := re.search(rf"^(@.+\n)*(class|def) {name}\b.*\n(([ \])}}#].*)?\n)*", source, re.MULTILINE):
        try:
            node: ast.stmt | None = ast.parse(found[0]).body[0]
        except SyntaxError:  # a text inside is not indented
            node = next((one for one in ast.parse(source).body if getattr(one, "name", None) == name), None)
        return (module, node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
    for found in re.finditer(rf"^from ([\w.]+) import (\([^)]*|.*)\b{name}\b.*", source, re.MULTILINE):
        (statement,) = ast.parse(found[0] + (")" if "(" in found[0] and ")" not in found[0] else "")).body
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                return _find(f"{statement.module}.{alias.name}")
    return None


@functools.cache
def _source(module: str) -> str:
    top, *parts = module.split(".")
    # Of a package in a package it would import the outer one.
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or not spec.submodule_search_locations:
        return ""
    folder = Path(spec.submodule_search_locations[0], *parts)
    files = [file for file in (folder / "__init__.py", folder.with_suffix(".py")) if file.is_file()]
    return files[0].read_text(encoding="utf-8") if files else ""
