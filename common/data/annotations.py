"""Captions, tags and boxes of the pictures of a listing, as columns; imports neither torch nor a decoder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.data.sequences import Rows, Texts
from common.files import cache_folder, named, settled, stamp_of, write_atomically

Value = TypeVar("Value")
Read = TypeVar("Read", bound=Callable[..., Any])
# Boxes of one picture: `boxes` float32 [n, 4] as left, top, right, bottom; `labels` int64 [n] from 0; a flag per box,
# bool [n], that is `difficult` (VOC) or `iscrowd` (COCO).
Boxes = dict[str, Any]
# Cache columns of JSON files of at least this size.
KEEP_FROM_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class ImageAnnotations:
    """Annotations of N pictures, row by row.

    Args:
        image_ids, caption_ids: the set's own numbers.
        tags: categories of each picture, bool [N, T]; all False without tags.
        tag_names: names of the T categories; empty if the set has none.
        groups: pictures with the same number show the same thing, int64 [N].
    """

    image_ids: npt.NDArray[np.int64]
    captions: Sequence[tuple[str, ...]]
    caption_ids: Sequence[tuple[int, ...]]
    tags: npt.NDArray[np.bool_]
    tag_names: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    read_boxes: Callable[[], list[Boxes]] | None = None

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("image_ids", "captions", "caption_ids", "tags", "groups")
        }
        if len(set(lengths.values())) > 1 or self.tags.shape[1:] != (len(self.tag_names),):
            raise ValueError(
                f"annotations must have one row per image and one column per tag; rows: {lengths}, "
                f"tags: {self.tags.shape}, tag names: {len(self.tag_names)}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def boxes(self) -> list[Boxes]:
        """Boxes of every picture, read lazily; see `Boxes` in this module."""
        if self.read_boxes is None:
            raise ValueError("these annotations come without boxes")
        return self.read_boxes()

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over ids, captions, tags and groups in order, without boxes."""
        texts = self.captions if isinstance(self.captions, Rows) else Rows.texts(self.captions)
        numbers = self.caption_ids if isinstance(self.caption_ids, Rows) else Rows.numbers(self.caption_ids)
        state = hashlib.sha256(b"annotations 1\0")
        for column in (self.image_ids, self.groups, texts.starts, texts.column.ends, numbers.starts, numbers.column):
            state.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        state.update(texts.column.buffer)
        state.update(json.dumps([*self.tags.shape, *self.tag_names]).encode())
        state.update(np.packbits(self.tags).tobytes())
        return state.hexdigest()


@dataclass(frozen=True, eq=False)
class LanguageCaptions:
    """Captions of images in one language; at least one per image.

    `keys` name the images as in the region features. Images with the same number in `groups` show the same thing.
    """

    language: str
    keys: Texts
    captions: Rows[str]
    groups: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not len(self.groups):
            object.__setattr__(self, "groups", np.arange(len(self.keys)))
        lengths = (len(self.keys), len(self.captions), len(self.groups))
        if len(set(lengths)) > 1:
            raise ValueError(f"{lengths[0]} keys and {lengths[2]} groups for the captions of {lengths[1]} images")

    def __len__(self) -> int:
        return len(self.keys)

    def rows_of(self, keys: Iterable[str]) -> npt.NDArray[np.int64]:
        """Positions of some images; -1 without a caption in this language."""
        positions = {key: row for row, key in enumerate(self.keys)}
        return np.array([positions.get(key, -1) for key in keys], dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over language, keys, captions and groups in order."""
        state = hashlib.sha256(f"captions 1 {self.language}\0".encode())
        for column in (self.keys.ends, self.captions.starts, self.captions.column.ends, self.groups):
            state.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        state.update(self.keys.buffer)
        state.update(self.captions.column.buffer)
        return state.hexdigest()


# ---------------------------------------------------------------------------------------------------- reading JSON
def read_json(path: Path, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read a JSON object from a file, without some keys: masks take ten times the memory of the rest."""

    def drop(found: dict[str, Any]) -> dict[str, Any]:
        for key in without:
            found.pop(key, None)
        return found

    try:
        with named(path):
            content = path.read_bytes()
        document = json.loads(content, object_hook=drop if without else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated: get it anew") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a JSON {type(document).__name__} where an object is expected")
    return document


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) from a file with one JSON object per line; skips blank lines."""
    with named(path), path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error}); the file may be truncated: get it anew") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__} where an object is expected")
            yield where, record


def objects(value: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The list of objects under a key; `where` is the place for the message."""
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f'{where} has no list of objects "{key}"; it has: {", ".join(map(str, value)) or "nothing"}')
    return found


def entry_of(entry: Mapping[str, Any], key: str, kind: type[Value], where: str) -> Value:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
        names = {int: "a whole number of 64 bits", str: "a text"}
        raise ValueError(f'{where}: "{key}" must be {names.get(kind, kind.__name__)}, not {json.dumps(value)[:80]}')
    return value


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """The images of an annotation file, in its order, with their non-blank captions."""

    path: Path
    names: tuple[str, ...]
    image_ids: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    captions: Rows[str]
    caption_ids: Rows[int]

    def rows_of(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        positions = {name: row for row, name in enumerate(self.names)}
        try:
            return np.array([positions[name] for name in names], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"{self.path} has no image {error}: the listing is not one of this data set") from None

    def annotations(
        self,
        rows: npt.NDArray[np.int64],
        tags: npt.NDArray[np.bool_] | None = None,
        tag_names: tuple[str, ...] = (),
        read_boxes: Callable[[], list[Boxes]] | None = None,
    ) -> ImageAnnotations:
        """The annotations of some images, in the given order."""
        chosen = rows.tolist()
        return ImageAnnotations(
            self.image_ids[rows],
            Rows.texts(self.captions[row] for row in chosen),
            Rows.numbers(self.caption_ids[row] for row in chosen),
            np.zeros((len(rows), 0), dtype=np.bool_) if tags is None else tags,
            tag_names,
            self.groups[rows],
            read_boxes,
        )


class CaptionCollector:
    """Collects images and captions from an annotation file and finds contradictions in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, int] = {}
        self._rows: dict[int, int] = {}
        self._groups: list[int] = []
        self._captions: list[list[str]] = []
        self._caption_ids: list[list[int]] = []
        self._seen: set[int] = set()

    def add_image(self, name: str, image_id: int, group: int) -> None:
        if image_id in self._rows:
            raise ValueError(f"{self.path}: image id {image_id} occurs twice")
        if name in self._names:
            raise ValueError(f"{self.path}: file name {name!r} occurs twice")
        self._names[name] = self._rows[image_id] = len(self._groups)
        self._groups.append(group)
        self._captions.append([])
        self._caption_ids.append([])

    def add_caption(self, text: str, caption_id: int, image_id: int) -> None:
        """Add a caption of a known image; a blank one only uses up its number."""
        if caption_id in self._seen:
            raise ValueError(f"{self.path}: caption id {caption_id} occurs twice")
        if image_id not in self._rows:
            raise ValueError(f"{self.path}: caption {caption_id} is of image {image_id}, which the file does not list")
        self._seen.add(caption_id)
        if text.strip():
            self._captions[self._rows[image_id]].append(text)
            self._caption_ids[self._rows[image_id]].append(caption_id)

    def finish(self) -> CaptionedImages:
        return CaptionedImages(
            self.path,
            tuple(self._names),
            np.array(list(self._rows), dtype=np.int64),
            np.array(self._groups, dtype=np.int64),
            Rows.texts(self._captions),
            Rows.numbers(self._caption_ids),
        )


def read_once(maxsize: int = 4) -> Callable[[Read], Read]:
    """Cache a reader's results per process until a path among its arguments changes."""

    def decorated(read: Read) -> Read:
        kept = functools.lru_cache(maxsize)(lambda stamps, *arguments: read(*arguments))

        @functools.wraps(read)
        def once(*arguments: Any) -> Any:
            each = [argument if isinstance(argument, tuple) else (argument,) for argument in arguments]
            paths = [path for group in each for path in group if isinstance(path, Path)]
            return kept(tuple(tuple(stamp_of(path)) for path in paths), *arguments)

        once.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return once  # type: ignore[return-value]

    return decorated


def kept_columns(path: Path, make: Callable[[], dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Cache the columns made from a file until it changes; only worth it for files that take seconds to read."""
    stamp = stamp_of(path)
    if stamp[2] < KEEP_FROM_BYTES:
        return make()
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    kept = cache_folder() / "indices" / f"{path.stem}-{digest}.npz"
    try:
        with np.load(kept, allow_pickle=False) as archive:
            columns = dict(archive)
        if columns.pop("stamp").tolist() == stamp:
            return columns
    except Exception:  # Reading the file again repairs any damaged cache.
        pass
    columns = make()
    if settled(stamp):
        stream = io.BytesIO()
        np.savez(stream, stamp=np.array(stamp), **columns)  # type: ignore[arg-type]
        # An unwritable cache only costs time.
        with contextlib.suppress(OSError):
            write_atomically(kept, stream.getvalue())
    return columns
