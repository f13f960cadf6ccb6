"""Compare the first steps of the smoke stages, or of the published recipes, with recorded ones.

The same code computes the same losses and gradient norms on every processor, up to rounding. Nearly every fault changes
them by more than rounding does. The recorded values (seed 0) and their spread over instruction sets are in
`papers/<paper>/results/smoke/`: `fingerprint.json` has the smoke stages, and `rehearsal.json` the published recipes on
a rehearsal's tiny data. A separate process runs the stages, in an empty folder with an empty cache, so that no earlier
file replaces a computation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assemble.reporting import records
from assemble.reporting.curves import read_points
from assemble.reporting.draws import NATIVE, instruction_sets_here, use
from assemble.reporting.papers import Paper, checkout
from assemble.stages import stopping
from assemble.stages.plan import plan_stages
from assemble.stages.request import Selection, StageRequest, fingerprint
from common.errors import StageError
from common.files import parsing, write_atomically

#: Relative difference that rounding explains for any quantity, by device; see docs/comparing-runs.md.
FLOORS = {"cpu": 5e-5, "cuda": 5e-4}
FLOOR = FLOORS["cpu"]
#: A difference is relative to the recorded value, or to this if the value is smaller.
LEAST = 1e-3
#: Rounding also explains this multiple of the largest difference between the recorded instruction sets.
MARGIN = 4.0
#: Instruction sets to record, weakest first. The last gives the values. Published sizes take minutes without AVX2.
ROUNDINGS = ("sse41", "avx2", NATIVE)
#: `--precision` -> the trainer's precision. `tf32` rounds the factors of float32 products on a GPU.
PRECISIONS = {"32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed"}
#: Stage -> quantity -> step -> value.
Values = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Fingerprint:
    """Recorded values of a paper's smoke stages, in the order of the plan.

    Attributes:
        made: how the values were recorded: revision, versions, processor and instruction sets.
        code: hashes of the files behind the stages, see `assemble.reporting.code`.
        spread: largest difference between instruction sets, stored only if `MARGIN` times the difference exceeds the
            floor.
    """

    made: Mapping[str, Any]
    code: dict[str, str]
    spread: Values
    stages: Values

    def allowed(self, stage: str, quantity: str, step: str, value: float, floor: float = FLOOR) -> float:
        """Return the largest difference from a recorded value that rounding explains."""
        spread = self.spread.get(stage, {}).get(quantity, {}).get(step, 0.0)
        return max(floor * max(abs(value), LEAST), floor / FLOOR * MARGIN * spread)


@dataclass(frozen=True)
class Difference:
    """A value that rounding does not explain. `value` or `recorded` is None if it is missing."""

    stage: str
    step: int
    quantity: str
    value: float | None
    recorded: float | None
    allowed: float


def path_of(paper: Paper, rehearsal: bool = False) -> Path:
    return paper.results / "smoke" / ("rehearsal.json" if rehearsal else "fingerprint.json")


def read(paper: Paper, rehearsal: bool = False) -> Fingerprint:
    path = path_of(paper, rehearsal)
    if not path.is_file():
        raise StageError(
            f"{path} is missing, so there is nothing to compare with; record it on code you trust: "
            f"`assemble verify {paper.short}{' --rehearsal' * rehearsal} --record`"
        )
    with parsing(path, StageError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return Fingerprint(**content)


def write(path: Path, recorded: Fingerprint) -> None:
    """Write one line per quantity, so that a diff shows which quantities changed."""

    def block(content: Any, depth: int) -> str:
        if depth > 3 or not isinstance(content, dict) or not content:
            return json.dumps(content)
        lines = (f"{' ' * depth}{json.dumps(name)}: {block(inner, depth + 1)}" for name, inner in content.items())
        return "{\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}}}"

    write_atomically(path, block(vars(recorded), 1) + "\n")


def selection(
    paper: Paper,
    folder: Path,
    isa: str = NATIVE,
    *,
    rehearsal: bool = False,
    stages: Sequence[str] = (),
    device: str = "cpu",
    precision: str = "32",
) -> Selection:
    """Select the stages to run with seed 0: by default one per recipe, at smoke one per recipe and set of overrides."""
    parts = ["rehearsal" if rehearsal else "", "" if device == "cpu" else device, precision.replace("32", ""), isa]
    runs = (folder / paper.name / "-".join(filter(None, parts))).resolve()
    wanted = Selection(
        "paper" if rehearsal else "smoke",
        hardware="cpu" if device == "cpu" else "gpu1",
        runs=runs,
        data=runs / "data" / paper.name,
        isa=isa,
        stages=tuple(stages),
        rehearsal=rehearsal,
        arguments=("--trainer.precision", PRECISIONS[precision]) if rehearsal or precision != "32" else (),
    )
    if stages:
        return wanted
    first: dict[tuple[str, str], str] = {}
    for item in plan_stages(paper.name, wanted):
        first.setdefault((item.request.recipe, "" if rehearsal else str(item.request.overrides)), item.request.stage)
    return replace(wanted, stages=tuple(first.values()))


def record(paper: Paper, folder: Path, rehearsal: bool, jobs: int, show: Callable[[str], object]) -> Fingerprint:
    """Run the stages under every instruction set and write the fingerprint."""
    here = [isa for isa in ROUNDINGS[rehearsal:] if isa in instruction_sets_here()]
    if len(here) < 2:
        raise StageError("--record needs several instruction sets: run it on an x86 processor with AVX2")
    chosen = {isa: selection(paper, folder, isa, rehearsal=rehearsal) for isa in here}
    runs = {isa: measure(paper, chosen[isa], jobs, show) for isa in here}
    values = runs[here[-1]]
    for isa, other in runs.items():
        for item in plan_stages(paper.name, chosen[isa]):
            stage = item.request.stage
            if stage not in other or _shape(other[stage]) != _shape(values.get(stage, {})):
                log = chosen[isa].runs / "log.txt"
                raise StageError(f"{stage} fails or logs different quantities with --isa {isa}: see {log}")
    spread: Values = {}
    about: dict[str, Any] = {"revision": records.git_state(checkout())["revision"], "cpu": records.processor()}
    about |= {"versions": records.versions(), "roundings": here}
    made = Fingerprint(about, code_of(paper, rehearsal), spread, values)
    for stage, quantities in values.items():
        for name, curve in quantities.items():
            for step, value in curve.items():
                widest = max(abs(other[stage][name][step] - value) for other in runs.values())
                if MARGIN * widest > made.allowed(stage, name, step, value):
                    spread.setdefault(stage, {}).setdefault(name, {})[step] = float(f"{widest:.3g}")
    write(path_of(paper, rehearsal), made)
    return made


def _shape(quantities: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    return {name: list(curve) for name, curve in quantities.items()}


def code_of(paper: Paper, rehearsal: bool = False) -> dict[str, str]:
    """Return the files behind a paper's stages, with the hash of their code."""
    files: dict[str, str] = {}
    for item in plan_stages(paper.name, selection(paper, Path(), rehearsal=rehearsal)):
        files |= fingerprint(item.run)
    return {name: hashes.partition(":")[0] for name, hashes in sorted(files.items())}


def compare(
    recorded: Fingerprint, values: Values, stages: Iterable[str] | None = None, floor: float = FLOOR
) -> tuple[list[Difference], list[tuple[str, float]]]:
    """Find differences that rounding does not explain. Also list relative differences of quantities without a spread.

    Args:
        stages: the stages that should have values; None for all.
    """
    differences, relative = [], []
    for stage in dict.fromkeys([*recorded.stages, *values] if stages is None else stages):
        before, mine = recorded.stages.get(stage, {}), values.get(stage, {})
        here = []
        for name in dict.fromkeys([*before, *mine]):
            for step in dict.fromkeys([*before.get(name, {}), *mine.get(name, {})]):
                old, new = before.get(name, {}).get(step), mine.get(name, {}).get(step)
                allowed = 0.0 if old is None else recorded.allowed(stage, name, step, old, floor)
                if old is None or new is None or not abs(new - old) <= allowed:  # also if one is not a number
                    here.append(Difference(stage, int(step), name, new, old, allowed))
                if old is not None and new is not None and step not in recorded.spread.get(stage, {}).get(name, {}):
                    relative.append((name, abs(new - old) / max(abs(old), LEAST)))
        differences += sorted(here, key=lambda item: (item.step, item.quantity != "train/loss"))
    return differences, relative


def descendants(paper: Paper, chosen: Selection, stages: Sequence[str]) -> set[str]:
    """Return the stages that start from one of `stages`, directly or indirectly."""
    below: set[str] = set()
    for item in plan_stages(paper.name, chosen):
        if any(parent.stage in below or parent.stage in stages for parent in item.request.parents.values()):
            below.add(item.request.stage)
    return below


# -- runs --------------------------------------------------------------------------------------------------------------


def measure(
    paper: Paper,
    selection: Selection,
    jobs: int,
    show: Callable[[str], object] = lambda text: None,
    precision: str = "32",
) -> Values:
    """Run stages in the empty folder `selection.runs`, and return what the finished ones logged.

    Args:
        show: called with the progress.
    """
    runs = selection.runs
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    requests = [item.request for item in plan_stages(paper.name, selection)]
    program = "import sys; from assemble.stages.verify import _run; sys.exit(_run(*sys.argv[1:]))"
    chosen = json.dumps(vars(selection), default=str)
    command = [sys.executable, "-c", program, paper.name, chosen, str(jobs), precision]
    log, cache = runs / "log.txt", runs / "cache"
    settings = {"ASSEMBLE_CACHE": str(cache), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
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
    for folder in (cache, selection.data):
        shutil.rmtree(folder, ignore_errors=True)
    finished = _finished(requests)
    if not finished or (process.returncode and len(finished) == len(requests)):
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        raise StageError(f"{paper.short}: the stages could not be run ({''.join(last) or 'no output'}); see {log}")
    return {request.stage: logged(request) for request in finished}


def logged(request: StageRequest) -> dict[str, dict[str, float]]:
    """Read the curves and measurements of a finished stage, with eight digits."""
    curves = read_points(request.directory / "metrics.csv")
    return {name: {f"{x:.0f}": float(f"{y:.8g}") for x, y in points} for name, points in curves.items()}


def _finished(requests: Sequence[StageRequest]) -> list[StageRequest]:
    return [request for request in requests if (request.directory / records.RECORD_FILE).is_file()]


def _run(paper: str, selection: str, jobs: str, precision: str) -> int:
    """Run the stages in a new process, which has not imported torch."""
    from assemble.stages.rehearse import rehearse
    from assemble.stages.reproduce import run_paper

    values = json.loads(selection)
    use(values["isa"])
    paths = {name: Path(values[name]) for name in ("runs", "data")}
    chosen = Selection(**{**values, **paths})
    like: Any = nullcontext()
    if chosen.hardware != "cpu":
        from assemble.stages.like_cpu import like_cpu

        like = like_cpu(tf32=precision == "tf32")
    with like:
        if chosen.rehearsal:
            return any(stage.problem for stage in rehearse(paper, chosen, int(jobs)))
        return bool(run_paper(paper, chosen, jobs=int(jobs)))
