"""Data for rehearsals: random pictures with all classes of COCO, VOC and ImageNet, and BERT with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common.data.datasets.coco import Annotated, Instance, Vocabulary, write_coco
from common.data.datasets.coco_karpathy import karpathy_folder, karpathy_name, write_karpathy
from common.data.datasets.imagenet import imagenet_path, write_class_names
from common.data.datasets.voc import write_voc
from common.data.worlds.base import write_jpeg

WIDTH, HEIGHT = 96, 72
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def picture(number: int) -> np.ndarray:
    """Draw patches of random colors, uint8 [HEIGHT, WIDTH, 3]."""
    rng = np.random.default_rng(number)
    patches = rng.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
    return np.repeat(np.repeat(patches, 12, axis=0), 12, axis=1)


def _written(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(path, picture(number))
    return path


def _instances(number: int, classes: int) -> tuple[Instance, ...]:
    """Return two objects: one fills most of the picture, the other is small."""
    objects = []
    for place, (left, top, right, bottom) in enumerate(((6.0, 4.0, 80.0, 60.0), (10.0, 8.0, 30.0, 28.0))):
        outline = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        category = (number + 7 * place) % classes
        objects.append(Instance(category, (left, top, right, bottom), (right - left) * (bottom - top), outline))
    return tuple(objects)


def captions_of(number: int, names: Sequence[str]) -> tuple[str, ...]:
    """Return the captions of a picture. The first two name the objects in the picture."""
    shown = [names[(number + 7 * place) % len(names)] for place in range(2)]
    texts = (
        "a {} beside a {} .", "one {} and one {}, near to the left .", "something on a table .", "things in a room .",
        "a photo taken outside .",
    )  # fmt: skip
    return tuple(text.format(*shown) for text in texts)


def words_of_captions(names: Sequence[str]) -> set[str]:
    """Return the caption vocabulary."""
    texts = (text for number in range(len(names)) for text in captions_of(number, names))
    return {word.strip(",") for text in texts for word in text.split()}


def annotated(
    folder: Path, numbers: Sequence[int], name_of: Callable[[int], str], names: Sequence[str]
) -> list[Annotated]:
    """Write pictures and return their annotations; `names` are the category names."""
    return [
        Annotated(
            number, _written(folder / name_of(number), number).name, WIDTH, HEIGHT,
            captions_of(number, names), _instances(number, len(names)),
        )
        for number in numbers
    ]  # fmt: skip


def write_random_coco(root: Path, year: str, train: int, val: int, names: Sequence[str]) -> None:
    """Write COCO of one year: pictures, captions and instances of both splits."""
    vocabulary = Vocabulary("Random pictures", tuple((name, "thing") for name in names), ("none",))
    for split, first, count in (("train", 1, train), ("val", 5001, val)):
        prefix = f"COCO_{split}2014_" if year == "2014" else ""
        file_name = f"{prefix}{{:012d}}.jpg".format
        images = annotated(root / f"{split}{year}", range(first, first + count), file_name, names)
        write_coco(root, f"{split}{year}", images, vocabulary)


def write_random_karpathy(root: Path, train: int, restval: int, val: int, test: int, names: Sequence[str]) -> None:
    """Write COCO 2014 with Karpathy's splits."""
    parts, first = {}, 10001
    for split, count in (("train", train), ("restval", restval), ("val", val), ("test", test)):
        numbers = range(first, first + count)
        parts[split] = annotated(root / karpathy_folder(split), numbers, partial(karpathy_name, split=split), names)
        first += count
    write_karpathy(root, parts)


def write_random_voc(root: Path, year: str, trainval: int, test: int) -> None:
    """Write Pascal VOC of one year with its 20 classes."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    prefix = "" if year == "2007" else f"{year}_"
    images = annotated(
        folder / "JPEGImages", range(1, trainval + test + 1), lambda number: f"{prefix}{number:06d}.jpg", VOC_CLASSES
    )
    rows = list(range(trainval))
    parts = {"train": rows[::2], "val": rows[1::2], "trainval": rows}
    if test:
        parts["test"] = list(range(trainval, trainval + test))
    write_voc(folder, images, VOC_CLASSES, parts)


def write_random_imagenet(root: Path, train: int, val: int) -> None:
    """Write ImageNet with a folder for every class. Pictures are only in the first folders."""
    for split, count in (("train", train), ("val", val)):
        for label in range(1000):
            path = imagenet_path(root, split, label, label + 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            if label < count:
                _written(path, label)
    write_class_names(root, [f"class {number}" for number in range(1000)])


# -- weights ----------------------------------------------------------------------------------------------------------

VOCABULARY = 30522
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_random_bert(folder: Path, words: Iterable[str], layers: int = 12) -> None:
    """Write bert-base-uncased with random weights. The vocabulary has `words` and letters, padded to full size."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    BertForPreTraining(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers)).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    vocabulary = dict.fromkeys((*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *sorted(set(words))))
    pieces = [*vocabulary, *(f"[unused{number}]" for number in range(VOCABULARY - len(vocabulary)))]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
