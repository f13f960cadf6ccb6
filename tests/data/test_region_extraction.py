"""Extracting region features: what is chosen, and that a run goes on, passes over broken images and explains itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from common.commands.main import main
from common.data import region_extraction
from common.data.datasets.folder import FolderOfImages
from common.data.region_extraction import RegionExtractor, extract_regions, load_detector, write_skipped
from common.data.regions import RegionFeatures, identity_of, write_regions
from tests.data.image_layouts import write_image

CLASSES = 4


def detector() -> FasterRCNN:
    """A real Faster R-CNN with next to no backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        backbone.out_channels = 8
        made = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
            box_head=TwoMLPHead(8 * 49, 12),
            box_predictor=_Predictor(),
            min_size=32,
            max_size=64,
            rpn_post_nms_top_n_test=20,
        )
    return made.eval()


class _Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.boxes(features)


@pytest.fixture(scope="module")
def extractor() -> RegionExtractor:
    return RegionExtractor(detector(), regions=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        write_image(tmp_path / "images" / ("part" if number > 2 else "") / f"{number}.jpg", number, (40 + number, 30))
    return tmp_path / "images"


def test_regions_lie_in_the_picture_and_are_the_best(extractor: RegionExtractor) -> None:
    images = [torch.rand(3, 30, 44, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    found = extractor(images)
    for own in found:
        assert own.features.shape == (5, 12)
        assert own.boxes.shape == (5, 4)
        assert (own.boxes >= 0).all()
        assert own.boxes[:, 2].max() <= 44
        assert own.boxes[:, 3].max() <= 30
        assert (own.boxes[:, 2:] > own.boxes[:, :2]).all()
        assert set(own.labels) <= set(range(1, CLASSES))
        assert own.distribution is not None
        np.testing.assert_allclose(own.distribution.sum(1), 1, rtol=1e-5)
        assert (own.labels == own.distribution[:, 1:].argmax(1) + 1).all()
    # Pictures do not depend on what is beside them.
    alone = extractor(images[1:])[0]
    np.testing.assert_allclose(alone.features, found[1].features, atol=1e-5)
    np.testing.assert_allclose(alone.boxes, found[1].boxes, atol=1e-3)


def test_features_are_the_box_head_s(extractor: RegionExtractor) -> None:
    image = torch.rand(3, 30, 44, generator=torch.Generator().manual_seed(3))
    own = extractor([image])[0]
    net: Any = extractor.detector
    with torch.inference_mode():
        batch, _ = net.transform([image])
        maps = {"0": net.backbone(batch.tensors)}
        height, width = batch.image_sizes[0]
        scale = torch.tensor([width / 44, height / 30] * 2)
        pooled = net.roi_heads.box_roi_pool(maps, [torch.from_numpy(own.boxes) * scale], batch.image_sizes)
        np.testing.assert_allclose(net.roi_heads.box_head(pooled).numpy(), own.features, atol=1e-3)


def test_least_score_and_a_picture_without_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = RegionExtractor(detector(), regions=5, min_score=1.0)
    assert len(strict([torch.rand(3, 30, 44)])[0]) == 1
    monkeypatch.setattr(strict.detector.rpn, "forward", lambda *_: ([torch.zeros(0, 4)], {}))
    own = strict([torch.rand(3, 30, 44)])[0]
    assert own.boxes.tolist() == [[0, 0, 44, 30]]
    assert own.labels.tolist() == [0]
    assert not own.features.any()


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_a_folder_of_pictures(folder: Path, extractor: RegionExtractor, suffix: str) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    output = folder.parent / f"a{suffix}"
    result = extract_regions(folder, output, extractor, batch_size=2, half=True, distribution=True, progress=False)
    assert (result.written, result.found_before) == (5, 0)
    assert len(result.skipped) == 1
    assert "broken.jpg" in result.skipped[0]
    found = RegionFeatures(output)
    assert sorted(found.keys) == list("01234")
    assert (found["3"].height, found["3"].width) == (30, 43)
    assert found["3"].distribution is not None
    assert {entry.name for entry in folder.parent.iterdir()} == {"images", output.name}
    # What is there is not looked at again, what is new is added.
    write_image(folder / "new.jpg", 9)
    again = extract_regions(folder, output, _counting(extractor, seen := []), half=True, progress=False)
    assert (again.written, again.found_before, len(seen)) == (6, 5, 1)
    np.testing.assert_array_equal(RegionFeatures(output)["3"].features, found["3"].features)


def _counting(extractor: RegionExtractor, seen: list[int], stop_after: int | None = None) -> Any:
    def count(images: list[Tensor]) -> Any:
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend([1] * len(images))
        return extractor(images)

    count.identity = extractor.identity  # type: ignore[attr-defined]
    return count


def test_a_stopped_run_goes_on(folder: Path, extractor: RegionExtractor) -> None:
    output, whole = folder.parent / "a.h5", folder.parent / "whole.h5"
    extract_regions(folder, whole, extractor, batch_size=2, progress=False)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        extract_regions(folder, output, _counting(extractor, seen, 4), batch_size=2, progress=False)
    assert not output.is_file()
    parts = sorted((folder.parent / "a.h5.parts").glob("*.npz"))
    assert (len(seen), len(parts)) == (4, 2)
    parts[0].write_bytes(b"cut off")
    extract_regions(folder, output, _counting(extractor, seen), batch_size=2, progress=False)
    assert len(seen) == 4 + 3
    assert not (folder.parent / "a.h5.parts").exists()
    found, expected = RegionFeatures(output), RegionFeatures(whole)
    for key in "01234":
        np.testing.assert_allclose(found[key].features, expected[key].features, atol=1e-5)


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_features_of_two_detectors_or_settings_are_not_mixed(
    folder: Path, extractor: RegionExtractor, suffix: str
) -> None:
    output, parts = folder.parent / f"a{suffix}", folder.parent / f"a{suffix}.parts"
    fewer, other = (RegionExtractor(detector(), count, origin={"detector": "b"}) for count in (4, 5))
    with pytest.raises(KeyboardInterrupt):
        extract_regions(folder, output, _counting(extractor, [], 2), batch_size=2, progress=False)
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"a\.\w+\.parts was made with other --detector, --regions: delete it, name"):
        extract_regions(folder, output, _counting(fewer, seen), progress=False)
    with pytest.raises(ValueError, match=r"parts was made with other --half, --distribution: delete it"):
        extract_regions(folder, output, _counting(extractor, seen), half=True, distribution=True, progress=False)
    extract_regions(folder, output, extractor, progress=False)
    with pytest.raises(ValueError, match=r"a\.\w+ was made with other --detector: delete it, name another --output"):
        extract_regions(folder, output, _counting(other, seen), progress=False)
    assert (seen, parts.exists()) == ([], False)
    write_regions(output, [(key, RegionFeatures(output)[key]) for key in "01234"])
    assert identity_of(output) is None
    write_image(folder / "new.jpg", 9)
    assert extract_regions(folder, output, other, progress=False).written == 6
    assert identity_of(output) == {**other.identity, "half": False, "distribution": False}


def test_parts_that_were_left_behind_at_the_end(folder: Path, extractor: RegionExtractor, monkeypatch: Any) -> None:
    output = folder.parent / "a.h5"
    with monkeypatch.context() as patch:
        patch.setattr(region_extraction.shutil, "rmtree", lambda *_, **__: None)
        extract_regions(folder, output, extractor, progress=False)
    result = extract_regions(folder, output, extractor, progress=False)
    assert (result.written, len(RegionFeatures(output))) == (5, 5)


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_pictures_are_called_as_their_captions_call_them(folder: Path, extractor: RegionExtractor, suffix: str) -> None:
    names = ["cat.jpg.jpg", "dog.PNG.jpeg", os.fsdecode(b"caf\xe9.png")]
    for number, name in enumerate(names):
        write_image(folder / name, number)
    (folder / os.fsdecode(b"broken\xe9.png")).write_bytes(b"")
    output = folder.parent / f"a{suffix}"
    for _ in range(2):  # what is there keeps its name
        result = extract_regions(folder, output, extractor, progress=False)
        write_image(folder / "new.jpg", 9)
    found = RegionFeatures(output)
    assert sorted(found.keys) == sorted([*"01234", "cat", "dog", "caf\udce9", "new"])
    write_skipped(folder.parent / "skipped.txt", result.skipped)
    assert b"broken\xe9.png" in (folder.parent / "skipped.txt").read_bytes()
    rows = "".join(json.dumps({"file_name": name, "caption": "one"}) + "\n" for name in names)
    (folder / "metadata.jsonl").write_text(rows)
    dataset = FolderOfImages(folder)
    keys = dataset.captions("all", "en").keys
    assert found.missing(keys) == []
    assert sorted(dataset.image_path(key, "all").name for key in keys) == sorted(names)
    write_image(folder / "cat.jpg")
    with pytest.raises(ValueError, match=r"cat\.jpg and cat\.jpg\.jpg would both be called 'cat'"):
        extract_regions(folder, output, extractor, progress=False)


def test_folders_that_cannot_be_used(tmp_path: Path, extractor: RegionExtractor) -> None:
    output = tmp_path / "a.h5"
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        extract_regions(tmp_path / "none", output, extractor)
    with pytest.raises(ValueError, match="holds no images"):
        extract_regions(tmp_path, output, extractor)
    with pytest.raises(ValueError, match="must end with"):
        extract_regions(tmp_path, tmp_path / "a.txt", extractor)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        extract_regions(tmp_path, output, extractor, progress=False)
    write_image(tmp_path / "b" / "a.jpg")
    with pytest.raises(ValueError, match="would both be called 'a'"):
        extract_regions(tmp_path, output, extractor)


# ---------------------------------------------------------------------------------------------------- weights, command
@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights under torchvision's names."""
    names = {"roi_heads.box_predictor.classes.": "roi_heads.box_predictor.cls_score."}

    def renamed(state: dict[str, Tensor], there: bool) -> dict[str, Tensor]:
        for mine, theirs in names.items():
            old, new = (mine, theirs) if there else (theirs, mine)
            state = {key.replace(old, new): value for key, value in state.items()}
        return state

    made = detector()
    state = renamed(made.state_dict(), True)
    monkeypatch.setattr(region_extraction, "get_model_builder", lambda name: lambda **_: _renaming(renamed))
    path = tmp_path / "detector.pth"
    torch.save(state, path)
    return path


def _renaming(renamed: Any) -> FasterRCNN:
    made = detector()
    load, own = made.load_state_dict, made.state_dict
    made.load_state_dict = lambda state, strict=True: load(renamed(state, False), strict)  # type: ignore[assignment]
    made.state_dict = lambda: renamed(own(), True)  # type: ignore[assignment]
    return made


def test_weights_are_needed_and_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no detector: give --detector FILE.*nothing is downloaded"):
        load_detector(None)
    with pytest.raises(FileNotFoundError, match=r"a\.pth: no such file of weights; give --detector"):
        load_detector(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_detector(tmp_path / "a.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no weights of a Faster R-CNN"):
        load_detector(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="features are those of a Faster R-CNN"):
        load_detector(tmp_path / "a.pth", "retinanet_resnet50_fpn")


def test_weights_of_another_network(weights: Path) -> None:
    state = torch.load(weights)
    missing = {key: value for key, value in state.items() if not key.startswith("backbone")}
    torch.save(missing, weights)
    with pytest.raises(ValueError, match="they lack backbone"):
        load_detector(weights)
    torch.save({**state, "roi_heads.box_head.fc6.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match="weights of another network"):
        load_detector(weights)


def test_the_command(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out" / "a.h5"
    (folder / "broken.png").write_bytes(b"")
    options = ["--output", str(output), "--regions", "3", "--batch-size", "2", "--device", "cpu"]
    command = ["data", "m3p", "--extract-regions", str(folder), *options]
    assert main(command) == 2
    assert "no detector: give --detector FILE" in capsys.readouterr().err
    assert main([*command, "--detector", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert "regions of 5 images, 0 of them from before" in printed
    assert "1 images cannot be read" in printed
    listed = output.with_name("a.h5.skipped.txt")
    assert "broken.png" in listed.read_text()
    assert RegionFeatures(output).max_regions == 3
    (folder / "broken.png").unlink()
    assert main([*command, "--detector", str(weights)]) == 0
    assert not listed.exists()
    capsys.readouterr()
    torch.save({name: 2 * value for name, value in torch.load(weights).items()}, weights)
    assert main([*command, "--detector", str(weights), "--min-score", "0.5"]) == 1
    assert "a.h5 was made with other --detector, --min-score: delete it" in capsys.readouterr().err


def test_the_command_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "m3p", "--extract-regions", str(tmp_path)]) == 2
    assert "needs --output FILE" in capsys.readouterr().err
    assert main(["data", "m3p", "--output", "a.h5"]) == 2
    assert "goes with --extract-regions" in capsys.readouterr().err
    assert main(["data", "m3p", "--extract-regions", str(tmp_path), "--output", "a.h5", "--regions", "0"]) == 2
    assert "--regions: must be at least 1" in capsys.readouterr().err
