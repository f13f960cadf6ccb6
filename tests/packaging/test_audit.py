"""The audit of the lock: what has weaknesses is named, and what was not looked up does not count as free of them."""

from __future__ import annotations

import json
import runpy
from typing import Any

from tests.architecture.sources import ROOT

judge = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["judge"]


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(packages), "fixes": []})


SOUND = {"name": "a", "version": "1.0", "vulns": []}
WEAK = {"name": "b", "version": "2.0", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2.1"], "aliases": []}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1.0)"}


def test_what_is_sound_passes() -> None:
    assert judge(report(SOUND)) == (0, ["1 of 1 packages looked up, 0 with known weaknesses"])


def test_a_weakness_is_named_with_its_cure() -> None:
    status, lines = judge(report(SOUND, WEAK, SKIPPED))
    assert status == 1
    assert lines[0] == "b 2.0: PYSEC-2026-1, mended in 2.1"
    assert lines[1] == "2 of 3 packages looked up, 1 with known weaknesses"


def test_what_was_not_looked_up_does_not_pass() -> None:
    status, lines = judge(report(SOUND, *[SKIPPED] * 7))
    assert status == 2
    assert lines[-1].startswith("not audited, the database did not answer")
    assert lines[-1].endswith("c, c, c, c, c and 2 more")
    for nothing in ("", "ConnectionError", "[]", report()):
        assert judge(nothing)[0] == 2
    assert "is there a network?" in judge("")[1][0]
