"""Every table in a README is what the promoted records say."""

from __future__ import annotations

import re

from common.reporting import render
from common.reporting.papers import existing_papers
from common.reporting.results import find_promoted
from common.reporting.tables import load


def test_readmes_hold_exactly_what_the_records_say() -> None:
    stale = [str(path) for path in render.stale(render.pages(existing_papers()))]
    assert not stale, f"out of date: {stale}; run `make tables`"


def test_promoted_records_come_from_clean_revisions() -> None:
    for paper in existing_papers():
        for record in find_promoted(paper.name):
            assert record.clean, f"{record.stage} seed {record.seed}: promoted from a changed tree"


def test_a_claim_or_check_makes_sense_alone() -> None:
    for paper in existing_papers():
        for table in load(paper.name).tables:
            for check in (*table.claims, *table.checks):
                leans = re.search(r"^[A-Z]\d+:|^(The same|So do|It|They)\b", check.text)
                assert not leans, f"{paper.name}, {table.id}.{check.id}: {check.text!r} leans on another text"
