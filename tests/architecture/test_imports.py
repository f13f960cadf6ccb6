"""Who may import whom, checked on the source text (DESIGN section 4)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("common", "papers") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, and whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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

    collect(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in at_import
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in at_import


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_forbidden_import(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    for module, _ in imported(path):
        top = module.split(".")
        assert top[0] != "pytorch_lightning", f"{name_of(path)}: use lightning.pytorch"
        if parts[0] == "common":
            assert top[0] != "papers", f"{name_of(path)} imports {module}: common/ never imports papers/"
            if parts[1] in {"encoders", "losses", "memory", "metrics", "reporting", "data"}:
                assert top[0] != "lightning", f"{name_of(path)} imports {module}: no lightning in common/{parts[1]}"
            if parts[1] == "reporting":
                assert top[0] not in {"torch", "torchvision", "torchaudio"}, f"{name_of(path)} imports {module}"
        elif len(parts) > 2:
            assert top[0] != "papers" or top[1:2] in ([], [parts[1]]), (
                f"{name_of(path)} imports another paper: {module}"
            )
            # Detection, VirTex and stand-ins for downloads are whole protocols: network, training and data of another
            # paper's method.
            allowed = {"module.py", "data.py", "evaluation.py", "miniature.py", "virtex.py"}
            now = [m for m, immediate in imported(path) if immediate and m.split(".")[0] == "lightning"]
            assert parts[2] in allowed or not now, f"{name_of(path)} imports lightning; only {sorted(allowed)} may"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_grab_bag_module(path: Path) -> None:
    assert path.name not in {"utils.py", "misc.py", "helpers.py", "tools.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "papers").glob("*/module.py")), ids=name_of)
def test_module_file_is_readable_in_one_sitting(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    code = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            code.update(range(node.lineno, node.lineno + 1))
    assert len(code) <= 250
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            own = {other.name for other in tree.body if isinstance(other, ast.ClassDef)}
            assert bases <= {"pl.LightningModule", *own}, f"{node.name} stands on {bases}, not on LightningModule"
