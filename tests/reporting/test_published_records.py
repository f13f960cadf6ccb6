"""The published records: their hashes are those of the configurations in them, and of the stages that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.reporting.papers import existing_papers
from common.reporting.records import config_hash
from common.reporting.results import find_promoted
from common.stages.plan import plan
from common.stages.request import Selection

PAPERS = [paper.name for paper in existing_papers() if find_promoted(paper.name)]


@pytest.mark.parametrize("paper", PAPERS)
def test_hashes_follow_from_the_stored_configuration(paper: str) -> None:
    found = find_promoted(paper)
    lineages = {(r.scale, r.seed, r.stage): r.lineage_hash for r in found}
    for record in found:
        assert config_hash(record.config) == record.config_hash, record.stage
        for parent in record.parents.values():
            assert lineages[record.scale, record.seed, parent["stage"]] == parent["lineage_hash"], record.stage


@pytest.mark.parametrize("paper", PAPERS)
def test_records_are_of_the_stages_as_they_are_configured_now(paper: str) -> None:
    found = {(r.scale, r.seed, r.stage): r for r in find_promoted(paper)}
    nowhere = Path("/nonexistent")
    for scale, seed in sorted({key[:2] for key in found}):
        for stage in plan(paper, Selection(scale=scale, seeds=(seed,), runs=nowhere, data=nowhere, everything=True)):
            record = found.pop((scale, seed, stage.request.stage), None)
            assert record is None or record.lineage_hash == stage.lineage, stage.request.stage
    assert not found, f"no stage of these is left: {sorted(found)}"


def test_moving_a_class_is_no_new_experiment() -> None:
    def config(path: str, rate: float = 0.1) -> dict[str, object]:
        return {"model": {"class_path": path, "init_args": {"learning_rate": rate, "parts": [{"class_path": path}]}}}

    assert config_hash(config("papers.x.module.Net")) == config_hash(config("common.y.Net"))
    assert config_hash(config("papers.x.module.Net")) != config_hash(config("papers.x.module.Other"))
    assert config_hash(config("papers.x.module.Net")) != config_hash(config("papers.x.module.Net", 0.2))
