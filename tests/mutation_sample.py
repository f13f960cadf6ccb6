"""Make one random change at a time to the code outside the losses, and run its tests (`make mutation SAMPLE=100`).

A change replaces an operator, condition, number, argument or result. Its tests are those that run the changed line, the
fastest first, up to two minutes. Verdicts are written to mutants/sample-<seed>.jsonl, where a stopped run resumes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
from coverage import CoverageData

PACKAGES = (*(f"common/{name}" for name in ("protocols", "training", "data", "metrics")), "assemble")
FOLDER = Path("mutants")
SECONDS = 120.0

_COMPARED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_COMPUTED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    begin: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


def mutants(path: Path) -> list[Mutant]:
    """Return all changes to a file, except changes to error messages, annotations, decorators and default arguments."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, new in _changed(ast.parse(source)):
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        old = source[begin:end].decode()
        found.append(Mutant(str(path), node.lineno, begin, end, old, new))
    return found


def _changed(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    match node:
        case ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
            return
        case ast.Compare(left, [op], [right]) if type(op) in _COMPARED:
            yield node, f"({ast.unparse(ast.Compare(left, [_COMPARED[type(op)]()], [right]))})"
        case ast.BinOp(left, op, right) if type(op) in _COMPUTED and not _is_text(left):
            yield node, f"({ast.unparse(ast.BinOp(left, _COMPUTED[type(op)](), right))})"
        case ast.BoolOp(op, values):
            yield node, f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))})"
        case ast.UnaryOp(ast.Not(), operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.Constant(value) if isinstance(value, bool):
            yield node, str(not value)
        case ast.Constant(value) if isinstance(value, int | float):
            yield node, repr(value + 1)
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            yield value, "None"
        case ast.Expr(ast.Call() as call):
            yield call, "None"
        case ast.Call(function, arguments, keywords):
            for keyword in keywords:
                rest = [other for other in keywords if other is not keyword]
                yield node, ast.unparse(ast.Call(function, arguments, rest))
    for name, field in ast.iter_fields(node):
        if name in (
            "annotation",
            "returns",
            "decorator_list",
            "defaults",
            "kw_defaults",
            "slice" if _typed(node) else "",
        ):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from _changed(child)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _typed(node: ast.AST) -> bool:
    """Check whether an expression is a generic type such as `dict[str, int]`."""
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id[0].isupper()


class Tests:
    """Find the tests that run a line, from one run of all tests under coverage."""

    def __init__(self, jobs: int) -> None:
        database, times = FOLDER / "coverage", FOLDER / "times.xml"
        if not (database.is_file() and times.is_file()):
            covered = ["--cov=common", "--cov=assemble", "--cov-context=test", "--cov-report="]
            options = [*covered, f"--junitxml={times}", "-n", str(jobs)]
            environment = ["env", f"COVERAGE_FILE={database}"]
            subprocess.run([*environment, sys.executable, "-m", "pytest", "-q", *options], check=False)
        self._data = CoverageData(str(database))
        self._data.read()
        self._tests = {context.split("|")[0] for context in self._data.measured_contexts() if context}
        self._seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
            for case in ElementTree.parse(times).iter("testcase")
        }

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests of a mutant, the fastest first, up to two minutes."""
        contexts = self._data.contexts_by_lineno(str(Path(mutant.path).resolve()))
        found = [context for context in contexts.get(mutant.line, []) if context]
        named = {context.split("|")[0] for context in found}
        shared = {context.split("::")[0] for context in found if context.endswith("|setup")}
        named |= {test for test in self._tests if test.split("::")[0] in shared}  # sharing one setup
        if not named:  # the line ran when the module was imported
            named = {context.split("|")[0] for own in contexts.values() for context in own if context}
        chosen, total = [], 0.0
        for test in sorted(named, key=lambda test: (self._seconds.get(test, 0.0), test)):
            total += self._seconds.get(test, 0.0)
            if chosen and total > SECONDS:
                break
            chosen.append(test)
        return chosen


def verdict(mutant: Mutant, tests: list[str], tree: Path) -> str:
    """Return `killed` if a test fails on the changed code, `survived` if all pass, or `untested` without tests."""
    if not tests:
        return "untested"
    target, listed = tree / mutant.path, (tree / "tests.txt").resolve()
    source = target.read_bytes()
    listed.write_text("\n".join(tests), encoding="utf-8")
    target.write_bytes(source[: mutant.begin] + mutant.new.encode() + source[mutant.end :])
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"@{listed}"]
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}  # for commands that the tests start
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=4 * SECONDS, check=False)
        if done.returncode == pytest.ExitCode.USAGE_ERROR:
            raise RuntimeError(f"{mutant}: the tests could not be started\n{done.stdout}{done.stderr}")
        return "survived" if done.returncode == pytest.ExitCode.OK else "killed"
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        target.write_bytes(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    tests = Tests(options.jobs)
    every = [m for package in PACKAGES for path in sorted(Path(package).rglob("*.py")) for m in mutants(path)]
    drawn = random.Random(options.seed).sample(every, options.sample)
    results = FOLDER / f"sample-{options.seed}.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    known = {Mutant(**row["mutant"]): row["verdict"] for row in map(json.loads, lines)}
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(options.jobs):
        trees.put(_copied(FOLDER / f"tree{number}"))

    def judged(mutant: Mutant) -> None:
        if mutant in known:
            return
        tree = trees.get()
        try:
            known[mutant] = verdict(mutant, tests.of(mutant), tree)
        finally:
            trees.put(tree)
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"mutant": asdict(mutant), "verdict": known[mutant]}) + "\n")
        print(f"{known[mutant]:9} {mutant}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(judged, drawn))
    killed = sum(known[mutant] == "killed" for mutant in drawn)
    print(
        f"\n{killed} of {len(drawn)} changes are noticed (seed {options.seed}, of {len(every):,} possible). The others:"
    )
    for mutant in sorted((m for m in drawn if known[m] != "killed"), key=lambda m: (m.path, m.line)):
        print(f"  {known[mutant]:9} {mutant}")


def _copied(tree: Path) -> Path:
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and Path(name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target)
    return tree


if __name__ == "__main__":
    main()
