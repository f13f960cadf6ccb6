"""Parse every module of the suite once, and find which modules import which, for the architecture tests."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from assemble.reporting.code import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("assemble", "common", "papers")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Map the import path of every module and package to its syntax tree."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = parse(path.read_text(encoding="utf-8"))
    return found


def file_of(module: str) -> str:
    """Return the path of a module's file, for messages."""
    path = module.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Return a module's imports, including lazy and type-only ones, and whether importing the module runs them."""
    at_import: set[ast.AST] = set()

    def collect(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                at_import.add(node)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                collect(node.body)
                collect(node.orelse)
            elif isinstance(node, ast.Try | ast.With):
                collect(node.body)

    tree = modules()[module]
    collect(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in at_import
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                # `from package import module` looks like `from module import name`, so check both meanings.
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in modules() else node.module), node in at_import


@functools.cache
def graph() -> dict[str, set[str]]:
    """Map every module of the suite to the modules of the suite that it imports."""
    return {name: {other for other, _ in imports(name) if other in modules()} - {name} for name in modules()}


def reached(starts: set[str]) -> set[str]:
    """Return modules and everything that they import, directly or indirectly."""
    found, waiting = set(), set(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting |= graph()[name]
    return found


@functools.cache
def configured(paper: str) -> set[str]:
    """Return the modules of the classes that a paper's configurations name."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "configs" / paper).glob("*.yaml"))
    paths = re.findall(r"class_path: ([\w.]+)\.\w+", text)
    return {path for path in paths if path in modules()}


def shared_classes() -> set[str]:
    """Return the modules of the classes that the configurations of all papers name."""
    found: set[str] = set()
    for path in (ROOT / "configs").glob("*.yaml"):
        found.update(re.findall(r"class_path: ([\w.]+)\.\w+", path.read_text(encoding="utf-8")))
    return found & modules().keys()


@functools.cache
def papers() -> dict[str, str]:
    """Map the package of every paper to its short name."""
    found = {}
    for path in sorted((ROOT / "papers").glob("*/tables.yaml")):
        block = re.search(r"^paper:.*\n(?:[ #].*\n|\n)*", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert block is not None
        found[path.parent.name] = yaml.safe_load(block[0])["paper"]["short"]
    return found


def docstrings(tree: ast.Module) -> set[ast.expr]:
    """Return the docstrings of a module, and all other strings that are statements, such as one below a constant."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
