"""The user's data: a folder of clips, images or sounds; docs/own-data.md shows its layouts.

If there are no splits, the clips of each class are divided into five folds by a hash of the name, which is the same on
every machine. Fold 1 is the test fold. Parts of one recording may get different folds; to prevent that, give a list.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.data.annotations import ImageAnnotations, LanguageCaptions, read_csv, single_spaced
from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    walk,
)
from common.data.datasets.captioned import LanguageCaptioned
from common.data.listing import DatasetError, DatasetMissing, Listing
from common.data.regions import picture_key
from common.data.sequences import Rows, Texts

#: Name of the list, following Hugging Face.
LIST = "metadata.csv"
#: Maps the name of a folder, or a value of the column `split`, to a split.
SPLIT_OF: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OTHER = {"validation": "test", "test": "validation"}
#: Folds that a class's files get in turn. A class with one file is for training, because fold 1 is the test fold.
_DEALT = (2, 1, 3, 4, 5)


@dataclass(frozen=True)
class Entry:
    """A file, or a part of a file, described by folder names or the list. Paths are relative to the root.

    Args:
        split: "train", "validation" or "test"; "" if there are no splits.
        sound: separate sound file; "" if the file contains the sound.
        start, end: part of the file in seconds; NaN means the file's start or end.
        captions: captions by language; the key "" is the data set's default language.
    """

    name: str
    label: str = ""
    split: str = ""
    sound: str = ""
    start: float = math.nan
    end: float = math.nan
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


class OwnFolder(MediaDataset):
    """Base of the user's data sets: reads layouts, splits and folds, and explains problems."""

    splits = ("train", "validation", "test", "all")
    split_aliases: ClassVar[Mapping[str, str]] = {
        "val": "validation",
        # names of the splits in recipes
        "trainval": "train",
        "unbalanced_train": "train",
        "evaluation": "test",
    }
    num_folds = 5
    num_classes = None
    size = "unknown"
    license = "unknown; state it when you share the model"
    source = ""
    suffixes: ClassVar[frozenset[str]]
    #: Columns of the list besides `file_name`, `label` and `split`.
    columns: ClassVar[tuple[str, ...]] = ()

    def _lacks(self, path: Path, reason: str = "") -> DatasetMissing:
        layout = "\n".join(f"    {line}" for line in self.expected_layout.splitlines())
        return DatasetMissing(
            f"{self.title}: {reason + '; looked in' if reason else 'nothing at'} {path}\n"
            f"  A folder looks like this:\n{layout}\n"
            "  `--data FOLDER` names it; docs/own-data.md shows examples."
        )

    def summary(self) -> str:
        """Return lines to print: the numbers of files and classes, and notes."""
        listing = self.listing("all")
        classes = len(listing.classes)
        of = f"of {classes} {'class' if classes == 1 else 'classes'}" if classes else "without classes"
        first = f"{self.root}: {len(listing):,} {self.unit} {of} ({listing.layout})"
        return "\n".join([first, *(f"  {note}" for note in listing.notes)])

    def _scan(self, split: str, fold: int | None) -> Scan:
        items, scan = self._contents()
        label_of = {name: label for label, name in enumerate(scan.classes)}
        folds = _folds(items)
        for row in self._rows_of_split(items, folds, split, fold):
            item = items[row]
            label = label_of.get(item.label, -1)
            scan.add(
                item.name, label=label, sound_label=label if "audio" in self.streams else -1, fold=folds[row],
                start=item.start, end=item.end, sound=item.sound,
            )  # fmt: skip
        return scan

    def _rows_of_split(self, items: Sequence[Entry], folds: Sequence[int], split: str, fold: int | None) -> list[int]:
        present = {item.split for item in items} - {""}
        if split == "all":
            return list(range(len(items)))
        if present and fold not in (None, 1):
            raise ValueError(
                f"{self.root} is already divided into {', '.join(sorted(present))}, so there is no fold {fold}; "
                "leave fold empty"
            )
        if present <= {"train"}:
            return [row for row, assigned in enumerate(folds) if (assigned == (fold or 1)) != (split == "train")]
        wanted = split if split in present else _OTHER.get(split)
        return [row for row, item in enumerate(items) if item.split == wanted]

    def _contents(self) -> tuple[list[Entry], Scan]:
        """Return the folder's files, sorted by name, and an empty scan with the classes."""
        self.require_folder()
        items, scan = self._listed() if (self.root / LIST).is_file() else self._in_folders()
        for what in ("label", "split"):
            lacking = [item for item in items if not getattr(item, what)]
            if lacking and len(lacking) < len(items):
                raise DatasetError(
                    f"{self.root / lacking[0].name}: no {what}, but {len(items) - len(lacking)} of {len(items)} files "
                    f"have one; set it in {LIST}, or with the folder that holds the file"
                )
        scan.classes = tuple(sorted({item.label for item in items} - {""}))
        return sorted(items, key=lambda item: item.name), scan

    # -- class folders -------------------------------------------------------------------------------------------------

    def _in_folders(self) -> tuple[list[Entry], Scan]:
        watched: list[Path] = []
        names: list[str] = []
        ignored: Counter[str] = Counter()
        for name, _ in walk(self.root, None, watched):
            suffix = os.path.splitext(name)[1].lower()
            if os.path.basename(name) in (LIST, "metadata.jsonl"):
                raise DatasetError(
                    f"{self.root / name} is not read: list the files of all splits in {self.root / LIST}"
                )
            if suffix in self.suffixes:
                names.append(name)
            else:
                ignored[suffix or name] += 1
        counts = ", ".join(f"{count} x {kind}" for kind, count in ignored.most_common(3))
        if not names:
            reason = f"it holds {counts}" if ignored else "it is empty"
            raise self._lacks(self.root, f"no file with one of the endings {' '.join(sorted(self.suffixes))}; {reason}")
        parts = self._split_folders(sorted({name.split("/")[0] for name in names if "/" in name}))
        items = []
        for name in names:
            *folders, _ = name.split("/")
            split = SPLIT_OF[folders.pop(0).lower()] if parts and folders else ""
            items.append(Entry(name, _normal(folders[0]) if folders else "", split))
        layout = "class folders" if any(item.label for item in items) else "files without classes"
        layout += f" in {', '.join(f'{part}/' for part in parts)}" if parts else ""
        notes = [f"{ignored.total():,} other files are ignored: {counts}"] if ignored else []
        return items, Scan((), layout, watched, notes=notes)

    def _split_folders(self, folders: Sequence[str]) -> list[str]:
        """Return the split folders. If there are other folders, return none, because a class may be called "train"."""
        parts = [name for name in folders if name.lower() in SPLIT_OF]
        others = [name for name in folders if name not in parts]
        if others and len({SPLIT_OF[part.lower()] for part in parts}) > 1:
            raise DatasetError(
                f"{self.root} holds the splits {', '.join(parts)} and also {', '.join(others[:3])}: put each "
                "class into the folder of a split"
            )
        return [] if others else parts

    # -- metadata.csv --------------------------------------------------------------------------------------------------

    def _listed(self) -> tuple[list[Entry], Scan]:
        path = self.root / LIST
        watched = [path]
        # Accented letters may be composed or decomposed, so compare normalized names.
        present = {_normal(name): name for name, _ in walk(self.root, None, watched)}
        parse = functools.partial(self._entry, present=present)
        items: dict[tuple[str, str], Entry] = {}
        for item in read_csv(path, parse, self._check_columns, skipinitialspace=True, strict=True):
            part = (item.name, f"{item.start} {item.end}")  # as text, because nan != nan
            items[part] = item if part not in items else self._joined(items[part], item)
        if not items:
            raise DatasetError(f"{path} lists no files: write a line for every file below its heading")
        return list(items.values()), Scan((), f"list {LIST}", watched)

    def _entry(self, row: Mapping[str | None, Any], present: Mapping[str, str]) -> Entry:
        if None in row:
            raise ValueError("the line has more cells than the heading; put texts that contain commas in quotes")
        cells = {str(column).strip(): (value or "").strip() for column, value in row.items()}

        def file(stated: str) -> str:
            name = _normal(stated.replace("\\", "/").removeprefix("./"))
            if name not in present:
                raise ValueError(f"file {name!r} does not exist in {self.root}")
            return present[name]

        split = cells.get("split", "").lower()
        if split and split not in SPLIT_OF:
            raise ValueError(f"split {split!r} must be one of {', '.join(SPLIT_OF)}")
        start, end = (float(cells.get(column) or math.nan) for column in ("start", "end"))
        if start < 0 or end <= start:
            raise ValueError(f"start {start:g} and end {end:g} must be seconds, with start before end")
        sound = file(cells["sound"]) if cells.get("sound") else ""
        label = _normal(cells.get("label", ""))
        tags = (_normal(tag.strip()) for tag in cells.get("tags", "").split(";") if tag.strip())
        return Entry(
            file(cells["file_name"]), label, SPLIT_OF.get(split, ""), sound, start, end, _captions(cells),
            tuple(dict.fromkeys(tags)),
        )  # fmt: skip

    def _check_columns(self, columns: Iterable[str]) -> None:
        valid = ("file_name", "label", "split", *self.columns)
        for column in columns:
            if column not in valid and not ("caption" in valid and column.startswith("caption_")):
                raise ValueError(f"unknown column {column!r}; a list of {self.unit} has {', '.join(valid)}")

    def _joined(self, before: Entry, item: Entry) -> Entry:
        """Add captions and tags of another line about the same file."""
        if (item.label, item.split) != (before.label, before.split) or not (item.captions or item.tags):
            raise DatasetError(f"{self.root / item.name} is listed twice")
        captions = dict(before.captions)
        for language, texts in item.captions.items():
            captions[language] = (*captions.get(language, ()), *texts)
        return replace(before, captions=captions, tags=tuple(dict.fromkeys((*before.tags, *item.tags))))


class FolderOfClips(OwnFolder):
    """Clips of the user: videos with sound.

    In a list, the column `sound` names a separate sound file. The columns `start` and `end` (seconds) cut a clip out of
    a long file, which may have several lines.
    """

    name = "own_clips"
    title = "Folder of clips"
    streams = ("video", "audio")
    suffixes = VIDEO_SUFFIXES
    columns = ("sound", "start", "end")
    expected_layout = (
        "<class>/<any name>.mp4                                  (.avi .mkv .webm .mov ..., with sound)\n"
        "or train/<class>/..., val/<class>/..., test/<class>/...\n"
        "or files without class folders\n"
        "or metadata.csv: file_name[,sound][,label][,split][,start][,end]"
    )


class FolderOfAudio(OwnFolder):
    """The user's sounds, in class folders or with a list."""

    name = "own_audio"
    title = "Folder of audio"
    streams = ("audio",)
    suffixes = AUDIO_SUFFIXES
    columns = ("start", "end")
    expected_layout = (
        "<class>/<any name>.wav                                  (.flac .ogg .mp3 .m4a)\n"
        "or train/<class>/..., val/<class>/..., test/<class>/...\n"
        "or files without class folders\n"
        "or metadata.csv: file_name[,label][,split][,start][,end]"
    )


class FolderOfImages(LanguageCaptioned, OwnFolder):
    """The user's images, in class folders, or with a list of captions and tags.

    An image can have several lines, one for each caption. If no image has tags, the classes are used as tags.

    Args:
        language: language of the captions in the column `caption`, and of models with one language.
        regions: folder of region features; None = `regions` in the root.
    """

    name = "own_images"
    title = "Folder of images"
    streams = ("image",)
    suffixes = IMAGE_SUFFIXES
    columns = ("caption", "text", "tags")
    expected_layout = (
        "<class>/<any name>.jpg                                  (.png .webp ...)\n"
        "or train/<class>/..., val/<class>/..., test/<class>/...\n"
        "or metadata.csv: file_name[,caption][,caption_<language>][,tags][,label][,split]"
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        language: str = "en",
        regions: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(root, regions)
        self.language = language
        self._names: dict[str, dict[str, str]] = {}

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Return captions and tags of a listing's images, in the order of the listing."""
        listing = self.listing(split) if listing is None else listing
        items, _ = self._contents()
        row_of = {item.name: row for row, item in enumerate(items)}
        rows = [row_of[name] for name in listing.names]
        texts = [self._captions_of(item, self.language) for item in items]
        numbers = np.cumsum([0, *map(len, texts)])
        tagged = any(item.tags for item in items)
        tags_of = [item.tags if tagged else (item.label,) * bool(item.label) for item in items]
        names = tuple(sorted({tag for item_tags in tags_of for tag in item_tags}))
        column = {name: number for number, name in enumerate(names)}
        tags = np.zeros((len(rows), len(names)), dtype=np.bool_)
        for place, row in enumerate(rows):
            tags[place, [column[tag] for tag in tags_of[row]]] = True
        ids = np.array(rows, dtype=np.int64)
        return ImageAnnotations(
            ids,
            Rows.texts(texts[row] for row in rows),
            Rows.numbers(range(numbers[row], numbers[row + 1]) for row in rows),
            tags,
            names,
            ids,
        )

    def _checked_language(self, language: str | None) -> str:
        return self.language if language is None else language

    def _captions(self, split: str, language: str) -> LanguageCaptions:
        items, _ = self._contents()
        names = set(self.listing(split).names)
        if not any(self._captions_of(item, language) for item in items):
            listed = sorted({code or self.language for item in items for code in item.captions})
            raise DatasetError(
                f"{self.root} has no captions in {language!r}; it has {', '.join(listed) or 'none at all'}: write them "
                f"into the column caption_{language} of {LIST}"
            )
        keys: dict[str, Entry] = {}
        for item in items:
            key = picture_key(Path(item.name).name)
            if item.name in names and self._captions_of(item, language):
                if key in keys:
                    raise DatasetError(
                        f"{self.root}: {keys[key].name} and {item.name} would both be called {key!r} among region "
                        "features: give them other names"
                    )
                keys[key] = item
        texts = Rows.texts(self._captions_of(item, language) for item in keys.values())
        return LanguageCaptions(language, Texts(keys), texts, np.arange(len(keys)))

    def image_path(self, key: str, split: str) -> Path:
        wanted = SPLIT_OF.get(split, split)
        if wanted not in self._names:  # read the folder once, not for every picture
            preferred = set(self.listing(split).names)
            items = sorted(self._contents()[0], key=lambda item: item.name not in preferred)
            # The last entry wins: the reversed order gives this split's files precedence over others of the same name.
            self._names[wanted] = {picture_key(Path(item.name).name): item.name for item in reversed(items)}
        return self.root / self._names[wanted].get(key, f"{key}.jpg")

    def _captions_of(self, item: Entry, language: str) -> tuple[str, ...]:
        captions = item.captions.get(language, ())
        return (*item.captions.get("", ()), *captions) if language == self.language else captions

    def _options(self) -> dict[str, object]:
        return {"language": self.language}


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folds(items: Sequence[Entry]) -> list[int]:
    """Return the fold of every item, from 1. The files of a class, sorted by name hash, get folds in turn."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[_normal(item.name)].add(item.label)
    groups: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for row, item in enumerate(items):
        # Keep the parts of a file together. Files with several classes form a separate group.
        name = _normal(item.name)
        groups["\0".join(sorted(labels[name]))].setdefault(name, []).append(row)
    folds = [0] * len(items)
    for files in groups.values():
        for place, name in enumerate(sorted(files, key=_digest)):
            for row in files[name]:
                folds[row] = _DEALT[place % len(_DEALT)]
    return folds


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _captions(cells: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    captions: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    for column, text in cells.items():
        if text and (column in ("caption", "text") or column.startswith("caption_")):
            captions[column.partition("_")[2]] += (single_spaced(text),)
    return dict(captions)
