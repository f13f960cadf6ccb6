"""Tiny data sets in the layouts of the real ones and released networks with random weights, to rehearse with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.data.datasets.coco import CLASSES, coco_name
from common.data.rehearsal import annotated, words_of_captions, write_random_bert, write_random_coco

TRAIN, TEST = 8, 4


def write_datasets(root: Path) -> None:
    """Write every data set that a recipe reads to `$DATA`."""
    write_random_coco(root / "coco", "2014", train=TRAIN, val=TEST, names=CLASSES)
    _write_narratives(root / "coco", "coco_{split}_localized_narratives", ("train", "val"), coco_name, "2017")
    _write_narratives(
        root / "open_images", "open_images_{split}_localized_narratives", ("train_v6", "validation"),
        lambda number: f"{number:016x}.jpg", "",
    )  # fmt: skip


def write_weights(root: Path) -> None:
    """Write BERT, the frozen image networks, and those of the metrics to `$DATA`."""
    write_random_bert(root / "bert-base-uncased", words_of_captions(CLASSES))
    _write_networks(root / "weights")
    _write_clip(root / "weights" / "clip-vit-base-patch32")


def _write_narratives(root: Path, stem: str, parts: Sequence[str], name_of: Callable[[int], str], year: str) -> None:
    """Pictures and one narrative for each, with the fields of the release."""
    for first, part in zip((20001, 30001), parts):
        split = part.partition("_")[0]
        images = annotated(root / f"{split}{year}", range(first, first + TRAIN), name_of, CLASSES)
        lines = [
            json.dumps(
                {
                    "dataset_id": split,
                    "image_id": Path(image.file_name).stem.lstrip("0") if year else Path(image.file_name).stem,
                    "annotator_id": 1,
                    "caption": " ".join(image.captions),
                    "timed_caption": [{"utterance": "a", "start_time": 0.0, "end_time": 0.4}],
                    "traces": [[{"x": 0.2, "y": 0.7, "t": 0.02}]],
                    "voice_recording": "",
                }
            )
            for image in images
        ]
        _write_parts(root / stem.format(split=part), lines, several=split == "train")


def _write_parts(stem: Path, lines: Sequence[str], several: bool) -> None:
    """One file, or two for the larger splits."""
    groups: Iterable[tuple[str, Sequence[str]]] = [("", lines)]
    if several:
        groups = [("-00000-of-00002", lines[::2]), ("-00001-of-00002", lines[1::2])]
    for ending, own in groups:
        stem.with_name(f"{stem.name}{ending}.jsonl").write_text("".join(f"{line}\n" for line in own), encoding="utf-8")


def _write_networks(folder: Path) -> None:
    """torchvision's networks under the names of their files, with random weights."""
    import torch
    from torchvision import models
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    folder.mkdir()
    torch.manual_seed(0)
    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    # All proposals are the whole picture and merge into one; a random thousand would take seconds each.
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
    """A narrow CLIP with a tokenizer of letters; nothing in the recipes depends on its width."""
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
