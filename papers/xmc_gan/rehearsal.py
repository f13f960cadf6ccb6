"""Writes tiny data sets and random weights in the layouts of the real data sets and the released weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.data.datasets.coco import CLASSES, coco_name
from common.data.datasets.localized_narratives import (
    LocalizedNarratives,
    LocalizedNarrativesCOCO,
    LocalizedNarrativesOpenImages,
    write_narratives,
)
from common.data.rehearsal import annotated, words_of_captions, write_random_bert, write_random_coco

TRAIN, TEST = 8, 4


def write_datasets(root: Path) -> None:
    """Write all data sets that recipes read from `$DATA`."""
    write_random_coco(root / "coco", "2014", train=TRAIN, val=TEST, names=CLASSES)
    _write_narratives(LocalizedNarrativesCOCO(root / "coco"), ("train", "val"), coco_name)
    _write_narratives(
        LocalizedNarrativesOpenImages(root / "open_images"), ("train", "validation"), "{:016x}.jpg".format
    )


def write_weights(root: Path) -> None:
    """Write BERT, the frozen image networks, and the networks of the metrics to `$DATA`."""
    write_random_bert(root / "bert-base-uncased", words_of_captions(CLASSES))
    _write_networks(root / "weights")
    _write_clip(root / "weights" / "clip-vit-base-patch32")


def _write_narratives(dataset: LocalizedNarratives, splits: Sequence[str], name_of: Callable[[int], str]) -> None:
    """Write pictures, and one narrative per picture."""
    for first, split in zip((20001, 30001), splits):
        images = annotated(dataset.root / dataset.folders[split], range(first, first + TRAIN), name_of, CLASSES)
        zeros = "0" if dataset.id_digits else ""
        narratives = [(Path(image.file_name).stem.lstrip(zeros), " ".join(image.captions)) for image in images]
        write_narratives(dataset.root / dataset.files[split], narratives, 2 if split == "train" else None)


def _write_networks(folder: Path) -> None:
    """Write torchvision's networks with random weights under the names of the released files."""
    import torch
    from torchvision import models
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    folder.mkdir()
    torch.manual_seed(0)
    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    # Make all proposals the whole picture, so that they merge into one; a thousand would take seconds per picture.
    proposal: Any = detector.rpn.head.bbox_pred
    torch.nn.init.zeros_(proposal.weight)
    proposal.bias.data = torch.tensor([0.0, 0.0, 10.0, 10.0]).repeat(len(proposal.bias) // 4)
    for name, network in (
        ("resnet50-0676ba61.pth", models.resnet50(weights=None)),
        ("vgg19-dcbb9e9d.pth", models.vgg19(weights=None)),
        ("inception_v3_google-0cc3c7bd.pth", models.inception_v3(weights=None, init_weights=False)),
        ("fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", detector),
    ):
        torch.save(network.state_dict(), folder / name)


def _write_clip(folder: Path) -> None:
    """Write a narrow CLIP with a tokenizer of letters; recipes don't depend on its width."""
    from transformers import CLIPConfig, CLIPModel

    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(pieces), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**size, "image_size": 224, "patch_size": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
