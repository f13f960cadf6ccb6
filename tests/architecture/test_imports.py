"""Check which modules import which, and that `common` doesn't depend on a paper, in the source code."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.sources import (
    ROOT,
    configured,
    docstrings,
    file_of,
    graph,
    imports,
    modules,
    papers,
    reached,
    shared_classes,
)

#: Files of a paper that may import lightning: modules, data modules, and files that hold both.
LIGHTNING = {"module", "data", "search", "baselines", "miniature"}
#: Files of a paper that may import its miniature, since an export may contain the miniature's encoder.
WITH_MINIATURE = {"use"}
#: Packages of `common` that offer parts for users' methods. A part needs no paper that uses it.
LIBRARY = (
    "common.data.datasets", "common.data.worlds", "common.encoders", "common.losses", "common.memory", "common.metrics",
    "common.protocols",
)  # fmt: skip
#: Parts that only one paper uses so far but that others could use: a store for vectors of a frozen text encoder.
WAITING = {"common.data.text_features"}
#: Packages of the application and the library, from the top layer down. A package never imports a higher layer.
FLOORS = (
    {"assemble.commands"},
    {"assemble.stages"},
    {"assemble.reporting"},
    {"common.models"},
    {"common.training", "common.protocols", "common.monitoring"},
    {"common.data", "common.metrics"},
    {"common.encoders", "common.losses", "common.memory"},
    {"common.files", "common.errors", "common.types"},
)
#: Packages of the library that may import lightning.
WITH_LIGHTNING = {"common.models", "common.training", "common.protocols", "common.monitoring"}
#: Maximum lines of code in a paper's module file, so that a reader can read it in one sitting.
SITTING = 260


def forbidden(module: str, imported: str, immediate: bool) -> str:
    """Return why a module may not import another, or an empty text if the import is allowed."""
    parts, top = module.split("."), imported.split(".")
    if top[0] == "pytorch_lightning":
        return "use lightning.pytorch"
    room = ".".join(parts[:2])
    if parts[0] != "assemble" and top[0] == "assemble":
        return "neither the library nor a paper imports the application"
    if parts[0] == "common" and top[0] == "papers":
        return "common imports no paper"
    if parts[0] == "common" and room not in WITH_LIGHTNING and top[0] == "lightning":
        return f"no lightning in {room}"
    if room == "assemble.reporting" and top[0] in {"torch", "torchvision", "torchaudio", "lightning"}:
        return "the reports do without torch and lightning"
    if parts[0] == "papers" and len(parts) > 2:
        if top[0] == "papers" and top[1:2] not in ([], [parts[1]]):
            return "a paper imports no other one"
        if top[0] == "papers" and top[2:3] == ["miniature"] and parts[2] not in {"miniature", *WITH_MINIATURE}:
            return "the published method does without the miniature"
        if immediate and top[0] == "lightning" and parts[2] not in LIGHTNING:
            return f"only {', '.join(sorted(LIGHTNING))} import lightning"
    return ""


def test_no_forbidden_import() -> None:
    found = [
        f"{file_of(module)} imports {imported}: {why}"
        for module in modules()
        for imported, immediate in imports(module)
        if (why := forbidden(module, imported, immediate))
    ]
    assert not found, "\n".join(found)


def test_no_circle() -> None:
    """Count lazy imports and imports for types as well."""
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' <- '.join(error.args[1])}") from None


def test_packages_stand_on_floors() -> None:
    """Check that a package of the application or the library imports only its layer and lower layers."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    inside = {
        module: ".".join(module.split(".")[:2])
        for module in modules()
        if module.startswith(("assemble.", "common.")) and module != "assemble.__main__"
    }
    assert set(inside.values()) == floor.keys()
    climbs = [
        f"{file_of(module)} imports {other}"
        for module, room in inside.items()
        for other in graph()[module] & inside.keys()
        if floor[inside[other]] < floor[room]
    ]
    assert not climbs, "from a higher floor: " + ", ".join(climbs)


def test_common_names_no_paper() -> None:
    """Check identifiers and strings for names of papers. Docstrings may name a paper as a source."""
    names = "|".join(sorted({*papers(), *papers().values()}))
    word = re.compile(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])")
    found = []
    for module, tree in modules().items():
        documented = docstrings(tree)
        for node in ast.walk(tree) if module.startswith("common") else ():
            if node in documented:
                continue
            told = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "value", "module")]
            named = [match[1] for text in told if isinstance(text, str) and (match := word.search(text))]
            found += [f"{file_of(module)}:{getattr(node, 'lineno', 0)} names {name}" for name in named]
    assert not found, "\n".join(found)


def test_common_holds_what_two_papers_use() -> None:
    """Check that two papers use each module. The command line's modules and parts for users' methods are exempt."""
    served = reached({"assemble.commands.main", *shared_classes(), *(m for m in modules() if m.startswith(LIBRARY))})
    used = [
        reached({m for m in modules() if m.startswith(f"papers.{paper}")} | configured(paper)) for paper in papers()
    ]
    lonely = [
        file_of(module)
        for module, tree in modules().items()
        if module.startswith("common.") and len(tree.body) > 1 and module not in {*served, *WAITING}
        if sum(module in own for own in used) < 2
    ]
    assert not lonely, f"fewer than two papers use {', '.join(lonely)}: move it to the paper, or delete it"


def test_module_files_stand_on_lightning_and_are_read_in_one_sitting() -> None:
    for module, tree in modules().items():
        if not re.fullmatch(r"papers\.\w+\.module", module):
            continue
        own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                assert bases <= {"pl.LightningModule", *own}, f"{node.name} stands on {bases}, not on LightningModule"
        lines = (ROOT / file_of(module)).read_text(encoding="utf-8").splitlines()
        told = {line for node in docstrings(tree) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        code = [line for n, line in enumerate(lines, 1) if n not in told and line.strip() and line.strip()[0] != "#"]
        assert len(code) <= SITTING, f"{file_of(module)} has {len(code)} lines of code"


@pytest.mark.parametrize("paper", papers())
def test_a_loss_loads_few_files(paper: str) -> None:
    """Check that a loss needs few files, and none that reads data or exports models."""
    assert len(reached({f"papers.{paper}.loss"})) <= 16
