"""Finds the function that computes a metric: the one with its key, in the modules of the configured classes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from assemble.reporting.papers import project_root

_Definition = ast.FunctionDef | ast.ClassDef
_SOURCE = re.compile(r"Source:(.*?)(?:\n\n|\Z)", re.DOTALL)
_PAGE = re.compile(r"(?:docs/papers/(\w+)\.md |^\s*)\[([\d.]+)\]")


@dataclass(frozen=True)
class MetricSource:
    """The function that computes a metric; `page` is the section of `docs/papers` that it cites, if any."""

    function: str
    file: str
    line: int
    page: str


class _Named(NamedTuple):
    """A string in a function, as a pattern of metric keys; `read` if it only looks up a value."""

    pattern: str
    exact: bool
    read: bool
    line: int
    inside: tuple[_Definition, ...]


def find_metric(key: str, classes: Sequence[str]) -> MetricSource | None:
    """Search the modules of these classes (import paths, the model's first), then their imports, breadth first.

    Code that only looks up the value counts if nothing else has the key.
    """
    # `avsd7/cider` is named `cider` where it is computed.
    names = {key.removeprefix("test/"), key.rpartition("/")[2]}
    own = [path.rpartition(".")[2] for path in classes]
    files = [found for path in classes if (found := _file(path.rpartition(".")[0]))]
    reading: list[tuple[Path, _Named]] = []
    for file in files:  # grows during the loop
        matching = [one for one in _texts(file) if any(re.fullmatch(one.pattern, name) for name in names)]
        if matching:
            # The last match in a file is the final value.
            best = max(matching, key=lambda one: (not one.read, one.inside[0].name in own, one.exact, one.line))
            if not best.read:
                return _source(file, best, classes[0])
            reading.append((file, best))
        files += [one for one in _imported(file) if one not in files]
    return _source(*reading[0], classes[0]) if reading else None


def _source(file: Path, found: _Named, model: str) -> MetricSource:
    """The match, with the section that its function, class or protocol cites, such as `docs/papers/mct.md [9]`."""
    path = file.relative_to(project_root()).as_posix()
    documented: list[_Definition | ast.Module] = [*reversed(found.inside), _tree(file)]
    module, _, name = model.rpartition(".")
    protocol = _file(module) if module.startswith("common.protocols.") else None
    top = _tree(protocol).body if protocol else []
    documented += [one for one in top if isinstance(one, _Definition) and one.name == name]
    cited = (
        f"docs/papers/{page or file.parent.name}.md [{section}]"
        for node in documented
        for source in _SOURCE.findall(ast.get_docstring(node) or "")
        for page, section in _PAGE.findall(source)
    )
    return MetricSource(".".join(one.name for one in found.inside), path, found.line, next(cited, ""))


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def _texts(file: Path) -> list[_Named]:
    return [*_walk(_tree(file))]


def _walk(node: ast.AST, inside: tuple[_Definition, ...] = (), read: bool = False) -> Iterator[_Named]:
    """The strings in functions; a field of an f-string matches any text."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            parts = child.values if isinstance(child, ast.JoinedStr) else [child]
            fixed = [str(one.value) if isinstance(one, ast.Constant) else "" for one in parts]
            if inside and isinstance(inside[-1], ast.FunctionDef) and len("".join(fixed).removeprefix("test/")) > 1:
                pattern = "".join(re.escape(text) or ".*" for text in fixed).removeprefix("test/")
                yield _Named(pattern, len(parts) == 1, read, child.lineno, inside)
        else:
            looked_up = isinstance(child, ast.Subscript) and isinstance(child.ctx, ast.Load)
            yield from _walk(child, (*inside, child) if isinstance(child, _Definition) else inside, read or looked_up)


@functools.cache
def _imported(file: Path) -> list[Path]:
    """Our files that a file imports, in order."""
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [_file(f"{node.module}.{one.name}") or _file(node.module) for one in node.names]
    return [one for one in dict.fromkeys(found) if one]


def _file(module: str) -> Path | None:
    """The file of one of our modules."""
    path = project_root().joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    ours = module.partition(".")[0] in ("common", "papers")
    return next((one for one in files if one.is_file()), None) if ours else None
