"""Base of data sets with captions in several languages and region features."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from common.data.annotations import LanguageCaptions, read_json, read_once, read_rows, single_spaced
from common.data.datasets.base import IMAGE_SUFFIXES, DatasetStatus, MediaDataset, Scan, prefix_of, walk
from common.data.listing import DatasetError, DatasetMissing, Listing
from common.data.regions import REGION_SUFFIXES, KeyKind, RegionError, RegionFeatures
from common.data.sequences import Rows, Texts
from common.files import parsing, read_bytes

#: Possible names of region feature files.
_REGION_PATTERNS = ("{split}.h5", "{split}.npz", "{split}_[0-9]*.h5", "{split}_[0-9]*.npz", "{split}.hdf5")
_REGION_LAYOUT = "regions/<split>.h5 (or .npz, or <split>_<number>.h5)"


class LanguageCaptioned(MediaDataset):
    """Base of data sets with captions in several languages. Region features are in `regions/` by default."""

    streams = ("image",)
    languages: ClassVar[tuple[str, ...]]
    #: Whether its splits differ from those of `coco`, the data set that provides its images.
    own_splits: ClassVar[bool] = False
    #: The authors' region feature files of each split, relative to the root.
    official_regions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    region_keys: ClassVar[KeyKind] = "stem"

    def __init__(self, root: str | os.PathLike[str], regions: str | os.PathLike[str] | None = None) -> None:
        super().__init__(root)
        self.regions_root = None if regions is None else Path(regions).expanduser()

    def captions(self, split: str, language: str | None = None) -> LanguageCaptions:
        """Return the captions of a split in one language. None means the data set's first language."""
        split, _ = self._checked(split, None)
        return self._captions(split, self._checked_language(language))

    @abstractmethod
    def _captions(self, split: str, language: str) -> LanguageCaptions: ...

    @abstractmethod
    def image_path(self, key: str, split: str) -> Path:
        """Return the path of a picture. The file may be missing: models with region features don't read it."""

    def regions(self, split: str) -> RegionFeatures:
        """Return the region features of a split's pictures. The files may also contain pictures of other splits."""
        paths = self.region_paths(split)
        if not paths:
            folder = self.regions_folder
            raise DatasetMissing(
                f"{self.title}: no region features of split {split!r} in {folder}\n"
                f"  Expected: {_REGION_LAYOUT}\n"
                "  Make them: assemble data PAPER --extract-regions FOLDER_OF_IMAGES --detector WEIGHTS "
                f"--output {folder / split}.h5"
            )
        return _region_features(paths, self.region_keys)

    @property
    def regions_folder(self) -> Path:
        return self.regions_root or self.root / "regions"

    def region_paths(self, split: str) -> tuple[Path, ...]:
        """Return the existing region feature files of a split."""
        folder = self.regions_folder
        places = [(folder, pattern.format(split=split)) for pattern in _REGION_PATTERNS]
        official = self.official_regions.get(split, ())
        places += [(parent, pattern) for parent in (folder, self.root) for pattern in official]
        places.append((folder, "*"))  # last, files of any name, for all splits
        for parent, pattern in places:
            seen = (path for path in parent.glob(pattern) if not path.name.startswith("."))
            paths = [path for path in seen if path.suffix.lower() in REGION_SUFFIXES]
            if paths:
                return tuple(sorted(paths, key=_natural))
        return ()

    def region_notes(self, split: str) -> list[str]:
        try:
            features = self.regions(split)
        except DatasetMissing:
            return [f"{split}: no region features; expected {_REGION_LAYOUT} in {self.regions_folder}"]
        except (RegionError, OSError) as error:
            return [f"{split}: region features cannot be used: {error}"]
        try:
            keys = self.captions(split).keys
        except (DatasetMissing, ValueError):
            return []  # the status reports this error
        lacking = features.missing(keys)
        if not lacking:
            return []
        return [f"{split}: {len(lacking):,} of {len(keys):,} images have no region features, such as {lacking[0]}"]

    def _checked_language(self, language: str | None) -> str:
        language = self.languages[0] if language is None else language
        if language not in self.languages:
            raise ValueError(f"{self.title} has no captions in {language!r}; it has {', '.join(self.languages)}")
        return language


class CaptionedDataset(LanguageCaptioned):
    """A data set with captions and region features, whose pictures are optional."""

    further_layout = _REGION_LAYOUT
    #: Folders with a split's pictures `<key>.jpg`, relative to the root; the first that exists is used.
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def image_path(self, key: str, split: str) -> Path:
        folders = [self.root / folder for folder in self.image_folders.get(split, ("images",))]
        names = [folder / f"{key}{suffix}" for folder in folders for suffix in (".jpg", ".png", ".jpeg", ".webp")]
        if self.region_keys == "number":  # img2dataset's file names: 10,000 per folder
            names += [folder / f"{int(key) // 10_000:05d}" / f"{int(key):09d}.jpg" for folder in folders]
        return next((path for path in names if path.is_file()), names[0])

    def captions(self, split: str, language: str | None = None) -> LanguageCaptions:
        captions = super().captions(split, language)
        path = self.root / "groups.json"  # split -> key -> what an image shows; only miniatures have it
        if not path.is_file():
            return captions
        with parsing(path, DatasetError):
            group_of = read_json(path)[self._checked(split, None)[0]]
            return replace(captions, groups=np.array([group_of[key] for key in captions.keys], dtype=np.int64))

    def _all(self, split: str, fold: int | None) -> Listing:
        # Don't cache the listing: it would miss that a caption list grew when its download finished.
        return self._fresh(*self._checked(split, fold))[0]

    def _scan(self, split: str, fold: int | None) -> Scan:
        keys = {key for language in self.languages for key in self.captions(split, language).keys}
        home = self._one_of(
            *self.image_folders.get(split, ("images",)), reason=f"the images of split {split!r} are missing"
        )
        prefix = prefix_of(home, self.root)
        scan = Scan((), prefix)
        numbered = self.region_keys == "number"
        files = {
            str(int(stem)) if numbered and stem.isdecimal() else stem: prefix + name
            for name, stem in walk(home, IMAGE_SUFFIXES, scan.watched)
        }
        for key in sorted(keys):
            scan.add(files.get(key), key)
        return scan

    def status(self) -> DatasetStatus:
        counts: dict[str, int] = {}
        notes: list[str] = []
        unlike: dict[str, str] = {}
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
                if published := self._unlike_published(len(captions), self.published_count(split)):
                    unlike[part] = published
                    notes.append(f"{part}: {len(captions):,} {self.unit}, {published}")
            if any(part.split()[0] == split for part in counts):
                notes += [*self.region_notes(split), *self._picture_notes(split)]
        layout = "captions by image" if counts else ""
        return DatasetStatus(self, layout, counts, problems, tuple(dict.fromkeys(notes)), unlike)

    def _picture_notes(self, split: str) -> list[str]:
        try:
            listing = self.listing(split)
        except (DatasetMissing, ValueError):
            return [f"{split}: no images; only needed to extract region features and for figures"]
        if listing.missing:
            return [f"{split}: {listing.missing:,} listed images are missing, such as {listing.missing_names[0]}"]
        return []


_region_features = read_once(16)(RegionFeatures)


def _natural(path: Path) -> tuple[str | int, ...]:
    """Sort key that puts `train_10` after `train_9`."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name))


# ---------------------------------------------------------------------------------------------------- text files
def read_text(path: Path) -> str:
    """Read a UTF-8 text file, optionally gzipped."""
    with parsing(path, DatasetError):
        content = read_bytes(path, None)
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")


def read_text_lines(path: Path) -> list[str]:
    """Read the stripped lines of a text file, including blank ones; see :func:`read_text`."""
    lines = [line.strip() for line in read_text(path).replace("\r\n", "\n").split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def one_language(path: Path, language: str, rows: Iterable[tuple[str, Iterable[str]]]) -> LanguageCaptions:
    """Collect captions by image key. Leave out blank captions, and images whose captions are all blank."""
    captions = [(key, tuple(single_spaced(text) for text in texts if text.strip())) for key, texts in rows]
    kept = {key: texts for key, texts in captions if texts}
    if not kept:
        raise DatasetError(f"{path}: has no captions; download it again")
    if len({key for key, _ in captions}) < len(captions):
        raise DatasetError(f"{path}: an image occurs twice")
    return LanguageCaptions(language, Texts(kept), Rows.texts(kept.values()), np.arange(len(kept)))


def read_caption_table(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the row number, from 0, and the caption of each row in a tab-separated table of captions.

    A table with a heading has a column `caption`, quoted as in CSV. Without a heading, captions are the first column,
    an address follows, and quotes are literal.
    """

    def captions(lines: Iterator[str]) -> Iterator[str]:
        first = next(lines, "")
        heading = first.rstrip("\r\n").split("\t")
        headed = "caption" in heading
        column = heading.index("caption") if headed else 0
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if headed else csv.QUOTE_NONE
        rows = lines if headed else itertools.chain([first], lines)
        csv.field_size_limit(2**24)  # the default is too small
        for row in csv.reader(rows, delimiter="\t", quoting=quoting, strict=True):
            if len(row) < (len(heading) if headed else 2):
                raise ValueError(f"{len(row)} columns; expected a caption, a tab and an address")
            if "\n" in row[column] and "\t" in row[column]:
                raise ValueError("a quote is not closed on its line; in a table without heading, quotes are literal")
            yield row[column]

    return enumerate(read_rows(path, captions, str))
