"""Data of one's own: a folder of clips, of images or of sounds.

What lies in the folder says what it is, in one of three ways:

- *class folders*: `<class>/...`, or `train/<class>/...` beside `val/<class>/...` and `test/<class>/...`;
- *files alone*, without class folders: they have no class;
- *a list* `metadata.csv` or `metadata.jsonl`, in the folder or in each folder of a split, with a line for every file.

Where nothing divides the files, each class is dealt out to five folds by the hashes of the names: the same on every
machine, whatever the order. Fold 1 is then what the others are tested on. The hashes know nothing of where a file came
from: pieces of one recording should be divided by a list.

See docs/own-data.md.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.data.annotations import ImageAnnotations, LanguageCaptions, NumberRows, TextRows, Texts, read_json_lines
from common.data.datasets.base import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaDataset,
    Scan,
    csv_rows,
    entries,
    walk,
)
from common.data.datasets.captioned import LanguageCaptioned
from common.data.listing import DatasetMissing, Listing
from common.data.regions import picture_key
from common.files import named, stamp_of

#: Names of the lists, in the convention of Hugging Face's folders of images, sounds and videos.
LISTS = ("metadata.csv", "metadata.jsonl")
#: What the folder of a split, or the column `split` of a list, may say.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
#: The split that each of these names means.
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_OTHER = {"validation": "test", "test": "validation"}
#: Folds in the order in which the files of a class are dealt out: a class of one file is trained on.
_DEALT = (2, 1, 3, 4, 5)
#: What separates tags in a cell of a list.
_TAG_SEPARATOR = ";"


@dataclass(frozen=True)
class Item:
    """A file, or a part of it, as the folder or a list tells of it.

    Args:
        name: Relative to the root.
        label: Name of its class; "" = none.
        split: "train", "validation" or "test"; "" = not divided.
        sound: File with the sound, relative to the root; "" = the file itself.
        start, end: Limits of the part in seconds; NaN = the file's own.
        captions: Texts by language; "" = the language that the data set is told.
        tags: What the image shows.
        where: Place that says so, for messages.
    """

    name: str
    label: str = ""
    split: str = ""
    sound: str = ""
    start: float = float("nan")
    end: float = float("nan")
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Args:
        items: In the order of names.
        layout: What was found, in words.
        watched: Folders and lists that were read.
        notes: What else its user should know.
    """

    items: tuple[Item, ...]
    layout: str
    watched: tuple[Path, ...]
    notes: tuple[str, ...] = ()


class OwnFolder(MediaDataset):
    """What the three kinds share: layouts, splits, folds and messages.

    Args:
        root: The folder.
    """

    splits = ("train", "validation", "test", "all")
    split_aliases: ClassVar[Mapping[str, str]] = {
        "val": "validation",
        # As the recipes call what they train and test on.
        "trainval": "train",
        "unbalanced_train": "train",
        "evaluation": "test",
    }
    num_folds = 5
    num_classes = 0
    size = "yours"
    license = "yours"
    source = "your own files"
    suffixes: ClassVar[frozenset[str]]
    #: Columns of a list beside `file_name`, `label` and `split`.
    columns: ClassVar[tuple[str, ...]] = ()

    def parts(self) -> list[tuple[str, int | None]]:
        return [("all", None)]

    def published_classes(self) -> int:
        """None are published: whatever there is, is right."""
        return len(self._classes(self._contents()))

    def _lacks(self, path: Path, reason: str = "") -> DatasetMissing:
        layout = "\n".join(f"    {line}" for line in self.expected_layout.splitlines())
        return DatasetMissing(
            f"{self.title}: {reason + '; looked in' if reason else 'nothing at'} {path}\n"
            f"  A folder looks like this:\n{layout}\n"
            "  `--data FOLDER` names it; docs/own-data.md shows examples."
        )

    def _scan(self, split: str, fold: int | None) -> Scan:
        contents = self._contents()
        classes = self._classes(contents)
        label_of = {name: label for label, name in enumerate(classes)}
        folds = _folds(contents.items)
        scan = Scan(classes, contents.layout, watched=list(contents.watched), notes=list(contents.notes))
        scan.folds, scan.starts, scan.ends, scan.sounds = [], [], [], []
        for row in self._rows_of_split(contents, folds, split, fold):
            item = contents.items[row]
            scan.names.append(item.name)
            scan.labels.append(label_of.get(item.label, -1))
            scan.folds.append(folds[row])
            scan.starts.append(item.start)
            scan.ends.append(item.end)
            scan.sounds.append(item.sound)
        if "audio" in self.streams:
            scan.sound_labels = list(scan.labels)
        return scan

    def _rows_of_split(self, contents: Contents, folds: Sequence[int], split: str, fold: int | None) -> list[int]:
        """Places of a split's items."""
        items = contents.items
        present = {item.split for item in items} - {""}
        if split == "all":
            return list(range(len(items)))
        if not present:
            held_out = fold or 1
            return [row for row, own in enumerate(folds) if (own == held_out) != (split == "train")]
        if fold not in (None, 1):
            raise ValueError(
                f"{self.root} is divided by its owner into {', '.join(sorted(present))}, so there is no fold {fold}; "
                "leave fold empty"
            )
        if "train" not in present:
            raise ValueError(f"{self.root} has a part for {', '.join(sorted(present))} and none to train on")
        if present == {"train"}:
            held_out_rows = {row for row, own in enumerate(folds) if own == 1}
            return [row for row in range(len(items)) if (row in held_out_rows) != (split == "train")]
        wanted = split if split in present else _OTHER[split]
        return [row for row, item in enumerate(items) if item.split == wanted]

    def _classes(self, contents: Contents) -> tuple[str, ...]:
        return tuple(sorted({item.label for item in contents.items} - {""}))

    # ------------------------------------------------------------------------------------------------ reading
    def _contents(self) -> Contents:
        """What the folder holds."""
        self.require_folder()
        folders, _ = entries(self.root)
        parts = [name for name in folders if name.lower() in SPLIT_OF]
        lists = [path for path in (self.root / name for name in LISTS) if path.is_file()]
        own_lists = [self.root / part / name for part in parts for name in LISTS]
        own_lists = [path for path in own_lists if path.is_file()]
        if len(lists) > 1 or len({path.parent for path in own_lists}) < len(own_lists):
            raise ValueError(f"{(lists or own_lists)[0].parent} holds {' and '.join(LISTS)}: which of them counts?")
        if lists and own_lists:
            raise ValueError(f"{lists[0]} and {own_lists[0]}: keep the list of the folder or those of its splits")
        listed = {path.parent.name for path in own_lists}
        unlisted = [part for part in parts if listed and part not in listed and self._holds_any(part)]
        if unlisted:
            raise ValueError(
                f"{self.root / unlisted[0]} holds files and no list, where {own_lists[0].parent} has one: write a list "
                f"into each folder of a split, or one into {self.root} with a column `split`"
            )
        if lists or own_lists:
            return self._listed(lists or own_lists)
        others = [name for name in folders if parts and name not in parts and self._holds_any(name)]
        divided = bool(parts) and (not others or len({SPLIT_OF[part.lower()] for part in parts}) > 1)
        if divided and others:
            raise ValueError(
                f"{self.root} holds the splits {', '.join(parts)} and beside them {', '.join(others[:3])}: put each "
                "class into the folder of a split, or write a list"
            )
        watched: list[Path] = []
        unknown: Counter[str] = Counter()
        items: list[Item] = []
        for part in parts if divided else [""]:
            items += self._in_class_folders(part, watched, unknown)
        if not items:
            raise self._nothing(unknown)
        _check_classes(self.root, items)
        layout = "class folders" if any(item.label for item in items) else "files without classes"
        layout += f" in {', '.join(f'{part}/' for part in parts)}" if divided else ""
        return Contents(tuple(sorted(items, key=_name)), layout, tuple(watched), self._notes(items, unknown))

    def _in_class_folders(self, part: str, watched: list[Path], unknown: Counter[str]) -> list[Item]:
        """The files of the root, or of the folder of a split."""
        home = self.root / part
        prefix = f"{part}/" if part else ""
        found: list[tuple[str, str]] = []
        sounds: dict[str, str] = {}
        for name, _ in walk(home, None, watched):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in self.suffixes:
                found.append((prefix + name, name.split("/")[0] if "/" in name else ""))
            elif suffix in AUDIO_SUFFIXES and "video" in self.streams:
                stem = os.path.splitext(name)[0]
                if stem in sounds:
                    raise ValueError(f"{home}: {sounds[stem]} and {name} are both the sound of {stem!r}: leave one")
                sounds[stem] = name
            else:
                unknown[suffix or name] += 1
        empty = [name for name in entries(home)[0] if not any(label == name for _, label in found)]
        if empty:
            unknown[f"folder without any, such as {empty[0]}"] += len(empty)
        owners: dict[str, str] = {}
        items = []
        for name, label in found:
            stem = os.path.splitext(name.removeprefix(prefix))[0]
            if stem in sounds:
                if stem in owners:
                    raise ValueError(
                        f"{home}: {sounds[stem]} is the sound of both {owners[stem]} and {name}: give them other names"
                    )
                owners[stem] = name
            sound = prefix + sounds[stem] if stem in sounds else ""
            split = SPLIT_OF[part.lower()] if part else ""
            items.append(Item(name, _normal(label), split, sound, where=str(self.root / name)))
        alone = sorted(set(sounds) - set(owners))
        if alone:
            unknown[f"sounds without a picture, such as {sounds[alone[0]]}"] += len(alone)
        return items

    def _holds_any(self, folder: str) -> bool:
        return any(os.path.splitext(name)[1].lower() in self.suffixes for name, _ in walk(self.root / folder, None, []))

    def _nothing(self, unknown: Counter[str]) -> DatasetMissing:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in unknown.most_common(3))
        found = f"it holds {kinds}" if kinds else "it is empty"
        return self._lacks(self.root, f"no file with one of the endings {' '.join(sorted(self.suffixes))}; {found}")

    def _notes(self, items: Sequence[Item], unknown: Counter[str]) -> tuple[str, ...]:
        notes = []
        if unknown:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in unknown.most_common(3))
            notes.append(f"{sum(unknown.values()):,} other files are passed over: {kinds}")
        counts = Counter(label for label, _ in {(item.label, item.name) for item in items} if label)
        if len(counts) == 1:
            notes.append(f"there is one class, {next(iter(counts))!r}: enough to pre-train on, not to classify")
        few = sorted(label for label, count in counts.items() if count < 2)
        if few and not any(item.split for item in items):
            notes.append(f"{len(few)} classes have one file, which fold 2 alone tests, such as {few[0]!r}")
        return tuple(notes)

    # ------------------------------------------------------------------------------------------------ lists
    def _listed(self, paths: Sequence[Path]) -> Contents:
        watched = [*paths]
        present: dict[str, str] = {}
        for name, _ in walk(self.root, None, watched):
            # A name may be spelt with one sign or with two for a letter and its accent, and look the same.
            present.setdefault(_normal(name), name)
        items: list[Item] = []
        for path in paths:
            part = path.parent.relative_to(self.root).as_posix()
            prefix, split = ("", "") if part == "." else (f"{part}/", SPLIT_OF[part.lower()])
            for where, row in _rows(path):
                items.append(self._item(where, row, prefix, split, present))
        if not items:
            raise ValueError(f"{paths[0]} lists nothing: write a line for every file below its heading")
        items = self._merged(items)
        divided = {bool(item.split) for item in items}
        if len(divided) > 1:
            lacking = next(item for item in items if not item.split)
            raise ValueError(f"{lacking.where}: no split, where other lines have one")
        _check_classes(self.root, items)
        layout = f"list {', '.join(path.relative_to(self.root).as_posix() for path in paths)}"
        return Contents(tuple(sorted(items, key=_name)), layout, tuple(watched), self._notes(items, Counter()))

    def _item(self, where: str, row: Mapping[str, Any], prefix: str, split: str, present: Mapping[str, str]) -> Item:
        """The item that a line of a list tells of."""
        for column in row:
            if column not in ("file_name", "label", "split", *self.columns) and not (
                "caption" in self.columns and column.startswith("caption_")
            ):
                known = ", ".join(("file_name", "label", "split", *self.columns))
                raise ValueError(f"{where}: unknown column {column!r}; a list of {self.unit} has {known}")
        name = self._file(where, row, "file_name", prefix, present)
        if not name:
            raise ValueError(f"{where}: file_name is empty")
        if os.path.splitext(name)[1].lower() not in self.suffixes:
            raise ValueError(f"{where}: {name} has none of the endings {' '.join(sorted(self.suffixes))}")
        stated = _text(where, row, "split").lower()
        if stated and stated not in SPLIT_OF:
            raise ValueError(f"{where}: split {stated!r} is none of {', '.join(SPLIT_OF)}")
        if stated and split and SPLIT_OF[stated] != split:
            raise ValueError(f"{where}: split {stated!r} in the list of {prefix}")
        start, end = _seconds(where, row, "start"), _seconds(where, row, "end")
        if end <= start:
            raise ValueError(f"{where}: end {end:g} is not after start {start:g}")
        return Item(
            name,
            _normal(_text(where, row, "label")),
            SPLIT_OF.get(stated, split),
            self._file(where, row, "sound", prefix, present),
            start,
            end,
            _captions(where, row),
            _tags(where, row),
            where,
        )

    def _file(self, where: str, row: Mapping[str, Any], column: str, prefix: str, present: Mapping[str, str]) -> str:
        """A file that a line names, as the disk spells it."""
        stated = _text(where, row, column).replace("\\", "/").removeprefix("./")
        if not stated:
            return ""
        if os.path.isabs(stated) or ".." in stated.split("/"):
            raise ValueError(f"{where}: {stated} does not lie in {self.root}")
        name = present.get(_normal(prefix + stated))
        if name is None:
            raise ValueError(f"{where}: {prefix}{stated} does not exist in {self.root}")
        return name

    def _merged(self, items: list[Item]) -> list[Item]:
        """Lines of one file joined where that means something."""
        first: dict[tuple[str, float, float], Item] = {}
        for item in items:
            # NaN equals nothing, itself included.
            start, end = (-1.0 if np.isnan(limit) else limit for limit in (item.start, item.end))
            key = (item.name, start, end)
            if key in first:
                raise ValueError(f"{item.where}: {item.name} is listed before, at {first[key].where}")
            first[key] = item
        return items


class FolderOfClips(OwnFolder):
    """Clips of one's own: videos with their sound, or with sound in files beside them.

    A sound file of the same name beside a video (`dog.mp4`, `dog.wav`) takes the place of its own sound. In a list,
    `sound` names it, and `start` and `end` (seconds) cut a clip out of a long file, which may have several lines.
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
        "<same name>.wav beside a video                          (its sound, where that is a file of its own)\n"
        "or metadata.csv: file_name[,sound][,label][,split][,start][,end]"
    )


class FolderOfAudio(OwnFolder):
    """Sounds of one's own, in class folders or with a list."""

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
    """Images of one's own, in class folders, or with a list that has captions and tags.

    Lines of the same image add captions. Where no list has tags, the class of an image is its tag.

    Args:
        root: The folder.
        language: Language of the column `caption`, and of the captions where a model reads one language.
        regions: Folder of region features; None = `regions` in the root.
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
        super().__init__(root)
        self.language = language
        self._names: dict[str, dict[str, str]] = {}
        if regions is not None:
            self.regions_root = Path(regions).expanduser()

    def annotations(self, split: str, listing: Listing | None = None) -> ImageAnnotations:
        """Captions and tags of a split's images, one row per image of the listing, in its order."""
        listing = self.listing(split) if listing is None else listing
        items = self._contents().items
        row_of = {item.name: row for row, item in enumerate(items)}
        try:
            rows = [row_of[name] for name in listing.table.names()]
        except KeyError as error:
            raise ValueError(f"{self.root}: {error} of the listing is not there any more") from None
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
            TextRows(texts[row] for row in rows),
            NumberRows(range(numbers[row], numbers[row + 1]) for row in rows),
            tags,
            names,
            ids,
        )

    def captions(self, split: str, language: str) -> LanguageCaptions:
        split, _ = self._checked(split, None)
        items = self._contents().items
        names = set(self.listing(split).table.names())
        if not any(self._captions_of(item, language) for item in items):
            known = sorted({own or self.language for item in items for own in item.captions})
            raise ValueError(
                f"{self.root} has no captions in {language!r}; it has {', '.join(known) or 'none at all'}: write them "
                f"into the column caption_{language} of {LISTS[0]}"
            )
        keys: dict[str, Item] = {}
        for item in items:
            key = picture_key(Path(item.name).name)
            if item.name in names and self._captions_of(item, language):
                if key in keys:
                    raise ValueError(
                        f"{self.root}: {keys[key].name} and {item.name} would both be called {key!r} among region "
                        "features: give them other names"
                    )
                keys[key] = item
        texts = TextRows(self._captions_of(item, language) for item in keys.values())
        return LanguageCaptions(language, Texts(keys), texts)

    def image_path(self, key: str, split: str) -> Path:
        wanted = SPLIT_OF.get(split, split)
        if wanted not in self._names:  # the folder is read once: a split is asked for picture after picture
            items = sorted(self._contents().items, key=lambda item: item.split != wanted)
            # The first counts, so those of the split: another one may have a file of the name.
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
            if before is None:
                merged[item.name] = item
                continue
            if (item.label, item.split) != (before.label, before.split):
                raise ValueError(f"{item.where}: {item.name} has another label or split than at {before.where}")
            if not item.captions:
                raise ValueError(f"{item.where}: {item.name} is listed before, at {before.where}")
            captions = dict(before.captions)
            for language, texts in item.captions.items():
                captions[language] = (*captions.get(language, ()), *texts)
            tags = tuple(dict.fromkeys((*before.tags, *item.tags)))
            merged[item.name] = replace(before, captions=captions, tags=tags)
        return list(merged.values())


# ---------------------------------------------------------------------------------------------------- details
def _name(item: Item) -> str:
    return item.name


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folds(items: Sequence[Item]) -> list[int]:
    """Fold of every item, from 1: the files of a class in the order of the hashes of their names, dealt out in turn."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[_normal(item.name)].add(item.label)
    groups: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for row, item in enumerate(items):
        # Parts of one file stay together, also where they are of several classes: such files are a group of their own.
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


def _check_classes(root: Path, items: Sequence[Item]) -> None:
    """All files have a class, or none has: a file without one could not be classified."""
    lacking = [item for item in items if not item.label]
    if lacking and len(lacking) < len(items):
        raise ValueError(
            f"{lacking[0].where}: no class, where other files of {root} have one ({len(lacking)} of {len(items)} "
            "have none): put it into a class folder, or give it a label"
        )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lines of a list as pairs of place and columns; empty cells are left out."""
    return iter(_read_rows(path, tuple(stamp_of(path))))


@functools.lru_cache(maxsize=4)
def _read_rows(path: Path, stamp: tuple[int, ...]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    try:
        with named(path):
            path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the list as UTF-8") from None
    if path.suffix == ".jsonl":
        rows = [
            (where, {column: value for column, value in row.items() if value is not None})
            for where, row in read_json_lines(path)
        ]
    else:
        rows = _csv_cells(path)
    for where, row in rows:
        if "file_name" not in row:
            raise ValueError(f"{where}: no file_name, which every line of a list has")
    return tuple(rows)


def _csv_cells(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    heading: list[str] = []
    line = 0
    # The csv module's own limit is meant for cells typed by people.
    csv.field_size_limit(2**24)
    with csv_rows(path, csv.reader, skipinitialspace=True, strict=True) as reader:
        try:
            for row in reader:
                line = reader.line_num
                where, cells = f"{path}, line {line}", [cell.strip() for cell in row]
                if not heading:
                    heading = cells
                    if len({*cells} - {""}) < len(list(filter(None, cells))):
                        raise ValueError(f"{where}: a column of this heading stands twice: give it another name")
                elif len(cells) > len(heading):
                    raise ValueError(f"{where}: more cells than the heading has; put texts with commas into quotes")
                elif cells:
                    rows.append((where, {column: value for column, value in zip(heading, cells) if value}))
        except csv.Error as error:
            # Of the line after the last good one: a missing quote is noticed lines below it.
            raise ValueError(
                f"{path}, line {line + 1}: {error}; a text in quotes ends with a quote before the next comma or the "
                "end of the line, and a quote inside it is written twice"
            ) from None
    return rows


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column, "")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be a text, not {json.dumps(value)[:80]}")
    return value.strip()


def _texts(where: str, column: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{where}: {column} must be a text or a list of texts, not {json.dumps(value)[:80]}")
    return tuple(" ".join(one.split()) for one in values if one.strip())


def _captions(where: str, row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Captions by language."""
    found: dict[str, tuple[str, ...]] = {}
    for column, value in row.items():
        if column in ("caption", "text") or column.startswith("caption_"):
            plain = column.partition("_")[2] if column.startswith("caption_") else ""
            for language, texts in (value if isinstance(value, dict) else {plain: value}).items():
                found[language] = (*found.get(language, ()), *_texts(where, column, texts))
    return {language: texts for language, texts in found.items() if texts}


def _tags(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("tags", [])
    values = value.split(_TAG_SEPARATOR) if isinstance(value, str) else list(_texts(where, "tags", value))
    return tuple(dict.fromkeys(_normal(tag.strip()) for tag in values if tag.strip()))


def _seconds(where: str, row: Mapping[str, Any], column: str) -> float:
    if column not in row:
        return float("nan")
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{where}: {column} must be a time in seconds, not {row[column]!r}")
    return value
