"""Pascal VOC: which of 20 classes a photograph shows, and their boxes."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.data.annotations import Boxes
from common.data.datasets.base import (
    IMAGE_SUFFIXES,
    MediaDataset,
    Scan,
    entries,
    prefix_of,
    read_lines,
    walk,
    write_lines,
)
from common.data.datasets.coco import Annotated
from common.data.listing import DatasetError, Listing
from common.files import open_regular, parsing

_PUBLISHED = {
    "2007": {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952},
    "2012": {"train": 5_717, "val": 5_823, "trainval": 11_540},
}
# Flag in the lists -> label: 1 present, 0 absent, -1 only difficult examples.
_STATES = {"1": 1, "-1": 0, "0": -1}


class PascalVOC(MediaDataset):
    """Pascal VOC of one or several years, in the layout of the development kit; `root` may be `VOCdevkit` itself.

    Class names come from the lists of the first year, in alphabetical order. "test" leaves out 2012, whose test images
    have no labels.

    Source: docs/papers/mct.md [9], "VOC07 linear SVM" and "VOC07+12 detection".
    """

    name = "voc"
    title = "Pascal VOC"
    splits = ("train", "val", "trainval", "test")
    num_classes = 20
    streams = ("image",)
    expected_layout = (
        "VOCdevkit/VOC2007/JPEGImages/<image>.jpg   (and VOC2012 next to it)\n"
        "VOCdevkit/VOC2007/Annotations/<image>.xml   (boxes)\n"
        "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt, test.txt, ...: one image per line\n"
        "VOCdevkit/VOC2007/ImageSets/Main/<class>_trainval.txt, ...: image and 1, 0 (difficult) or -1 per line"
    )
    size = "0.9 GB (2007), 2 GB (2012)"
    license = "free for research; the images belong to their Flickr authors"
    source = (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007 (trainval and test) and "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
    )

    def __init__(self, root: str | Path, years: Sequence[str] = ("2007",)) -> None:
        super().__init__(root)
        # YAML reads an unquoted year as a number.
        self.years = tuple(str(year) for year in years)
        if isinstance(years, str) or not self.years or len(set(self.years)) < len(self.years):
            raise ValueError(f"years must be a list of different years, such as [2007, 2012], not {years!r}")

    @property
    def full_title(self) -> str:
        return f"{self.title} {' and '.join(self.years)}"

    def published_count(self, split: str, fold: int | None = None) -> int | None:
        return sum(_PUBLISHED.get(year, {}).get(split, 0) for year in self.years) or None

    def labels(self, split: str, listing: Listing | None = None) -> npt.NDArray[np.int8]:
        """Return which classes each image of a listing (None = the whole split) shows, int8 [N, classes].

        1 is present, 0 absent, -1 only difficult instances. (The lists use 1, -1 and 0 for these.)
        """
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        states: dict[str, list[int]] = {}
        for year in self._years_of(split):
            lists = self._lists(year)
            prefix = prefix_of(lists.parent.parent, self.root)
            for name in listing.classes:
                path = lists / f"{name}_{split}.txt"
                with parsing(path, DatasetError):
                    for image, state in map(str.split, read_lines(path)):
                        states.setdefault(f"{prefix}JPEGImages/{image}", []).append(_STATES[state])
        rows = [states.get(os.path.splitext(name)[0], []) for name in listing.names]
        for name, row in zip(listing.names, rows):
            if len(row) != len(listing.classes):
                raise DatasetError(f"{self.root}: the lists of {split} of all classes must name {name} exactly once")
        return np.array(rows, dtype=np.int8).reshape(len(rows), len(listing.classes))

    def boxes(self, split: str, listing: Listing | None = None) -> list[Boxes]:
        """Return the :data:`common.data.annotations.Boxes` of each image of a listing, with the flag `difficult`."""
        split, _ = self._checked(split, None)
        listing = self.listing(split) if listing is None else listing
        label_of = {name: label for label, name in enumerate(listing.classes)}
        paths = [clip.path.parent.parent / "Annotations" / f"{clip.path.stem}.xml" for clip in listing]
        return [_read_boxes(path, label_of) for path in paths]

    def _options(self) -> dict[str, object]:
        return {"years": self.years}

    def _scan(self, split: str, fold: int | None) -> Scan:
        years = self._years_of(split)
        endings = tuple(f"_{part}.txt" for part in self.splits)
        names = [name for name in entries(self._lists(self.years[0]))[1] if name.endswith(endings)]
        classes = tuple(sorted({name.rpartition("_")[0] for name in names}))
        scan = Scan(classes, ", ".join(f"VOC{year}" for year in years))
        scan.watched += map(self._lists, self.years)
        for year in years:
            lists = self._lists(year)
            images = lists.parent.parent / "JPEGImages"
            if not images.is_dir():
                raise self._lacks(images)
            scan.watched.append(lists / f"{split}.txt")
            prefix = prefix_of(images, self.root)
            files = {stem: prefix + name for name, stem in walk(images, IMAGE_SUFFIXES, scan.watched)}
            for image in dict.fromkeys(line.split()[0] for line in read_lines(lists / f"{split}.txt")):
                scan.add(files.get(image), prefix + image)
        return scan

    def _years_of(self, split: str) -> list[str]:
        """Return the years with labeled images of a split."""
        having = []
        for year in self.years:
            lists = self._lists(year)
            labeled = any(name.endswith(f"_{split}.txt") for name in entries(lists)[1])
            if labeled and (lists / f"{split}.txt").is_file():
                having.append(year)
            elif split != "test" or self.years == (year,):
                raise self._lacks(lists / f"{split}.txt", f"VOC{year} lacks the lists of split {split!r}")
        return having

    def _lists(self, year: str) -> Path:
        return self._one_of(f"VOCdevkit/VOC{year}/ImageSets/Main", f"VOC{year}/ImageSets/Main")


def _read_boxes(path: Path, label_of: Mapping[str, int]) -> Boxes:
    with parsing(path, DatasetError), open_regular(path) as file:
        # Ignore nested boxes of parts of a person (head, hand, foot).
        objects = ElementTree.parse(file).getroot().findall("object")
        sides = [[item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")] for item in objects]
        # Pixel numbers start at 1 and include the last one. As edges, the whole image (1, 1, W, H) is (0, 0, W, H), so
        # only the first two change (as in detectron2's data/datasets/pascal_voc.py).
        boxes = np.array(sides, dtype=np.float64).reshape(-1, 4) - (1.0, 1.0, 0.0, 0.0)
        if not np.all(boxes[:, 2:] > boxes[:, :2]):
            raise DatasetError(f"{path}: a box has no area")
        return {
            "boxes": boxes.astype(np.float32),
            "labels": np.array([label_of[(item.findtext("name") or "").strip()] for item in objects], dtype=np.int64),
            "difficult": np.array([(item.findtext("difficult") or "0").strip() == "1" for item in objects], np.bool_),
        }


# ---------------------------------------------------------------------------------------------------- writing
def write_voc(
    folder: Path, images: Sequence[Annotated], classes: Sequence[str], parts: Mapping[str, Sequence[int]]
) -> None:
    """Write ``Annotations`` and ``ImageSets/Main`` of one year of Pascal VOC; `parts` maps lists to rows."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for image in images:
        tree = ElementTree.ElementTree(_voc_annotation(image, folder.name, classes))
        ElementTree.indent(tree, "\t")
        tree.write(folder / "Annotations" / f"{Path(image.file_name).stem}.xml", encoding="utf-8")
    lists = folder / "ImageSets" / "Main"
    for part, rows in parts.items():
        stems = [Path(images[row].file_name).stem for row in rows]
        write_lines(lists / f"{part}.txt", stems)
        for number, name in enumerate(classes):
            lines = (f"{stem} {_voc_flag(images[row], number):2d}" for stem, row in zip(stems, rows))
            write_lines(lists / f"{name}_{part}.txt", lines)


def _voc_flag(image: Annotated, category: int) -> int:
    """Return 1 if the image shows the category, 0 if only with difficult instances, -1 if not."""
    shown = [instance for instance in image.instances if instance.category == category]
    if not shown:
        return -1
    return 0 if all(instance.difficult for instance in shown) else 1


def _voc_annotation(image: Annotated, folder: str, classes: Sequence[str]) -> ElementTree.Element:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder=folder, filename=image.file_name)
    add(ElementTree.SubElement(root, "source"), database="generated", annotation="generated", image="generated")
    add(ElementTree.SubElement(root, "size"), width=image.width, height=image.height, depth=3)
    add(root, segmented=0)
    for instance in image.instances:
        entry = ElementTree.SubElement(root, "object")
        add(entry, name=classes[instance.category], pose="Unspecified", truncated=0)
        add(entry, difficult=int(instance.difficult))
        left, top, right, bottom = instance.box
        # Pixel numbers start at 1, and the box includes the last one.
        add(
            ElementTree.SubElement(entry, "bndbox"),
            xmin=max(1, math.floor(left) + 1),
            ymin=max(1, math.floor(top) + 1),
            xmax=min(image.width, math.ceil(right)),
            ymax=min(image.height, math.ceil(bottom)),
        )
    return root
