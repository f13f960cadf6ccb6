"""Tiny Conceptual Captions, Multi30K, COCO, STAIR Captions, COCO-CN and text, as the real ones are distributed."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from common.data.regions import write_regions
from tests.data.image_layouts import write_image, write_json
from tests.data.region_layouts import regions

FLICKR = ("1000092795", "10002456", "1000268201")
COCO = ("COCO_train2014_000000000009", "COCO_val2014_000000000042", "COCO_val2014_000000000073")
#: The five first, in the order of their numbers.
SPLITS = ("train", "restval", "test")


def write_text(path: Path, text: str) -> Path:
    """A text file, packed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """One text a line."""
    return write_text(path, "".join(f"{line}\n" for line in lines))


def write_features(path: Path, keys: Sequence[str]) -> Path:
    """Region features of some pictures."""
    write_regions(path, ((key, regions(number)) for number, key in enumerate(keys)))
    return path


def write_conceptual_captions(root: Path, headed: bool = False, images: bool = True) -> Path:
    """Four rows, the third blank."""
    texts = ["a \"quoted' dog", "two  cats", " ", "a tree , alone"]
    if headed:
        cells = [text.replace('"', '""') for text in texts]
        write_lines(root / "google.csv", ["url\tcaption", *(f'http://a\t"{text}"' for text in cells)])
        write_lines(root / "google_valid.csv", ["caption", "a val"])
    else:
        write_lines(root / "Train_GCC-training.tsv", [f"{text}\thttp://a/{n}" for n, text in enumerate(texts)])
        write_lines(root / "Validation_GCC-1.1.0-Validation.tsv", ["a val\thttp://a"])
    if images:
        for number in (0, 1):
            write_image(root / "training" / f"{number}.jpg", number)
        write_image(root / "validation" / "0.jpg")
    return root


def write_multi30k(root: Path, home: str = "data/", packed: bool = True, images: bool = True) -> Path:
    """Two images for training, one in each of the other splits."""
    end = ".gz" if packed else ""
    for task1, task2, keys in (
        ("train", "train", FLICKR[:2]),
        ("val", "val", FLICKR[2:]),
        ("test_2016_flickr", "test_2016", ["5"]),
    ):
        write_lines(root / home / f"task1/image_splits/{task1}.txt", [f"{key}.jpg" for key in keys])
        for language in ("fr", "cs"):
            texts = [f"{language} of {key}" for key in keys]
            write_lines(root / home / f"task1/raw/{task1}.{language}{end}", texts)
        for language in ("en", "de"):
            for number in range(1, 6):
                texts = [f"{language}  {number} of {key}" for key in keys]
                write_lines(root / home / f"task2/raw/{task2}.{number}.{language}{end}", texts)
    if images:
        for key in (*FLICKR, "5"):
            write_image(root / "flickr30k-images" / f"{key}.jpg")
    return root


def write_coco_karpathy(root: Path, images: bool = True) -> Path:
    """One image of training, one of the rest of validation, one for testing."""
    entries = []
    for key, split in zip(COCO, SPLITS):
        folder, number = key.split("_")[1], int(key[-12:])
        sentences = [{"raw": f"caption {n}  of {number}", "sentid": 10 * number + n} for n in range(2)]
        entry = {"filepath": folder, "filename": f"{key}.jpg", "cocoid": number, "split": split}
        entries.append({**entry, "sentences": sentences})
        if images:
            write_image(root / folder / f"{key}.jpg")
    write_json(root / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    return root


def write_stair(root: Path, folder: str = "") -> Path:
    """Japanese captions of the images of `write_coco_karpathy`."""
    for part, keys in (("train", COCO[:1]), ("val", COCO[1:])):
        numbers = [int(key[-12:]) for key in keys]
        document = {
            "images": [{"id": number, "file_name": f"{key}.jpg"} for number, key in zip(numbers, keys)],
            "annotations": [
                {"id": 10 * number + n, "image_id": number, "caption": f"キャプション {n} {number}"}
                for number in numbers
                for n in range(2)
            ],
        }
        write_json(root / folder / f"stair_captions_v1.2_{part}.json", document)
    return root


def write_coco_cn(root: Path, folder: str = "coco-cn-version1805v1.1") -> Path:
    """Chinese captions of the same images; the first has two."""
    for split, key in zip(("train", "val", "test"), COCO):
        write_lines(root / folder / f"coco-cn_{split}.txt", [key])
    lines = [f"{COCO[0]}#0\t一只 狗", f"{COCO[1]}#0\t两只猫", f"{COCO[2]}#0\t三只鸟", f"{COCO[0]}#1\t狗", "other#0\t别"]
    write_lines(root / folder / "imageid.human-written-caption.txt", lines)
    return root


def write_wikipedia(root: Path, languages: Sequence[str] = ("en", "zh_yue")) -> Path:
    """Three sentences for training and one for validation."""
    for language in languages:
        write_text(root / f"{language}.train.txt", f"\ufeffOne {language}.\r\n\nTwö.\n  \nThree")
        write_lines(root / f"{language}.valid.txt", ["Held out."])
    return root
