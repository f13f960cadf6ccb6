"""Test the extraction of region features: the choice of regions, resuming, broken images, and messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from assemble.commands.main import main
from common.data import region_extraction
from common.data.datasets.folder import FolderOfImages
from common.data.region_extraction import RegionExtractor, extract_regions, load_detector
from common.data.regions import RegionFeatures, Regions
from common.errors import StageError
from tests.data.image_layouts import write_image

CLASSES = 4


def detector() -> FasterRCNN:
    """Build a real Faster R-CNN with a minimal backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        backbone.out_channels = 8
        made = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
            box_head=TwoMLPHead(8 * 49, 12),
            box_predictor=FastRCNNPredictor(12, CLASSES),
            min_size=32,
            max_size=64,
            rpn_post_nms_top_n_test=20,
        )
    return made.eval()


@pytest.fixture(scope="module")
def extractor() -> RegionExtractor:
    return RegionExtractor(detector(), regions=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        write_image(tmp_path / "images" / ("part" if number > 2 else "") / f"{number}.jpg", number, (40 + number, 30))
    return tmp_path / "images"


def test_features_are_the_box_head_s_whatever_picture_is_beside(extractor: RegionExtractor) -> None:
    beside, image = (torch.rand(3, 30, width, generator=torch.Generator().manual_seed(3)) for width in (20, 44))
    own = extractor([beside, image])[1]
    assert (own.features.shape, own.boxes.shape) == ((5, 12), (5, 4))
    net: Any = extractor.detector
    with torch.inference_mode():
        batch, _ = net.transform([image])
        maps = {"0": net.backbone(batch.tensors)}
        height, width = batch.image_sizes[0]
        scale = torch.tensor([width / 44, height / 30] * 2)
        pooled = net.roi_heads.box_roi_pool(maps, [torch.from_numpy(own.boxes) * scale], batch.image_sizes)
        np.testing.assert_allclose(net.roi_heads.box_head(pooled).numpy(), own.features, atol=1e-3)


def test_duplicates_come_last_and_boxes_are_scaled(extractor: RegionExtractor) -> None:
    # The second and third box overlap the first and have nearly the same score. The last extends beyond the picture.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 1, 10, 10], [20, 20, 40, 50]], dtype=torch.float32)
    scores = torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.7, 0], [0.25, 0.75, 0], [0.65, 0.05, 0.3]])
    features, order = torch.arange(8.0).view(4, 2), [0, 3, 2, 1]
    found = extractor._chosen(boxes, features, scores, (30, 44), (60, 132))
    assert found.boxes.tolist() == [[0, 0, 30, 20], [60, 40, 120, 60], [0, 2, 30, 20], [0, 0, 30, 18]]
    assert (found.labels.tolist(), found.height, found.width) == ([1, 2, 1, 1], 60, 132)
    assert np.array_equal(found.features, features[order])
    assert np.array_equal(found.distribution, scores[order])  # type: ignore[arg-type]
    none = extractor._chosen(boxes[:0], features[:0], scores[:0], (30, 44), (60, 132))
    whole = Regions(np.zeros((1, 2)), np.array([[0, 0, 132, 60]]), np.zeros(1), 60, 132, np.eye(1, 3))
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(none, name), value)
    assert (none.labels.dtype, none.boxes.dtype, none.features.dtype) == (np.int64, np.float32, np.float32)


def test_a_stopped_run_goes_on(folder: Path, extractor: RegionExtractor) -> None:
    output, whole = folder.parent / "a.h5", folder.parent / "whole.h5"
    extract_regions(folder, whole, extractor, batch_size=2)
    stops = [DEFAULT, DEFAULT, KeyboardInterrupt, KeyboardInterrupt, DEFAULT]
    counted = Mock(wraps=extractor, identity=extractor.identity, side_effect=stops)
    for distribution in (False, True):  # a run with other options starts again
        with pytest.raises(KeyboardInterrupt):
            extract_regions(folder, output, counted, batch_size=2, distribution=distribution)
        assert len(list((folder.parent / "a.h5.parts").glob("*.npz"))) == 2
    assert not output.is_file()
    extract_regions(folder, output, counted, batch_size=2)
    assert [len(call.args[0]) for call in counted.call_args_list] == [2, 2, 1, 2, 1]
    assert not (folder.parent / "a.h5.parts").exists()
    found, expected = RegionFeatures(output), RegionFeatures(whole)
    for key in "01234":
        np.testing.assert_allclose(found[key].features, expected[key].features, atol=1e-5)
        assert found[key].distribution is None


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_pictures_are_called_as_their_captions_call_them(
    folder: Path, extractor: RegionExtractor, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["cat.jpg.jpg", "dog.PNG.jpeg", os.fsdecode(b"caf\xe9.png")]
    for number, name in enumerate(names):
        write_image(folder / name, number)
    (folder / os.fsdecode(b"broken\xe9.png")).write_bytes(b"")
    output = folder.parent / f"a{suffix}"
    broken = os.fsdecode(b"broken\xe9.png")
    assert extract_regions(folder, output, extractor, distribution=True) == (8, (str(folder / broken),))
    assert "broken" in caplog.text
    found = RegionFeatures(output)
    assert found["3"].distribution is not None
    assert sorted(found.keys) == sorted([*"01234", "cat", "dog", "caf\udce9"])
    assert (found["3"].height, found["3"].width) == (30, 43)
    assert b"broken\xe9.png" in output.with_name(f"{output.name}.skipped.txt").read_bytes()
    names = names[:2]  # the list must be UTF-8, so leave out the other name
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *(f"{name},one" for name in names)]))
    dataset = FolderOfImages(folder)
    keys = dataset.captions("all", "en").keys
    assert found.missing(keys) == []
    assert sorted(dataset.image_path(key, "all").name for key in keys) == sorted(names)


#: Each case has the files of an unusable folder and a text that the error must contain.
@pytest.mark.parametrize(("names", "named"), [([], "no images"), (["a.jpg"], "a.jpg"), (["a.jpg", "b/a.jpg"], "'a'")])
def test_folders_that_cannot_be_used(tmp_path: Path, extractor: RegionExtractor, names: list[str], named: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(StageError, match=named):
        extract_regions(tmp_path, tmp_path / "a.h5", extractor)


# -- weights, command --------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = {(None, CLASSES): detector}
    monkeypatch.setattr(
        region_extraction,
        "fasterrcnn_resnet50_fpn",
        lambda *, weights_backbone, num_classes: made[weights_backbone, num_classes](),
    )
    torch.save(detector().state_dict(), tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


def test_weights_are_loaded_and_those_of_another_network_named(weights: Path) -> None:
    state = torch.load(weights)
    state["roi_heads.box_predictor.cls_score.bias"] += 1
    released = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for own, epsilon in ((state, 1e-5), (released, 0.0)):
        torch.save({"model": own}, weights)
        loaded = load_detector(weights)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in own.items())
        assert [module.eps for module in loaded.modules() if isinstance(module, nn.BatchNorm2d)] == [epsilon]
    assert RegionExtractor(loaded, origin={"weights": "a"}).identity == {"weights": "a", "regions": 100}
    lacking = {key: value for key, value in state.items() if not key.startswith("backbone")}
    for content in ({"weight": torch.zeros(1)}, lacking, {**state, "roi_heads.box_head.fc6.weight": torch.zeros(2, 2)}):
        torch.save(content, weights)
        with pytest.raises(StageError, match=r"detector\.pth"):
            load_detector(weights)
    with pytest.raises(StageError, match="--detector"):
        load_detector(weights.with_name("none.pth"))


def test_the_command(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out" / "a.h5"
    (folder / "broken.png").write_bytes(b"")
    command = ["data", "m3p", "--extract-regions", str(folder), "--output", str(output)]
    assert main([*command, "--detector", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert "regions of 5 images" in printed
    assert "1 images cannot be read" in printed
    listed = output.with_name("a.h5.skipped.txt")
    assert "broken.png" in listed.read_text()
    assert len(RegionFeatures(output)["0"]) == 20
    # The command checks the output file before it loads the detector.
    assert main([*command, "--detector", "none.pth"]) == 2
    assert "a.h5 exists" in capsys.readouterr().err
    assert main([*command, "--fetch", "esc50"]) == 2
    assert "give only one of" in capsys.readouterr().err
    assert main(["data", "m3p", "--distribution"]) == 2
    assert "--distribution need" in capsys.readouterr().err
    assert main([*command, "--detector", "none.pth", "--output", "a.txt"]) == 2
    assert "--output" in capsys.readouterr().err
