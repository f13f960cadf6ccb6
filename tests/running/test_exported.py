"""Test exported models as folders and on the Hub: content, use without the suite's folders, and damaged exports."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from assemble.reporting.papers import SCALES
from assemble.reporting.records import Record
from assemble.stages.export import metadata, model_card, write_export
from assemble.stages.paper_modules import trained_model
from common.errors import StageError
from common.models.trained import READ, TrainedModel, fetch_export, push_export
from tests.data.media_factory import tone, write_video
from tests.trained import checkpoint

PAPERS = ("avid_cma", "mct", "xmc_gan", "m3p", "vx2text")
NAMES = {"avid_cma": "AVID", "mct": "MCT", "xmc_gan": "XMCGAN", "m3p": "M3P", "vx2text": "VX2Text"}
CAPTION = "a red circle left and a blue square right on white"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a paper's export, and writes the export at the first call."""
    folder = tmp_path_factory.mktemp("exports")

    def export(paper: str) -> Path:
        path = folder / paper
        return path if path.exists() else write_export(trained_model(paper), checkpoint(paper), path)

    return export


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a clip with sound, a silent clip, a picture and a broken file."""
    folder = tmp_path_factory.mktemp("files")
    frames = np.random.default_rng(0).integers(0, 256, (24, 32, 40, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", frames=frames, fps=8.0, audio=tone(3.0, 8_000), audio_rate=8_000)
    write_video(folder / "silent.mp4", frames=frames, fps=8.0, with_audio=False)
    Image.fromarray(frames[0]).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def outputs(model: Any, files: Path) -> list[Any]:
    """Return the outputs of every method of a model."""
    clip, picture = files / "clip.mp4", files / "picture.png"
    if model.paper == "avid_cma":
        return [model.embed_video(clip), model.embed_audio([clip])]
    if model.paper == "mct":
        return [model.embed_image(picture), model.embed_text(CAPTION), model.features([picture])]
    if model.paper == "xmc_gan":
        made = model.generate([CAPTION], 2, seed=3)
        return [made, model.embed_image(made), model.embed_image([picture]), model.embed_text([CAPTION])]
    if model.paper == "m3p":
        both = [model.embed_image(picture), model.embed_text(["ein roter Apfel", "a cat"])]
        return [*both, model.match(picture, ["ein roter Apfel", "a cat"])]
    return [model.answer(clip, "what is moving ?"), model.embed_video(clip), model.embed_audio(clip), model.words(clip)]


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


@pytest.mark.parametrize("paper", PAPERS)
def test_an_export_does_the_same_as_the_stage_and_needs_nothing_else(
    paper: str, exports: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public: type[TrainedModel] = getattr(importlib.import_module(f"papers.{paper}"), NAMES[paper])
    assert public is trained_model(paper)
    expected = outputs(public.from_export(checkpoint(paper)), files)

    moved = shutil.copytree(exports(paper), tmp_path / "moved")
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASSEMBLE_DATA", str(tmp_path / "data"))
    model = public.from_export(moved)
    assert not model.training
    found = outputs(model, files)
    assert len(found) == len(expected)
    assert all(same(one, other) for one, other in zip(found, expected))
    # An export must not need the folder of runs, a cache, or data.
    assert not (tmp_path / "cache").exists()
    written = (moved / "config.json").read_text(encoding="utf-8")
    assert not re.search(r'"(/|[A-Za-z]:\\)', written)
    assert "$DATA" not in written


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_in_the_folder(paper: str, exports: Callable[[str], Path]) -> None:
    folder = exports(paper)
    record = Record.from_json((folder / "record.json").read_text(encoding="utf-8"))
    assert record == Record.from_json((checkpoint(paper).parents[1] / "record.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_bytes())
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    assert config["config_hash"] == record.config_hash
    assert all(any(map(Path(name).match, READ)) for name in config["files"])
    shared = json.loads(metadata["shared"])
    assert names | set(shared) == set(trained_model(paper).from_export(folder).state_dict())
    # The export has no bank, queue, key encoder or optimizer, so it is smaller than the checkpoint.
    assert not [name for name in names if re.search(r"bank|queue|^\w+\.key\.|objective|criterion|optimi", name)]
    assert (folder / "model.safetensors").stat().st_size < checkpoint(paper).stat().st_size
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{NAMES[paper]}.from_export(" in card
    assert f"`{record.config_hash}`" in card
    assert all(name in card for name in record.metrics)
    assert all(one["field"] in card and one["reason"] in card for one in record.deviations)
    assert all(f"`{one['field']}`: {one['value']}" in card for one in record.ours)
    assert ("Twemoji (CC-BY-4.0)" in card) == (paper == "m3p")
    assert not list(folder.parent.glob(".*"))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(exports: Callable[[str], Path], tmp_path: Path) -> Path:
    """Copy an export that a test can damage."""
    return shutil.copytree(exports("avid_cma"), tmp_path / "export")


def refused(folder: Path, message: str, paper: str = "avid_cma") -> None:
    with pytest.raises(StageError, match=message) as caught:
        trained_model(paper).from_export(folder)
    assert str(folder) in str(caught.value)


def test_damage_is_named(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1000], whole + b"1", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(content)
        refused(damaged, "model.safetensors: SHA-256 differs")
    weights.unlink()
    refused(damaged, "model.safetensors: No such file")
    os.mkfifo(weights)
    refused(damaged, "model.safetensors: is not a regular file")
    weights.unlink()
    weights.write_bytes(whole)
    config = damaged / "config.json"
    text = config.read_text(encoding="utf-8")
    for name in ("model.safetensors", "record.json"):  # unlisted files could be links to any file
        changed(damaged, lambda document, name=name: document["files"].pop(name))
        refused(damaged, f"{name}: SHA-256 differs")
        config.write_text(text, encoding="utf-8")
    config.write_text(text[:-40], encoding="utf-8")
    refused(damaged, r"config\.json: Unterminated")
    config.write_text(text.replace("model/1", "model/9"), encoding="utf-8")
    refused(damaged, "config.json: format is 'representation-assemble/model/9'")
    config.unlink()
    refused(damaged, "is not an export, it has no config.json")


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_files_of_two_exports_and_other_models_are_told_apart(damaged: Path, exports: Callable[[str], Path]) -> None:
    refused(exports("mct"), "is a model of mct, not of avid")
    shutil.copyfile(exports("mct") / "config.json", damaged / "config.json")
    refused(damaged, "model.safetensors", "mct")


SYSTEM = "common.files.os.system"


def at(config: dict[str, Any], field: str, value: Any) -> None:
    """Set a field of a configuration, or remove it with `...`. Separate names by dots, or by slashes before a file."""
    *above, last = field.split("/") if "/" in field else field.split(".")
    for name in above:
        config = config[name]
    if value is ...:
        del config[last]
    else:
        config[last] = value


def asking(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


@pytest.mark.parametrize(
    ("paper", "field", "value", "told"),
    [
        ("xmc_gan", "model.init_args.evaluation", asking(SYSTEM, command="touch {}"), " is not an argument of XMCGAN"),
        ("xmc_gan", "model.init_args.generator.init_args.channels", [asking(SYSTEM, command="touch {}")], r"\.0 is"),
        ("mct", "inputs.tokenizer", asking("strangers_module.Tokenizer"), r"\.class_path is 'strangers_module"),
        ("avid_cma", "model.init_args.video_model", asking("common.encoders.video.nn.Identity"), ".class_path is"),
        ("avid_cma", "model.class_path", "common.protocols.svm.SoundSVM", " is .* not a class of"),
        ("avid_cma", "model.init_args.warm_start", "/proc/self/environ", " is not an argument of AVID"),
        ("avid_cma", "inputs.audio.statistics", "/proc/self/environ", " names a file"),
        ("vx2text", "model.init_args.video_classifier.init_args.categories", "/proc/self/environ", " names a file"),
    ],
)
def test_an_export_from_a_stranger_runs_nothing(
    paper: str,
    field: str,
    value: Any,
    told: str,
    exports: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reject every way to name foreign code, and name the field, before a command runs or a module is imported."""
    marker = tmp_path / "it_ran"
    (tmp_path / "strangers_module.py").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(exports(paper), tmp_path / "export")
    value = json.loads(json.dumps(value).replace("touch {}", f"touch {marker}"))
    changed(folder, lambda config: at(config, field, value))
    refused(folder, rf"config.json: {re.escape(field)}{told}", paper)
    assert not marker.exists()
    assert "strangers_module" not in sys.modules


@pytest.mark.parametrize(
    ("paper", "field", "value", "told"),
    [
        ("avid_cma", "model", {}, "model does not fit AVID: .*video_model"),
        (
            "avid_cma",
            "files",
            {"../outside": {"bytes": 1, "sha256": ""}},
            r"files lists \.\./outside, which",
        ),
        ("mct", "inputs.image.crop", 5000, "inputs.image does not fit ImageTransform: resize"),
        ("vx2text", "files/tokenizer.json", ..., "files has no tokenizer.json"),
    ],
)
def test_a_damaged_configuration_is_named_with_its_field(
    paper: str, field: str, value: Any, told: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exports(paper), tmp_path / "export")
    changed(folder, lambda config: at(config, field, value))
    refused(folder, told, paper)


def test_the_record_of_another_step_is_not_given_to_a_kept_checkpoint(tmp_path: Path) -> None:
    run = shutil.copytree(checkpoint("avid_cma").parents[1], tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "global_step": content["global_step"] - 1}, last.with_name("step000001.ckpt"))
    with pytest.raises(StageError, match=r"step000001.ckpt is of step .* its record is of step .*last.ckpt"):
        write_export(trained_model("avid_cma"), last.with_name("step000001.ckpt"), tmp_path / "export")
    write_export(trained_model("avid_cma"), last, tmp_path / "export")


def test_the_generator_that_was_measured_is_the_one_that_is_used(tmp_path: Path) -> None:
    run = shutil.copytree(checkpoint("xmc_gan").parents[1], tmp_path / "run")
    model, last = trained_model("xmc_gan"), run / "checkpoints" / "last.ckpt"
    average = model.read(last).weights["generator.image.bias"]
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("evaluated: average", "evaluated: trained"), encoding="utf-8")
    state = torch.load(last, weights_only=True)["state_dict"]
    raw = model.read(last).weights["generator.image.bias"]
    assert torch.equal(average, state["generators.key.image.bias"])
    assert torch.equal(raw, state["generators.query.image.bias"])
    assert not torch.equal(raw, average)


# -- what the models give ----------------------------------------------------------------------------------------------


def test_embeddings_of_sounds_and_pictures(exports: Callable[[str], Path], files: Path) -> None:
    model: Any = trained_model("avid_cma").from_export(exports("avid_cma"))
    clip, silent = files / "clip.mp4", files / "silent.mp4"
    video = model.embed_video([clip, silent])
    torch.testing.assert_close(video.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.embed_video(torch.stack([model.read_video(clip)])), video[:1])
    skipped: list[tuple[int, str]] = []
    rows, kept = model.embed("audio", [files / "broken.mp4", clip, silent], skipped)
    assert kept == [1]
    assert rows.shape[0] == 1
    assert [place for place, _ in skipped] == [0, 2]
    assert "broken.mp4" in skipped[0][1]
    assert "has no audio stream" in skipped[1][1]
    model.clips = 3
    assert model.read_video(clip).shape[0] == 3
    assert model.embed_video(clip).shape == video[:1].shape
    with pytest.raises(TypeError, match="3 is not a video: give a file"):
        model.embed_video([clip, 3])
    with pytest.raises(StageError, match=r"none of the 1 can be read as video; the first: .*broken.mp4"):
        model.embed("video", [files / "broken.mp4"], [])


def test_regions_out_of_a_file(exports: Callable[[str], Path], files: Path, tmp_path: Path) -> None:
    from common.data.regions import RegionFeatures, Regions, write_regions

    model: Any = trained_model("m3p").from_export(exports("m3p"))
    found = model.read_image(files / "picture.png")
    own = Regions(found.features, np.array([[0, 0, 8, 8]] * 5, dtype=np.float32), found.labels, 8, 8)
    few = Regions(own.features[:2], own.boxes[:2], own.labels[:2], 8, 8)
    write_regions(tmp_path / "regions.npz", [("there", own), ("few", few)])
    model.regions, model.detector = RegionFeatures(tmp_path / "regions.npz"), None
    assert model.match(["there", tmp_path / "there.jpg"], "a cat").shape == (2, 1)
    # The text must have the same position, whichever other images are searched.
    together = model.match(["few", "there"], "a cat")[0]
    torch.testing.assert_close(model.match("few", "a cat")[0], together, rtol=1e-5, atol=1e-6)
    skipped: list[tuple[int, str]] = []
    assert model.gallery("image", ["there", "absent"], skipped)[1] == [0]
    assert "absent" in skipped[0][1]
    model.regions = None
    with pytest.raises(StageError, match="--extract-regions"):
        model.match("there", "a cat")


# -- the Hub -----------------------------------------------------------------------------------------------------------

REPO = "someone/avid"
LISTED = ["model.safetensors", "record.json"]


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Return a function that adds a commit to the client's cache. The network is off."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def commit(repo: str, files: dict[str, bytes], digit: str = "1") -> str:
        folder, number = tmp_path / "cache" / f"models--{repo.replace('/', '--')}", digit * 40
        (folder / "snapshots" / number).mkdir(parents=True)
        for name, content in files.items():
            (folder / "snapshots" / number / name).write_bytes(content)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(number, encoding="ascii")
        return number

    return commit


def test_only_the_files_of_the_export_are_sent(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    (damaged / "notes.txt").touch()
    sent: list[Any] = []
    address = SimpleNamespace(commit_url="https://hub/commit/1")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo, **about: sent.append((api.library_name, repo, about)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **about: sent.append(about) or address)
    assert push_export(damaged, REPO, private=True) == "https://hub/commit/1"
    files = ["config.json", "README.md", *LISTED]
    assert sent == [
        ("representation-assemble", REPO, {"private": True, "exist_ok": True}),
        {"repo_id": REPO, "folder_path": damaged, "allow_patterns": files, "commit_message": "Export of export"},
    ]


def test_a_commit_is_fetched_and_stays_what_it_was(cached: Callable[..., str], exports: Callable[[str], Path]) -> None:
    export = exports("avid_cma")
    files = {name: (export / name).read_bytes() for name in ("config.json", *LISTED)}
    first = cached(REPO, files)
    assert fetch_export(REPO).name == first
    model: Any = trained_model("avid_cma").from_pretrained(REPO)
    assert not model.training
    assert model.fingerprint() == trained_model("avid_cma").from_export(export).fingerprint()
    with pytest.raises(StageError, match="is a model of avid_cma, not of mct"):
        trained_model("mct").from_pretrained(REPO)
    config = {**json.loads(files["config.json"]), "seed": 7}
    second = cached(REPO, {**files, "config.json": json.dumps(config).encode()}, "2")
    assert fetch_export(REPO).name == second
    pinned = fetch_export(REPO, first)
    assert pinned.name == first
    assert json.loads((pinned / "config.json").read_bytes())["seed"] == 0


def test_what_cannot_be_fetched_is_told(
    cached: Callable[..., str], exports: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for repo in ("someone/other", "avid", "a/b/c", "../avid", "a/..", str(tmp_path)):
        with pytest.raises(StageError, match=re.escape(f"Hugging Face Hub, {repo}: ")):
            fetch_export(repo)
    config, load = exports("avid_cma") / "config.json", trained_model("avid_cma").from_pretrained
    cached("someone/bert", {"config.json": b'{"model_type": "bert"}'})
    cached("someone/half", {"config.json": config.read_bytes()})
    for repo, problem in (("bert", r"config.json: KeyError"), ("half", r"model.safetensors: No such file")):
        with pytest.raises(StageError, match=f"someone--{repo}/.*{problem}"):
            load(f"someone/{repo}")
    for digit, name in enumerate(("*", "../outside", "../../refs/main", "/etc/passwd", "a/../../b")):
        listing = {**json.loads(config.read_bytes()), "files": {name: {}}}
        cached("someone/bad", {"config.json": json.dumps(listing).encode()}, str(digit))
        with pytest.raises(StageError, match=r"someone--bad/.*: (files lists .* outside the export|No such file)"):
            load("someone/bad")
    # A cached model is loaded without the Hub and without waiting for the network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", None)
    with pytest.raises(StageError, match=r"someone/other: .*Connection refused"):
        fetch_export("someone/other")
    cached("someone/whole", {name: (config.parent / name).read_bytes() for name in ("config.json", *LISTED)})
    assert fetch_export("someone/whole").name == "1" * 40


# -- the card ----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_record_and_real_data_are_named(exports: Callable[[str], Path]) -> None:
    export = exports("avid_cma")
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
    # The card has a tag for each scale except `paper`.
    tags = {scale: set(metadata(replace(real, scale=scale), "avid", model).tags or []) for scale in SCALES}
    assert {scale: own - tags["paper"] for scale, own in tags.items()} == {
        "paper": set(), "single": {"single"}, "mini": {"mini"}, "smoke": {"smoke"},
    }  # fmt: skip
