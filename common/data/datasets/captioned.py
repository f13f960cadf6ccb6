"""Base of data sets with captions in several languages: captions by key, region features, status."""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from common.data.annotations import LanguageCaptions, read_json, read_once
from common.data.datasets.base import IMAGE_SUFFIXES, DatasetStatus, MediaDataset, Scan, prefix_of, walk
from common.data.listing import DatasetMissing
from common.data.regions import REGION_SUFFIXES, KeyKind, RegionError, RegionFeatures
from common.files import named

#: Possible names of region feature files.
_REGION_PATTERNS = ("{split}.h5", "{split}.npz", "{split}_[0-9]*.h5", "{split}_[0-9]*.npz", "{split}.hdf5")
_REGION_LAYOUT = "regions/<split>.h5 (or .npz, or <split>_<number>.h5)"


class LanguageCaptioned:
    """Mixin for captions by language and region features of the same pictures.

    Attributes:
        regions_root: folder of the region features; None = `regions` in the folder of the data set.
        own_splits: whether its splits differ from those of `coco`, the data set whose images it shows.
    """

    languages: ClassVar[tuple[str, ...]]
    own_splits: ClassVar[bool] = False
    #: The authors' region feature files of each split, relative to the root.
    official_regions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    region_keys: ClassVar[KeyKind] = "stem"
    root: Path
    regions_root: Path | None = None

    @abstractmethod
    def captions(self, split: str, language: str) -> LanguageCaptions:
        """The captions of a split in one language."""

    @abstractmethod
    def image_path(self, key: str, split: str) -> Path:
        """The file of a picture, which may not exist: a model with region features does not need it."""

    def regions(self, split: str) -> RegionFeatures:
        """The region features of a split's pictures; may contain others."""
        paths = self.region_paths(split)
        if not paths:
            folder = self.regions_folder
            raise DatasetMissing(
                f"{self._title()}: no region features of split {split!r} in {folder}\n"
                f"  Expected: {_REGION_LAYOUT}\n"
                "  Make them: assemble data PAPER --extract-regions FOLDER_OF_IMAGES --detector WEIGHTS "
                f"--output {folder / split}.h5"
            )
        return _region_features(paths, self.region_keys)

    @property
    def regions_folder(self) -> Path:
        return self.root / "regions" if self.regions_root is None else Path(self.regions_root)

    def region_paths(self, split: str) -> tuple[Path, ...]:
        """Files with the region features of a split; empty if there are none."""
        folder = self.regions_folder
        for pattern in _REGION_PATTERNS:
            found = sorted(folder.glob(pattern.format(split=split)), key=_natural)
            if found:
                return tuple(found)
        for parent in (folder, self.root):
            for pattern in self.official_regions.get(split, ()):
                found = sorted(parent.glob(pattern), key=_natural)
                if found:
                    return tuple(found)
        if not folder.is_dir():
            return ()
        # Otherwise, features of all splits in files of any name.
        return tuple(
            sorted((path for path in folder.iterdir() if path.suffix.lower() in REGION_SUFFIXES), key=_natural)
        )

    def region_notes(self, split: str) -> list[str]:
        try:
            features = self.regions(split)
        except DatasetMissing:
            return [f"{split}: no region features; expected {_REGION_LAYOUT} in {self.regions_folder}"]
        except (RegionError, OSError) as error:
            return [f"{split}: region features cannot be used: {error}"]
        try:
            keys = self.captions(split, self.languages[0]).keys
        except (DatasetMissing, ValueError):
            return []  # the status reports it
        lacking = features.missing(keys)
        if not lacking:
            return []
        return [f"{split}: {len(lacking):,} of {len(keys):,} images have no region features, such as {lacking[0]}"]

    def check_regions(self, samples: int, generator_seed: int = 0) -> list[str]:
        """Read the regions of random pictures of every split and report damage."""
        problems = []
        for split in self.splits:  # type: ignore[attr-defined]
            try:
                features = self.regions(split)
            except (DatasetMissing, RegionError):
                continue  # the status reports it
            keys = features.keys
            chosen = np.random.default_rng(generator_seed).permutation(len(keys))[:samples]
            for row in sorted(chosen.tolist()):
                try:
                    features[keys[row]]
                except RegionError as error:
                    problems.append(str(error))
        return problems

    def _checked_language(self, language: str) -> str:
        if language not in self.languages:
            raise ValueError(f"{self._title()} has no captions in {language!r}; it has {', '.join(self.languages)}")
        return language

    def _title(self) -> str:
        return getattr(self, "title", type(self).__name__)


class CaptionedDataset(LanguageCaptioned, MediaDataset):
    """A data set of captions with region features; its pictures are optional.

    Args:
        regions: folder of the region features; None = `regions` in the root.
    """

    num_classes = 0
    streams = ("image",)
    further_layout = _REGION_LAYOUT
    prepares = "check of every caption and of the region features; decoding of a random sample of the pictures"
    #: Folders of a split's pictures `<key>.jpg`, relative to the root; the first that exists is used.
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, root: str | os.PathLike[str], regions: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root)
        if regions is not None:
            self.regions_root = Path(regions).expanduser()

    def image_path(self, key: str, split: str) -> Path:
        folders = [self.root / folder for folder in self.image_folders.get(split, ("images",))]
        names = [folder / f"{key}{suffix}" for folder in folders for suffix in (".jpg", ".png", ".jpeg", ".webp")]
        if self.region_keys == "number":  # as img2dataset names files: 10,000 per folder
            names += [folder / f"{int(key) // 10_000:05d}" / f"{int(key):09d}.jpg" for folder in folders]
        return next((path for path in names if path.is_file()), names[0])

    def _scan(self, split: str, fold: int | None) -> Scan:
        keys = {key for language in self.languages for key in self.captions(split, language).keys}
        folder = next((f for f in self.image_folders.get(split, ("images",)) if (self.root / f).is_dir()), None)
        if folder is None:
            expected = self.image_folders.get(split, ("images",))[0]
            raise self._lacks(self.root / expected, f"the images of split {split!r} are missing")
        scan = Scan((), f"{folder}/")
        home = self.root / folder
        numbered = self.region_keys == "number"
        found = {
            str(int(stem)) if numbered and stem.isdecimal() else stem: name
            for name, stem in walk(home, IMAGE_SUFFIXES, scan.watched)
        }
        scan.names = [prefix_of(home, self.root) + found[key] for key in sorted(keys) if key in found]
        scan.missing_names = sorted(keys.difference(found))
        scan.labels = [-1] * len(scan.names)
        return scan

    def status(self) -> DatasetStatus:
        """Status of captions by split and language, region features, and pictures."""
        counts: dict[str, int] = {}
        notes: list[str] = []
        problems: list[str] = []
        for split in self.splits:
            for language in self.languages:
                part = split if len(self.languages) == 1 else f"{split} {language}"
                try:
                    captions = self.captions(split, language)
                except (DatasetMissing, ValueError) as error:
                    problems.append(str(error))
                    continue
                counts[part] = len(captions)
                notes += self._unlike_published(part, len(captions), self.published_count(split))
            if any(part.split()[0] == split for part in counts):
                notes += self.region_notes(split)
                notes += self._picture_notes(split)
        layout = "captions by image" if counts else ""
        return DatasetStatus(self, layout, counts, problems, tuple(dict.fromkeys(notes)))

    def grouped(self, captions: LanguageCaptions, split: str) -> LanguageCaptions:
        """Add the groups of `groups.json`, which only miniatures have."""
        path = self.root / "groups.json"
        if not path.is_file():
            return captions
        known = read_json(path).get(split)
        if not isinstance(known, dict):
            raise ValueError(f"{path}: no groups of split {split!r}")
        try:
            groups = np.array([int(known[key]) for key in captions.keys], dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: an image of split {split!r} has no group ({error})") from None
        return replace(captions, groups=groups)

    def _picture_notes(self, split: str) -> list[str]:
        try:
            listing = self.listing(split)
        except (DatasetMissing, ValueError):
            return [f"{split}: the images are not there; they are only needed for region features and for pictures"]
        if listing.missing:
            return [f"{split}: {listing.missing:,} listed images are missing, such as {listing.missing_names[0]}"]
        return []


@read_once(16)
def _region_features(paths: tuple[Path, ...], key: KeyKind) -> RegionFeatures:
    return RegionFeatures(paths, key)


def _natural(path: Path) -> tuple[str | int, ...]:
    """Sorts `train_10` after `train_9`."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name))


# ---------------------------------------------------------------------------------------------------- text files
def read_text(path: Path) -> str:
    """A UTF-8 text file, optionally gzipped."""
    with named(path):
        content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; get the file anew") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); get the file anew") from None


def read_text_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, including blank ones; see :func:`read_text`."""
    lines = [line.strip() for line in read_text(path).replace("\r\n", "\n").split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def read_caption_table(path: Path) -> Iterator[tuple[int, str]]:
    """Rows of a tab-separated table of captions: number from 0, and caption.

    With a heading, the captions are the column `caption`, quoted as in CSV. Without one, they are the first column,
    followed by an address, and quotes are literal.
    """
    with named(path), path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            first = stream.readline().rstrip("\r\n").split("\t")
            headed = "caption" in first
            column = first.index("caption") if headed else 0
            if not headed:
                stream.seek(0)
            quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if headed else csv.QUOTE_NONE
            # The csv module's default field limit is too small.
            csv.field_size_limit(2**24)
            for number, row in enumerate(csv.reader(stream, delimiter="\t", quoting=quoting, strict=True)):
                if len(row) < (len(first) if headed else 2):
                    raise ValueError(
                        f"{path}, line {number + 1 + headed}: {len(row)} columns; a caption and an address, separated "
                        "by a tab, are expected"
                    )
                if "\n" in row[column] and "\t" in row[column]:
                    raise ValueError(
                        f"{path}, caption {number}: a quote at its beginning is not closed in its line, and several "
                        "lines came to be one; take the heading away, then quotes mean themselves"
                    )
                yield number, row[column]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); get the file anew") from None
        except csv.Error as error:
            raise ValueError(f"{path}: damaged ({error}); get the file anew") from None
