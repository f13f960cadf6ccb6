"""Test archives of runs to send: what an archive contains, what promotion takes from it, and what promotion rejects."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assemble.commands.main import main
from assemble.reporting.papers import paper_named, project_root
from assemble.reporting.records import config_hash
from assemble.reporting.results import find_promoted, promoted_curves
from assemble.stages import contribution
from common.errors import ReportingError
from tests.trained import checkpoint

Capsys = pytest.CaptureFixture[str]
Files = dict[str, bytes]
RECORD = "avid_cma/smoke/seed0/esc@avid/record.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two stages, change their records to a clean revision, and write a verify result."""
    folder = tmp_path_factory.mktemp("sent") / "runs"
    assert main(["reproduce", "avid", "--scale", "smoke", "--stages", "esc@avid", "--runs", str(folder)]) == 0
    for path in folder.glob("*/*/*/*/record.json"):
        edit(path, git={"revision": "a" * 40, "dirty": False})
    (folder / "verify").mkdir()
    (folder / "verify" / "result.json").write_text(json.dumps({"papers": {"avid_cma": {"agrees": True}}}))
    return folder


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the project's recipes and tables without results."""
    root = tmp_path / "copy"
    shutil.copytree(project_root() / "configs", root / "configs")
    (root / "papers" / "avid_cma").mkdir(parents=True)
    for name in ("tables.yaml", "README.md"):
        shutil.copy(project_root() / "papers" / "avid_cma" / name, root / "papers" / "avid_cma")
    shutil.copy(project_root() / "README.md", root)
    monkeypatch.setenv("ASSEMBLE_ROOT", str(root))
    return root


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


def contribute(runs: Path) -> Path:
    assert main(["contribute", "avid", "--scale", "smoke", "--runs", str(runs)]) == 0
    return runs / "contribution-avid.zip"


def contents(path: Path) -> Files:
    with zipfile.ZipFile(path) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def promote(path: Path) -> int:
    return main(["promote", "avid", "--from", str(path), "--scale", "smoke"])


def rebuilt(path: Path, files: Files) -> Path:
    path.write_bytes(contribution.archive(files))
    return path


def test_what_was_sent_is_promoted_and_fills_the_tables(runs: Path, copy: Path, capsys: Capsys) -> None:
    first = contribute(runs).read_bytes()
    out = capsys.readouterr().out
    assert all(text in out for text in ("stages:    2\n", "revision:  aaaaaaaaaaaa\n", "verify:    agrees\n"))
    path = contribute(runs)
    assert path.read_bytes() == first
    assert promote(path) == 0
    assert capsys.readouterr().out.count("promoted: avid_cma/smoke/seed0/") == 2
    measured = {record.stage: record.metrics for record in find_promoted("avid_cma")}
    for stage, metrics in measured.items():
        assert json.loads((runs / f"avid_cma/smoke/seed0/{stage}/record.json").read_bytes())["metrics"] == metrics
    assert "train/loss" in promoted_curves(paper_named("avid"))["smoke", "seed0", "avid"]
    assert main(["tables", "avid", "--scale", "smoke"]) == 0
    assert f"{measured['esc@avid']['test/best_top1']:.1f}" in capsys.readouterr().out


def test_an_archive_names_neither_the_machine_nor_its_user(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ann-lees-runs"
    shutil.copytree(runs, folder)
    home, host, key = tmp_path / "alee", "gpu7.lab.example.org", "0123456789abcdef" * 2
    for name, value in (("HOME", str(home)), ("USER", "annlee"), ("WANDB_API_KEY", key)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: host)
    record = json.loads((folder / RECORD).read_bytes())
    record["config"]["trainer"]["logger"] = [{"class_path": "WandbLogger", "init_args": {"entity": "lees-lab"}}]
    record["config"]["trainer"]["default_root_dir"] = f"{folder}/on {host}"
    record["data"]["notes"] = {"notes": [f"read from {home}/esc50, shared by annlee on {host} with {key}", "~alee/x"]}
    record["data"][f"{home}/esc50"] = {"skipped_names": ["AnnLee_clips/1.wav", "gpu7/2.wav"]}
    record["ours"] = [{"field": "data.root", "value": f"{home}/esc50"}]
    record |= {"wandb_run_id": "lees-run", "media": ["media/lees.png"], "code": {"annlee.loss": "a:b"}}
    (folder / RECORD).write_text(json.dumps(record))
    with (folder / RECORD).with_name("metrics.csv").open("a") as curves:
        curves.write(f"0,train/annlee,1.0\n0,{home}/loss,2.0\n")
    verify = {"machine": {"cpu": f"of {host}"}, "papers": {"avid_cma": {"agrees": True}, "mct": {"agrees": False}}}
    (folder / "verify" / "result.json").write_text(json.dumps(verify))
    packed = contents(contribute(folder))
    assert set(packed) >= {RECORD, RECORD.replace("record.json", "metrics.csv"), contribution.VERIFY}
    everything = b"\n".join(packed.values()).decode()
    for text in ("lee", "gpu7", key, str(tmp_path), "logger", "mct"):
        assert text not in everything, text
    assert "read from <private>, shared by <private> on <private> with <private>" in everything
    assert "\n0,train/<private>,1.0\n0,<private>,2.0\n" in everything
    # The name of this user is a word of the recipes.
    monkeypatch.setenv("USER", "train")
    assert json.loads(contents(contribute(folder))[RECORD])["config_hash"] == record["config_hash"]
    assert "learning_rate" in contents(contribute(folder))[RECORD.replace("esc@", "")].decode()

    record["config"]["data"]["init_args"]["split"] = str(home)  # the hash covers this field
    (folder / RECORD).write_text(json.dumps({**record, "config_hash": config_hash(record["config"])}))
    assert main(["contribute", "avid", "--scale", "smoke", "--runs", str(folder)]) == 2


def test_given_weights_stay_marked_and_only_the_authors_count(
    copy: Path, tmp_path: Path, capsys: Capsys, runs: Path
) -> None:
    folder = tmp_path / "runs"
    flags = ["--stages", "esc@avid", "--given", f"avid={checkpoint('avid_cma')}", "--runs", str(folder)]
    assert main(["reproduce", "avid", "--scale", "smoke", *flags]) == 0
    assert main(["contribute", "avid", "--scale", "smoke", "--runs", str(folder)]) == 2
    assert "a file of yours" in capsys.readouterr().out
    (path,) = folder.rglob("record.json")
    released = contribution.load("avid_cma").released["avid"]
    digest = json.loads(path.read_bytes())["given"]["avid"]["sha256"]
    git = {"revision": "a" * 40, "dirty": False}
    for source, count in (("https://example.org", 0), (released.source, 1)):
        edit(path, git=git, given={"avid": {"file": released.file, "sha256": digest, "source": source}})
        archive = contribute(folder)
        assert "1 of them from the authors' weights" in capsys.readouterr().out
        assert promote(archive) == 1 - count
        assert ("promoted: avid_cma/smoke/seed0-given/esc@avid" in capsys.readouterr().out) == bool(count)
        assert [set(record.given) for record in find_promoted("avid_cma")] == [{"avid"}] * count


def record_with(**fields: Any) -> Callable[[Files], Files]:
    return lambda files: {**files, RECORD: json.dumps({**json.loads(files[RECORD]), **fields}).encode()}


def other_seed(hashed: bool) -> Callable[[Files], Files]:
    """Make a change to the configuration in a record. With `hashed`, update the hash as well."""

    def change(files: Files) -> Files:
        record = json.loads(files[RECORD])
        record["config"]["seed_everything"] = 5
        record["config_hash"] = config_hash(record["config"]) if hashed else record["config_hash"]
        return {**files, RECORD: json.dumps(record).encode()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: {**files, "../evil.json": b"{}"}, "not a file of a contribution"),
        (lambda files: {**files, "avid_cma/smoke/seed0/../metrics.csv": b""}, "not a file of a contribution"),
        (lambda files: {**files, "/tmp/evil/record.json": b"{}"}, "not a file of a contribution"),
        (lambda files: {**files, "mct/smoke/seed0/mct/record.json": b"{}"}, "records of one paper"),
        (lambda files: {contribution.VERIFY: files[contribution.VERIFY]}, "records of one paper"),
        (lambda files: {**files, "avid_cma/smoke/seed0/w/metrics.csv": bytes(2**28 + 1)}, "more than 10,000 files or"),
        (lambda files: {f"avid_cma/smoke/seed{n}/w/metrics.csv": b"" for n in range(10_001)}, "more than 10,000 files"),
        (lambda files: {**files, contribution.VERIFY: b'{"papers": 1}'}, "verify.json"),
        (record_with(metrics={"test/top1": "99"}), "metrics"),
        (record_with(stage="dcase@avid"), "of another run"),
        (record_with(row="cma"), "not that of the recipe"),
        (other_seed(hashed=False), "not that of the recipe"),
        (other_seed(hashed=True), "not that of the recipe"),
        (record_with(lineage_hash="0" * 12), "other configurations"),
        (record_with(parents={}), "other configurations"),
        (record_with(git={"revision": "a" * 40, "dirty": True}), "uncommitted"),
    ],
)  # fmt: skip
def test_a_hostile_archive_is_refused(
    change: Callable[[Files], Files], message: str, runs: Path, copy: Path, tmp_path: Path, capsys: Capsys
) -> None:
    path = rebuilt(tmp_path / "b.zip", change(contents(contribute(runs))))
    capsys.readouterr()
    assert promote(path) in (1, 2)
    assert message in "".join(capsys.readouterr())
    assert "esc@avid" not in {record.stage for record in find_promoted("avid_cma")}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, None])
def test_links_devices_duplicates_and_damage_are_refused(kind: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        entry = zipfile.ZipInfo(contribution.VERIFY)
        entry.external_attr = (kind or stat.S_IFREG) << 16
        packed.writestr(entry, b"{}")
        if kind is None:
            with pytest.warns(UserWarning, match="Duplicate"):
                packed.writestr(contribution.VERIFY, b"{}")
    with pytest.raises(ReportingError, match="not a file of a contribution, or occurs twice"):
        contribution.unpack(path, tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ReportingError, match=r"a\.zip"):
        contribution.unpack(path, tmp_path)


def test_without_finished_stages_no_archive_is_written(tmp_path: Path, capsys: Capsys) -> None:
    assert main(["contribute", "avid", "--scale", "smoke", "--runs", str(tmp_path)]) == 2
    assert "`assemble reproduce avid` runs them" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
