"""Test detection: average precision by hand and by brute force, transformed boxes, and training on tiny data sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_iou

from common.data.datasets import voc as voc_layout
from common.data.datasets.coco import Annotated
from common.data.datasets.voc import PascalVOC
from common.encoders.checkpoint_files import load_encoder
from common.encoders.image import ImageResNet
from common.metrics.detection import (
    OVERLAPS,
    DetectedImage,
    DetectionsOncePerImage,
    coco_average_precision,
    voc07_average_precision,
)
from common.protocols.detection import (
    BoxTransform,
    Detection,
    DetectionData,
    collate_detection,
    draw_detections,
    recompute_batch_statistics,
)
from common.training.callbacks import StepSeed
from common.training.examples import RandomTensors
from tests.data.image_layouts import instance, write_image
from tests.distributed.harness import run_distributed
from tests.protocols import parts

DETECTRON2 = Path(__file__).parents[2] / "papers" / "mct" / "detectron2"

# -- average precision -------------------------------------------------------------------------------------------------

LEFT, RIGHT, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [60.0, 60.0, 70.0, 80.0]


def image(found: list[Any] = [], true: list[Any] = [], difficult: list[int] = []) -> DetectedImage:  # noqa: B006
    """Make an image with detections (box, score, label) and objects (box, label), some of them marked as difficult."""
    flags = np.zeros(len(true), dtype=np.bool_)
    flags[difficult] = True
    return DetectedImage(
        boxes=np.array([box for box, _, _ in found], dtype=np.float32).reshape(-1, 4),
        scores=np.array([score for _, score, _ in found], dtype=np.float32),
        labels=np.array([label for _, _, label in found], dtype=np.int64),
        true_boxes=np.array([box for box, _ in true], dtype=np.float32).reshape(-1, 4),
        true_labels=np.array([label for _, label in true], dtype=np.int64),
        difficult=flags,
    )


RULES = pytest.mark.parametrize("precision", [coco_average_precision, voc07_average_precision])


@RULES
@pytest.mark.parametrize("images", [[], [image()], [image([(LEFT, 0.9, 1)])], [image([], [(LEFT, 1)], difficult=[0])]])
def test_without_an_object_there_is_no_precision(precision: Any, images: list[DetectedImage]) -> None:
    with pytest.raises(ValueError, match="needs objects"):
        precision(images)


@pytest.mark.parametrize(
    ("extra", "voc", "coco"),
    [
        ([(RIGHT, 0.9, 1)], 1.0, 1.0),  # finding a difficult object doesn't count
        ([(RIGHT, 0.9, 1), (RIGHT, 0.85, 1)], 1.0, 0.5),  # COCO's rules excuse only one of the detections
        ([([20.0, 20.0, 25.0, 25.0], 0.9, 1)], 0.5, 0.5),  # the box overlaps the object too little to be excused
    ],
)
def test_difficult_objects(extra: list[Any], voc: float, coco: float) -> None:
    images = [image([*extra, (LEFT, 0.8, 1)], [(LEFT, 1), (RIGHT, 1)], difficult=[1])]
    assert voc07_average_precision(images)["ap50"] == pytest.approx(voc)
    assert coco_average_precision(images)["ap50"] == pytest.approx(coco)


def drawn_images(seed: int, count: int, most: tuple[int, int] = (30, 150), difficult: float = 0.0) -> list[Any]:
    """Make images with fewer than `most` objects and detections. About 70 % of the detections are near an object."""
    draw = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        objects, found = draw.integers(0, most)
        corner, size = draw.integers(0, 400, (objects, 2)), draw.integers(4, 200, (objects, 2))
        true = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
        corner, size = draw.integers(0, 400, (found, 2)), draw.integers(4, 200, (found, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        labels, true_labels = draw.integers(1, 4, found), draw.integers(1, 4, objects)
        if objects:
            near = np.flatnonzero(draw.random(found) < 0.7)
            chosen = draw.integers(0, objects, len(near))
            boxes[near] = true[chosen] + draw.integers(-3, 4, (len(near), 4))
            labels[near] = true_labels[chosen]
        scores = (draw.integers(1, 50, found) / 50).astype(np.float32)  # many scores are equal
        hard = draw.random(objects) < difficult
        images.append(DetectedImage(boxes.astype(np.float32), scores, labels, true, true_labels, hard))
    return images


@pytest.mark.parametrize("seed", range(3))
def test_equals_what_pycocotools_says_of_a_file_of_results(seed: int) -> None:
    images = drawn_images(seed, count=12)
    truth = COCO()
    truth.dataset = {
        "info": {}, "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": label} for label in (1, 2, 3)],
        "annotations": [
            {"image_id": n, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": 0,
             "area": float(np.prod(box[2:] - box[:2]))}
            for n, one in enumerate(images) for box, label in zip(one.true_boxes.astype(float), one.true_labels)
        ],
    }  # fmt: skip
    for number, row in enumerate(truth.dataset["annotations"], start=1):
        row["id"] = number
    truth.createIndex()
    rows = [
        [n, *box[:2], *(box[2:] - box[:2]), score, label]
        for n, one in enumerate(images)
        for box, score, label in zip(one.boxes.astype(float), one.scores, one.labels)
    ]
    official = COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
    official.evaluate()
    official.accumulate()
    official.summarize()
    found = coco_average_precision(images)
    assert 0.1 < found["ap"] < found["ap50"] < 1
    assert list(found.values()) == pytest.approx(list(official.stats[:3]), abs=1e-9)


def brute_force(images: list[DetectedImage], label: int, threshold: float) -> float:
    """Compute VOC 2007's average precision, one detection at a time."""
    rows = [(-image.scores[d], i, d) for i, image in enumerate(images) for d in np.flatnonzero(image.labels == label)]
    taken: set[tuple[int, int]] = set()
    verdicts = []
    for _, i, d in sorted(rows):
        one, best, where = images[i], -1.0, -1
        for g in np.flatnonzero(one.true_labels == label):
            pair = (torch.from_numpy(boxes[None].astype(float)) for boxes in (one.boxes[d], one.true_boxes[g]))
            overlap = box_iou(*pair).item()
            if overlap > best:
                best, where = overlap, g
        if best > threshold and one.difficult[where]:
            continue
        verdicts.append(best > threshold and (i, where) not in taken)
        if verdicts[-1]:
            taken.add((i, where))
    count = sum(int(((image.true_labels == label) & ~image.difficult).sum()) for image in images)
    points = [(sum(verdicts[:end]) / count, sum(verdicts[:end]) / end) for end in range(1, len(verdicts) + 1)]
    return sum(max([0.0, *(p for recall, p in points if recall >= tenth / 10)]) / 11 for tenth in range(11))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 4))
def test_voc_equals_brute_force(seed: int, number: int) -> None:
    images = drawn_images(seed, number, most=(6, 9), difficult=0.3)
    labels = {int(label) for one in images for label in one.true_labels[~one.difficult]}
    if not labels:
        return
    result = voc07_average_precision(images)
    means = [np.mean([brute_force(images, label, threshold) for label in labels]) for threshold in OVERLAPS]
    assert result["ap"] == pytest.approx(np.mean(means))
    assert result["ap50"] == pytest.approx(means[0])
    assert result["ap75"] == pytest.approx(means[5])


def one_detection(score: float) -> dict[str, Tensor]:
    return {"boxes": torch.tensor([LEFT]), "scores": torch.tensor([score]), "labels": torch.tensor([1])}


ONE_OBJECT = {"boxes": torch.tensor([LEFT]), "labels": torch.tensor([1])}


def test_processes_count_an_image_once() -> None:
    def gather(rank: int) -> Any:
        found = DetectionsOncePerImage()
        for item in [[0, 2, 4], [0], []][rank]:
            found.update(torch.tensor([item]), [one_detection(0.1 * rank + 0.5)], [ONE_OBJECT])
        images = found.compute()
        return [list(images), images[0].scores.tolist(), images[0].difficult.tolist()]

    assert run_distributed(gather, 3) == [[[0, 2, 4], [0.5], [False]]] * 3


# -- images and boxes --------------------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3))


def test_a_test_image_is_resized_with_its_boxes() -> None:
    transform = BoxTransform(sizes=(20,), test_size=30, max_size=50, mean=(0, 0, 0), std=(1, 1, 1), training=False)
    tensor, boxes = transform(picture(20, 10), np.array([[5, 0, 20, 10]], dtype=np.float32))
    # With a shorter side of 30, the longer side would be 60, which is above the limit of 50.
    assert tensor.shape == (3, 25, 50)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= 0.0
    assert tensor.max() <= 1.0
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[12.5, 0, 50, 25]]
    unchanged, none = transform(picture(40, 30), np.zeros((0, 4), dtype=np.float32))
    assert none.shape == (0, 4)
    assert torch.equal(unchanged, torch.from_numpy(np.array(picture(40, 30))).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("given", "field"), [({"sizes": ()}, "sizes"), ({"max_size": 799}, "max_size"), ({"test_size": 1334}, "max_size")]
)
def test_sizes_that_no_picture_can_have_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        BoxTransform(**given)


def test_training_draws_sizes_and_flips_with_the_boxes() -> None:
    transform = BoxTransform(sizes=(8, 16), test_size=8, max_size=64, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[2:5, 1:4] = 255
    seen = set()
    for seed in range(20):
        drawn = Image.fromarray(pixels)
        boxes = np.array([[1, 2, 4, 5]], dtype=np.float32)
        tensor, moved = transform(drawn, boxes, np.random.default_rng(seed))
        scale = tensor.shape[1] // 8
        left, top, right, bottom = (round(v) for v in moved[0].tolist())
        seen.add((scale, left != scale))
        # The transformed box still covers the bright square.
        assert tensor[0, top:bottom, left:right].mean() > 0.75
        assert moved[0, 2] - moved[0, 0] == 3 * scale
        again, _ = transform(drawn, boxes, np.random.default_rng(seed))
        assert torch.equal(again, tensor)
    assert seen == {(1, False), (1, True), (2, False), (2, True)}


Entry = tuple[tuple[int, int], list[tuple[str, tuple[int, int, int, int], bool]]]
SCENE: list[Entry] = [
    ((40, 32), [("disc", (1, 1, 20, 16), False), ("bar", (21, 17, 40, 32), False)]),
    ((32, 32), []),
    ((32, 48), [("bar", (5, 5, 5, 5), False), ("disc", (8, 8, 30, 40), True)]),  # one pixel; a difficult object
    ((36, 32), [("disc", (4, 4, 24, 24), False)]),
    ((32, 32), [("bar", (3, 3, 33, 20), False)]),  # one pixel beyond the image, as in VOC
]


def write_voc(root: Path, train: list[Entry], test: list[Entry]) -> None:
    """Write images and boxes in VOC's layout, in which boxes count pixels from 1 and include the last pixel."""
    folder, images, kinds = root / "VOCdevkit" / "VOC2007", [], ("bar", "disc")
    parts = {"trainval": range(len(train)), "test": range(len(train), len(train) + len(test))}
    for number, (size, objects) in enumerate([*train, *test]):
        name = f"{number:02}.jpg"
        write_image(folder / "JPEGImages" / name, number, size)
        shown = [
            instance(kinds.index(kind), (left - 1.0, top - 1.0, right, bottom), difficult=hard)
            for kind, (left, top, right, bottom), hard in objects
        ]
        # The writer cuts boxes at the given image size, so give a larger size.
        images.append(Annotated(number, name, 99, 99, (), tuple(shown)))
    voc_layout.write_voc(folder, images, kinds, parts)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, [*SCENE, *SCENE[:3]], [*SCENE, SCENE[3], SCENE[0]])
    return root


def data(root: Path, **options: Any) -> DetectionData:
    small = BoxTransform(sizes=(32, 40), test_size=32, max_size=64)
    defaults: dict[str, Any] = {"image": small, "batch_size": 2, "num_workers": 0, "seed": 3}
    return DetectionData(PascalVOC(root), **{**defaults, **options})


def test_items_have_boxes_and_labels(voc: Path) -> None:
    module = data(voc, image=BoxTransform(sizes=(32,), test_size=32, max_size=64, flip=0.0))
    module.setup("fit")
    assert module.num_classes == 2
    items = [module.test_images[item] for item in range(3)]
    assert [{name: value.tolist() for name, value in item["target"].items()} for item in items] == [
        {"boxes": [[0, 0, 20, 16], [20, 16, 40, 32]], "labels": [2, 1], "difficult": [False, False], "image_id": 0},
        {"boxes": [], "labels": [], "difficult": [], "image_id": 1},
        {"boxes": [[4, 4, 5, 5], [7, 7, 30, 40]], "labels": [1, 2], "difficult": [False, True], "image_id": 2},
    ]
    assert module.test_images[4]["target"]["boxes"].tolist() == [[2, 2, 32, 20]]
    assert len(module.training_images[0, 2]["target"]["boxes"]) == 2
    assert len(module.training_images[2]["target"]["boxes"]) == 2
    batch = collate_detection(items[:2])
    assert [tuple(one.shape) for one in batch["images"]] == [(3, 32, 40), (3, 32, 32)]
    assert batch["index"].tolist() == [0, 1]


@pytest.mark.parametrize("box", [(1, 1, 34, 20), (1, 5, 10, 99), (33, 5, 33, 20)])
def test_a_box_outside_the_image_names_the_file(tmp_path: Path, box: tuple[int, int, int, int]) -> None:
    write_voc(tmp_path, [((32, 32), [("bar", (1, 1, 9, 9), False), ("disc", box, False)])] * 2, SCENE[:1])
    module = data(tmp_path)
    module.setup("fit")
    with pytest.raises(ValueError, match=rf"JPEGImages/00\.jpg: the box \[{box[0] - 1:.1f}, {box[1] - 1:.1f}, "):
        module.training_images[0, 0]


def test_batches_for_statistics_and_made_up_ones_look_like_real_ones(voc: Path) -> None:
    module = parts.attached(data(voc), "fit", 1, 2)
    example = module.example_batch(detector(), 2, RandomTensors())
    made, real, first = example.batch, next(iter(module.train_dataloader())), next(iter(module.statistics_dataloader()))
    assert first["index"].tolist() == real["index"].tolist()
    assert all(map(torch.equal, first["images"], real["images"]))
    assert (example.batches, example.facts) == (5_011 // 2, {"num_classes": 2})
    assert [tuple(one.shape) for one in made["images"]] == [(3, 40, 53)] * 2
    for target in made["targets"]:
        assert [target["boxes"].tolist(), target["labels"].tolist()] == [[[0, 0, 40, 40]], [1]]
        assert all(value.dtype == real["targets"][0][name].dtype for name, value in target.items())


# -- the detector ------------------------------------------------------------------------------------------------------


def encoder(seed: int = 0) -> ImageResNet:
    torch.manual_seed(seed)
    return ImageResNet((1, 1, 1, 1), False, (4, 4, 8, 8), 4, 3, 2, False)


def detector(**options: Any) -> Detection:
    torch.manual_seed(1)
    small: dict[str, Any] = {
        "anchor_sizes": (8, 16), "proposals_per_map_training": 60, "proposals_per_map_test": 60,
        "proposals_training": 20, "proposals_test": 20, "anchors_per_image": 32, "crops_per_image": 16, "crop_size": 4,
        "score_threshold": 0.0, "warmup_steps": 2, "milestones": (50,), "precise_bn_batches": 2,
    }  # fmt: skip
    return Detection(encoder(), **{"num_classes": 2, **small, **options})


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return parts.trainer(folder, **{"limit_val_batches": 0, "use_distributed_sampler": False, **options})


def targets(*counts: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[1.0, 1.0, 12.0, 12.0], [5.0, 5.0, 5.4, 5.4], [10.0, 2.0, 31.0, 30.0]], dtype=dtype)
    return [{"boxes": boxes[:count], "labels": torch.tensor([1, 2, 2])[:count]} for count in counts]


def detectron2_config(name: str) -> dict[str, Any]:
    return yaml.safe_load((DETECTRON2 / f"{name}.yaml").read_text(encoding="utf-8"))


def test_defaults_are_the_published_recipe() -> None:
    with torch.device("meta"):
        module = Detection(ImageResNet(), 20)
    assert (module.stride, module.norm.num_features) == (16, 2048)
    assert module.rpn.head.cls_logits.out_channels == 15
    # detectron2 uses these overlaps for objects and background, numbers of training boxes, and shares of objects.
    for part, expected in ((module.rpn, (0.7, 0.3, 0.7, 256, 0.5)), (module.roi_heads, (0.5, 0.5, 0.5, 512, 0.25))):
        match, sampler = part.proposal_matcher, part.fg_bg_sampler
        sampled = sampler.batch_size_per_image, sampler.positive_fraction
        assert (match.high_threshold, match.low_threshold, part.nms_thresh, *sampled) == expected
    config = detectron2_config("voc_faster_rcnn_R50_C4_24k")
    transform, solver = BoxTransform(), config["SOLVER"]
    assert module.roi_heads.box_predictor.cls_score.out_features == 21
    assert (transform.max_size, transform.flip, transform.training) == (1333, 0.5, True)
    assert list(transform.sizes) == config["INPUT"]["MIN_SIZE_TRAIN"]
    assert transform.test_size == config["INPUT"]["MIN_SIZE_TEST"]
    assert np.allclose(np.array(transform.mean) * 255, config["MODEL"]["PIXEL_MEAN"])
    assert np.allclose(np.array(transform.std) * 255, config["MODEL"]["PIXEL_STD"])
    assert module.hparams["learning_rate"] == solver["BASE_LR"]
    assert list(module.hparams["milestones"]) == solver["STEPS"]
    assert module.hparams["warmup_steps"] == solver["WARMUP_ITERS"]


@pytest.mark.parametrize("counts", [(0,), (1, 2, 0)])
def test_every_parameter_learns_whatever_the_images_show(counts: tuple[int, ...]) -> None:
    module = detector().train()
    images = [torch.randn(3, 32 + 4 * i, 40) for i in range(len(counts))]
    detections, losses = module(images, targets(*counts))
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert not detections
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        # Data parallelism needs a gradient for each parameter, even if the gradient is zero.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_crops_show_the_places_of_their_boxes() -> None:
    module = detector(crop_size=2)
    predictor = module.roi_heads.box_predictor
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.4)
        assert not layer.bias.any()
    assert module.stride == 8
    # The value of each map position is its column. Column 0 is at pixel 4, the center of the first eight pixels.
    columns = torch.arange(10.0).expand(1, 1, 10, 10)
    crop = module._crop({"0": columns}, [torch.tensor([[16.0, 16.0, 48.0, 48.0]])], [(80, 80)])
    # The halves of the box have their centers at pixels 24 and 40, which are columns 2.5 and 4.5.
    assert crop[0, 0, 0].tolist() == pytest.approx([2.5, 4.5])


def test_half_precision_keeps_boxes_and_losses_precise() -> None:
    module, found = detector(), []
    for part in (module.rpn.head, module.roi_heads.box_predictor):
        part.register_forward_hook(lambda module, given, results: found.extend(results))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = module.train()([torch.randn(3, 32, 40)], targets(2))
        detections, _ = module.eval()([torch.randn(3, 32, 40)])
    assert all(loss.isfinite() for loss in losses.values())
    assert detections[0]["boxes"].dtype == torch.float32
    assert detections[0]["scores"].dtype == torch.float32
    assert {(one[0] if isinstance(one, list) else one).dtype for one in found} == {torch.float32}


def test_learning_rate_rises_and_falls() -> None:
    module = detector(learning_rate=0.1, warmup_steps=4, milestones=(6, 8), weight_decay=0.5)
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rise = [0.1 * (0.001 + 0.999 * step / 4) for step in range(4)]
    assert rates == pytest.approx([*rise, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(module.parameters()))
    assert decay[id(module.image_encoder.bn1.weight)] == decay[id(module.norm.bias)] == 0.0
    assert decay[id(module.image_encoder.conv1.weight)] == decay[id(module.rpn.head.cls_logits.bias)] == 0.5
    assert detector(warmup_steps=0).configure_optimizers()["optimizer"].param_groups[0]["lr"] == 0.02  # type: ignore[index,call-overload]


# -- statistics of batch normalization ---------------------------------------------------------------------------------


def normalized() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.0), nn.BatchNorm1d(3, track_running_stats=False)).eval()


def batches(count: int, rows: int = 50) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 3, generator=generator) * (1 + i) + 5 * i + 1e4,) for i in range(count)]


def test_statistics_are_those_of_all_values() -> None:
    module = normalized()
    module[0].momentum = 0.3  # type: ignore[assignment]
    recompute_batch_statistics(module, batches(4))
    values = torch.cat([rows for (rows,) in batches(4)])
    assert torch.allclose(module[0].running_mean, values.double().mean(0).float(), rtol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(module[0].running_var, values.var(0), rtol=0.02)  # type: ignore[arg-type]
    assert not any(part.training for part in module.modules())
    assert module[0].momentum == 0.3
    with pytest.raises(ValueError, match="no training batch"):
        recompute_batch_statistics(module, [])


def test_statistics_of_two_processes_are_those_of_one() -> None:
    whole = normalized()
    recompute_batch_statistics(whole, batches(4))

    def half(rank: int) -> Any:
        module = normalized()
        recompute_batch_statistics(module, batches(4)[rank::2])
        return {name: value for name, value in module.state_dict().items() if "running" in name}

    for found in run_distributed(half, 2):
        for name, value in found.items():
            assert np.allclose(value, whole.state_dict()[name], rtol=1e-5), name


def test_the_true_and_the_likely_boxes_are_drawn(voc: Path, tmp_path: Path) -> None:
    module = data(voc)
    module.setup("test")
    true, likely, unlikely = np.array([[0.0, 0, 20, 16]]), [2.0, 1, 9, 12], [30.0, 20, 35, 28]
    image = DetectedImage(
        np.array([likely, unlikely]), np.array([0.5, 0.49]), np.array([2, 1]), true, np.array([2]), np.array([False])
    )
    none = DetectedImage(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), true, np.array([2]), np.array([False]))
    stage: Any = SimpleNamespace(trainer=SimpleNamespace(default_root_dir=tmp_path), loggers=[])
    draw_detections(stage, module.test_images, {0: image, 3: none})
    first, second = (np.asarray(Image.open(tmp_path / "media" / f"detections_{n}.png")) for n in (1, 2))
    assert first.shape == (32, 40, 3)  # the network's input size
    red = lambda pixels: (pixels == (255, 0, 0)).all(-1)  # noqa: E731
    assert red(first)[5, 2]
    assert not red(first)[22:].any()
    assert not red(second).any()
    for pixels in (first, second):
        assert (pixels[10, 20] == 255).all()


# -- through the trainer -----------------------------------------------------------------------------------------------

METRICS = {f"test/{rules}{name}" for rules in ("", "coco_") for name in ("ap", "ap50", "ap75")} | {"test/images"}


def test_fit_and_test(voc: Path, tmp_path: Path) -> None:
    start = tmp_path / "pretrained.ckpt"
    torch.save({"state_dict": {f"image.{k}": v for k, v in encoder(5).state_dict().items()}}, start)
    module = detector(pretrained=str(start), encoder_prefixes=["image."], learning_rate=0.0)
    run = trainer(tmp_path, max_steps=5)
    run.fit(module, datamodule=data(voc))
    assert run.global_step == 5
    logged = {name.removeprefix("train/"): float(value) for name, value in run.logged_metrics.items()}
    assert set(logged) == {"loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert run.progress_bar_metrics == {"train/loss": pytest.approx(sum(logged.values()) / 2, rel=1e-5)}
    # The learning rate is zero, so the weights still equal those of the file.
    assert torch.equal(module.image_encoder.conv1.weight, encoder(5).conv1.weight)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = encoder(6)
    load_encoder(again, tmp_path / "last.ckpt", ["image_encoder."])
    assert torch.equal(again.conv1.weight, encoder(5).conv1.weight)
    first = run.test(module, datamodule=data(voc), verbose=False)[0]
    assert set(first) == METRICS
    assert first["test/images"] == 7
    assert all(0.0 <= first[name] <= 100.0 for name in METRICS)
    assert len(list((tmp_path / "media").glob("detections_?.png"))) == 6
    # A second test computes the same statistics from the same batches.
    assert run.test(module, datamodule=data(voc), verbose=False)[0] == first
    fresh = detector(pretrained=str(tmp_path / "absent.ckpt"))
    again = trainer(tmp_path).test(
        fresh, datamodule=data(voc), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
    )
    assert again[0] == first


def test_results_are_in_percent_and_by_both_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr("common.protocols.detection.log_results", lambda module, metrics: logged.update(metrics))
    module = detector()
    module.trainer = trainer(tmp_path)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    module.on_test_epoch_start()
    module.detections.update(torch.tensor([0, 1]), [one_detection(0.9), nothing], [ONE_OBJECT, ONE_OBJECT])
    module.on_test_epoch_end()
    # One of two objects is found, so the precision is 1 up to recall 0.5: 6 of VOC's 11 and 51 of COCO's 101 values.
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(
        {name: 600 / 11 if "coco" not in name else 5100 / 101 for name in METRICS} | {"test/images": 2}
    )


def test_statistics_are_made_with_the_synchronization_of_training(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep batch statistics synchronized after training, since two images per device are not the training batch."""
    run, called = trainer(tmp_path), []
    layers = SimpleNamespace(apply=lambda module: called.append("on"), revert=lambda module: called.append("off"))
    monkeypatch.setattr(run.strategy, "_layer_sync", layers, raising=False)
    monkeypatch.setattr("common.protocols.detection.recompute_batch_statistics", lambda *_: called.append("made"))
    run.test(detector(), datamodule=data(voc), verbose=False)
    assert called == ["on", "made", "off"]


def test_a_resumed_run_equals_an_uninterrupted_one(voc: Path, tmp_path: Path) -> None:
    def fit(start: Path | None = None) -> dict[str, Tensor]:
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        run = trainer(tmp_path, max_steps=6, callbacks=[StepSeed(1), save], enable_checkpointing=True)
        run.fit(detector(learning_rate=0.05), datamodule=data(voc), ckpt_path=start, weights_only=True)
        return dict(run.lightning_module.state_dict())

    whole, resumed = fit(), fit(tmp_path / "step=3.ckpt")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
