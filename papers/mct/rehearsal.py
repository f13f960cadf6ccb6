"""Tiny data sets in the layouts of the real ones, and BERT with random weights, to test the recipes quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.data.datasets.coco import CLASSES
from common.data.datasets.imagenet import imagenet_class
from common.data.rehearsal import (
    words_of_captions,
    write_random_bert,
    write_random_coco,
    write_random_imagenet,
    write_random_karpathy,
    write_random_voc,
)
from common.encoders.image import ImageResNet


def write_datasets(root: Path) -> None:
    """Write every data set that the recipes read from `$DATA`."""
    write_random_coco(root / "coco", "2017", train=12, val=4, names=CLASSES)
    write_random_karpathy(root / "coco", train=8, restval=2, val=4, test=10, names=CLASSES)
    for year, test in (("2007", 20), ("2012", 0)):
        # Classes must repeat, because cross-validation chooses the classifier's cost.
        write_random_voc(root / "voc", year, trainval=80 if year == "2007" else 4, test=test)
    write_random_imagenet(root / "imagenet", train=200, val=8)
    listed = "".join(f"{imagenet_class(number)}\n" for number in range(100))
    (root / "imagenet" / "imagenet100.txt").write_text(listed, encoding="utf-8")


def write_weights(root: Path) -> None:
    """Write a BERT whose vocabulary covers the captions to `$DATA`."""
    write_random_bert(root / "bert-base-uncased", words_of_captions(CLASSES), layers=2)


def write_released(stage: str, module: Any, data: object, path: Path) -> None:
    """Write a ResNet-50 in the layout of MoCo, VirTex or torchvision, depending on the stage that it replaces."""
    encoder = next(part for part in module.modules() if isinstance(part, ImageResNet)).state_dict()
    content: dict[str, Any]
    if stage == "moco_v2_imagenet":
        state = {f"module.encoder_{kind}.{name}": value for kind in "qk" for name, value in encoder.items()}
        state |= {"module.encoder_q.fc.0.weight": torch.zeros(4, 4), "module.queue": torch.zeros(128, 64)}
        content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}
    elif stage == "virtex":
        state = {f"visual.cnn.{name}": value for name, value in encoder.items()}
        content = {"model": state | {"textual.embedding.words.weight": torch.zeros(4, 4)}, "iteration": 500_000}
    else:
        content = {name: value for name, value in encoder.items() if not name.endswith("num_batches_tracked")}
        content |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(content, path, _use_new_zipfile_serialization=stage != "in_sup")
