"""The user's data: a folder of clips, images or sounds; docs/own-data.md shows its layouts.

Without splits, hashes of the names assign each class to five folds, the same on every machine; fold 1 is the test fold.
Pieces of one recording may get different folds; use a list to split those.
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

from common.data.annotations import ImageAnnotations, LanguageCaptions, read_csv, read_json_lines, single_spaced
from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    entries,
    walk,
)
from common.data.datasets.captioned import LanguageCaptioned
from common.data.listing import DatasetError, DatasetMissing, Listing
from common.data.regions import picture_key
from common.data.sequences import Rows, Texts

#: List names by Hugging Face's convention.
LISTS = ("metadata.csv", "metadata.jsonl")
#: Split by folder name or value of the column `split`.
SPLIT_OF: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OTHER = {"validation": "test", "test": "validation"}
#: Order in which a class's files are assigned to folds; a class of one file is for training.
_DEALT = (2, 1, 3, 4, 5)


@dataclass(frozen=True)
class Item:
    """A file, or a part of it, as described by the folder or a list; paths are relative to the root.

    Args:
        split: "train", "validation" or "test"; "" without splits.
        sound: "" for the sound of the file itself.
        start, end: in seconds; NaN for the file's own.
        captions: by language; "" is the data set's default language.
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
    """Base of the three kinds: layouts, splits, folds and messages."""

    splits = ("train", "validation", "test", "all")
    split_aliases: ClassVar[Mapping[str, str]] = {
        "val": "validation",
        # The recipes' names of the splits.
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
    #: Further columns besides `file_name`, `label` and `split`.
    columns: ClassVar[tuple[str, ...]] = ()

    def _lacks(self, path: Path, reason: str = "") -> DatasetMissing:
        layout = "\n".join(f"    {line}" for line in self.expected_layout.splitlines())
        return DatasetMissing(
            f"{self.title}: {reason + '; looked in' if reason else 'nothing at'} {path}\n"
            f"  A folder looks like this:\n{layout}\n"
            "  `--data FOLDER` names it; docs/own-data.md shows examples."
        )

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

    def _rows_of_split(self, items: Sequence[Item], folds: Sequence[int], split: str, fold: int | None) -> list[int]:
        present = {item.split for item in items} - {""}
        if split == "all":
            return list(range(len(items)))
        if present and fold not in (None, 1):
            raise ValueError(
                f"{self.root} is already divided into {', '.join(sorted(present))}, so there is no fold {fold}; "
                "leave fold empty"
            )
        if present and "train" not in present:
            raise ValueError(f"{self.root} has a split for {', '.join(sorted(present))} and none to train on")
        if present <= {"train"}:
            return [row for row, own in enumerate(folds) if (own == (fold or 1)) != (split == "train")]
        wanted = split if split in present else _OTHER[split]
        return [row for row, item in enumerate(items) if item.split == wanted]

    # -- reading the folder --------------------------------------------------------------------------------------------

    def _contents(self) -> tuple[list[Item], Scan]:
        self.require_folder()
        folders, loose = entries(self.root)
        parts = [name for name in folders if name.lower() in SPLIT_OF]
        lists = [path for part in ("", *parts) for name in LISTS if (path := self.root / part / name).is_file()]
        if lists:
            return self._listed(lists, parts)
        others = [name for name in folders if parts and name not in parts and self._holds_any(name)]
        others += [name for name in loose if parts and os.path.splitext(name)[1].lower() in self.suffixes]
        divided = bool(parts) and (not others or len({SPLIT_OF[part.lower()] for part in parts}) > 1)
        if divided and others:
            raise DatasetError(
                f"{self.root} holds the splits {', '.join(parts)} and also {', '.join(others[:3])}: put each "
                "class into the folder of a split, or write a list"
            )
        watched: list[Path] = []
        unknown: Counter[str] = Counter()
        items = [item for part in (parts if divided else [""]) for item in self._in_folders(part, watched, unknown)]
        ignored = ", ".join(f"{count} x {kind}" for kind, count in unknown.most_common(3))
        notes = [f"{unknown.total():,} other files are ignored: {ignored}"] if unknown else []
        if not items:
            found = f"it holds {ignored}" if unknown else "it is empty"
            raise self._lacks(self.root, f"no file with one of the endings {' '.join(sorted(self.suffixes))}; {found}")
        layout = "class folders" if any(item.label for item in items) else "files without classes"
        layout += f" in {', '.join(f'{part}/' for part in parts)}" if divided else ""
        return self._checked_items(items, Scan((), layout, watched, notes=notes))

    def _in_folders(self, part: str, watched: list[Path], unknown: Counter[str]) -> list[Item]:
        """The files of the root or a split's folder; folders are classes."""
        home, prefix = self.root / part, f"{part}/" if part else ""
        found: dict[str, list[str]] = defaultdict(list)
        sounds: dict[str, list[str]] = defaultdict(list)
        for name, _ in walk(home, None, watched):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in self.suffixes:
                found[stem].append(name)
            elif suffix.lower() in AUDIO_SUFFIXES and "video" in self.streams:
                sounds[stem].append(name)
            else:
                unknown[suffix.lower() or name] += 1
        for stem, names in sounds.items():
            if stem not in found:
                unknown[f"sounds without a picture, such as {names[0]}"] += len(names)
            elif len(names) > 1:
                raise DatasetError(f"{home}: {', '.join(names)}: only one can be the sound of {found[stem][0]}")
        return [
            Item(
                prefix + name,
                _normal(stem.split("/")[0] if "/" in stem else ""),
                SPLIT_OF.get(part.lower(), ""),
                prefix + sounds[stem][0] if stem in sounds else "",
            )
            for stem, names in found.items()
            for name in names
        ]

    def _holds_any(self, folder: str) -> bool:
        return any(walk(self.root / folder, self.suffixes, []))

    def _checked_items(self, items: list[Item], scan: Scan) -> tuple[list[Item], Scan]:
        """Refuse partial labels and partial splits; set the classes."""
        for what in ("label", "split"):
            lacking = [item for item in items if not getattr(item, what)]
            if lacking and len(lacking) < len(items):
                raise DatasetError(
                    f"{self.root / lacking[0].name}: no {what}, which {len(items) - len(lacking)} other files have; a "
                    "class folder or a list gives a file its label"
                )
        scan.classes = tuple(sorted({item.label for item in items} - {""}))
        return sorted(items, key=lambda item: item.name), scan

    # -- lists ---------------------------------------------------------------------------------------------------------

    def _listed(self, paths: Sequence[Path], parts: Sequence[str]) -> tuple[list[Item], Scan]:
        homes = [path.parent for path in paths]
        if len(set(homes)) < len(homes) or (self.root in homes and len(homes) > 1):
            raise DatasetError(f"{paths[0]} and {paths[1]}: keep one list for the folder, or one for each split")
        unlisted = [part for part in parts if self.root not in homes and self.root / part not in homes]
        for part in filter(self._holds_any, unlisted):
            raise DatasetError(
                f"{self.root / part} has files but no list, unlike {homes[0]}: write a list into the folder of each "
                f"split, or one into {self.root} with a column `split`"
            )
        watched = [*paths]
        # Accented letters may be composed or decomposed.
        present = {_normal(name): name for name, _ in walk(self.root, None, watched)}
        items: list[Item] = []
        for path in paths:
            part = "" if path.parent == self.root else path.parent.name
            parse = functools.partial(self._item, part=part, present=present)
            if path.suffix == ".jsonl":
                items += read_json_lines(path, parse)
            else:
                items += read_csv(path, parse, self._check_columns, skipinitialspace=True, strict=True)
        if not items:
            raise DatasetError(f"{paths[0]} lists nothing: write a line for every file below its heading")
        layout = f"list {', '.join(path.relative_to(self.root).as_posix() for path in paths)}"
        return self._checked_items(self._merged(items), Scan((), layout, watched))

    def _item(self, row: Mapping[str, Any], part: str, present: Mapping[str, str]) -> Item:
        if None in row:
            raise ValueError("more cells than the heading; quote texts that contain commas")
        row = {column.strip(): value.strip() if isinstance(value, str) else value for column, value in row.items()}
        row = {column: value for column, value in row.items() if value not in (None, "")}
        self._check_columns(row)

        def file(column: str) -> str:
            stated = str(row.get(column, "")).replace("\\", "/").removeprefix("./")
            name = f"{part}/{stated}" if part else stated
            if stated and _normal(name) not in present:
                raise ValueError(f"{name} does not exist in {self.root}")
            return present[_normal(name)] if stated else ""

        name, split = file("file_name"), str(row.get("split", part)).lower()
        if os.path.splitext(name)[1].lower() not in self.suffixes:
            raise ValueError(f"file_name {name!r} has none of the endings {' '.join(sorted(self.suffixes))}")
        if split and split not in SPLIT_OF:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLIT_OF)}")
        start, end = (float(row.get(column, math.nan)) for column in ("start", "end"))
        if start < 0 or end <= start or math.inf in (start, end):
            raise ValueError(f"start {start:g} and end {end:g} must be seconds, in this order")
        label = _normal(str(row.get("label", "")))
        return Item(name, label, SPLIT_OF.get(split, ""), file("sound"), start, end, _captions(row), _tags(row))

    def _check_columns(self, columns: Iterable[str]) -> None:
        known = ("file_name", "label", "split", *self.columns)
        for column in columns:
            if column not in known and not ("caption" in known and column.startswith("caption_")):
                raise ValueError(f"unknown column {column!r}; a list of {self.unit} has {', '.join(known)}")

    def _merged(self, items: list[Item]) -> list[Item]:
        """Join lines of the same file if the kind allows that."""
        parts: set[tuple[str, str]] = set()
        for item in items:
            part = (item.name, f"{item.start} {item.end}")  # as text, since not every nan equals another
            if part in parts:
                raise DatasetError(f"{self.root / item.name} is listed twice")
            parts.add(part)
        return items


class FolderOfClips(OwnFolder):
    """The user's clips: videos with sound, or with separate sound files.

    A sound file with the name of a video (`dog.mp4`, `dog.wav`) replaces its sound. In a list, `sound` names it, and
    `start` and `end` (seconds) cut a clip out of a long file, which may have several lines.
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
        "<same name>.wav next to a video                         (its sound, if stored separately)\n"
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

    Lines of the same image add captions. If no list has tags, the class of an image is its tag.

    Args:
        language: language of the column `caption`, and of monolingual models.
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
        "or metadata.csv: file_name[,caption][,caption_<language>][,tags][,label][,split]\n"
        '   or metadata.jsonl: {"file_name": "a.jpg", "caption": {"en": ["..."], "de": ["..."]}, "tags": ["dog"]}'
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
        """Captions and tags of the images of a listing, in its order."""
        listing = self.listing(split) if listing is None else listing
        items, _ = self._contents()
        row_of = {item.name: row for row, item in enumerate(items)}
        rows = [row_of[name] for name in listing.names]
        texts = [self._captions_of(item, self.language) for item in items]
        numbers = np.cumsum([0, *map(len, texts)])
        tagged = any(item.tags for item in items)
        tags_of = [item.tags if tagged else (item.label,) * bool(item.label) for item in items]
        names = tuple(sorted({tag for own in tags_of for tag in own}))
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
            known = sorted({own or self.language for item in items for own in item.captions})
            raise DatasetError(
                f"{self.root} has no captions in {language!r}; it has {', '.join(known) or 'none at all'}: write them "
                f"into the column caption_{language} of {LISTS[0]}"
            )
        keys: dict[str, Item] = {}
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
        if wanted not in self._names:  # read the folder once, because pictures are looked up one by one
            own = set(self.listing(split).names)
            items = sorted(self._contents()[0], key=lambda item: item.name not in own)
            # The first one wins, so this split's files take precedence over others of the same name.
            self._names[wanted] = {picture_key(Path(item.name).name): item.name for item in reversed(items)}
        return self.root / self._names[wanted].get(key, f"{key}.jpg")

    def _captions_of(self, item: Item, language: str) -> tuple[str, ...]:
        own = item.captions.get(language, ())
        return (*item.captions.get("", ()), *own) if language == self.language else own

    def _options(self) -> dict[str, object]:
        return {"language": self.language}

    def _merged(self, items: list[Item]) -> list[Item]:
        merged: dict[str, Item] = {}
        for item in items:
            before = merged.get(item.name)
            if before is not None:
                if (item.label, item.split) != (before.label, before.split):
                    raise DatasetError(f"{self.root / item.name} is listed with two labels or splits")
                captions = dict(before.captions)
                for language, texts in item.captions.items():
                    captions[language] = (*captions.get(language, ()), *texts)
                item = replace(before, captions=captions, tags=tuple(dict.fromkeys((*before.tags, *item.tags))))
            merged[item.name] = item
        return list(merged.values())


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folds(items: Sequence[Item]) -> list[int]:
    """Fold of every item, from 1: the files of a class are assigned in turn, in the order of their name hashes."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[_normal(item.name)].add(item.label)
    groups: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for row, item in enumerate(items):
        # Keep parts of one file together; files with several classes form a separate group.
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


def _captions(row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for column, value in row.items():
        if column in ("caption", "text") or column.startswith("caption_"):
            plain = column.partition("_")[2]
            for language, texts in (value if isinstance(value, dict) else {plain: value}).items():
                texts = [texts] if isinstance(texts, str) else texts
                kept = (single_spaced(text) for text in texts if text.strip())
                found[language] = (*found.get(language, ()), *kept)
    return {language: texts for language, texts in found.items() if texts}


def _tags(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("tags", [])
    tags = value.split(";") if isinstance(value, str) else value
    return tuple(dict.fromkeys(_normal(tag.strip()) for tag in tags if tag.strip()))
