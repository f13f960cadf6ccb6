"""Argument names of a class, read from its source without importing it, so plans stay fast."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_Found = tuple[str, ast.ClassDef | ast.FunctionDef]


@functools.cache
def arguments_of(path: str) -> frozenset[str] | None:
    """Arguments of a class (bases included) or function; None if it takes any or has no source."""
    found = _find(path)
    if found is None:
        return None
    names, closed = _walk(*found)
    return frozenset(names) if closed else None


def is_missing(path: str) -> bool:
    """Whether a path in `common` or `papers` does not exist."""
    return path.partition(".")[0] in ("common", "papers") and _find(path) is None


def _walk(module: str, node: ast.ClassDef | ast.FunctionDef) -> tuple[set[str], bool]:
    """Argument names, and whether they are complete."""
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    names: set[str] = set()
    initializer = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if initializer is not None:
        names, closed = _parameters(initializer)
        if closed:
            return names, True
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        names = {
            one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
    for base in node.bases:
        found = _resolve(module, ast.unparse(base).partition("[")[0])
        if found is None:
            continue
        more, closed = _walk(*found)
        names |= more
        if closed and more:
            return names, True
    return names, initializer is None and bool(names)


def _parameters(node: ast.FunctionDef) -> tuple[set[str], bool]:
    given = node.args
    names = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self"}
    return names, given.kwarg is None


def _find(path: str) -> _Found | None:
    module, _, name = path.rpartition(".")
    return _resolve(module, name) if module else None


def _resolve(module: str, name: str) -> _Found | None:
    """Where a module's name is defined, through its imports."""
    tree = _tree(module)
    if tree is None or "." in name:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _resolve(node.module, alias.name)
    return None


@functools.cache
def _tree(module: str) -> ast.Module | None:
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a package in a package it would import the outer one
    except ValueError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], *parts)
    for file in (folder / "__init__.py", folder.with_suffix(".py")):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None
