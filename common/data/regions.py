"""Region features of pictures: boxes that a detector found, with a vector and a class for each box.

A file holds the columns `image_id` [N], `height_width` [N, 2] (also in this order if called `wh`), `num_boxes` [N],
`bbox` [N, M, 4] as left, top, right, bottom in pixels, `features` [N, M, F], and `objects` [N, M] or `distribution` [N,
M, C]. HDF5 files (`.h5`) are read picture by picture, NumPy files (`.npz`) are held in memory.

Source: docs/papers/m3p.md [4]. This module imports neither torch nor a decoder.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.data.sequences import Texts
from common.errors import optional_package
from common.files import open_regular, parsing, write_whole

#: What identifies a picture: its file name without suffix, or the number in its name.
KeyKind = Literal["stem", "number"]

REGION_SUFFIXES = (".h5", ".hdf5", ".npz")
_COLUMNS = ("image_id", "height_width", "num_boxes", "bbox", "features", "objects", "distribution")
_WRITTEN_AT_ONCE = 256
_IMAGE_SUFFIXES = re.compile(r"(\.(jpe?g|png|webp|bmp|gif|tiff?))+$", re.IGNORECASE)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # the same on every machine, whatever its locale


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class RegionError(ValueError):
    """Region features cannot be used. The message names the file and, if possible, the picture."""


def picture_key(name: str) -> str:
    """Remove all image suffixes from a picture's file name: `cat.jpg.jpg` becomes "cat"."""
    return _IMAGE_SUFFIXES.sub("", name)


@dataclass(frozen=True, eq=False)
class Regions:
    """The R regions of one picture, in the detector's order; label 0 is the background.

    Args:
        features: not normalized, float32 [R, F].
        boxes: left, top, right, bottom in pixels, float32 [R, 4].
        distribution: class probabilities [R, C], if the file has them.
    """

    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    height: int
    width: int
    distribution: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int, distribution: bool = False) -> Regions:
        """Return the first `count` regions, optionally with their `distribution`."""
        shares = self.distribution[:count] if distribution and self.distribution is not None else None
        return Regions(self.features[:count], self.boxes[:count], self.labels[:count], self.height, self.width, shares)

    @property
    def box_vectors(self) -> npt.NDArray[np.float32]:
        """Return left, top, right, bottom and area relative to the picture, scaled to unit vectors: float32 [R, 5].

        The vector of an empty box at the origin is zero. Source: docs/papers/m3p.md [3], "Image embedding".
        """
        left, top, right, bottom = self.boxes.astype(np.float64).T
        area = (right - left) * (bottom - top) / (self.width * self.height)
        sides = [left / self.width, top / self.height, right / self.width, bottom / self.height]
        vectors = np.stack([*sides, area], axis=-1)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


class RegionFeatures:
    """Reads region features of pictures lazily. If several files contain a picture, the first file is used.

    The key of `google_000123.jpg` is "google_000123" (`stem`) or "123" (`number`).
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], key: KeyKind = "stem") -> None:
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self.paths = tuple(Path(path) for path in given)
        self._files = [_RegionFile(path) for path in self.paths]
        names = [_encoded_keys(file, key) for file in self._files]
        sizes = {file.feature_size for file in self._files}
        if len(sizes) != 1:
            listed = ", ".join(f"{file.path} {file.feature_size}" for file in self._files)
            raise RegionError(f"region feature files must have the same width, found: {listed or 'no file'}")
        self.feature_size = sizes.pop()
        # Use sorted columns, because a dictionary of three million pictures takes half a gigabyte per process.
        self._sorted, self._places = np.unique(np.concatenate(names), return_index=True)
        self._starts = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def keys(self) -> Texts:
        """The pictures' keys, in the order of the files."""
        return Texts(_decoded(self._sorted[row]) for row in np.argsort(self._places))

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if self._find(key) < 0]

    def __getitem__(self, key: str) -> Regions:
        place = self._find(key)
        if place < 0:
            raise RegionError(
                f"{', '.join(map(str, self.paths[:3]))}: no region features of picture {key}; `assemble data "
                "<paper> --extract-regions` makes them"
            )
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[number].read(place - int(self._starts[number]), key)

    def _find(self, key: str) -> int:
        encoded = _encoded(key)
        row = int(np.searchsorted(self._sorted, encoded))
        return int(self._places[row]) if row < len(self._sorted) and self._sorted[row] == encoded else -1


def _encoded_keys(file: _RegionFile, key: KeyKind) -> npt.NDArray[np.bytes_]:
    keys = [picture_key(name) for name in file.names]
    if key == "number":
        digits = [re.findall(r"\d+", stem) for stem in keys]
        if [] in digits:
            raise RegionError(
                f"{file.path}: image_id {file.names[digits.index([])]!r} has no number of a caption's row"
            )
        keys = [str(int(numbers[-1])) for numbers in digits]
    encoded = np.array([_encoded(name) for name in keys], dtype=np.bytes_)
    unique, counts = np.unique(encoded, return_counts=True)
    if (counts > 1).any():
        raise RegionError(f"{file.path}: the picture {_decoded(unique[counts > 1][0])!r} occurs twice")
    return encoded


# -- reading -----------------------------------------------------------------------------------------------------------


class _RegionFile:
    """Columns of an untrusted file. Any problem raises a RegionError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        with parsing(path, RegionError):
            columns = self._columns
            for name in {*_COLUMNS[:5], "objects" if "distribution" not in columns else "distribution"} - set(columns):
                raise ValueError(f"no column {name}")
            shapes = {name: tuple(column.shape) for name, column in columns.items()}
            number, most, self.feature_size = (*shapes["features"], 0, 0, 0)[:3]  # checked below
            rows = (number, most)
            expected = {
                "image_id": (number,), "height_width": (number, 2), "num_boxes": (number,), "bbox": (*rows, 4),
                "features": (*rows, self.feature_size), "objects": rows,
                "distribution": (*rows, *shapes.get("distribution", (0,))[-1:]),
            }  # fmt: skip
            if any(shape != expected[name] for name, shape in shapes.items()):
                raise ValueError(f"its columns have inconsistent shapes: {shapes}")
            counts = np.asarray(columns["num_boxes"])
            if not ((counts >= 0) & (counts <= most)).all():
                raise ValueError(f"num_boxes must be 0 to {most}, but is {counts.min()} to {counts.max()}")
            names = np.asarray(columns["image_id"]).tolist()
            self.names = [_decoded(name) if isinstance(name, bytes) else str(name) for name in names]

    def __getstate__(self) -> dict[str, Any]:
        # Another process can't use an open file.
        return {**self.__dict__, "_columns": {}, "_owner": -1}

    def read(self, row: int, key: str) -> Regions:
        # HDF5 handles do not survive a fork.
        if self._owner not in (None, os.getpid()):
            self._open()
        with parsing(self.path, RegionError):
            columns = self._columns
            count = int(columns["num_boxes"][row])
            height, width = (int(value) for value in columns["height_width"][row])
            values = {name: np.asarray(columns[name][row, :count]) for name in _COLUMNS[3:] if name in columns}
            shares = values["distribution"].astype(np.float32) if "distribution" in values else None
            labels = values["objects"] if shares is None or "objects" in values else shares.argmax(axis=-1)
            regions = Regions(
                values["features"].astype(np.float32),
                values["bbox"].astype(np.float32),
                labels.astype(np.int64),
                height,
                width,
                shares,
            )
        _check(regions, f"{self.path}, picture {key!r}")
        return regions

    def _open(self) -> None:
        h5py = None if self.path.suffix.lower() == ".npz" else optional_package("h5py", "features")
        with parsing(self.path, RegionError):
            if h5py is None:
                with open_regular(self.path) as stream, np.load(stream) as held:
                    read = {name: held[name] for name in {*_COLUMNS, "wh"} & set(held)}
            else:
                file = h5py.File(open_regular(self.path))
                read = {name: plain_column(file, name) for name in {*_COLUMNS, "wh"} & set(file)}
        self._owner = None if h5py is None else os.getpid()
        if "wh" in read:
            read["height_width"] = read["wh"]
        self._columns = {name: read[name] for name in _COLUMNS if name in read}


def plain_column(file: Any, name: str) -> Any:
    """Return a column of an untrusted HDF5 file. Raise an error if the column refers to another file."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    column = file[name]
    if column.is_virtual or column.external:
        raise ValueError(f"{name} is stored in other files")
    text = name == "image_id" and h5py.check_string_dtype(column.dtype) is not None
    if not text and column.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds values of type {column.dtype}")
    return column


def _check(regions: Regions, where: str) -> None:
    if not len(regions):
        raise RegionError(f"{where}: no regions; at least one is needed")
    if not (np.isfinite(regions.features).all() and np.isfinite(regions.boxes).all()):
        raise RegionError(f"{where}: features or boxes that are not finite; extract them again")
    if regions.height <= 0 or regions.width <= 0:
        raise RegionError(f"{where}: invalid picture size, height {regions.height} and width {regions.width}")
    right, bottom = float(regions.boxes[:, 2].max()), float(regions.boxes[:, 3].max())
    beyond = right > 1.05 * regions.width or bottom > 1.05 * regions.height
    if beyond and right <= regions.height and bottom <= regions.width:
        raise RegionError(
            f"{where}: boxes reach to {right:g}, {bottom:g} in a picture {regions.width} wide and {regions.height} "
            "high; the size must be stored as height, then width, also in the column `wh`"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def write_regions(path: str | os.PathLike[str], rows: Iterable[tuple[str, Regions]]) -> None:
    """Write named regions to an `.h5` or `.npz` file atomically. For `.npz`, all regions must fit into memory."""
    path = Path(path)
    if path.suffix.lower() not in REGION_SUFFIXES:
        raise ValueError(f"{path}: the name must end with {', '.join(REGION_SUFFIXES)}")
    write = _write_numpy if path.suffix.lower() == ".npz" else _write_hdf5
    first = next(iterator := iter(rows), None)
    if first is None:
        raise ValueError(f"{path}: no pictures to write region features of")
    write_whole(path, lambda temporary: write(temporary, itertools.chain([first], iterator)))


def _packed(held: Sequence[tuple[str, Regions]]) -> dict[str, npt.NDArray[Any]]:
    every = [regions for _, regions in held]
    most = max(map(len, every))

    def column(values: Sequence[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
        padded = np.zeros((len(held), most, *values[0].shape[1:]), dtype=kind)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
        return padded

    shares = [regions.distribution for regions in every if regions.distribution is not None]
    columns = {
        "image_id": np.array([_encoded(name) for name, _ in held], dtype=np.bytes_),
        "height_width": np.array([(regions.height, regions.width) for regions in every], dtype=np.int32),
        "num_boxes": np.array([len(regions) for regions in every], dtype=np.int32),
        "bbox": column([regions.boxes for regions in every], np.float32),
        "features": column([regions.features for regions in every], np.float32),
        "objects": column([regions.labels for regions in every], np.int32),
    }
    if shares:
        if len(shares) < len(every):
            raise ValueError("only some of the pictures have a distribution over the classes")
        columns["distribution"] = column(shares, np.float32)
    return columns


def _write_numpy(path: Path, rows: Iterator[tuple[str, Regions]]) -> None:
    np.savez(path, **_packed(list(rows)))  # type: ignore[arg-type]


def _write_hdf5(path: Path, rows: Iterator[tuple[str, Regions]]) -> None:
    h5py = optional_package("h5py", "features")
    count = 0
    with h5py.File(path, "w") as file:
        while held := list(itertools.islice(rows, _WRITTEN_AT_ONCE)):
            for name, values in _packed(held).items():
                if name == "image_id":
                    values = values.astype(h5py.string_dtype())
                if name not in file:
                    # One picture per chunk, for random access.
                    chunks = (1 if values.ndim == 3 else len(values), *values.shape[1:])
                    file.create_dataset(name, data=values, maxshape=(None,) * values.ndim, chunks=chunks)
                    continue
                column = file[name]
                column.resize((count + len(held), *np.maximum(column.shape[1:], values.shape[1:])))
                column[(slice(count, None), *map(slice, values.shape[1:]))] = values
            count += len(held)
