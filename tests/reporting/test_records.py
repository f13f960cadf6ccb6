"""Test records: validation, round trip, hashes, atomic writing, and git state."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assemble.reporting import records
from assemble.reporting.records import IGNORED_KEYS, Record, RecordError, config_hash
from tests.reporting.conftest import Capsys, Saved, a_record

KEYS = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=6).filter(
    lambda key: key not in IGNORED_KEYS
)
LEAVES = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text(max_size=5)
CONFIGS = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=8
    ),
    max_size=4,
)
METRICS = st.dictionaries(
    st.text(min_size=1, max_size=10), st.floats(allow_nan=False, allow_infinity=False), max_size=5
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def leaf_paths(value: Any) -> list[tuple]:
    if isinstance(value, dict):
        return [(key, *rest) for key, item in value.items() for rest in leaf_paths(item)]
    if isinstance(value, list):
        return [(i, *rest) for i, item in enumerate(value) for rest in leaf_paths(item)]
    return [()]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {k: replaced(v, path[1:], new) if k == path[0] else v for k, v in value.items()}
    return [replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value)]


@given(CONFIGS, st.sampled_from(sorted(IGNORED_KEYS)), LEAVES, st.data())
def test_hash_is_blind_to_ignored_keys_and_order_and_to_nothing_else(
    config: dict, key: str, leaf: Any, data: st.DataObject
) -> None:
    own = config_hash(config)
    assert len(own) == 12
    assert config_hash(reversed_keys(config)) == own
    assert config_hash({**config, key: leaf}) == own
    assert config_hash({**config, "nested": {"x": 1, key: leaf}}) == config_hash({**config, "nested": {"x": 1}})
    paths = leaf_paths(config)
    if paths and paths != [()]:
        path = data.draw(st.sampled_from(paths))
        assert config_hash(replaced(config, path, "quite another value")) != own


def test_seed_is_in_the_hash_but_not_in_the_configuration() -> None:
    first, second = (a_record(config={"seed_everything": seed, "a": 1}) for seed in (0, 1))
    assert config_hash(first.config) != config_hash(second.config)
    assert first.configuration == second.configuration
    assert first.configuration != a_record(config={"seed_everything": 0, "a": 2}).configuration


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("job", {"job": "probing"}),
        ("scale", {"scale": "minni"}),
        ("seed", {"seed": -1}),
        ("metrics.a", {"metrics": {"a": "high"}}),
        ("config", {"config": {"path": Path("/x")}}),
        ("hardware.isa", {"hardware": {"isa": {"requested": "avx9"}}}),
        *((f"hardware: {name}", {"hardware": {name: 3}}) for name in ("cpu", "accelerators", "isa")),
        ("media.0", {"media": [3]}),
        ("wall_seconds", {"wall_seconds": float("nan")}),
        ("schema", {"schema": 2}),
        ("unheard_of", {"unheard_of": 2}),
    ],
)
def test_wrong_fields_are_named(named: str, fields: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{named}"):
        Record.of(dataclasses.asdict(a_record()) | fields)


def test_control_characters_are_made_visible() -> None:
    text = "\x1b[2J"
    fields: dict[str, Any] = {"started": text, "git": {"revision": text, "dirty": False}, "hardware": {"cpu": text}}
    fields |= {"metrics": {text: 1.0}, "deviations": [{"field": text, "reason": text}], "precision": text}
    assert r"\u001b" not in a_record(**fields).to_json()


def test_values_that_json_lacks() -> None:
    record = a_record(metrics={"a": float("nan"), "b": 1}, config={"limit": float("inf"), "betas": (0.9, 0.99)})
    assert record.metrics == {"a": None, "b": 1.0}
    assert record.config == {"limit": "inf", "betas": [0.9, 0.99]}
    assert (record.global_batch, record.steps) == (0, 0)
    assert Record.from_json(record.to_json()) == record


VALID = json.loads(a_record().to_json())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "JSON"),
        (json.dumps({key: VALID[key] for key in VALID if key != "git"}).encode(), "git: missing$"),
        (json.dumps({**VALID, "config": functools.reduce(lambda a, _: {"a": a}, range(900), {})}).encode(), "JSON"),
        (None, ""),
    ],
)
def test_a_broken_file_is_named(content: bytes | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RecordError, match=rf"record\.json: .*{named}"):
        records.read(path)


def test_find_checks_places_and_skips_what_was_set_aside(project: Path, saved: Saved, capsys: Capsys) -> None:
    folder = saved("esc@base", 1)
    saved("esc@base", 0)
    saved("esc@base", 0, scale="smoke")
    folder.rename(folder.with_name(folder.name + records.SET_ASIDE))
    found = records.find(project / "runs", "mct")
    assert [(r.scale, r.seed) for r in found] == [("mini", 0), ("smoke", 0)]
    assert [r.scale for r in records.find(project / "runs", scale="smoke")] == ["smoke"]
    folder = saved("esc@base", 2)
    folder.rename(folder.with_name("esc@better"))
    with pytest.raises(RecordError, match="the record is of another run, whose folder is"):
        records.find(project / "runs", strict=True)
    unreadable = saved("esc@base", 3) / records.RECORD_FILE
    unreadable.unlink()
    unreadable.mkdir()
    (saved("esc@base", 4) / records.RECORD_FILE).write_text("{")
    capsys.readouterr()
    found = records.find(project / "runs", "mct")
    assert [(r.scale, r.seed) for r in found] == [("mini", 0), ("smoke", 0)]
    for error, words in zip(capsys.readouterr().err.splitlines(), ("another run", "directory", "JSON"), strict=True):
        assert words in error
        assert "record.json" in error


def test_expected_seconds_are_of_this_processor_or_instruction_set_and_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(stage: str, seconds: float, machine: str = "avx2", requested: str = "native", cpu: str = "other") -> Record:
        isa = {"requested": requested, "machine": machine}
        return a_record(stage=stage, wall_seconds=seconds, hardware={"cpu": cpu, "isa": isa})

    def expected(here: list[Record], *stages: str, isa: str = "native") -> list[float | None]:
        return list(map(records.expected_seconds(stages, here, known, isa).get, stages))

    monkeypatch.setattr(records, "machine_isa", lambda: "avx2")
    monkeypatch.setattr(records, "processor", lambda: "ours")
    known = [run("a", 20.0), run("a", 15.0), run("a", 6.0, "avx512"), run("a", 90.0, requested="avx"), run("b", 4.0)]
    known += [run("c", 50.0, "avx512"), run("e", 7.0), run("e", 9.0, cpu="ours"), run("e", 8.0, "avx512", cpu="ours")]
    assert expected([], *"abce") == pytest.approx([19.3, 5.1, 56.25, 9.0], rel=0.01)
    assert expected([], "d") == [None]
    assert expected([], "a", isa="avx") == [90.0]
    assert expected([run("a", 30.0)], "a", "b", "d") == [30.0, 8.0, None]
    known += [run("b", 8.0, cpu="third")]
    assert expected([], "b") == pytest.approx([7.7], rel=0.01)


def test_memory_is_in_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 801_000}.__getitem__)
    assert records.hardware()["memory_gib"] == 3.1


SETTINGS = ("user.name=a", "user.email=a@b", "commit.gpgsign=false")


def test_git_state_ignores_results_pages_and_runs_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), *(part for one in SETTINGS for part in ("-c", one)), *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    assert records.git_state(None) == records.git_state(tmp_path) == {"revision": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    state = records.git_state(tmp_path)
    assert len(state["revision"].encode()) == 40
    assert state["dirty"] is False
    results = tmp_path / "papers" / "mct" / "results" / "mini"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    (tmp_path / "papers" / "README.md").write_text("page")
    run = tmp_path / "mine" / "mct" / "mini" / "seed0-sse41" / "mct"
    run.mkdir(parents=True)
    (run / "record.json").write_text("{}")
    assert records.git_state(tmp_path)["dirty"] is False
    assert records.git_state(tmp_path / "papers")["dirty"] is False
    (tmp_path / "new.py").write_text("2")
    assert records.git_state(tmp_path / "papers")["dirty"] is True
    # The file has a new time stamp but no change. Refreshing the index would lock it and block a commit.
    os.utime(tmp_path / "code.py", (1, 1))
    index = (tmp_path / ".git" / "index").read_bytes()
    records.git_state(tmp_path)
    assert (tmp_path / ".git" / "index").read_bytes() == index
