"""Replace stages by files, such as the authors' weights or a checkpoint. These stages are `given`: not trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from assemble.reporting.papers import paper_named
from assemble.reporting.records import lineage_hash
from assemble.reporting.tables import StageInstance, Tables
from common.errors import StageError, nearest
from common.files import digest, wrong_checksum


@dataclass(frozen=True)
class Given:
    """The file that replaces a stage.

    Attributes:
        source: where the authors publish the file; empty if the user named it with `--given`.
        beside: see `Released.beside`.
    """

    path: Path
    source: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)

    def fill(self, name: str) -> Path | None:
        """Return the file for a configuration field. None if the field needs another released file that is missing."""
        if name not in self.beside or self.path.suffix == ".ckpt":  # our checkpoints hold everything
            return self.path
        neighbor = self.path.with_name(self.beside[name])
        return neighbor if neighbor.is_file() else None

    @property
    def lineage(self) -> str:
        files = {name: path for name in self.beside if (path := self.fill(name)) is not None}
        return lineage_hash("given", {name: digest(path, "sha256") for name, path in {"": self.path, **files}.items()})

    def recorded(self) -> dict[str, str]:
        """Return the entry of a record's `given`."""
        source = {"source": self.source} if self.source else {}
        return {"file": self.path.name, "sha256": digest(self.path, "sha256"), **source}


def find_given(
    source: Tables, scale: str, released: Path | None, named_files: Sequence[str]
) -> tuple[dict[str, Given], tuple[str, ...]]:
    """Find the weights given for each stage, in the `--released` folder or as `--given stage=FILE`.

    Also list the stages whose released file is missing.
    """
    given: dict[str, Given] = {}
    if released is not None:
        short = paper_named(source.paper).short
        if not source.released:
            raise StageError(f"--released: papers/{source.paper}/tables.yaml names no released weights; use --given")
        if scale != "paper":
            raise StageError(
                f"--released: the authors' weights have the published sizes; add --scale paper, not {scale}"
            )
        if not released.is_dir():
            raise StageError(f"--released {released}: no such folder; `assemble data {short}` names the authors' files")
        for stage, file in source.released.items():
            path = released.resolve() / file.file
            if not path.is_file():
                continue
            if file.checksum and (wrong := wrong_checksum(path, file.checksum)):
                raise StageError(f"--released: {path}: {wrong}; get it again from {file.source}")
            given[stage] = Given(path, file.source, file.beside)
    for text in named_files:
        stage, equals, name = text.partition("=")
        path = Path(name).expanduser().resolve()
        if not equals or stage not in source.stages:
            raise StageError(f"--given {text}: write stage=FILE; {nearest(stage, source.stages)}")
        if not path.is_file():
            raise StageError(f"--given {text}: there is no file {path}")
        beside = source.released[stage].beside if stage in source.released else {}
        given[stage] = Given(path, beside=beside)
    absent = tuple(stage for stage in source.released if stage not in given) if released is not None else ()
    if released is not None and not given:
        wanted = "; ".join(f"{file.file} from {file.origin}" for file in source.released.values())
        raise StageError(f"--released {released}: none of the authors' files is there: {wanted}")
    return given, absent


def started(instances: Sequence[StageInstance], given: Collection[str], absent: Collection[str]) -> list[StageInstance]:
    """Select the stages that start from given stages, directly or indirectly, and all other stages that they need.

    Leave out stages whose released file is absent, and all stages that start from a stage left out.
    """
    from_given, left_out = set(given), set(absent)
    for instance in instances:  # parents first
        parents = set() if instance.id in given else {*instance.parents.values()}
        if parents & left_out:
            left_out.add(instance.id)
        elif parents & from_given and instance.id not in left_out:
            from_given.add(instance.id)
    needed = from_given - set(given)
    for instance in reversed(instances):
        if instance.id in needed and instance.id not in given:
            needed |= {*instance.parents.values()}
    return [instance for instance in instances if instance.id in needed]


def given_lines(source: Tables, given: Mapping[str, Given], absent: Sequence[str]) -> list[str]:
    """Write a table of the given stages and of the `absent` ones, whose file is missing. No stages make no lines."""
    if not given:
        return []
    rows = [("given", "file", "from")]
    for stage, file in given.items():
        rows.append((stage, file.path.name, source.released[stage].origin if file.source else "your file"))
    for stage in absent:
        released = source.released[stage]
        rows.append((stage, f"missing: {released.file}", released.origin))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [*lines, *["stages that need a missing file are left out"] * bool(absent)]
