"""Run the commands of docs/own-data.md on tiny files at the smoke scale, and test the short names of data sets."""

from __future__ import annotations

import glob
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from assemble.commands.main import main
from assemble.reporting.papers import project_root
from assemble.reporting.records import find
from assemble.reporting.tables import StageInstance
from assemble.stages.cli import check
from assemble.stages.configuration import check_arguments, resolve
from assemble.stages.request import Selection, requests_for
from common.errors import ConfigurationError
from tests.data.media_factory import write_video, write_wav

PAGE = project_root() / "docs" / "own-data.md"
SETS = "common.data.datasets"


def write_files(mine: Path) -> None:
    """Write clips, sounds, captioned images, and images in class folders."""
    for kind, frequency in (("cat", 300.0), ("dög", 1500.0)):
        for number in range(12):
            write_video(mine / "clips" / kind / f"{number}.mp4", seconds=1.5, size=(24, 32))
        for number in range(5):
            path = mine / "sounds" / kind / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, frequency=frequency + 20 * number)
    (mine / "clips" / "dög").rename(mine / "clips" / "dog")
    (mine / "images").mkdir()
    lines = ["file_name,caption,caption_de,tags"]
    for number in range(30):
        color, german, rgb = (("red", "rotes", (200, 9, 9)), ("blue", "blaues", (9, 9, 200)))[number % 2]
        picture = Image.new("RGB", (32, 36), tuple(value + number for value in rgb))
        picture.save(mine / "images" / f"{number}.png")
        lines += [f"{number}.png,a {color} square,ein {german} Quadrat,{color};square"]
        lines += [f"{number}.png,number {number} is {color},,"]
        (mine / "pictures" / color).mkdir(parents=True, exist_ok=True)
        picture.save(mine / "pictures" / color / f"{number}.jpg")
    (mine / "images" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    write_files(tmp_path / "mine")
    text = PAGE.read_text(encoding="utf-8").replace("mini", "smoke").replace("/mine", str(tmp_path / "mine"))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(".venv/bin/assemble")]
    assert len(lines) == 8
    for line in lines:
        words = []
        for word in shlex.split(line)[1:]:
            words += glob.glob(word) if "*" in word else [word]
        words += ["--runs", str(tmp_path / "runs")] if words[0] == "fit" else []
        assert main(words) == 0, line
    told = capsys.readouterr()
    assert "24 clips of 2 classes (class folders)" in told.out
    assert "30 images without classes (list metadata.csv)" in told.out
    assert "clips/dog/0.mp4" in told.out
    assert "random weights" not in told.err
    records = {record.recipe: record for record in find(tmp_path / "runs")}
    assert set(records) == {
        "avid", "kinetics_linear", "esc50_svm", "mct_tag", "imagenet_linear", "cross_modal_search",
    }  # fmt: skip
    assert records["kinetics_linear"].metrics["test/videos"] == 6
    assert records["esc50_svm"].metrics["test/files"] == 10
    assert records["imagenet_linear"].metrics["test/images"] == 6


def test_another_root_is_another_run_wherever_it_is_written(tmp_path: Path) -> None:
    from assemble.stages.request import Selection, find_request

    mine = tmp_path / "mine.yaml"

    def stage(root: str, data: str = "data", *arguments: str) -> str:
        own = {"class_path": f"{SETS}.folder.FolderOfImages", "init_args": {"root": root}}
        mine.write_text(yaml.safe_dump({"data": {"init_args": {"dataset": own, "world": None}}}))
        selection = Selection(scale="smoke", runs=tmp_path, data=tmp_path / data)
        return find_request("mct/mct", selection, [*(arguments or ("--config", str(mine)))]).stage

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert stage(a) == stage(a, "elsewhere") == stage(str(tmp_path / "b" / ".." / "a")) != stage(b)
    assert stage("$DATA") != stage("$DATA", "elsewhere")
    own = f"{SETS}.folder.FolderOfImages"
    by_class = ("--data.dataset.class_path", own, "--data.dataset.root", "$DATA", "--data.world", "null")
    assert stage("", "data", *by_class) == stage("", "data", *by_class) != stage("", "elsewhere", *by_class)


@pytest.mark.parametrize(
    ("paper", "recipe", "name"),
    [
        ("avid", "avid", "folder.FolderOfClips"),
        ("avid", "esc50_svm", "folder.FolderOfAudio"),
        ("mct", "mct", "folder.FolderOfImages"),
    ],
)
def test_the_short_name_takes_the_class_that_holds_the_same(paper: str, recipe: str, name: str) -> None:
    data = resolve(paper, recipe, arguments=["--data.dataset", "folder"]).config["data"]["init_args"]
    assert data["dataset"] == {"class_path": f"{SETS}.{name}", "init_args": {"root": "$DATA"}}
    assert data["world"] is None


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has an empty value"):
        resolve("avid", "avid", arguments=["--data.dataset", ""])
    with pytest.raises(ConfigurationError, match=r"--data.dataset foldr: did you mean 'folder'"):
        resolve("avid", "avid", arguments=["--data.dataset", "foldr"])
    with pytest.raises(ConfigurationError, match=r"0 classes of .*esc50 have video"):
        resolve("avid", "avid", arguments=["--data.dataset", "esc50"])
    (request,) = requests_for("avid_cma", [StageInstance("x", "cma", "pretrain", None)], Selection(scale="smoke"), 0)
    with pytest.raises(ConfigurationError, match=r"video\.fpz.*did you mean 'fps'"):
        check(replace(request, arguments=("--data.video.fpz", "3")))
    for field in ("model.init_args.warm_strat", "modle.init_args.warm_start"):
        with pytest.raises(ConfigurationError, match=r"tables\.yaml, from .*did you mean"):
            check(replace(request, parents={field: request}))
    with pytest.raises(ConfigurationError, match="at most negatives"):
        check(replace(request, arguments=("--model.loss.within_negatives", "5120")))


def test_wrong_numbers_and_missing_captions_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    for number in range(40):
        path = tmp_path / "one" / "cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)

    def fails(name: str, *words: str) -> str:
        own = ["--data.dataset", "folder", "--data", str(tmp_path / "one"), "--runs", str(tmp_path / "runs")]
        assert main(["fit", name, "--scale", "smoke", *own, *words]) == 1
        return capsys.readouterr().err

    assert "num_classes: the data set has 1" in fails("mct/imagenet_linear")
    assert "images have no caption, such as" in fails("mct/mct")
    # The command fails before it builds or logs anything.
    assert not list((tmp_path / "runs").rglob("mct+*/metrics.csv"))
    (tmp_path / "one" / "dog").mkdir()
    (tmp_path / "one" / "cat" / "0.png").rename(tmp_path / "one" / "dog" / "0.png")
    assert "set --model.num_classes 2" in fails("mct/imagenet_linear")


def test_the_line_for_xmc_gan_fits_together() -> None:
    (line,) = re.findall(r"```sh\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    words = shlex.split(line)
    paper, recipe = words[2].split("/")
    run = resolve(paper, recipe, scale="paper", arguments=words[words.index("--data.dataset") :])
    check_arguments(run.with_placeholders(DATA="data"), run.layers)
    data = run.config["data"]["init_args"]
    assert data["dataset"]["init_args"] == {"root": "/mine/images"}
    assert data["text_features"] is None
    assert run.config["model"]["init_args"]["text_encoder"]["init_args"] == {"pretrained": "$DATA/bert-base-uncased"}
