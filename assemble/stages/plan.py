"""Plan which stages to run and which are done. Only `render_plan` imports torch and lightning, for its checks."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from assemble.reporting import code, records
from assemble.reporting.draws import NATIVE
from assemble.reporting.papers import paper_named, working_folder
from assemble.reporting.progress import duration
from assemble.reporting.records import config_hash
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import StageInstance, expand
from assemble.stages.configuration import RunConfiguration
from assemble.stages.given import started
from assemble.stages.request import (
    Selection,
    StageRequest,
    changed_code,
    digests_in,
    fingerprint,
    finished_record,
    identity_of,
    requests_for,
    trained_again,
)
from common.errors import ReportingError
from common.files import usable_cores

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Planned:
    """A stage, and why it runs or is skipped.

    Attributes:
        done: whether a record matches the stage's configuration and ancestors.
        changed: code files that changed since the stage and its parents were trained; empty if the stage starts again.
    """

    request: StageRequest
    run: RunConfiguration
    done: bool
    reason: str
    changed: tuple[str, ...] = ()


def plan_stages(paper: str, selection: Selection) -> list[Planned]:
    """Plan a paper's stages for every seed, parents first. A misspelled field in any stage raises an error."""
    name = paper_named(paper).name
    instances, left_out = chosen(name, selection)
    if not instances and left_out:
        stages = ", ".join([*selection.given, *selection.absent])
        raise ReportingError(f"--released, --given: no selected stage starts from {stages}")
    if not instances:
        raise ReportingError(
            f"{paper_named(name).title}: no selected table or row has stages at scale {selection.scale}; change "
            "--scale, --tables or --rows, or add --everything"
        )
    requests = [request for seed in selection.seeds for request in requests_for(name, instances, selection, seed)]
    planned: dict[tuple[int, str], Planned] = {}
    for request in requests:
        done, reason = state_of(request)
        parents = [planned[parent.key] for parent in request.parents.values()]
        changed = tuple(sorted({*changed_code(request), *(file for parent in parents for file in parent.changed)}))
        if done and not all(parent.done for parent in parents):
            waits = next(parent.request.stage for parent in parents if not parent.done)
            done, reason, changed = False, f"{waits} runs again", ()
        elif changed and request.rerun:
            done, reason, changed = False, f"{code.changed_text(changed)}: starts again", ()
        elif changed:
            reason += f", by other code ({code.changed_text(changed)})"
        planned[request.key] = Planned(request, request.configuration, done, reason, changed)
    return [*planned.values()]


def chosen(paper: str, selection: Selection) -> tuple[list[StageInstance], int]:
    """Return the selected stages, and how many are left out because they don't start from given weights."""
    wanted = selection.tables, selection.rows, selection.stages, selection.everything
    instances = expand(paper, selection.scale, *wanted, selection.given)
    if selection.everything or not selection.given:
        return instances, 0
    kept = started(instances, selection.given, selection.absent)
    return kept, len({stage.id for stage in instances} - {stage.id for stage in kept} - {*selection.given})


def other_code(planned: Sequence[Planned]) -> str:
    """Say in a sentence which stages other code trained. Return an empty text if there are none."""
    return code.sentence([item.changed for item in planned])


def state_of(request: StageRequest) -> tuple[bool, str]:
    """Return whether a stage is done, and why it runs or is skipped."""
    if request.given is not None:
        return True, request.given.path.name
    record = finished_record(request)
    if record is not None:
        return True, f"done {record.started[:16].replace('T', ' ')} in {duration(record.wall_seconds)}"
    if (path := request.directory / "record.json").is_file():
        try:
            record = records.read(path)
        except records.RecordError as error:
            records.warn_of(f"skipped a malformed record: {error}")
            return False, "its record is malformed"
        if record.lineage_hash == request.lineage:
            return False, f"{trained_again(request, digests_in(record))} was trained again since"
        return False, "its configuration or that of a stage it starts from changed"
    if request.checkpoint().is_file():
        identity = identity_of(request.directory)
        if identity.get("lineage_hash") != request.lineage:
            return False, "was stopped, and its configuration or that of a stage it starts from changed: starts again"
        if parent := trained_again(request, identity["digests"]):
            return False, f"was stopped, and {parent} was trained again since: starts again"
        return False, "was stopped, resumes from its last checkpoint"
    return False, ""


def seconds_by_records(planned: Sequence[Planned]) -> tuple[dict[str, float], bool]:
    """Return the expected time of each stage that has records, and whether any of them is from this processor."""
    request, stages = planned[0].request, [item.request.stage for item in planned]
    here = records.find(request.runs, request.paper, request.scale)
    recorded = find_promoted(request.paper, request.scale)
    seconds = records.expected_seconds(stages, here, recorded, request.isa)
    return seconds, records.processor() in {record.hardware.get("cpu") for record in [*here, *recorded]}


def seconds_left(seconds_of: Mapping[str, float], left: Sequence[Planned], jobs: int) -> float | None:
    """Estimate the time to run the stages in `left`, `jobs` at a time. A stage without records gets the mean time."""
    if not seconds_of:
        return None if left else 0.0
    ordered = start_order(left, seconds_of, jobs)
    parents = {item.request.key: [parent.key for parent in item.request.parents.values()] for item in ordered}
    return side_by_side(_seconds_by_key(ordered, seconds_of), parents, jobs)


def start_order(planned: Sequence[Planned], seconds_of: Mapping[str, float], jobs: int) -> list[Planned]:
    """Order stages by seed, then by the time until their last descendant ends, longest first, so that no worker idles.

    One worker keeps the order of the tables, which prints the first table sooner. Parents must come first.
    """
    if jobs == 1 or not seconds_of:
        return list(planned)
    seconds = _seconds_by_key(planned, seconds_of)
    after = dict.fromkeys(seconds, 0.0)  # time from a stage's end to the end of its last descendant
    for item in reversed(planned):
        key = item.request.key
        for parent in item.request.parents.values():
            after[parent.key] = max(after.get(parent.key, 0.0), seconds[key] + after[key])
    seeds = list(dict.fromkeys(seed for seed, _ in seconds))
    return sorted(planned, key=lambda item: (seeds.index((key := item.request.key)[0]), -seconds[key] - after[key]))


def _seconds_by_key(planned: Sequence[Planned], seconds_of: Mapping[str, float]) -> dict[tuple[int, str], float]:
    mean = sum(seconds_of.values()) / len(seconds_of)
    return {item.request.key: seconds_of.get(item.request.stage, mean) for item in planned}


def expected_text(left: float | None, measured_here: bool) -> str:
    """Write `seconds_left` in words."""
    if left is None:
        return "unknown, no earlier record of this scale"
    return duration(left) + ("" if measured_here or not left else " (a guess: no record of this processor)")


def side_by_side(seconds: Mapping[Key, float], parents: Mapping[Key, Collection[Key]], jobs: int) -> float:
    """Return when the last task ends. A task starts when its parents have ended and one of `jobs` workers is free."""
    waiting, ends, now = list(seconds), dict[Key, float](), 0.0
    while waiting:
        unfinished = {*waiting, *(task for task, end in ends.items() if end > now)}
        ready = next((task for task in waiting if unfinished.isdisjoint(parents[task])), None)
        if ready is not None and sum(end > now for end in ends.values()) < jobs:
            waiting.remove(ready)
            ends[ready] = now + seconds[ready]
        else:
            now = min(end for end in ends.values() if end > now)
    return max(ends.values(), default=0.0)


def default_jobs(hardware: str) -> int:
    """Return the default of `--jobs`, the number of stages to run in parallel."""
    return min(usable_cores(), 4) if hardware == "cpu" else 1


def fit_arguments(request: StageRequest) -> list[str]:
    """Return the command-line arguments for `assemble` that run one planned stage."""
    folders = {str(given.path.parent): None for given in request.files.values() if given.source}
    named = [f"{stage}={given.path}" for stage, given in request.files.items() if not given.source]
    return [
        "fit", f"{request.paper}/{request.stage}", "--scale", request.scale, "--seed", str(request.seed),
        *(["--isa", request.isa] if request.isa != NATIVE else []), *(["--rerun"] if request.rerun else []),
        *(word for folder in folders for word in ("--released", folder)),
        *(word for file in named for word in ("--given", file)),
        "--hardware", request.hardware, "--runs", str(request.runs), "--data", str(request.data), "--unless_done",
    ]  # fmt: skip


def check_configurations(requests: Sequence[StageRequest]) -> None:
    """Check names, types and ranges, and import everything that the stages need."""
    from assemble.stages.lightning_workarounds import import_lightning

    import_lightning()
    from assemble.stages.cli import check

    for request in requests:
        fingerprint(request.configuration)  # hash the code now, before an edit: `check` imports it
    of_seed = {"seed_everything"}
    distinct = {(config_hash(request.configuration.config, of_seed), *request.parents): request for request in requests}
    for request in distinct.values():
        check(request)


def render_plan(planned: Sequence[Planned], form: str) -> str:
    """Write the plan as text, a shell script, or SLURM submissions with dependencies."""
    todo = [item for item in planned if not item.done]
    if todo:
        check_configurations([item.request for item in todo])
    if form == "text":
        return _as_text(planned, todo)
    if changed := other_code(planned):
        records.warn_of(f"{changed}; --rerun runs them again")
    # Name this interpreter, since a job may start without an activated environment.
    program = [sys.executable, "-m", "assemble"]
    commands = [shlex.join([*program, *fit_arguments(item.request)]) for item in todo]
    lines = ["#!/bin/sh", "set -e", f"cd {shlex.quote(str(working_folder()))}"]
    if form == "shell":
        return "\n".join([*lines, *commands])
    logs = sorted({item.request.runs / item.request.paper / item.request.scale / "slurm" for item in todo})
    lines += [f"mkdir -p {shlex.quote(str(folder))}" for folder in logs]
    variables: dict[tuple[int, str], str] = {}
    for number, (item, command) in enumerate(zip(todo, commands), start=1):
        request = item.request
        waits = [variables[parent.key] for parent in request.parents.values() if parent.key in variables]
        variable = f"stage_{number}"
        variables[request.key] = variable
        lines.append(f"{variable}=$({_submission(item, command, list(dict.fromkeys(waits)))})")
    return "\n".join(lines)


def _as_text(planned: Sequence[Planned], todo: Sequence[Planned]) -> str:
    seconds, measured_here = seconds_by_records(planned) if planned else ({}, True)
    rows = [("", "draw", "stage", "recipe", "time", "why")] + [
        (
            "given" if item.request.given else "done" if item.done else "run",
            str(item.request.draw),
            item.request.stage,
            item.request.recipe,
            "" if item.done or item.request.stage not in seconds else duration(seconds[item.request.stage]),
            item.reason,
        )
        for item in planned
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    jobs = min(default_jobs(todo[0].request.hardware), len(todo)) if todo else 1
    expected = expected_text(seconds_left(seconds, todo, jobs), measured_here)
    changed = [f"{text}; `assemble reproduce` asks what to do" for text in [other_code(planned)] if text]
    return "\n".join([*lines, *changed, f"expected time of stages to run, {jobs} in parallel: {expected}"])


def _submission(item: Planned, command: str, waits: Sequence[str]) -> str:
    request, trainer = item.request, item.run.config["trainer"]
    devices = trainer.get("devices", 1)
    tasks = int(devices) if str(devices).isdigit() else 1
    # Count the loader's workers but not the task, so that eight tasks with eight workers fit on 64 cores.
    cpus = max(1, item.run.config["data"]["init_args"].get("num_workers", 0))
    name = f"{request.paper}-{request.stage}-{request.scale}-{request.draw.folder.replace('seed', 's')}"
    folder = str(request.runs / request.paper / request.scale / "slurm")
    log = f"{folder.replace('%', '%%')}/%x.log"  # SLURM replaces patterns such as %x
    # `singleton`: a second submission waits for the first and finds its work done.
    dependency = ",".join([f"afterok:{':'.join(f'${wait}' for wait in waits)}"] * bool(waits) + ["singleton"])
    options = [
        f"--job-name={shlex.quote(name)}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
        f"--nodes={int(trainer.get('num_nodes', 1))}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *([f"--gres=gpu:{tasks}"] if trainer.get("accelerator") == "gpu" else []),
        # Leave two minutes to save and requeue. The signal goes to the processes, not to their shell.
        "--requeue",
        "--signal=USR1@120",
        f"--dependency={dependency}",
        "--kill-on-invalid-dep=yes",
    ]
    # By default, srun ignores sbatch's --cpus-per-task, and when a task dies, the others wait for it.
    step = f"srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {command}"
    return f"sbatch --parsable {' '.join(options)} --wrap={shlex.quote(step)}"
