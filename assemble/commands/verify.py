"""The command `assemble verify`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from assemble.commands.parsing import Option, PaperNames, at_least, one_of
from assemble.reporting import code, records
from assemble.reporting.draws import INSTRUCTION_SETS, NATIVE
from assemble.reporting.papers import Paper, checkout, papers_named, runs_root
from assemble.reporting.progress import duration
from common.errors import StageError
from common.files import write_atomically


def verify(
    papers: PaperNames = (),
    *,
    rehearsal: Annotated[bool, "run the published recipes on the tiny data of `rehearse` instead"] = False,
    record: Annotated[bool, "record this code's values as the new reference, under several instruction sets"] = False,
    isa: Annotated[
        str, Option("emulate the floating-point rounding of another CPU; default: native", choices=INSTRUCTION_SETS)
    ] = NATIVE,
    device: Annotated[
        str, Option("cuda compares this GPU with the values recorded on a CPU", choices=("cpu", "cuda"))
    ] = "cpu",
    precision: Annotated[
        Sequence[str],
        Option("only 32 is judged; default: 32; with --device cuda all three", parse=one_of(("32", "tf32", "bf16"))),
    ] = (),
    stages: Annotated[Sequence[str], "only these stages and those they start from"] = (),
    folder: Annotated[Path | None, "folder for the runs and result.json; default: runs/verify"] = None,
    jobs: Annotated[
        int, Option("number of stages to run in parallel; default: one per core, at most 4", parse=at_least(1))
    ] = 0,
) -> int:
    """Check that this code, on this machine, computes what was recorded.

    Runs the smoke stages with seed 0 and compares every logged value with papers/*/results/smoke/fingerprint.json, or
    with --rehearsal one stage of each published recipe with rehearsal.json. Exits with 1 if a difference is too large
    for rounding, and names the first one.
    """
    from assemble.stages import verify as verification
    from assemble.stages.plan import default_jobs

    if stages and (record or len(papers) != 1):
        raise StageError("--stages selects stages of one paper: name the paper; --record takes no --stages")
    if record and (device != "cpu" or precision):
        raise StageError("--record always runs on the CPU at full precision: leave out --device and --precision")
    if device == "cpu" and "tf32" in precision:
        raise StageError("--precision tf32 needs an NVIDIA GPU: add --device cuda")
    accelerators = _gpu() if device == "cuda" else []
    precisions = precision or (["32", "tf32", "bf16"] if accelerators else ["32"])
    chosen = papers_named(papers)
    folder, began = folder or runs_root() / "verify", time.monotonic()
    jobs = jobs or default_jobs("gpu1" if accelerators else "cpu")
    width = max(len(paper.title) for paper in chosen)
    if record:
        for paper in chosen:
            fingerprint = verification.record(paper, folder, rehearsal, jobs, _show)
            print(f"{paper.title:{width}}  recorded {_size(fingerprint.stages)}; {_jumps(fingerprint)}", flush=True)
        took = duration(time.monotonic() - began)
        print(f"{took}; commit papers/*/results/smoke/*.json with the change that explains it")
        return 0
    recorded = {paper.name: verification.read(paper, rehearsal) for paper in chosen}
    floor = verification.FLOORS[device]
    results: dict[str, Any] = {}
    for paper in chosen:
        results[paper.name] = {"agrees": True}
        for kind in precisions:
            wanted = verification.selection(
                paper, folder, isa, rehearsal=rehearsal, stages=stages, device=device, precision=kind
            )
            planned = _recorded_stages(paper, wanted, recorded[paper.name]) if stages else None
            values = verification.measure(paper, wanted, jobs, _show, kind)
            _show("")
            differences, relative = verification.compare(recorded[paper.name], values, planned, floor)
            largest = max((difference for _, difference in relative), default=0.0)
            result: dict[str, Any] = {"largest": largest, **({"values": values} if accelerators else {})}
            if kind == "32":
                results[paper.name] |= {**result, "agrees": not differences, "differences": differences[:100]}
                explains = f"{'another device' if accelerators else 'rounding'} explains {floor:.0e}"
                agrees = f"agrees (largest difference {largest:.1e}, {explains}; {_jumps(recorded[paper.name])})"
                text = f"{_size(values)}: {agrees}"
                if differences:
                    text = "\n".join(["differs", *_explained(paper, wanted, recorded[paper.name], values, differences)])
            else:
                half, most = _spread(relative)
                results[paper.name][kind] = {**result, "half": half, "nine_of_ten": most}
                text = f"{kind}: half of the losses differ by up to {half:.0e}, nine of ten by {most:.0e}"
            print(f"{paper.title:{width}}  {text}", flush=True)
    about = {"isa": isa, "machine": records.hardware(accelerators, isa), "versions": records.versions()}
    about |= {"git": records.git_state(checkout()), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(folder / "result.json", json.dumps({**about, "papers": results}, indent=1, default=vars) + "\n")
    differing = [paper.short for paper in chosen if not results[paper.name]["agrees"]]
    if differing and device == "cpu":
        arguments = " ".join([*differing, *["--rehearsal"] * rehearsal])
        print(f"If you meant to change this, record a new fingerprint: assemble verify {arguments} --record")
    elif not differing and "32" in precisions:
        print(f"This code, on this machine, computes what was recorded. {duration(time.monotonic() - began)}")
    if accelerators:
        print(f"Please send us {folder / 'result.json'}, which has all values")
    return 1 if differing else 0


def _recorded_stages(paper: Paper, wanted: Any, fingerprint: Any) -> list[str]:
    """List the recorded stages among the stages of `--stages` and their parents."""
    from assemble.stages.plan import plan_stages

    planned = [item.request.stage for item in plan_stages(paper.name, wanted)]
    if not (recorded := [stage for stage in planned if stage in fingerprint.stages]):
        raise StageError(f"--stages {' '.join(wanted.stages)}: only {', '.join(fingerprint.stages)} are recorded")
    return recorded


def _spread(relative: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Return the relative differences that half and nine of ten of the losses do not exceed."""
    losses = [0.0, *sorted(difference for quantity, difference in relative if quantity == "train/loss")]
    half, most = (losses[len(losses) * tenths // 10] for tenths in (5, 9))
    return half, most


def _gpu() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        raise StageError("--device cuda: torch finds no GPU on this machine; without it, the CPU is compared")
    return [torch.cuda.get_device_name()]


def _show(text: str) -> None:
    """Replace the progress line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _size(values: Any) -> str:
    return f"{len(values)} stages, {sum(map(len, values.values()))} quantities"


def _jumps(fingerprint: Any) -> str:
    """Count the values with a larger tolerance, since they differ more between the recorded instruction sets."""
    count = sum(len(steps) for quantities in fingerprint.spread.values() for steps in quantities.values())
    return f"{count} value{'s' * (count != 1)} may differ by more"


def _explained(paper: Paper, wanted: Any, fingerprint: Any, values: Any, differences: Sequence[Any]) -> Iterator[str]:
    """Say where a run first differs (stage, step, quantity), and which differing stages start from that stage."""
    from assemble.stages.verify import code_of, descendants

    first = differences[0]
    stages = list(dict.fromkeys(item.stage for item in differences))
    yield f"  first   {_difference_text(first, fingerprint, values)}"
    if first.stage in values and first.stage in fingerprint.stages:
        step = str(first.step)
        together = [item.quantity for item in differences if (item.stage, item.step) == (first.stage, first.step)]
        same = [name for name, curve in values[first.stage].items() if step in curve and name not in together]
        also = [f"{first.stage}, step {step}: {_list(together[1:])}"] if together[1:] else []
        yield from (
            [f"  also    {'; '.join([*also, *([f'equal: {_list(same)}'] if same else [])])}"] if also or same else []
        )
    below = descendants(paper, wanted, [first.stage])
    follow = [stage for stage in stages[1:] if stage in below]
    if follow:
        yield f"  then    {_list(follow)}, which start{'s' * (len(follow) == 1)} from it"
    apart = {item.stage: item for item in reversed(differences) if item.stage not in {first.stage, *follow}}
    for difference in [*apart.values()][::-1][:4]:
        yield f"  and     {_difference_text(difference, fingerprint, values)}"
    if len(apart) > 4:
        yield f"          and {len(apart) - 4} more stages that do not start from it"
    log = (wanted.runs / "log.txt").read_text(encoding="utf-8").splitlines()
    failed = [line.strip() for line in log if line.startswith("  FAILED")]
    yield from (f"  failed  {line.removeprefix('FAILED ')}" for line in failed[:3])
    revision = str(fingerprint.made["revision"])[:8]
    changed = code.differing(fingerprint.code, code_of(paper, wanted.rehearsal))
    mine, theirs = records.versions(), fingerprint.made["versions"]
    differing = [f"{name} {mine.get(name)} instead of {old}" for name, old in theirs.items() if mine.get(name) != old]
    if changed:
        yield f"  code    {code.changed_text(changed)} since the fingerprint was made ({revision})"
    else:
        yield f"  code    did not change since the fingerprint was made ({revision})"
    yield from [f"  using   {', '.join(differing)}"] if differing else []


def _difference_text(difference: Any, fingerprint: Any, values: Any) -> str:
    stage, new, old = difference.stage, difference.value, difference.recorded
    if stage not in values:
        return f"{stage}: did not finish"
    if stage not in fingerprint.stages:
        return f"{stage}: is new, and the fingerprint lacks it"
    place = f"{stage}, step {difference.step}, {difference.quantity}"
    if new is None or old is None:
        return f"{place}: {'has no finite value, but had one' if new is None else 'is new'}"
    digits = 4
    while digits < 9 and f"{new:.{digits}g}" == f"{old:.{digits}g}":
        digits += 1
    return f"{place}: {new:.{digits}g} instead of {old:.{digits}g} (rounding explains {difference.allowed:.0e})"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
