"""The command `assemble verify`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from assemble.commands.parsing import Option, PaperNames, at_least
from assemble.reporting import code, records
from assemble.reporting.draws import INSTRUCTION_SETS, NATIVE
from assemble.reporting.papers import Paper, checkout, existing_papers, paper_named, runs_root
from assemble.reporting.progress import duration
from common.errors import StageError
from common.files import write_atomically


def verify(
    papers: PaperNames = (),
    *,
    record: Annotated[bool, "record the values of this code instead, with several instruction sets"] = False,
    isa: Annotated[
        str, Option("emulate the floating-point rounding of another CPU; default: native", choices=INSTRUCTION_SETS)
    ] = NATIVE,
    stages: Annotated[Sequence[str], "only these stages and those they start from"] = (),
    folder: Annotated[Path | None, "folder of the runs and of result.json; default: runs/verify"] = None,
    jobs: Annotated[int, Option("stages in parallel; default: one per core, at most 4", parse=at_least(1))] = 0,
) -> int:
    """Check that this code, on this machine, computes what was recorded.

    Runs the smoke stages with seed 0 and compares every logged value with papers/*/results/smoke/fingerprint.json.
    Exits with 1 if rounding does not explain a difference, and names the first one.
    """
    from assemble.stages import verify as verification
    from assemble.stages.plan import default_jobs, plan_stages

    if stages and (record or len(papers) != 1):
        raise StageError("--stages compares stages of one paper: name it, and record without --stages")
    chosen = [paper_named(name) for name in papers] or existing_papers()
    folder, jobs, began = folder or runs_root() / "verify", jobs or default_jobs("cpu"), time.monotonic()
    recorded = {} if record else {paper.name: verification.read(paper) for paper in chosen}
    width = max(len(paper.title) for paper in chosen)
    results: dict[str, Any] = {}
    for paper in chosen:
        name = paper.title.ljust(width)
        if record:
            fingerprint = verification.record(paper, folder, jobs, _show)
            print(f"{name}  recorded {_size(fingerprint.stages)}; {_jumps(fingerprint)}", flush=True)
            continue
        fingerprint = recorded[paper.name]
        wanted = verification.selection(paper, folder, isa, stages=tuple(stages))
        values = verification.measure(paper, wanted, jobs, _show)
        _show("")
        planned = [item.request.stage for item in plan_stages(paper.name, wanted)] if stages else None
        differences, largest = verification.compare(fingerprint, values, planned)
        results[paper.name] = {"agrees": not differences, "largest": largest, "differences": differences[:100]}
        if differences:
            print(f"{name}  differs")
            log = (wanted.runs / "log.txt").read_text(encoding="utf-8").splitlines()
            failed = [line.strip() for line in log if line.startswith("  FAILED")]
            print("\n".join(_explained(paper, fingerprint, values, differences, failed)), flush=True)
        else:
            told = (
                f"(largest difference {largest:.1e}, rounding explains {verification.FLOOR:.0e}; {_jumps(fingerprint)})"
            )
            print(f"{name}  {_size(values)}: agrees {told}", flush=True)
    took = duration(time.monotonic() - began)
    if record:
        print(f"{took}; commit papers/*/results/smoke/fingerprint.json with the change that explains it")
        return 0
    about = {"isa": isa, "machine": records.hardware(isa=isa), "versions": records.versions()}
    about |= {"git": records.git_state(checkout()), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(folder / "result.json", json.dumps({**about, "papers": results}, indent=1, default=vars) + "\n")
    differing = [paper.short for paper in chosen if not results[paper.name]["agrees"]]
    if differing:
        named = " ".join(differing)
        print(f"If you meant to change this, record a new fingerprint: assemble verify {named} --record")
    else:
        print(f"This code, on this machine, computes what was recorded. {took}")
    return 1 if differing else 0


def _show(text: str) -> None:
    """Replace the progress line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _size(values: Any) -> str:
    return f"{len(values)} stages, {sum(map(len, values.values()))} quantities"


def _jumps(fingerprint: Any) -> str:
    """The values whose recorded spread over instruction sets exceeds what rounding explains elsewhere."""
    count = sum(len(steps) for quantities in fingerprint.spread.values() for steps in quantities.values())
    return f"{count} value{'s' * (count != 1)} may differ by more"


def _explained(
    paper: Paper, fingerprint: Any, values: Any, differences: Sequence[Any], failed: Sequence[str]
) -> Iterator[str]:
    """Where a run leaves the recorded one: the first stage, step and quantity, then what follows from it."""
    from assemble.stages.verify import code_of, descendants

    first = differences[0]
    stages = list(dict.fromkeys(one.stage for one in differences))
    yield f"  first   {_told(first, fingerprint, values)}"
    if first.stage in values and first.stage in fingerprint.stages:
        step = str(first.step)
        together = [one.quantity for one in differences if (one.stage, one.step) == (first.stage, first.step)]
        same = [name for name, curve in values[first.stage].items() if step in curve and name not in together]
        also = [f"{first.stage}, step {step}: {_list(together[1:])}"] if together[1:] else []
        yield from (
            [f"  also    {'; '.join([*also, *([f'equal: {_list(same)}'] if same else [])])}"] if also or same else []
        )
    below = descendants(paper, [first.stage])
    follow = [stage for stage in stages[1:] if stage in below]
    if follow:
        yield f"  then    {_list(follow)}, which start{'s' * (len(follow) == 1)} from it"
    apart = [one for one in differences if one.stage not in {first.stage, *follow}]
    for one in list({one.stage: one for one in reversed(apart)}.values())[::-1][:4]:
        yield f"  and     {_told(one, fingerprint, values)}"
    if (more := len({one.stage for one in apart}) - 4) > 0:
        yield f"          and {more} more stages that do not start from it"
    yield from (f"  failed  {line.removeprefix('FAILED ')}" for line in failed[:3])
    revision = str(fingerprint.made["revision"])[:8]
    changed = code.differing(fingerprint.code, code_of(paper))
    mine, theirs = records.versions(), fingerprint.made["versions"]
    others = [f"{name} {mine.get(name)} instead of {old}" for name, old in theirs.items() if mine.get(name) != old]
    if changed:
        yield f"  code    {code.changed_text(changed)} since the fingerprint was made ({revision})"
    else:
        yield f"  code    did not change since the fingerprint was made ({revision})"
    yield from [f"  using   {', '.join(others)}"] if others else []


def _told(one: Any, fingerprint: Any, values: Any) -> str:
    if one.stage not in values:
        return f"{one.stage}: did not finish"
    if one.stage not in fingerprint.stages:
        return f"{one.stage}: is new, and the fingerprint lacks it"
    place = f"{one.stage}, step {one.step}, {one.quantity}"
    if one.value is None or one.recorded is None:
        return f"{place}: {'is not logged, but was' if one.value is None else 'is new'}"
    digits = 4
    while digits < 9 and f"{one.value:.{digits}g}" == f"{one.recorded:.{digits}g}":
        digits += 1
    return f"{place}: {one.value:.{digits}g} instead of {one.recorded:.{digits}g} (rounding explains {one.allowed:.0e})"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
