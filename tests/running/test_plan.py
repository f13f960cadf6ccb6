"""Test the plan: which stages run, in which order, with which commands, and what is printed."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from assemble.commands.main import main
from assemble.reporting import code, records
from assemble.reporting.papers import working_folder
from assemble.reporting.records import Record
from assemble.stages import needs as needing
from assemble.stages import plan as planning
from assemble.stages import reproduce as schedule
from assemble.stages.plan import Planned, fit_arguments, plan_stages, render_plan
from assemble.stages.request import Selection
from common.data.datasets.esc50 import write_esc50
from common.errors import StageError
from common.files import write_atomically
from tests.reporting.conftest import MakeRecord, make_record  # noqa: F401 - a fixture

Finish = Callable[..., Record]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with six cores, and skip the check of types, which imports everything."""
    monkeypatch.setattr(planning, "usable_cores", lambda: 6)
    for module in (planning, schedule):
        monkeypatch.setattr(module, "check_configurations", lambda runs: None)


@pytest.fixture
def finish(make_record: MakeRecord) -> Finish:  # noqa: F811
    """Return a function that writes the record of a planned stage."""

    def write(item: Planned, seconds: float = 120.0) -> Record:
        about = {name: getattr(item.request, name) for name in ("paper", "recipe", "job", "row", "scale")}
        made, config = {"test/best_top1": 12.345, "test/retrieval_r1": 50.0}, item.run.config
        about |= {"metrics": made, "config": config, "wall_seconds": seconds, "lineage_hash": item.request.lineage}
        record = make_record(item.request.stage, item.request.seed, **about)
        records.write(item.request.directory / "record.json", record)
        return record

    return write


def test_stages_run_after_their_parents_and_a_failure_stops_only_its_children(
    finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = Selection(scale="smoke", seeds=(0, 1, 2), runs=tmp_path, data=tmp_path, stages=("esc@avid",))
    planned = {schedule._name(item): item for item in plan_stages("avid", wanted)}
    finish(planned["avid seed 2"], 30.0)
    for seed in (0, 2):
        write_atomically(planned[f"avid seed {seed}"].request.checkpoint(), "")
    ran: list[str] = []

    def run(item: Planned) -> Record:
        ran.append(schedule._name(item))
        if ran[-1] == "avid seed 1":
            raise KeyError("a bug")
        if ran[-1] == "esc@avid seed 2":
            raise StageError("no\x1b room")
        return finish(item)

    monkeypatch.setattr(schedule, "start_stage", run)
    told: list[str] = []
    assert schedule.run_paper("avid", wanted, finished=told.append) == {
        (1, "avid"): "'a bug'", (1, "esc@avid"): "starts from avid, which failed", (2, "esc@avid"): "no\x1b room",
    }  # fmt: skip
    assert ran == ["avid seed 0", "esc@avid seed 0", "avid seed 1", "esc@avid seed 2"]
    assert told == ["avid", "esc@avid"]
    printed = capfd.readouterr()
    changed = "was stopped, and its configuration or that of a stage it starts from changed: starts again"
    assert printed.out.splitlines() == [
        "AVID-CMA at scale smoke: 6 stages over seeds 0, 1, 2, 1 done, 5 to run",
        "  expected: 2.5 min (a guess: no record of this processor)",
        f"  avid seed 0: {changed}",
        "[1/5] avid seed 0: best_top1 12.3, retrieval_r1 50.0  [2.0 min, about 2.0 min left]",
        "[2/5] esc@avid seed 0: best_top1 12.3  [2.0 min, about 4.5 min left]",
        "  FAILED avid seed 1: 'a bug'",
        "  esc@avid seed 1: skipped, it starts from avid, which failed",
        r"  FAILED esc@avid seed 2: no\x1b room",
        "2 of 5 stages failed, 1 skipped; the others are done. Rerun the command to retry.",
    ]
    assert printed.err.count("Traceback") == 1  # only the bug shows a traceback
    # The next plan shows the times of the remaining stages. A malformed record counts as missing.
    write_atomically(planned["esc@avid seed 2"].request.directory / "record.json", "{")
    text = render_plan(plan_stages("avid", wanted), "text").splitlines()
    assert text == [
        "      draw    stage     recipe     time     why",
        "done  seed 0  avid      avid                done 2026-01-02 03:04 in 2.0 min",
        "done  seed 0  esc@avid  esc50_svm           done 2026-01-02 03:04 in 2.0 min",
        "run   seed 1  avid      avid       30 s",
        "run   seed 1  esc@avid  esc50_svm  2.0 min",
        "done  seed 2  avid      avid                done 2026-01-02 03:04 in 30 s",
        "run   seed 2  esc@avid  esc50_svm  2.0 min  its record is malformed",
        "expected time of stages to run, 3 in parallel: 2.5 min (a guess: no record of this processor)",
    ]


def test_a_plan_as_commands(tmp_path: Path) -> None:
    runs, program = tmp_path / "my 5%x runs", f"{sys.executable} -m assemble"
    wanted = Selection("paper", (0, 3), "slurm", runs, Path("/data"), stages=("esc@avid", "avid_cma"), isa="sse41")
    commands, submissions = [], []
    for number, (seed, stage) in enumerate(itertools.product((0, 3), ("avid", "avid_cma", "esc@avid")), start=1):
        options = f"--scale paper --seed {seed} --isa sse41 --hardware slurm --runs '{runs}' --data /data --unless_done"
        commands.append(f"{program} fit avid_cma/{stage} {options}")
        nodes, devices = (1, 1) if stage == "esc@avid" else (4, 8)
        after = "" if stage == "avid" else f"afterok:$stage_{1 if seed == 0 else 4},"
        step = shlex.quote(f"srun --cpus-per-task=8 --kill-on-bad-exit=1 {commands[-1]}")
        submissions.append(
            f"stage_{number}=$(sbatch --parsable --job-name=avid_cma-{stage}-paper-s{seed}-sse41 "
            f"--output='{tmp_path}/my 5%%x runs/avid_cma/paper/slurm/%x.log' --open-mode=append --nodes={nodes} "
            f"--ntasks-per-node={devices} --cpus-per-task=8 --gres=gpu:{devices} --requeue --signal=USR1@120 "
            f"--dependency={after}singleton --kill-on-invalid-dep=yes --wrap={step})"
        )
    begin, folder = ["#!/bin/sh", "set -e", f"cd {working_folder()}"], f"mkdir -p '{runs}/avid_cma/paper/slurm'"
    planned = plan_stages("avid", wanted)
    assert render_plan(planned, "shell").splitlines() == [*begin, *commands]
    assert render_plan(planned, "slurm").splitlines() == [*begin, folder, *submissions]
    # Jobs wait for stages that run, not for finished ones.
    rest = render_plan([replace(planned[0], done=True), *planned[1:3]], "slurm").splitlines()[4:]
    assert len(rest) == 2
    assert all("--dependency=singleton " in line for line in rest)
    with pytest.raises(StageError, match=f"needs 4 nodes.* --seeds 0 --data /data --runs '{runs}' --format slurm"):
        schedule.start_stage(planned[0])


def test_a_stage_of_several_devices_runs_in_a_process_of_its_own(
    finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (item,) = plan_stages("mct", Selection("paper", (0,), "gpu8", tmp_path, tmp_path, stages=("moco_v2",)))
    started = MagicMock()
    monkeypatch.setattr(schedule.subprocess, "Popen", started)
    ended = started.return_value.__enter__.return_value.wait
    for ended.return_value, told in ((3, "ended with status 3"), (-9, "was ended by SIGKILL"), (0, "with status 0")):
        with pytest.raises(StageError, match=told):
            schedule.start_stage(item)
    record = finish(item)
    assert schedule.start_stage(item) == record
    assert started.call_args.args[0][1:] == ["-m", "assemble", *fit_arguments(item.request)]


def test_everything_that_is_missing_is_said_once_before_the_first_stage(
    finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    where = ["avid", "--scale", "paper", "--data", str(data), "--runs", str(runs)]
    assert main(["reproduce", *where]) == 2
    printed = capsys.readouterr()
    rows = [line.split("  ")[0] for line in printed.out.splitlines()]
    clips = "100,000 clips of AudioSet, one file name a line"
    names = ["Kinetics-400", "AudioSet", "UCF-101", "HMDB-51", "ESC-50", "DCASE scenes", clips]
    assert rows == ["needed", *names, "disk", ""]
    assert printed.err == (
        "assemble: 7 of 7 data sets and files are missing, and 148 of 148 stages cannot run without them: see "
        f"`assemble data avid --data {data}`\n"
    )
    assert not runs.exists()

    # If a parent lacks data, its children cannot run either, but other stages can.
    write_esc50(data / "esc50", ("rain", "dog"), write=lambda path: path.write_bytes(b"sound"))
    where[2] = "single"
    where += ["--stages", "esc@untrained", "esc@avid"]
    assert main(["plan", *where]) == 0
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in table] == ["needed", "ESC-50", "Kinetics-400", "disk"]
    assert "yes, all 10 (published 2,000) clips" in " ".join(table[1])
    assert main(["plan", *where, "--format", "shell"]) == 0
    printed = capsys.readouterr()
    assert "esc@avid" in printed.out
    assert f"missing: {data}/kinetics_sounds" in printed.err
    assert main(["reproduce", *where]) == 2
    assert "and 2 of 3 stages cannot run" in (err := capsys.readouterr().err)
    assert "--skip-missing runs the other 1\n" in err
    monkeypatch.setattr(schedule, "start_stage", finish)
    assert main(["reproduce", *where, "--skip-missing", "--jobs", "1"]) == 0
    assert "2 stages are left out: their data is missing" in (out := capsys.readouterr().out)
    assert "[1/1] esc@untrained seed 0" in out
    assert [path.parent.name for path in runs.rglob("record.json")] == ["esc@untrained"]

    # Without the CSV file, the data set exists but cannot be read.
    (data / "esc50" / "meta" / "esc50.csv").unlink()
    assert main(["plan", *where, "--seeds", "1"]) == 0
    assert "incomplete: nothing at" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needing.shutil, "disk_usage", lambda folder: MagicMock(free=1e6))
    where = ["avid", "--scale", "smoke", "--runs", str(tmp_path), "--stages", "esc@avid"]
    assert main(["reproduce", *where]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == [f"disk    0.00 GB free for {tmp_path}, about 0.02 GB needed", ""]
    assert "free space, or name another folder with --runs" in printed.err


def write_package(folder: Path, **modules: str) -> None:
    for name, text in modules.items():
        write_atomically(folder / "mine" / f"{name}.py", text)


def test_a_fingerprint_counts_code_and_not_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    loss = "import typing\nif typing.TYPE_CHECKING:\n    import mine.types\n"
    loss += "def loss(x):\n    from . import scale\n    return x / 2\n"
    named = 'from importlib import import_module\nhelper = import_module("mine.helper")\nTERMS = ("mine.term.Term",)\n'
    write_package(
        tmp_path,
        model="import torch\nfrom mine.loss import loss\nimport mine.named\n",
        loss=loss,
        scale="S = 1\n",
        types="T = 1\n",
        named=named,
        helper="H = 1\n",
        term="class Term: ...\n",
    )
    files = code.fingerprint(["mine.model", "assemble.reporting.render", "papers.mct.monitoring", "papers.mct.loss"])
    names = {"model", "loss", "scale", "named", "helper", "term"}  # `scale` is a lazy import
    assert {"papers/mct/loss.py", *(f"mine.{name}" for name in names)} <= files.keys()
    assert not any("types" in name or name.startswith(("torch", "assemble", "papers/mct/mon")) for name in files)
    assert code.changed(files) == []
    write_package(
        tmp_path, loss=loss.replace("x):", 'x):\n    """Halve."""\n\n    # half').replace("x / 2", "(x  /  2)")
    )
    for encoded in (b"\xef\xbb\xbfH = 1\n", b"# coding: latin-1\n# \xe9\nH = 1\n"):
        (tmp_path / "mine" / "helper.py").write_bytes(encoded)
        assert code.changed(files) == []
    write_package(tmp_path, scale="S = 2\n")
    assert code.changed(files) == ["mine.scale"]
    write_package(tmp_path, loss=loss.replace("x / 2", "x / 4"))
    assert code.sentence([code.changed(files), []]) == (
        "1 stage was trained by other code: mine.loss, mine.scale changed"
    )
    both = code.joined(files, {**files, "mine.loss": "c:t"})
    assert code.differing(both, files) == code.differing(both, {**files, "mine.loss": "c:t"}) == ["mine.loss"]
    assert code.joined({}, files) == {}  # the code at the start of training is unknown


@pytest.mark.parametrize("old", [False, True])
def test_a_stage_of_other_code_is_named_and_its_children_with_it(
    old: bool, finish: Finish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = Selection("smoke", runs=tmp_path, data=tmp_path, stages=("esc@avid",))
    parent, child = plan_stages("avid", wanted)
    about: dict[str, Any] = {} if old else {"code": {"papers/avid_cma/loss.py": "edited:since"}}
    records.write(parent.request.directory / "record.json", replace(finish(parent), **about))
    start = {"stage": "avid", "lineage_hash": parent.request.lineage}
    made = replace(finish(child), parents=dict.fromkeys(child.request.parents, start))
    records.write(child.request.directory / "record.json", made)
    arguments = ["--scale", "smoke", "--runs", str(tmp_path), "--data", str(tmp_path), "--stages", "esc@avid"]
    told = "2 stages were trained by other code: papers/avid_cma/loss.py changed"
    planned = plan_stages("avid", wanted)
    assert all(item.done and bool(item.changed) != old for item in planned)
    status = main(["reproduce", "avid", *arguments])
    printed = capsys.readouterr()
    assert (status, told in printed.err) == ((0, False) if old else (1, True))
    assert main(["reproduce", "avid", *arguments, "--keep"]) == 0
    assert (f"{told}." in capsys.readouterr().out) != old
    again = plan_stages("avid", replace(wanted, rerun=True))
    assert [item.done for item in again] == [old, old]
    if not old:
        assert [item.reason for item in again] == ["papers/avid_cma/loss.py changed: starts again", "avid runs again"]


def test_a_child_of_another_checkpoint_is_not_done(finish: Finish, tmp_path: Path) -> None:
    wanted = Selection("smoke", runs=tmp_path, data=tmp_path, stages=("esc@avid",))
    parent, child = plan_stages("avid", wanted)

    def state(checkpoint: str, digest: str) -> tuple[bool, str]:
        made = replace(finish(parent), checkpoints={"last": checkpoint} if checkpoint else {})
        records.write(parent.request.directory / "record.json", made)
        start = {"stage": "avid", "lineage_hash": "0" * 12, **({"digest": digest} if digest else {})}
        records.write(
            child.request.directory / "record.json",
            replace(finish(child), parents=dict.fromkeys(child.request.parents, start)),
        )
        return plan_stages("avid", wanted)[1].done, plan_stages("avid", wanted)[1].reason

    assert all(state(*pair)[0] for pair in (("a", "a"), ("", "a"), ("", "")))
    for digest in ("b", ""):
        assert state("a", digest) == (False, "avid was trained again since")
    (parent.request.directory / "record.json").unlink()  # as if the folder was deleted
    assert [(item.done, item.reason) for item in plan_stages("avid", wanted)] == [
        (False, ""),
        (False, "avid runs again"),
    ]


def write_files(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_files_stand_for_stages_and_what_starts_from_them_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = write_files(tmp_path / "weights", "AVID_Kinetics_Cross-N1024_checkpoint.pth.tar")
    stored = (released / "AVID_Kinetics_Cross-N1024_checkpoint.pth.tar").rename(tmp_path / "blob")
    (released / "AVID_Kinetics_Cross-N1024_checkpoint.pth.tar").symlink_to(stored)  # download caches use such links
    flags = ["--released", str(released), "--runs", str(tmp_path / "runs"), "--data", str(tmp_path)]
    table = ["--tables", "kinetics_transfer"]
    assert main(["plan", "avid", "--scale", "paper", *flags, *table]) == 0
    out = capsys.readouterr().out
    states = {line.split()[3]: line.split()[0] for line in out.splitlines() if " seed 0 " in line}
    runs = [*(f"{name}_{split}@avid" for name in ("ucf", "hmdb") for split in (1, 2, 3)), "esc@avid", "dcase@avid"]
    assert states == {"avid": "given", **dict.fromkeys(runs, "run")}
    assert "missing: AVID-CMA_Kinetics_InstX-N1024-PosW-N64-Top32_checkpoint.pth.tar  https://github.com" in out
    assert "AVID-CMA (CC BY-NC 4.0)\nstages that need a missing file are left out\n" in out
    # The command of a cluster job passes on the files, and says by its flag whether they are the authors'.
    assert main(["plan", "avid", "--scale", "paper", *flags, "--stages", "esc@avid", "--format", "shell"]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if " fit " in line]
    arguments = shlex.split(command.partition(" fit ")[2])
    assert main(["fit", *arguments, "--print_config"]) == 0
    assert arguments[arguments.index("--released") + 1] == str(released)
    assert "--given" not in arguments
    wanted = find_wanted(["--given", f"avid={released / 'AVID_Kinetics_Cross-N1024_checkpoint.pth.tar'}"], tmp_path)
    last = plan_stages("avid", wanted)[-1]
    assert last.request.directory.parent.name == "seed0-given"
    assert shlex.join(fit_arguments(last.request)).count("--given avid=") == 1


def find_wanted(flags: list[str], runs: Path) -> Selection:
    from assemble.reporting.tables import load
    from assemble.stages.given import find_given

    given, absent = find_given(load("avid_cma"), "smoke", None, flags[1:])
    return Selection(scale="smoke", runs=runs, data=runs, stages=("esc@avid",), given=given, absent=absent)


def test_another_file_makes_other_stages(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "weights", "one.pth", "two.pth")
    lineages = set()
    for name in ("one.pth", "two.pth"):
        planned = plan_stages("avid", find_wanted(["--given", f"avid={folder / name}"], tmp_path))
        lineages.add(planned[-1].request.lineage)
    # The hash also covers the file of statistics in the same folder.
    write_files(folder, "audio_norm_stats.npz")
    wanted = find_wanted(["--given", f"avid={folder / 'two.pth'}"], tmp_path)
    lineages |= {plan_stages("avid", one)[-1].request.lineage for one in (wanted, replace(wanted, given={}))}
    assert len(lineages) == 4


@pytest.mark.parametrize(
    ("paper", "flags", "message"),
    [
        ("avid", ["--scale", "paper", "--released", "{}"], "none of the authors' files is there: AVID_Kinetics"),
        ("avid", ["--scale", "mini", "--released", "{}"], "add --scale paper, not mini"),
        ("xmcgan", ["--scale", "paper", "--released", "{}"], "names no released weights; use --given"),
        ("avid", ["--scale", "paper", "--released", "{}/none"], "no such folder"),
        ("mct", ["--scale", "paper", "--released", "{}"], "resnet50-0676ba61.pth: its sha256 is"),
        ("avid", ["--scale", "smoke", "--given", "avid={}/none.pth"], "there is no file"),
        ("avid", ["--scale", "smoke", "--given", "avidd={}"], "write stage=FILE; did you mean 'avid'?"),
        ("avid", ["--scale", "smoke", "--given", "ablation_cma={}/other.pth"], "no selected stage starts from"),
    ],
)
def test_a_file_that_cannot_stand_for_a_stage_is_refused(
    paper: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_files(tmp_path / "weights", "other.pth", *(["resnet50-0676ba61.pth"] if paper == "mct" else []))
    given = [flag.format(folder) for flag in flags]
    assert main(["plan", paper, *given, "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
