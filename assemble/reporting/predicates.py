"""Parse predicates over a table's cells, such as `AVID-CMA.ucf >= AVID.ucf + 1`, without running them as Python."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from common.errors import ReportingError, nearest

_PLACEHOLDER = "cell_of_table_"
_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
}

Value = Callable[["CellName"], float]


@dataclass(frozen=True)
class CellName:
    """Name a cell of a table by its row's label and its metric's id."""

    row: str
    metric: str

    def __str__(self) -> str:
        label = self.row if re.fullmatch(r"[\w-]+", self.row) else f"`{self.row}`"
        return f"{label}.{self.metric}"


@dataclass(frozen=True)
class Term:
    """An arithmetic expression.

    Args:
        value: function from the cells' values to the expression's value. May raise `ZeroDivisionError`.
        constant: the number added to the cells, such as 5 in `A.ucf + 5`.
    """

    value: Callable[[Value], float]
    cells: tuple[CellName, ...]
    constant: float


@dataclass(frozen=True)
class Comparison:
    """A difference of cells and its threshold: A.ucf - B.ucf and 5 for `A.ucf >= B.ucf + 5`."""

    left: Term
    compare: Callable[[float, float], bool]
    right: Term

    @property
    def threshold(self) -> float:
        return self.right.constant - self.left.constant

    def difference(self, of: Value) -> float:
        """Return the left side minus the right side, both without their constants."""
        return self.left.value(of) - self.right.value(of) + self.threshold

    def accepts(self, difference: float) -> bool:
        return self.compare(difference, self.threshold)

    def excess(self, difference: float) -> float:
        """Return by how much a difference passes the threshold (positive) or misses it (negative)."""
        return (difference - self.threshold) * (1 if self.compare in (operator.ge, operator.gt) else -1)

    def cells(self) -> tuple[CellName, ...]:
        return tuple(dict.fromkeys(self.left.cells + self.right.cells))


@dataclass(frozen=True)
class Predicate:
    """Comparisons that must all hold."""

    text: str
    comparisons: tuple[Comparison, ...]


def parse(text: str, rows: Collection[str], metrics: Collection[str]) -> Predicate:
    """Parse a predicate.

    Allowed: `row.metric`, numbers, `+ - * /`, parentheses, one of `>= > <= <` per comparison, and `and` between
    comparisons. A row label with spaces or brackets needs backticks.
    """
    source, cells = _name_cells(text, rows, metrics)
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        comparisons = tuple(_comparison(part, cells, text, rows) for part in parts)
    except ReportingError:
        raise
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        raise ReportingError(f"cannot read predicate {text[:80]!r}; write e.g. 'A.ucf >= B.ucf + 1'") from None
    return Predicate(text, comparisons)


def _name_cells(text: str, rows: Collection[str], metrics: Collection[str]) -> tuple[str, dict[str, CellName]]:
    """Replace every `row.metric` by a plain name that Python's grammar accepts."""
    plain = [re.escape(row) for row in rows if re.fullmatch(r"\w[\w-]*", row)]
    labels = "|".join([r"`(?P<quoted>[^`]*)`", rf"(?<![\w.`])(?P<plain>{'|'.join(plain) or '(?!)'})(?=\s*\.)"])
    pattern = re.compile(rf"(?:{labels})\s*\.\s*(?P<metric>\w+)")
    cells: dict[str, CellName] = {}

    def named(match: re.Match[str]) -> str:
        row = match["quoted"] if match["quoted"] is not None else match["plain"]
        if row not in rows:
            raise ReportingError(f"unknown row {row!r} in {text!r}: {nearest(row, rows)}")
        if match["metric"] not in metrics:
            raise ReportingError(f"unknown metric {match['metric']!r} in {text!r}: {nearest(match['metric'], metrics)}")
        name = f"{_PLACEHOLDER}{len(cells)}"
        cells[name] = CellName(row, match["metric"])
        return f" {name} "

    return pattern.sub(named, text), cells


def _comparison(node: ast.expr, cells: dict[str, CellName], text: str, rows: Collection[str]) -> Comparison:
    compare = _COMPARISONS.get(type(node.ops[0])) if isinstance(node, ast.Compare) and len(node.ops) == 1 else None
    if not isinstance(node, ast.Compare) or compare is None:
        raise ReportingError(f"expected one comparison (>=, >, <=, <) per part of {text!r}")
    comparison = Comparison(_term(node.left, cells, text, rows), compare, _term(node.comparators[0], cells, text, rows))
    if not comparison.cells():
        raise ReportingError(f"{text!r} compares numbers only; name at least one cell as row.metric")
    return comparison


def _term(node: ast.expr, cells: dict[str, CellName], text: str, rows: Collection[str]) -> Term:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        number = float(node.value)
        return Term(lambda of: number, (), number)
    if isinstance(node, ast.Name) and node.id in cells:
        cell = cells[node.id]
        return Term(lambda of: of(cell), (cell,), 0.0)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
    if isinstance(node, ast.BinOp) and (compute := _OPERATIONS.get(type(node.op))) is not None:
        left, right = (_term(side, cells, text, rows) for side in (node.left, node.right))
        both = left.cells + right.cells
        added = not both or compute in (operator.add, operator.sub)
        constant = compute(left.constant, right.constant) if added else 0.0
        return Term(lambda of: compute(left.value(of), right.value(of)), both, constant)
    part = ast.unparse(node)
    for name, cell in cells.items():
        part = part.replace(name, str(cell))
    first = re.match(r"[\w-]+", part)
    hint = f"; {nearest(first[0], rows)}" if first and isinstance(node, ast.Name | ast.Attribute) else ""
    raise ReportingError(f"{part!r} is not allowed in {text!r}: only row.metric, numbers and + - * /{hint}")
