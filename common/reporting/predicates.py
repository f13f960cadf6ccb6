"""Predicates over the cells of a table, such as `AVID-CMA.ucf >= AVID.ucf + 1`.

A small language of its own, never evaluated as Python.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from common.errors import ReportingError, nearest

_PLACEHOLDER = "cell_of_table_"
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARISONS: dict[type[ast.cmpop], str] = {ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<"}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_MAX_LENGTH = 2000

Value = Callable[["CellName"], float]


class PredicateError(ReportingError):
    """A predicate is not in the language; the message says which part and what is allowed."""


@dataclass(frozen=True)
class CellName:
    """A cell of a table by its row's label and its metric's id."""

    row: str
    metric: str

    def __str__(self) -> str:
        label = self.row if re.fullmatch(r"[\w-]+", self.row) else f"`{self.row}`"
        return f"{label}.{self.metric}"


@dataclass(frozen=True)
class Term:
    """An arithmetic expression: a number, a cell, or an operation on two terms."""

    operator: str
    operands: tuple[Term, ...] = ()
    number: float = 0.0
    cell: CellName | None = None

    def value(self, of: Value) -> float:
        """Value of the term; `of` gives a cell's value. Division by zero raises `ZeroDivisionError`."""
        if self.operator == "number":
            return self.number
        if self.operator == "cell":
            assert self.cell is not None
            return of(self.cell)
        left, right = (operand.value(of) for operand in self.operands)
        return _ARITHMETIC[self.operator](left, right)

    def cells(self) -> Iterator[CellName]:
        """The cells that the term reads."""
        if self.cell is not None:
            yield self.cell
        for operand in self.operands:
            yield from operand.cells()


@dataclass(frozen=True)
class Comparison:
    """Two terms and the side that should be the larger."""

    left: Term
    operator: str
    right: Term

    def margin(self, of: Value) -> float:
        """By how much the comparison holds (positive) or fails (negative)."""
        difference = self.left.value(of) - self.right.value(of)
        return difference if self.operator in (">=", ">") else -difference

    def accepts(self, margin: float) -> bool:
        """Whether a margin satisfies the comparison."""
        return margin >= 0 if self.operator in (">=", "<=") else margin > 0

    def cells(self) -> tuple[CellName, ...]:
        """The cells that the comparison reads, each once."""
        return tuple(dict.fromkeys([*self.left.cells(), *self.right.cells()]))


@dataclass(frozen=True)
class Predicate:
    """Comparisons that must all hold."""

    text: str
    comparisons: tuple[Comparison, ...]


def parse(text: str, rows: Collection[str], metrics: Collection[str]) -> Predicate:
    """Parse a predicate.

    Allowed: `row.metric`, numbers, `+ - * /`, parentheses, one of `>= > <= <` per comparison, and `and`
    between comparisons. A row label with spaces or brackets stands in backticks.

    Args:
        text: the predicate.
        rows: labels of the table's rows.
        metrics: ids of the table's metrics.

    Raises:
        PredicateError: for anything else, and for an unknown row or metric (with the nearest valid name).
    """
    if len(text) > _MAX_LENGTH or _PLACEHOLDER in text:
        raise PredicateError(f"predicate too long or with a reserved name: {text[:80]!r}")
    source, cells = _name_cells(text, rows, metrics)
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PredicateError(f"cannot read predicate {text!r}; write e.g. 'A.ucf >= B.ucf + 1'") from None
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    return Predicate(text, tuple(_comparison(part, cells, text, rows) for part in parts))


def _name_cells(text: str, rows: Collection[str], metrics: Collection[str]) -> tuple[str, dict[str, CellName]]:
    """Replace every `row.metric` by a plain name that Python's grammar accepts."""
    plain = sorted((re.escape(row) for row in rows if re.fullmatch(r"\w[\w-]*", row)), key=len, reverse=True)
    labels = "|".join([r"`(?P<quoted>[^`]*)`", rf"(?<![\w.`])(?P<plain>{'|'.join(plain) or '(?!)'})(?=\s*\.)"])
    pattern = re.compile(rf"(?:{labels})\s*\.\s*(?P<metric>\w+)")
    cells: dict[str, CellName] = {}

    def named(match: re.Match[str]) -> str:
        row = match["quoted"] if match["quoted"] is not None else match["plain"]
        if row not in rows:
            raise PredicateError(f"unknown row {row!r} in {text!r}: {nearest(row, rows)}")
        if match["metric"] not in metrics:
            raise PredicateError(f"unknown metric {match['metric']!r} in {text!r}: {nearest(match['metric'], metrics)}")
        name = f"{_PLACEHOLDER}{len(cells)}"
        cells[name] = CellName(row, match["metric"])
        return f" {name} "

    return pattern.sub(named, text), cells


def _comparison(node: ast.expr, cells: dict[str, CellName], text: str, rows: Collection[str]) -> Comparison:
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise PredicateError(f"expected one comparison (>=, >, <=, <) per part of {text!r}")
    symbol = _COMPARISONS.get(type(node.ops[0]))
    if symbol is None:
        raise PredicateError(f"only >=, >, <= and < compare in a predicate: {text!r}")
    left, right = _term(node.left, cells, text, rows), _term(node.comparators[0], cells, text, rows)
    if not any(True for _ in (*left.cells(), *right.cells())):
        raise PredicateError(f"{text!r} compares numbers only; name at least one cell as row.metric")
    return Comparison(left, symbol, right)


def _term(node: ast.expr, cells: dict[str, CellName], text: str, rows: Collection[str]) -> Term:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Term("number", number=float(node.value))
    if isinstance(node, ast.Name) and node.id in cells:
        return Term("cell", cell=cells[node.id])
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        operands = (_term(node.left, cells, text, rows), _term(node.right, cells, text, rows))
        return Term(_OPERATORS[type(node.op)], operands)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _term(node.operand, cells, text, rows)
        return operand if isinstance(node.op, ast.UAdd) else Term("-", (Term("number"), operand))
    part = ast.unparse(node)
    for name, cell in cells.items():
        part = part.replace(name, str(cell))
    first = re.match(r"[\w-]+", part)
    hint = f"; {nearest(first[0], rows)}" if first and isinstance(node, ast.Name | ast.Attribute) else ""
    raise PredicateError(f"{part!r} is not allowed in {text!r}: only row.metric, numbers and + - * /{hint}")
