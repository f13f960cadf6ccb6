"""Argument names of a class, read from its source without importing it, so plans stay fast."""

from __future__ import annotations

import ast
import functools

from assemble.reporting.code import parse, source_file


@functools.cache
def arguments_of(path: str) -> frozenset[str] | None:
    """Arguments of a class, bases included, or of a function; None if it takes any or has no source."""
    found = _find(path)
    names, complete = _arguments(*found) if found else (set(), False)
    return frozenset(names) if complete else None


@functools.cache
def fields_of(path: str) -> dict[str, set[str]]:
    """The arguments of a class, bases included, that are dataclasses of ours, and their fields."""
    module, node = _find(path) or ("", None)
    found: dict[str, set[str]] = {}
    if not isinstance(node, ast.ClassDef):
        return found
    for base in reversed(_bases(module, node)):
        found |= fields_of(base) if base != path else {}
    initializer = _initializer(node)
    for one in ast.walk(initializer.args) if initializer else ():
        if isinstance(one, ast.arg):
            found.pop(one.arg, None)
            name = ast.unparse(one.annotation).removesuffix(" | None") if one.annotation else ""
            ours = _names(module)[1].get(name, module).startswith(("common.", "papers."))
            kind = _find(f"{module}.{name}") if ours else None
            if kind and _is_dataclass(kind[1]):
                found[one.arg] = _arguments(*kind)[0]
    return found


def is_missing(path: str) -> bool:
    """Whether a path in `common` or `papers` does not exist."""
    return path.partition(".")[0] in ("common", "papers") and _find(path) is None


def _arguments(module: str, node: ast.ClassDef | ast.FunctionDef) -> tuple[set[str], bool]:
    """Argument names, and whether they are complete."""
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    names: set[str] = set()
    initializer = _initializer(node)
    if initializer is not None:
        names, complete = _parameters(initializer)
        if complete:
            return names, True
    elif _is_dataclass(node):
        fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
        names = {one.id for one in fields if isinstance(one, ast.Name)}
    for base in _bases(module, node):
        if found := _find(base):
            more, complete = _arguments(*found)
            names |= more
            if complete and more:
                return names, True
    return names, initializer is None and bool(names)


def _initializer(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)


def _is_dataclass(node: ast.ClassDef | ast.FunctionDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _bases(module: str, node: ast.ClassDef) -> list[str]:
    return [f"{module}.{ast.unparse(base).partition('[')[0]}" for base in node.bases]


def _parameters(function: ast.FunctionDef) -> tuple[set[str], bool]:
    given = function.args
    names = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self"}
    return names, given.kwarg is None


@functools.cache
def _find(path: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The module that defines a class or function, through imports, and its definition."""
    module, _, name = path.rpartition(".")
    defined, imported = _names(module)
    if name in defined:
        return module, defined[name]
    return _find(imported[name]) if name in imported else None


@functools.cache
def _names(module: str) -> tuple[dict[str, ast.ClassDef | ast.FunctionDef], dict[str, str]]:
    """The classes and functions that a module defines, and paths of the names that it imports."""
    file = source_file(module)
    body = parse(file.read_text(encoding="utf-8")).body if file else []
    imports = [one for one in body if isinstance(one, ast.ImportFrom) and not one.level]
    imported = {name.asname or name.name: f"{one.module}.{name.name}" for one in imports for name in one.names}
    return {one.name: one for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef)}, imported
