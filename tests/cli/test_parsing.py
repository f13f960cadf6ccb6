"""Test how commands are made from typed functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from assemble.commands.parsing import Option, Scale, at_least, parse

seen: dict[str, Any] = {}


@dataclass(frozen=True)
class Where:
    scale: Scale = "mini"
    runs: Annotated[Path | None, "a folder"] = None


def command(
    name: str,
    files: Sequence[Path] = (),
    *overrides: str,
    where: Where,
    rows: Sequence[str] = (),
    turns: Sequence[tuple[str, str]] = (),
    pair: tuple[str, str] | None = None,
    batch_size: Annotated[int, Option("rows", parse=at_least(1))] = 4,
    measure: Annotated[str | None, Option(const=lambda: "")] = None,
    force: bool = False,
) -> int:
    """Do something.

    More about it.
    """
    seen.clear()
    seen.update(locals())
    return 3


def other(files: Sequence[Path] = (), *, check: bool = False, need: str) -> int:
    """Do something else."""
    seen.clear()
    seen.update(locals())
    return 0


def test_a_signature_is_the_parser() -> None:
    given = ["x", "a", "b", "--rows", "1", "2", "--rows", "3", "--turns", "q", "a", "--pair", "p", "q"]
    given += ["--batch_size", "2", "--measure", "--scale", "smoke", "--runs", "~/r", "--force", "--model.width", "3"]
    assert parse(command, "command", given)() == 3
    assert seen == {
        "name": "x", "files": [Path("a"), Path("b")], "overrides": ("--model.width", "3"),
        "where": Where("smoke", Path.home() / "r"), "rows": ["1", "2", "3"],
        "turns": [["q", "a"]], "pair": ["p", "q"], "batch_size": 2, "measure": "", "force": True,
    }  # fmt: skip


def test_files_may_come_after_a_flag() -> None:
    assert parse(other, "other", ["--check", "--need", "n", "a"])() == 0
    assert parse(other, "other", ["a", "--check", "--need", "n", "b"])() == 0
    assert seen["files"] == [Path("a"), Path("b")]
