"""Run every stage of a paper at a large scale, on tiny data in the layouts of the real data sets.

`assemble rehearse` calls `run_paper` on the data and weights that `papers/<paper>/rehearsal.py` writes, with the
overlay `configs/<paper>/rehearsal.yaml`. Records list the fields that the overlay changes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from assemble.reporting import records
from assemble.reporting.papers import paper_named
from assemble.reporting.tables import StageInstance, Tables, load
from assemble.stages.given import Given
from assemble.stages.paper_modules import optional_part, part
from assemble.stages.plan import Planned, plan_stages
from assemble.stages.recipe_data import data_sections
from assemble.stages.recipes import REHEARSAL
from assemble.stages.reproduce import run_paper, say
from assemble.stages.request import Selection, finished_record, requests_for
from common.errors import StageError
from common.files import environment, write_atomically, write_whole


@dataclass(frozen=True)
class Rehearsed:
    """A rehearsed stage: why it failed (`problem`, empty if it didn't) and its missing metrics (`absent`)."""

    stage: str
    record: records.Record | None
    problem: str = ""
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = [f"  {self.stage}: {f'FAILED, {self.problem}' if self.problem else 'passed'}"]
        facts += [f"without {name}" for name in self.absent]
        if self.record is not None:
            null = sum(value is None for value in self.record.metrics.values())
            facts += [f"{self.record.steps} steps", f"{len(self.record.metrics)} metrics, {null} of them not finite"]
            facts += [f"{self.record.wall_seconds:.0f} s", f"{self.record.hardware.get('peak_memory_gib')} GiB"]
        return ", ".join(facts)


def write_fixtures(paper: str, root: Path) -> None:
    """Write a paper's tiny data sets and random weights into `root`. Keep existing ones."""
    module = part(paper, "rehearsal", "cannot be rehearsed")
    version = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    mark = root / ".written"
    if mark.is_file() and mark.read_text(encoding="utf-8") == version:
        return
    if root.exists() and not mark.is_file():
        raise StageError(f"{root} exists, but no rehearsal wrote it: give another --folder")
    say(f"writing tiny data sets and random weights to {root}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    write_atomically(mark, "")
    module.write_datasets(root)
    if hasattr(module, "write_weights"):
        module.write_weights(root)
    if (prepare := optional_part(paper, "prepare")) is not None:  # make stored features the way a user does
        prepare.text_features(data_sections(paper, root))
    write_atomically(mark, version)


def write_released(paper: str, folder: Path, selection: Selection) -> dict[str, Given]:
    """Write random weights in the layouts of the authors' files. Keep existing files. Return the files by stage."""
    given = {name: Given(folder / file.file, file.source, file.beside) for name, file in load(paper).released.items()}
    if not given:
        raise StageError(f"--released: papers/{paper}/tables.yaml names no released weights")
    missing = {stage: file.path for stage, file in given.items() if not file.path.is_file()}
    if missing:
        from assemble.stages.lightning_workarounds import import_lightning

        import_lightning()
        from assemble.stages.synthetic import built_without_files

        write = part(paper, "rehearsal", "cannot be rehearsed").write_released
        stages = load(paper).stages
        for stage, path in missing.items():
            instance = StageInstance(stage, stages[stage].recipe, stages[stage].job, None)
            (request,) = requests_for(paper, [instance], selection, 0)
            cli = built_without_files(request.configuration)
            write_whole(path, partial(write, stage, cli.model, cli.datamodule))
    return given


def rehearse(paper: str, selection: Selection, jobs: int = 1, released: bool = False) -> list[Rehearsed]:
    """Write tiny data to `selection.data`, and run a paper's selected stages on the data. Skip finished stages.

    With `released`, files in the layouts of the authors' weights replace stages.
    """
    name = paper_named(paper).name
    # Use a separate cache and no W&B, since the measured values are meaningless.
    with environment(ASSEMBLE_CACHE=str(selection.runs / "cache"), WANDB_MODE="disabled"):
        write_fixtures(name, selection.data)
        if released:
            selection = replace(selection, given=write_released(name, selection.data / "released", selection))
        planned = plan_stages(name, selection)
        say(f"reduced by configs/{name}/{REHEARSAL}.yaml")
        _forget_removed_parents(planned)
        failed = run_paper(name, selection, jobs=jobs, finished=lambda _: _remove_spent(planned))
    source = load(name)
    waiting = [item for item in planned if item.request.given is None]
    return [_judged(item, source, failed.get(item.request.key)) for item in waiting]


def _remove_spent(planned: Sequence[Planned]) -> None:
    """Remove checkpoints of finished stages that no unfinished stage starts from."""
    unfinished = [item for item in planned if finished_record(item.request) is None]
    needed = {item.request.stage for item in unfinished}
    needed |= {parent.stage for item in unfinished for parent in item.request.parents.values()}
    for item in planned:
        if item.request.given is None and item.request.stage not in needed:
            shutil.rmtree(item.request.directory / "checkpoints", ignore_errors=True)


def _forget_removed_parents(planned: Sequence[Planned]) -> None:
    """Rerun stages whose removed checkpoint an unfinished stage needs: remove the records of these stages."""
    needed: set[str] = set()
    for item in reversed(planned):
        if item.done and item.request.stage not in needed:
            continue
        for parent in item.request.parents.values():
            if not parent.checkpoint(item.run.start_from).is_file():
                needed.add(parent.stage)
                (parent.directory / records.RECORD_FILE).unlink(missing_ok=True)


def _judged(item: Planned, source: Tables, failure: str | None) -> Rehearsed:
    stage, record = item.request.stage, finished_record(item.request)
    if failure is not None or record is None:
        return Rehearsed(stage, None, failure or "did not run")
    wanted = published_keys(source, item.run.scale).get(stage, set())
    absent = tuple(sorted(wanted - set(record.metrics)))
    if wanted and len(absent) == len(wanted):
        return Rehearsed(stage, record, f"measured nothing that the tables read: {', '.join(absent)}")
    if item.run.trains and not record.steps:
        return Rehearsed(stage, record, "took no step")
    return Rehearsed(stage, record, absent=absent)


def published_keys(source: Tables, scale: str) -> dict[str, set[str]]:
    """Return, by stage, the metrics that a paper's tables read at a scale and that have published values."""
    keys: dict[str, set[str]] = defaultdict(set)
    for table in source.tables:
        for row in table.rows:
            for metric in table.metrics:
                for stage in source.instances(table, row, metric, scale) if metric.published else ():
                    keys[stage].add(metric.key)
    return keys
