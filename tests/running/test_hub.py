"""Exports on the Hub: sent and fetched by the real client, against a server of ours on the loopback interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import StageError
from common.reporting.papers import SCALES
from common.reporting.records import Record
from common.stages.export import trained_model, write_export
from common.stages.hub import fetch_export, push_export
from common.stages.model_card import metadata, model_card
from tests.hub_stub import HubStub, hub
from tests.trained import checkpoint

REPO = "someone/avid"
SENT = {".gitattributes", "README.md", "config.json", "model.safetensors", "record.json"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "avid"
    write_export(trained_model("avid_cma"), checkpoint("avid_cma"), folder)
    (folder / "notes.txt").write_text("not of the export", encoding="utf-8")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStub]:
    """The Hub of this process."""
    from huggingface_hub import constants

    with hub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants_template(stub.address))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        yield stub


def constants_template(address: str) -> str:
    return address + "/{repo_id}/resolve/{revision}/{filename}"


def test_what_is_sent_comes_back_and_nothing_else(server: HubStub, export: Path) -> None:
    address = push_export(export, REPO, private=True)
    (commit,) = server.commits[REPO]
    assert address == f"{server.address}/{REPO}/commit/{commit}"
    assert server.private[REPO]
    files = server.commits[REPO][commit]
    assert set(files) - {".gitattributes"} == SENT - {".gitattributes"}
    assert all((export / name).read_bytes() == content for name, content in files.items() if name in SENT)

    folder = fetch_export(REPO)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "record.json"}
    model: Any = trained_model("avid_cma").from_pretrained(REPO)
    assert not model.training
    assert model.fingerprint() == trained_model("avid_cma").from_export(export).fingerprint()
    with pytest.raises(StageError, match="is a model of avid, not of mct"):
        trained_model("mct").from_pretrained(REPO)


def test_a_commit_stays_what_it_was_and_needs_no_network(
    server: HubStub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push_export(export, REPO)
    (first,) = server.commits[REPO]
    config = json.loads(server.commits[REPO][first]["config.json"])
    second = server.commit(REPO, {"config.json": json.dumps({**config, "seed": 7}).encode()})
    newest = fetch_export(REPO)
    assert newest.name == second
    pinned = fetch_export(REPO, first)
    assert pinned.name == first
    assert json.loads((pinned / "config.json").read_bytes())["seed"] == 0
    # What is there is used as it is: by its commit without a question, and without a network by its branch, too.
    before = len(server.requests)
    assert fetch_export(REPO, first) == pinned
    assert len(server.requests) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_export(REPO) == newest
    assert len(server.requests) == before
    with pytest.raises(StageError, match="someone/other: "):
        fetch_export("someone/other")


def test_what_cannot_be_fetched_is_told(server: HubStub, export: Path) -> None:
    push_export(export, REPO)
    server.commit("someone/bert", {"config.json": b'{"model_type": "bert"}'})
    server.commit("someone/half", {"config.json": (export / "config.json").read_bytes()})
    for repo in ("someone/other", "avid", "a/b/c", "../avid", "a/..", str(export), "someone/bert", "someone/half"):
        with pytest.raises(StageError, match=re.escape(repo.replace("someone/bert", "someone--bert"))):
            fetch_export(repo)
    with pytest.raises(StageError, match=f"{REPO}: .*v9"):
        fetch_export(REPO, "v9")
    for name in ("*", "../outside", "/etc/passwd", "a/../../b"):
        server.commit("someone/bad", {"config.json": json.dumps({"files": {name: {}}}).encode()})
        with pytest.raises(StageError, match="someone/bad: "):
            fetch_export("someone/bad")


# -- the card ----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_record_and_real_data_are_named(export: Path) -> None:
    from dataclasses import replace

    from huggingface_hub import ModelCard

    smoke = Record.from_json((export / "record.json").read_text(encoding="utf-8"))
    model = trained_model("avid_cma")
    mini = replace(smoke, scale="mini", metrics={**smoke.metrics, "test/none": None})
    found = metadata(mini, "avid", model).to_dict()
    card = ModelCard(f"---\n{yaml.safe_dump(found)}---\n")
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == smoke.metrics
    assert {one.dataset_name for one in card.data.eval_results} == {"audio-visual world"}

    arguments = smoke.config["data"]["init_args"]
    real = replace(mini, scale="paper", config={**smoke.config, "data": {"init_args": {**arguments, "world": None}}})
    arguments = {**smoke.config["model"]["init_args"], "warm_start": "/data/weights/IG65M.pth"}
    released = replace(real, config={**real.config, "model": {"init_args": arguments}}, parents={})
    for record, starts in ((replace(real, parents={}), "random weights"), (released, "IG65M.pth")):
        card = model_card(record, "avid", model, "usage", REPO)
        assert f'AVID.from_pretrained("{REPO}")' in card
        assert f"| starts from | {starts} |" in card
        assert ("The weights that training started from" in card) == (record is released)
    found = metadata(real, "avid", model).to_dict()
    assert found["license"] == "other"
    assert found["datasets"] == ["kinetics400"]
    assert "mini" not in found["tags"]
    # Of each scale there is a card.
    tags = {scale: set(metadata(replace(real, scale=scale), "avid", model).tags or []) for scale in SCALES}
    assert {scale: own - tags["paper"] for scale, own in tags.items()} == {
        "paper": set(), "single": {"single"}, "mini": {"mini"}, "smoke": {"smoke"},
    }  # fmt: skip
