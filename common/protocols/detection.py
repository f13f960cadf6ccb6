"""Object detection on Pascal VOC: torchvision's Faster R-CNN on an image encoder, and its data module."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes

from common.data.annotations import Boxes
from common.data.datasets.voc import PascalVOC
from common.data.image_transforms import normalized
from common.data.images import ImageItems
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing, spread
from common.data.samplers import EpochSampler
from common.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from common.encoders.checkpoint_files import load_encoder
from common.encoders.image import ImageResNet
from common.files import write_whole
from common.metrics.detection import (
    DetectedImage,
    DetectionsOncePerImage,
    coco_average_precision,
    voc07_average_precision,
)
from common.monitoring.media import log_image, media_folder
from common.protocols.base import PREFIXES, check_num_classes, log_results
from common.protocols.data import ImageData
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.training.optimizers import refuse_half_weights
from common.types import Fraction, Momentum, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Batch = dict[str, Any]
Objects = dict[str, Tensor]
#: Number of pictures to draw, and the lowest score of the detections in them.
PICTURES, LEAST_SCORE = 6, 0.5


class Detection(pl.LightningModule):
    """Faster R-CNN on a residual network. The fourth stage makes the feature map, and the fifth is the head.

    All layers are trained, including batch normalization; an additional layer of it follows the last stage. Because a
    device has only a few images, several devices need `trainer.sync_batchnorm: true`. Before the test, the statistics
    are recomputed from training batches with the final weights.

    Logs percentages: `test/ap`, `test/ap50` and `test/ap75` by the rules of VOC 2007, as in the published tables, and
    `test/coco_ap`, `test/coco_ap50` and `test/coco_ap75` by COCO's rules. Every image counts once, on any number of
    processes. `media/detections_<n>.png` show some detections.

    Args:
        num_classes: number of classes without the background.
        pretrained, encoder_prefixes: checkpoint with the encoder, and possible prefixes; see `load_encoder`. None keeps
            the initial weights.
        anchor_sizes, anchor_ratios: sides in pixels and height / width of the boxes at each position of the map.
        proposals_per_map_training, proposals_per_map_test: number of best proposals before non-maximum suppression.
        proposals_training, proposals_test: number of proposals after non-maximum suppression.
        anchors_per_image: anchors per image in the loss that separates objects from background.
        crops_per_image: proposals per image in the loss of classes and boxes.
        weight_decay: not applied to batch normalization.
        warmup_steps: number of steps in which the learning rate rises linearly from a thousandth of its value.
        precise_bn_batches: number of training batches for recomputing statistics before the test. 0 keeps the running
            statistics.

    Shapes:
        Batch: `images`, a list of [3, H, W]; `targets`, a list of dicts with `boxes` [n, 4] (left, top, right, bottom
        in pixels of the tensor), `labels` [n] from 1, `difficult` [n]; `index` [B].

    Source: Faster R-CNN R50-C4 as detectron2 trains it on VOC, with its defaults for proposals, thresholds, the start
    of the warm-up, and weight decay. detectron2's box losses are L1; torchvision's are smooth below a ninth.
    """

    def __init__(
        self,
        image_encoder: ImageResNet,
        num_classes: PositiveInt,
        pretrained: str | None = None,
        encoder_prefixes: Sequence[str] = PREFIXES,
        anchor_sizes: Sequence[PositiveInt] = (32, 64, 128, 256, 512),
        anchor_ratios: Sequence[PositiveFloat] = (0.5, 1.0, 2.0),
        proposals_per_map_training: PositiveInt = 12000,
        proposals_per_map_test: PositiveInt = 6000,
        proposals_training: PositiveInt = 2000,
        proposals_test: PositiveInt = 1000,
        anchors_per_image: PositiveInt = 256,
        crops_per_image: PositiveInt = 512,
        crop_size: PositiveInt = 14,
        detections_per_image: PositiveInt = 100,
        score_threshold: Fraction = 0.05,
        learning_rate: PositiveFloat = 0.02,
        momentum: Momentum = 0.9,
        weight_decay: NonNegativeFloat = 1e-4,
        warmup_steps: NonNegativeInt = 100,
        milestones: Sequence[NonNegativeInt] = (18000, 22000),
        gamma: PositiveFloat = 0.1,
        precise_bn_batches: NonNegativeInt = 200,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder"])
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f"milestones: expected ascending steps, got {list(milestones)}")
        self.image_encoder = image_encoder
        pool = 1 if isinstance(image_encoder.maxpool, nn.Identity) else 2
        # Pixels between positions of the map; the third and the fourth stage halve the resolution.
        self.stride = int(image_encoder.conv1.stride[0]) * pool * 4
        anchors = AnchorGenerator((tuple(anchor_sizes),), (tuple(anchor_ratios),))
        channels = image_encoder.stage_channels["res4"]
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=anchors_per_image,
            positive_fraction=0.5,
            pre_nms_top_n={"training": proposals_per_map_training, "testing": proposals_per_map_test},
            post_nms_top_n={"training": proposals_training, "testing": proposals_test},
            nms_thresh=0.7,
        )
        self.norm = nn.BatchNorm2d(image_encoder.feature_dim)
        self.roi_heads = RoIHeads(
            # Pass methods, not modules: the fifth stage belongs to the encoder and must not be registered twice.
            self._crop,
            self._features_of_crops,
            _Predictor(image_encoder.feature_dim, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=crops_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
        )

    # -- the detector --------------------------------------------------------------------------------------------------

    def forward(self, images: Sequence[Tensor], targets: list[Objects] | None = None) -> tuple[list[Objects], Objects]:
        """Return the losses in training. Otherwise, return each image's `boxes` [D, 4], `labels` [D] and `scores` [D].

        Each of the `images` [3, H, W] is normalized. Training needs `targets` with `boxes` and `labels`.
        """
        batch = pad_together(images, self.stride)
        encoder = self.image_encoder
        features = encoder.layer3(encoder.layer2(encoder.layer1(encoder.stem(batch.tensors))))
        # Boxes in bfloat16 would be off by pixels, so only the encoder's stages run in lower precision.
        with torch.autocast(features.device.type, enabled=False):
            maps = {"0": features.to(self.norm.weight.dtype)}
            proposals, proposal_losses = self.rpn(batch, maps, targets)
        detections, losses = self.roi_heads(maps, proposals, batch.image_sizes, targets)
        return detections, {**proposal_losses, **losses}

    def _crop(self, maps: Mapping[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        size = self.hparams["crop_size"]
        return roi_align(maps["0"], proposals, size, 1.0 / self.stride, aligned=True)

    def _features_of_crops(self, crops: Tensor) -> Tensor:
        return self.norm(self.image_encoder.layer4(crops)).mean((2, 3))

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        refuse_half_weights(self, "box corners by up to several pixels")
        check_num_classes(self, self.hparams["num_classes"], fewest=1)
        if stage == "fit" and self.hparams["pretrained"] is not None:
            load_encoder(self.image_encoder, self.hparams["pretrained"], self.hparams["encoder_prefixes"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, losses = self(batch["images"], batch["targets"])
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        h: Any = self.hparams
        norms = {p for module in self.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
        groups = [
            {"params": [p for p in self.parameters() if p not in norms], "weight_decay": h.weight_decay},
            {"params": [p for p in self.parameters() if p in norms], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, h.learning_rate, h.momentum)
        milestones, warmup = list(h.milestones), h.warmup_steps

        def factor(step: int) -> float:
            rise = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
            return rise * h.gamma ** bisect_right(milestones, step)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Recompute the statistics of batch normalization. Every test uses the same training batches."""
        batches = self.hparams["precise_bn_batches"]
        if not batches:
            return
        loader = getattr(getattr(self.trainer, "datamodule", None), "statistics_dataloader", None)
        if loader is None:
            raise ValueError(
                "precise_bn_batches: the data module has no statistics_dataloader; set it to 0 to keep the statistics "
                "of training"
            )
        # Lightning synchronizes batch normalization across devices only in training.
        synchronization = getattr(self.trainer.strategy, "_layer_sync", None)
        if synchronization is not None:
            synchronization.apply(self)
        # The head draws random crops. Restore the random state afterwards.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            moved = (self.trainer.strategy.batch_to_device(batch, self.device) for batch in islice(loader(), batches))
            recompute_batch_statistics(self, ((batch["images"], batch["targets"]) for batch in moved))
        if synchronization is not None:
            synchronization.revert(self)

    def on_test_epoch_start(self) -> None:
        self.detections = DetectionsOncePerImage()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.detections.update(batch["index"], self(batch["images"])[0], batch["targets"])

    def on_test_epoch_end(self) -> None:
        detections = self.detections.compute()
        metrics = {f"test/{name}": 100 * value for name, value in voc07_average_precision(detections.values()).items()}
        metrics |= {
            f"test/coco_{name}": 100 * value for name, value in coco_average_precision(detections.values()).items()
        }
        metrics["test/images"] = float(len(detections))
        log_results(self, {name: torch.tensor(value) for name, value in metrics.items()})
        items = getattr(getattr(self.trainer, "datamodule", None), "test_images", None)
        if self.trainer.is_global_zero and isinstance(items, DetectionImages):
            chosen = [list(detections)[position] for position in spread(len(detections), PICTURES)]
            draw_detections(self, items, {item: detections[item] for item in chosen})


class _Predictor(FastRCNNPredictor):
    """Predicts classes and boxes of crops, in full precision even under autocast. Initialized as in detectron2."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.cls_score.weight.dtype))


def pad_together(images: Sequence[Tensor], multiple: int) -> ImageList:
    """Pad images [3, H, W] to one common size. Its sides are multiples of `multiple`, the stride of the feature map."""
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    height, width = (multiple * math.ceil(max(sides) / multiple) for sides in zip(*sizes))
    tensors = images[0].new_zeros(len(images), 3, height, width)
    for row, image, (h, w) in zip(tensors, images, sizes):
        row[:, :h, :w] = image
    return ImageList(tensors, sizes)


@torch.no_grad()
def recompute_batch_statistics(module: nn.Module, batches: Iterable[Sequence[Any]]) -> None:
    """Recompute the running statistics of batch normalization from batches, with the current weights.

    The variance is over all values, so differences between batch means count. Results are equal on all processes.

    Args:
        module: called with the entries of each batch, in training mode. The mode of each submodule is restored
            afterwards.
        batches: batches of equal size. Every process has different batches.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" ("precise BN").
    """
    norms: list[Any] = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {m: m.training for m in module.modules()}
    momenta = [norm.momentum for norm in norms]
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64, device=norm.running_mean.device) for norm in norms]
    count = 0
    module.train()
    try:
        for norm in norms:
            norm.momentum = 1.0  # the running statistics become those of the last batch
        for batch in batches:
            module(*batch)
            count += 1
            for norm, total in zip(norms, sums):
                mean, variance = norm.running_mean.double(), norm.running_var.double()
                total += torch.stack([mean, variance + mean.square()])
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for m, mode in modes.items():
            m.training = mode
    joined = torch.cat([total.flatten() for total in sums] + [sums[0].new_tensor([count])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined)
    if joined[-1] == 0:
        raise ValueError("precise_bn_batches: there is no training batch to compute statistics from")
    means = (joined[:-1] / joined[-1]).split([total.numel() for total in sums])
    for norm, both in zip(norms, means):
        mean, square = both.view(2, -1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean.square())


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxTransform:
    """Resizes, flips and normalizes a picture and its boxes. Keeps the aspect ratio.

    Args:
        sizes: lengths of the shorter side in training. For each image, one length is drawn at random.
        test_size: length of the shorter side in a test.
        max_size: upper limit of the longer side, which takes precedence over `sizes` and `test_size`.
        flip: probability of a horizontal flip in training.
        mean, std: mean and standard deviation of the channels, on a scale of 0 to 1.
    """

    sizes: tuple[PositiveInt, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    test_size: PositiveInt = 800
    max_size: PositiveInt = 1333
    flip: Fraction = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    training: bool = True

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes: expected at least one")
        if self.max_size < max(*self.sizes, self.test_size):
            raise ValueError(f"max_size ({self.max_size}) must be at least test_size and each of sizes")

    def with_training(self, training: bool) -> BoxTransform:
        """Return the same transform for training or for a test."""
        return dataclasses.replace(self, training=training)

    def resized(self, size: tuple[int, int], shorter: int) -> tuple[int, int]:
        """Compute a picture's width and height after its shorter side is resized."""
        scale = min(shorter / min(size), self.max_size / max(size))
        return round(size[0] * scale), round(size[1] * scale)

    def __call__(
        self, image: Image.Image, boxes: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, np.ndarray]:
        """Return the picture as float32 [3, H, W], and its boxes [n, 4] (left, top, right, bottom) in new pixels."""
        size, flipped = self.test_size, False
        if self.training:
            assert rng is not None
            size = self.sizes[int(rng.random() * len(self.sizes))]
            flipped = rng.random() < self.flip
        width, height = self.resized(image.size, size)
        boxes = boxes * np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        image = v2.resize(image, [height, width])
        if flipped:
            image = v2.horizontal_flip(image)
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        return normalized(np.asarray(image), self.mean, self.std), boxes


class DetectionImages(ImageItems):
    """Images with the boxes of their objects. For `options` see ImageItems; `transform` is a BoxTransform.

    An item holds:
        `image` float32 [3, H, W]; `target`, a dict of `boxes` float32 [n, 4], `labels` int64 [n] from 1, `difficult`
        bool [n] and `image_id`, the position in the listing; `index`.
    """

    def __init__(self, listing: Listing, boxes: Sequence[Boxes], **options: Any) -> None:
        super().__init__(listing, **options)
        self._transform = cast(BoxTransform, self.image_transform)
        self.boxes = boxes

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        return self._transform.resized(size, self._transform.test_size)

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        image, entry = self.image(item.file), self.boxes[item.file]
        given = entry["boxes"]
        # Some annotations are off by a pixel.
        boxes = np.clip(given, 0, np.array([*image.size, *image.size], dtype=np.float32))
        wrong = (np.abs(boxes - given) > 1).any(axis=1) | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        if wrong.any():
            raise ValueError(
                f"{self.name(item.file)}: the box {given[wrong][0].tolist()} (left, top, right, bottom) is not inside "
                f"the image of {image.width} x {image.height} pixels; correct its annotation"
            )
        tensor, boxes = self._transform(image, boxes, rng)
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(entry["labels"] + 1),
            "difficult": torch.from_numpy(entry["difficult"]),
            "image_id": torch.tensor(item.file),
        }
        return {"image": tensor, "target": target}

    def transform(self, batch: list[Sample]) -> None:
        pass  # sizes differ, so `read` transforms a picture and its boxes


class DetectionData(ImageData):
    """Images of Pascal VOC with boxes. The test split covers the years that have a test split.

    Args:
        image: transform, whose `training` is set automatically. None means the published transform.
        test_batch_size: images per test step, per device.
    """

    def __init__(
        self,
        dataset: PascalVOC,
        image: BoxTransform | None = None,
        train_split: str = "trainval",
        test_split: str = "test",
        test_batch_size: PositiveInt = 1,
        batch_size: PositiveInt = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, image=cast(Any, image or BoxTransform()), batch_size=batch_size, **kwargs)
        self.train_split = train_split
        self.test_split = test_split
        self.test_batch_size = test_batch_size

    def setup(self, stage: str) -> None:
        self.listing = self.dataset.listing(self.train_split)
        listing = self.dataset.listing(self.test_split)  # if test files are missing, fail before training
        boxes = self.dataset.boxes(self.test_split, listing)
        self.test_images = DetectionImages(listing, boxes, **self.options(training=False))

    @property
    def num_classes(self) -> int:
        return len(self.listing.classes)

    @cached_property
    def training_images(self) -> DetectionImages:
        boxes = self.dataset.boxes(self.train_split, self.listing)
        return DetectionImages(self.listing, boxes, **self.options(training=True))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_images, collate_fn=collate_detection)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        image = cast(BoxTransform, self.image)
        side = max(image.sizes)
        boxes = torch.tensor([[0.0, 0.0, side, side]])
        objects = {"boxes": boxes, "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
        batch = {
            "images": [draw.normal(3, side, min(side * 4 // 3, image.max_size)) for _ in range(size)],
            "targets": [dict(objects) for _ in range(size)],
            "index": torch.arange(size),
        }
        batches = batches_of_epoch(self.dataset.published_count(self.train_split), self.batch_size)
        return Example(batch, batches, {"num_classes": module.hparams["num_classes"]})

    def statistics_dataloader(self) -> DataLoader[Any]:
        """Load training batches in the order of the first epoch."""
        trainer = self.trainer
        images = self.training_images
        sampler = EpochSampler(len(images), self.batch_size, self.seed, trainer.global_rank, trainer.world_size)
        size = self.batch_size // trainer.world_size
        return self.loader(images, sampler, size, collate_detection)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.test_images, self.test_batch_size, collate_fn=collate_detection)


def collate_detection(samples: Sequence[Sample]) -> Batch:
    """Collate images and targets, whose sizes differ, as lists, and `index` as [B]."""
    return {
        "images": [sample["image"] for sample in samples],
        "targets": [sample["target"] for sample in samples],
        "index": torch.stack([sample["index"] for sample in samples]),
    }


def draw_detections(module: pl.LightningModule, images: DetectionImages, shown: Mapping[int, DetectedImage]) -> None:
    """Draw images with true boxes in white, and detected boxes with scores in red."""
    for number, (item, image) in enumerate(shown.items(), start=1):
        pixels = torch.from_numpy(images.preview(item)).permute(2, 0, 1)
        # Boxes are in pixels of the network's input.
        width, height = images.resized((pixels.shape[2], pixels.shape[1]))
        pixels = v2.resize(pixels, [height, width])
        likely = image.scores >= LEAST_SCORE
        boxes = torch.from_numpy(np.concatenate([image.true_boxes, image.boxes[likely]]))
        detections = zip(image.labels[likely].tolist(), image.scores[likely].tolist())
        names = [f"{images.listing.classes[label - 1]} {score:.2f}" for label, score in detections]
        true = len(image.true_boxes)
        if len(boxes):
            colors = ["white"] * true + ["red"] * len(names)
            pixels = draw_bounding_boxes(pixels, boxes, [""] * true + names, colors, width=2)
        path = media_folder(module) / f"detections_{number}.png"
        write_whole(path, v2.to_pil_image(pixels).save)
        log_image(module, path)
