"""Write tiny image data sets with real JPEG files, in the file layouts of the published data sets."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.datasets import coco, coco_cn, coco_karpathy, conceptual_captions, multi30k, stair_captions, voc
from common.data.datasets.base import write_lines
from common.data.datasets.coco import Annotated, Instance, Vocabulary, coco_name
from common.data.datasets.localized_narratives import write_narratives
from common.data.regions import Regions, write_regions

#: The size of the pictures, the length of a region's features, and the number of region classes.
HEIGHT, WIDTH, FEATURES, CLASSES = 30, 40, 6, 5

CATEGORIES = ("person", "dog", "car")
VOC_CLASSES = ("aeroplane", "bicycle", "train")
FLICKR = ("1000092795", "10002456", "1000268201")
COCO = ("COCO_train2014_000000000009", "COCO_val2014_000000000042", "COCO_val2014_000000000073")


NARRATIVES = (
    ("391895", "A man rides a bike."),
    ("522418", "A woman cuts a cake."),
    ("391895", "In the front a bike."),
)


def regions(number: int, count: int = 3, distribution: bool = False) -> Regions:
    """Make random region features, seeded with `number`."""
    rng = np.random.default_rng(number)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * (WIDTH, HEIGHT)
    shares = rng.dirichlet(np.ones(CLASSES), count).astype(np.float32)
    return Regions(
        rng.normal(size=(count, FEATURES)).astype(np.float32),
        corners.reshape(count, 4).astype(np.float32),
        shares.argmax(1).astype(np.int64),
        HEIGHT,
        WIDTH,
        shares if distribution else None,
    )


def write_image(path: Path, number: int = 0, size: tuple[int, int] = (24, 20)) -> Path:
    """Write a small JPEG (width, height) whose content depends on the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(path, "JPEG", quality=95, subsampling=0)
    return path


def annotated(number: int, name: str, captions: Sequence[str] = (), objects: Sequence[Instance] = ()) -> Annotated:
    return Annotated(number, name, 24, 20, tuple(captions), tuple(objects))


def instance(category: int, box: tuple[float, float, float, float], difficult: bool = False) -> Instance:
    left, top, right, bottom = box
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return Instance(category, box, (right - left) * (bottom - top), corners, difficult)


def write_coco(
    root: Path,
    train: int = 4,
    val: int = 2,
    instances: bool = True,
    year: str = "2017",
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write COCO. Image k has k objects, whose categories alternate. The annotation files list the images in reverse.

    `captions` maps a split to the captions of each image. Other splits get captions with the image number.
    """
    for split, count, first in (("train", train, 9), ("val", val, 5000)):
        images = []
        for row in range(count):
            number = first + 7 * row
            name = f"COCO_{split}2014_{coco_name(number)}" if year == "2014" else coco_name(number)
            write_image(root / f"{split}{year}" / name, number)
            texts = (captions or {}).get(split, [f"Image {number}, caption {c}." for c in range(2)])
            objects = [instance(k % len(CATEGORIES), (1.5 + k, 2.0, 4.5 + k, 6.25)) for k in range(row)]
            images.append(annotated(number, name, texts, objects))
        vocabulary = Vocabulary("", tuple((name, "thing") for name in CATEGORIES), ("none",))
        coco.write_coco(root, f"{split}{year}", images[::-1], vocabulary)
        if not instances:
            (root / "annotations" / f"instances_{split}{year}.json").unlink()
    return root


def write_karpathy(root: Path, train: int = 3, restval: int = 2, val: int = 2, test: int = 2) -> Path:
    """Write COCO 2014 and Karpathy's list of its splits, in order of decreasing image number."""
    number, parts = 911, {}
    for split, count in (("test", test), ("train", train), ("val", val), ("restval", restval)):
        parts[split] = []
        for _ in range(count):
            number -= 11
            name = coco_karpathy.karpathy_name(number, split)
            write_image(root / coco_karpathy.karpathy_folder(split) / name, number)
            parts[split].append(annotated(number, name, [f"Image {number}: {c}." for c in range(2)]))
    coco_karpathy.write_karpathy(root, parts)
    return root


def write_voc(
    root: Path,
    year: str = "2007",
    splits: Mapping[str, int] | None = None,
    classes: Sequence[str] = VOC_CLASSES,
    nested: bool = True,
) -> Path:
    """Write Pascal VOC of one year. Image k shows class k and, marked as difficult, class k + 1."""
    folder = root / "VOCdevkit" / f"VOC{year}" if nested else root / f"VOC{year}"
    splits = {"train": 2, "val": 3, "test": 3} if splits is None else splits
    images, parts = [], {}
    for split, count in splits.items():
        parts[split] = list(range(len(images), len(images) + count))
        for number in (row + 5 for row in parts[split]):
            name = f"{number:06d}.jpg" if year == "2007" else f"{year}_{number:06d}.jpg"
            write_image(folder / "JPEGImages" / name, number)
            shown = [instance(number % len(classes), (0.0, 0.0, 24.0, 20.0))]
            if len(classes) > 1:
                shown.append(instance((number + 1) % len(classes), (2.0, 1.0, 10.5, 11.0), difficult=True))
            images.append(annotated(number, name, objects=shown))
    if "train" in parts and "val" in parts:
        parts["trainval"] = sorted(parts["train"] + parts["val"])
    voc.write_voc(folder, images, classes, parts)
    return root


def write_imagenet(
    root: Path, classes: Sequence[str] = ("n01440764", "n01443537", "n02110958"), train: int = 3, val: int = 1
) -> Path:
    """Write ImageNet with class folders in both splits."""
    for label, name in enumerate(classes):
        for number in range(train):
            write_image(root / "train" / name / f"{name}_{number}.JPEG", 100 * label + number)
        for number in range(val):
            write_image(root / "val" / name / f"ILSVRC2012_val_{10 * number + label:08d}.JPEG", 7000 + label)
    return root


def write_ln_coco(root: Path, parts: int = 2, folder: str = "") -> Path:
    for image in {int(image) for image, _ in NARRATIVES}:
        write_image(root / "train2017" / f"{image:012d}.jpg", image)
    write_image(root / "val2017" / f"{139:012d}.jpg", 139)
    write_narratives(root / folder / "coco_train_localized_narratives", NARRATIVES, parts)
    write_narratives(root / folder / "coco_val_localized_narratives", [("139", "Ein Zimmer über \u2028 allem 猫.")])
    return root


# ---------------------------------------------------------------------------------------------------- languages
def write_features(path: Path, keys: Sequence[str]) -> Path:
    """Write random region features of the pictures `keys`."""
    write_regions(path, ((key, regions(number)) for number, key in enumerate(keys)))
    return path


def write_conceptual_captions(root: Path, headed: bool = False) -> Path:
    """Write four training captions, of which the third is blank."""
    texts = ["a \"quoted' dog", "two  cats", " ", "a tree , alone"]
    if headed:
        cells = [text.replace('"', '""') for text in texts]
        write_lines(root / "google.csv", ["url\tcaption", *(f'http://a\t"{text}"' for text in cells)])
        write_lines(root / "google_valid.csv", ["caption", "a val"])
    else:
        conceptual_captions.write_conceptual_captions(root, {"train": texts, "val": ["a val"]})
    for name in ("training/0", "training/1", "validation/0"):
        write_image(root / f"{name}.jpg")
    return root


def write_multi30k(root: Path, packed: bool = True, images: bool = True) -> Path:
    """Write two training images and one image per other split. Without `packed`, put plain files into the root."""
    for split, keys in (("train", FLICKR[:2]), ("val", FLICKR[2:]), ("test", ("5",))):
        captions = {language: [[f"{language} of {key}"] for key in keys] for language in ("fr", "cs")}
        for language in ("en", "de"):
            captions[language] = [[f"{language}  {number} of {key}" for number in range(1, 6)] for key in keys]
        multi30k.write_multi30k(root, split, keys, captions)
    if not packed:
        for path in (root / "data").rglob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        for path in (root / "data").iterdir():
            path.rename(root / path.name)
    if images:
        for key in (*FLICKR, "5"):
            write_image(root / "flickr30k-images" / f"{key}.jpg")
    return root


def _of_coco(text: str) -> list[Annotated]:
    numbers = [int(key[-12:]) for key in COCO]
    texts = [[text.format(n, number) for n in range(2)] for number in numbers]
    return [annotated(number, f"{key}.jpg", own) for key, number, own in zip(COCO, numbers, texts)]


def write_coco_karpathy(root: Path) -> Path:
    """Write one image for `train`, one for `restval`, and one for `test`."""
    images = _of_coco("caption {}  of {}")
    root.mkdir(parents=True, exist_ok=True)
    coco_karpathy.write_karpathy(root, {"train": images[:1], "restval": images[1:2], "test": images[2:]})
    for key in COCO:
        write_image(root / key.split("_")[1] / f"{key}.jpg")
    return root


def write_stair(root: Path, folder: str = "") -> Path:
    """Write Japanese captions for the images of `write_coco_karpathy`."""
    images = _of_coco("キャプション {} {}")
    stair_captions.write_stair_captions(root / folder, {"train2014": images[:1], "val2014": images[1:]}, "")
    return root


def write_coco_cn(root: Path, folder: str = "coco-cn-version1805v1.1") -> Path:
    """Write Chinese captions for the images of `write_coco_karpathy`. The first image has two captions."""
    texts = (["一只 狗", "狗"], ["两只猫"], ["三只鸟"])
    coco_cn.write_coco_cn(root, {split: [(key, own)] for split, key, own in zip(("train", "val", "test"), COCO, texts)})
    home = root / "coco-cn-version1805v1.1"
    if root / folder != home:
        for path in home.iterdir():
            path.rename(root / folder / path.name)
    return root


def write_wikipedia(root: Path, languages: Sequence[str] = ("en", "zh_yue")) -> Path:
    """Write three training sentences and one validation sentence per language."""
    for language in languages:
        write_lines(root / f"{language}.train.txt", [f"\ufeffOne {language}.\r", "", "Twö.", "  ", "Three"])
        write_lines(root / f"{language}.valid.txt", ["Held out."])
    return root
