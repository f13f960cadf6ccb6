"""Captions, tags and boxes of pictures, stored as columns. This module imports neither torch nor a decoder."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.data.listing import DatasetError
from common.data.sequences import Columns, Rows, Texts, cached_columns
from common.files import message_of, named, open_regular, parsing, read_bytes, stamp_of

Value = TypeVar("Value")
Read = TypeVar("Read", bound=Callable[..., Any])
# Boxes of one picture: `boxes` float32 [n, 4] as left, top, right, bottom; `labels` int64 [n], counted from 0; and bool
# [n] `difficult` (VOC) or `iscrowd` (COCO).
Boxes = dict[str, Any]
# Cache the columns of JSON files of at least this many bytes.
KEEP_FROM_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class ImageAnnotations:
    """Annotations of N pictures, one row each.

    `tags` is bool [N, T]. Pictures with the same number in `groups` (int64 [N]) show the same thing.
    """

    image_ids: npt.NDArray[np.int64]
    captions: Rows[str]
    caption_ids: Rows[int]
    tags: npt.NDArray[np.bool_]
    tag_names: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    read_boxes: Callable[[], list[Boxes]] | None = None

    def boxes(self) -> list[Boxes]:
        """Read the boxes of all pictures, lazily; see `Boxes`."""
        if self.read_boxes is None:
            raise ValueError("these annotations have no boxes")
        return self.read_boxes()

    def fingerprint(self) -> str:
        """Return the SHA-256 of ids, captions, tags and groups in hexadecimal. Boxes are not included."""
        texts, numbers = self.captions, self.caption_ids
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

    `keys` are the image names used by the region features. Images with the same number in `groups` show the same thing.
    """

    language: str
    keys: Texts
    captions: Rows[str]
    groups: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """Return the SHA-256 of language, keys, captions and groups in hexadecimal."""
        state = hashlib.sha256(f"captions 1 {self.language}\0".encode())
        for column in (self.keys.ends, self.captions.starts, self.captions.column.ends, self.groups):
            state.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        state.update(self.keys.buffer)
        state.update(self.captions.column.buffer)
        return state.hexdigest()


# ---------------------------------------------------------------------------------------------------- reading JSON
def read_json(path: Path, without: frozenset[str] = frozenset()) -> Any:
    """Read a JSON file, but drop the object keys in `without`. Dropping masks saves 90 % of the memory."""

    def drop(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entries.items() if key not in without}

    with parsing(path, DatasetError):
        return json.loads(read_bytes(path, None), object_hook=drop if without else None)


def read_json_lines(path: Path, parse: Callable[[Any], Value]) -> Iterator[Value]:
    """Parse the JSON value on each non-blank line of a file; see :func:`read_rows`."""
    return read_rows(path, lambda lines: map(json.loads, filter(str.strip, lines)), parse)


def read_csv(
    path: Path, parse: Callable[[Any], Value], check: Callable[[list[str]], object] = len, **options: Any
) -> Iterator[Value]:
    """Pass the column names of a CSV file to `check`, then parse the rows; see :func:`read_rows`."""

    def rows(lines: Iterator[str]) -> Iterable[Any]:
        reader: csv.DictReader[str] = csv.DictReader(lines, **options)
        names = [name.strip() for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise ValueError(f"a column occurs twice in the heading {', '.join(names)}")
        check(names)
        return reader

    return read_rows(path, rows, parse)


def read_rows(
    path: Path, rows_of: Callable[[Iterator[str]], Iterable[Any]], parse: Callable[[Any], Value]
) -> Iterator[Value]:
    """Split the lines of a UTF-8 file into rows with `rows_of`, and parse each row. Errors name the file and line."""
    at = [0]

    def counted(stream: Iterable[bytes]) -> Iterator[str]:
        for at[0], line in enumerate(stream, start=1):
            yield line.decode("utf-8-sig" if at[0] == 1 else "utf-8")

    try:
        with named(path), open_regular(path) as stream:
            for row in rows_of(counted(stream)):
                yield parse(row)
    except OSError:
        raise
    except Exception as error:  # A parser can raise any error on damaged content.
        raise DatasetError(f"{path}, line {at[0]}: {message_of(error)}") from error


def single_spaced(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """The images of an annotation file with their non-blank captions, in the file's order."""

    path: Path
    names: tuple[str, ...]
    image_ids: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    captions: Rows[str]
    caption_ids: Rows[int]

    def annotations(self, names: Iterable[str]) -> ImageAnnotations:
        """Return the captions of the named images, in the given order. Tags and boxes stay empty."""
        positions = {name: row for row, name in enumerate(self.names)}
        try:
            rows = [positions[name] for name in names]
        except KeyError as error:
            raise DatasetError(f"{self.path} has no image {error}: the listing is of another data set") from None
        return ImageAnnotations(
            self.image_ids[rows],
            Rows.texts(self.captions[row] for row in rows),
            Rows.numbers(self.caption_ids[row] for row in rows),
            np.zeros((len(rows), 0), dtype=np.bool_),
            (),
            self.groups[rows],
        )


def captioned_images(
    path: Path, images: Iterable[tuple[str, int, int]], captions: Iterable[tuple[str, int, int]]
) -> CaptionedImages:
    """Join images (file name, number, group) with their non-blank captions (text, number, image)."""
    names, image_ids, groups = zip(*images)
    captions_of: dict[int, list[tuple[str, int]]] = {image_id: [] for image_id in image_ids}
    for text, number, image_id in captions:
        if image_id not in captions_of:
            raise DatasetError(f"{path}: caption {number} is of image {image_id}, which the file does not list")
        if text.strip():
            captions_of[image_id].append((text, number))
    numbers = [number for rows in captions_of.values() for _, number in rows]
    for what, values in (("image id", image_ids), ("file name", names), ("caption id", numbers)):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DatasetError(f"{path}: {what} {twice[0]!r} occurs twice")
    return CaptionedImages(
        path,
        names,
        np.array(image_ids, dtype=np.int64),
        np.array(groups, dtype=np.int64),
        Rows.texts([text for text, _ in rows] for rows in captions_of.values()),
        Rows.numbers([number for _, number in rows] for rows in captions_of.values()),
    )


def read_once(maxsize: int = 4) -> Callable[[Read], Read]:
    """Cache the last `maxsize` results of a reader. If a file among the arguments changes, the reader runs again."""

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


def kept_columns(path: Path, make: Callable[[Path], Columns]) -> Columns:
    """Make columns from a file, or return the cached columns if the file hasn't changed. Small files are not cached."""
    if stamp_of(path)[2] < KEEP_FROM_BYTES:
        return make(path)
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return cached_columns(f"{path.stem}-{digest}", lambda: (make(path), [path]))
