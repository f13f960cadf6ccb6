"""`assemble verify`: compares the first steps of every smoke stage with recorded ones.

The same code computes the same losses and gradient norms on every processor, up to rounding; nearly every fault moves
them by more. The recorded values, seed 0, are in `papers/<paper>/results/smoke/fingerprint.json`, with their spread
over instruction sets. A separate process runs the stages, in an empty folder with an empty cache, so that no earlier
file replaces a computation.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assemble.reporting import records
from assemble.reporting.draws import NATIVE, instruction_sets_here
from assemble.reporting.papers import Paper, checkout
from assemble.stages import stopping
from assemble.stages.plan import plan_stages
from assemble.stages.request import Selection, StageRequest, fingerprint
from common.errors import StageError
from common.files import parsing, write_atomically

SCALE = "smoke"
#: Relative difference that rounding explains for any quantity, and the value below which it counts as absolute.
FLOOR, LEAST = 5e-5, 0.01
#: Largest difference between the recorded instruction sets, times this, is explained as well.
MARGIN = 4.0
#: Weakest first; the values are those of the last.
ROUNDINGS = ("sse41", "avx2", NATIVE)
#: Stage -> quantity -> step -> value.
Values = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Fingerprint:
    """Recorded values of a paper's smoke stages, in the order of the plan.

    Attributes:
        made: how they were recorded: revision, versions, processor and instruction sets.
        code: hashes of the files behind the stages, see `assemble.reporting.code`.
        spread: largest difference between instruction sets, only where `MARGIN` times it exceeds the floor.
    """

    made: Mapping[str, Any]
    code: dict[str, str]
    spread: Values
    stages: Values

    def allowed(self, stage: str, quantity: str, step: str, value: float) -> float:
        """Difference from a recorded value that rounding explains."""
        spread = self.spread.get(stage, {}).get(quantity, {}).get(step, 0.0)
        return max(_floor(value), MARGIN * spread)


@dataclass(frozen=True)
class Difference:
    """A value that rounding does not explain; None if it is missing on one side."""

    stage: str
    step: int
    quantity: str
    value: float | None
    recorded: float | None
    allowed: float


def _floor(value: float) -> float:
    """Difference that rounding explains for a value of any quantity."""
    return FLOOR * max(abs(value), LEAST)


def path_of(paper: Paper) -> Path:
    return paper.results / SCALE / "fingerprint.json"


def read(paper: Paper) -> Fingerprint:
    path = path_of(paper)
    if not path.is_file():
        raise StageError(
            f"{path} is missing, so there is nothing to compare with; record it on code you trust: "
            f"`assemble verify {paper.short} --record`"
        )
    with parsing(path, StageError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return Fingerprint(**content)


def write(paper: Paper, recorded: Fingerprint) -> None:
    """Write one line per quantity, so that a change shows what it moved."""

    def block(content: Any, depth: int) -> str:
        if depth > 3 or not isinstance(content, dict) or not content:
            return json.dumps(content)
        lines = (f"{' ' * depth}{json.dumps(name)}: {block(inner, depth + 1)}" for name, inner in content.items())
        return "{\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}}}"

    write_atomically(path_of(paper), block(vars(recorded), 1) + "\n")


def selection(paper: Paper, folder: Path, isa: str = NATIVE, **chosen: Any) -> Selection:
    """The smoke stages with seed 0; `chosen` are further fields."""
    runs = (folder / paper.name / isa).resolve()
    return Selection(SCALE, runs=runs, data=runs / "data", isa=isa, **chosen)


def record(paper: Paper, folder: Path, jobs: int, show: Callable[[str], object]) -> Fingerprint:
    """Run the stages under every instruction set and write the fingerprint."""
    here = [isa for isa in ROUNDINGS if isa in instruction_sets_here()]
    if len(here) < 2:
        raise StageError("a fingerprint is recorded with several instruction sets, so on an x86 processor with AVX2")
    runs = {isa: measure(paper, selection(paper, folder, isa), jobs, show) for isa in here}
    values = runs[here[-1]]
    spread: Values = {}
    for isa, other in runs.items():
        wanted = selection(paper, folder, isa)
        planned = [item.request.stage for item in plan_stages(paper.name, wanted)]
        if bad := [
            one for one in planned if _shape(other.get(one, {})) != _shape(values.get(one, {})) or one not in other
        ]:
            raise StageError(f"{bad[0]} fails or logs other quantities with --isa {isa}: see {wanted.runs / 'log.txt'}")
    for stage, quantities in values.items():
        for name, curve in quantities.items():
            for step, value in curve.items():
                widest = max(abs(other[stage][name][step] - value) for other in runs.values())
                if MARGIN * widest > _floor(value):
                    spread.setdefault(stage, {}).setdefault(name, {})[step] = float(f"{widest:.3g}")
    made = Fingerprint({**_provenance(), "roundings": here}, code_of(paper), spread, values)
    write(paper, made)
    return made


def _shape(quantities: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    return {name: list(curve) for name, curve in quantities.items()}


def _provenance() -> dict[str, Any]:
    hardware, versions = records.hardware(), records.versions()
    return {
        "revision": records.git_state(checkout())["revision"],
        "cpu": hardware["cpu"],
        "versions": {name: versions[name] for name in ("torch", "torchvision", "lightning", "numpy", "av")},
    }


def code_of(paper: Paper) -> dict[str, str]:
    """The files behind a paper's smoke stages, with the hash of their code."""
    files: dict[str, str] = {}
    for item in plan_stages(paper.name, Selection(SCALE)):
        files |= fingerprint(item.run)
    return {name: hashes.partition(":")[0] for name, hashes in sorted(files.items())}


def compare(
    recorded: Fingerprint, values: Values, stages: Iterable[str] | None = None
) -> tuple[list[Difference], float]:
    """What rounding does not explain, by stage and step, and the largest relative difference that it does.

    Args:
        stages: those that should have values; None for all.
    """
    differences, largest = [], 0.0
    for stage in dict.fromkeys([*recorded.stages, *values] if stages is None else stages):
        before, mine = recorded.stages.get(stage, {}), values.get(stage, {})
        here = []
        for name in dict.fromkeys([*before, *mine]):
            for step in dict.fromkeys([*before.get(name, {}), *mine.get(name, {})]):
                old, new = before.get(name, {}).get(step), mine.get(name, {}).get(step)
                allowed = 0.0 if old is None else recorded.allowed(stage, name, step, old)
                if old is None or new is None or not abs(new - old) <= allowed:  # also if one is not a number
                    here.append(Difference(stage, int(step), name, new, old, allowed))
                elif step not in recorded.spread.get(stage, {}).get(name, {}):
                    largest = max(largest, abs(new - old) / max(abs(old), LEAST))
        differences += sorted(here, key=lambda one: (one.step, one.quantity != "train/loss"))
    return differences, largest


def descendants(paper: Paper, stages: Sequence[str]) -> set[str]:
    """The stages that start from one of `stages`, directly or not."""
    below: set[str] = set()
    for item in plan_stages(paper.name, Selection(SCALE)):
        if any(parent.stage in below or parent.stage in stages for parent in item.request.parents.values()):
            below.add(item.request.stage)
    return below


# -- runs --------------------------------------------------------------------------------------------------------------


def measure(
    paper: Paper,
    selection: Selection,
    jobs: int,
    show: Callable[[str], object] = lambda text: None,
    variables: Mapping[str, str] | None = None,
) -> Values:
    """Run smoke stages in the empty folder `selection.runs`, and return what the finished ones logged.

    Args:
        show: called with the progress.
        variables: of the environment.
    """
    runs = selection.runs
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    requests = [item.request for item in plan_stages(paper.name, selection)]
    program = "import sys; from assemble.stages.verify import _run; sys.exit(_run(*sys.argv[1:]))"
    command = [sys.executable, "-c", program, paper.name, json.dumps(vars(selection), default=str), str(jobs)]
    log, cache = runs / "log.txt", runs / "cache"
    settings = {"ASSEMBLE_CACHE": str(cache), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **(variables or {})}
    with (
        stopping.listening(),
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **settings}) as process,
        stopping.waiting_for(process.send_signal),
    ):
        while process.poll() is None:
            show(f"{paper.title}: {len(_finished(requests))} of {len(requests)} stages")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    shutil.rmtree(cache, ignore_errors=True)
    finished = _finished(requests)
    if not finished or (process.returncode and len(finished) == len(requests)):
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        raise StageError(f"{paper.short}: the stages could not be run ({''.join(last) or 'no output'}); see {log}")
    return {request.stage: logged(request) for request in finished}


def logged(request: StageRequest) -> dict[str, dict[str, float]]:
    """The curves and measurements of a finished stage, in eight digits."""
    values: dict[str, dict[str, float]] = {}
    with (request.directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["name"] != "epoch":
                values.setdefault(row["name"], {})[row["step"]] = float(f"{float(row['value']):.8g}")
    return values


def _finished(requests: Sequence[StageRequest]) -> list[StageRequest]:
    return [request for request in requests if (request.directory / records.RECORD_FILE).is_file()]


def _run(paper: str, selection: str, jobs: str) -> int:
    """Run the stages in a new process, which has not imported torch."""
    from assemble.reporting.draws import use
    from assemble.stages.reproduce import run_paper

    values = json.loads(selection)
    use(values["isa"])
    paths = {name: Path(values[name]) for name in ("runs", "data")}
    return bool(run_paper(paper, Selection(**{**values, **paths}), jobs=int(jobs)))
