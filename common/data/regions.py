"""Region features of pictures: the boxes that a detector found, a vector and a class for each of them.

Three layouts are read. Packed files, `.h5` or `.npz`, hold the columns `image_id` [N], `wh` or `height_width` [N, 2]
(both stored as height, then width), `num_boxes` [N], `bbox` or `boxes` [N, M, 4] as left, top, right, bottom in pixels,
`features` [N, M, F], and `objects` [N, M] or `distribution` [N, M, C]. MMF's script writes two files per picture,
`<name>.npy` with the features [R, F] and `<name>_info.npy` with the rest.

Source: docs/papers/m3p.md [4]; the layout of MMF: `tools/scripts/features/extract_features_vmb.py` of its repository.
This module imports neither torch nor a decoder.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.data.annotations import Texts
from common.errors import optional_package
from common.files import named, write_whole

#: What the keys of region features are made from: the name of the picture's file without its suffix, or its digits.
KeyKind = Literal["stem", "number"]

PACKED_SUFFIXES = (".h5", ".hdf5", ".npz")
_INFO = "_info.npy"
_FIELDS = {
    "image_id": ("image_id",),
    "size": ("height_width", "wh"),
    "count": ("num_boxes",),
    "boxes": ("bbox", "boxes"),
    "features": ("features",),
    "labels": ("objects", "distribution"),
}
_PROBABILITIES = "distribution"
# Attribute of an HDF5 file, entry of NumPy's archive.
_IDENTITY = "assemble_identity"
_WRITTEN_AT_ONCE = 256
_IMAGE_SUFFIXES = re.compile(r"(\.(jpe?g|png|webp|bmp|gif|tiff?))+$", re.IGNORECASE)


class RegionError(ValueError):
    """Region features cannot be used; the message names the file and, where it is about one, the picture."""


def picture_key(name: str) -> str:
    """What a picture is called among region features: its file's name without suffix.

    All suffixes of images at its end are left out ("cat" of `cat.jpg.jpg`), so that the key of a key is the same.
    """
    return _IMAGE_SUFFIXES.sub("", name)


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one picture, in the order of the detector.

    Args:
        features: not normalized, float32 [R, F].
        boxes: left, top, right, bottom in pixels, float32 [R, 4].
        labels: class of each region, int64 [R]; 0 = background.
        height, width: of the picture in pixels.
        distribution: probabilities of the classes [R, C], where the file has them.
    """

    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    height: int
    width: int
    distribution: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def box_vectors(self) -> npt.NDArray[np.float32]:
        """What stands for the boxes in a model [R, 5]; see :func:`box_vectors`."""
        return box_vectors(self.boxes, self.height, self.width)


def box_vectors(boxes: npt.ArrayLike, height: float, width: float) -> npt.NDArray[np.float32]:
    """Left, top, right, bottom and area of boxes as shares of the picture, each vector scaled to length 1.

    Args:
        boxes: left, top, right, bottom in pixels [..., 4].
        height, width: of the picture in pixels.

    Returns:
        float32 [..., 5]; a box without size at the origin stays zero.

    Raises:
        ValueError: the picture has no size.

    Source: docs/papers/m3p.md [3], "Image embedding".
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"a picture of height {height:g} and width {width:g} has no size")
    corners = np.asarray(boxes, dtype=np.float64)
    left, top, right, bottom = np.moveaxis(corners, -1, 0)
    area = (right - left) * (bottom - top) / (width * height)
    vectors = np.stack([left / width, top / height, right / width, bottom / height, area], axis=-1)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class RegionTable:
    """The regions of several pictures in memory, padded to the same number.

    Args:
        keys: the pictures.
        features: not normalized, float32 [N, R, F]; zeros where there is no region.
        boxes: see :func:`box_vectors`, float32 [N, R, 5].
        labels: int64 [N, R]; 0 = background, also where there is no region.
        mask: where there is one, bool [N, R].
    """

    keys: Texts
    features: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.keys)


class RegionFeatures:
    """Region features of the pictures of a set, read from their files when they are asked for.

    Args:
        paths: packed files, or folders in the layout of MMF. A picture that several of them hold is read from the
            first one.
        key: what the keys are made from: of a file `google_000123.jpg`, "google_000123" or "123".

    Attributes:
        paths: the files.
        feature_size: F.
        max_regions: the largest number of regions that a picture can have; for a folder of MMF that of its first
            picture, as the script writes the same number for all unless its detector finds fewer.

    Raises:
        FileNotFoundError: a file does not exist.
        RegionError: a file is damaged, holds no region features, or its columns do not fit each other.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], key: KeyKind = "stem") -> None:
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not given:
            raise ValueError("at least one file of region features is needed")
        self.paths = tuple(Path(path) for path in given)
        self._files = [_open(path) for path in self.paths]
        names: list[npt.NDArray[np.bytes_]] = []
        for file in self._files:
            own = np.array([_encoded(_key_of(name, key, file.path)) for name in file.names()], dtype=np.bytes_)
            found, counts = np.unique(own, return_counts=True)
            if (counts > 1).any():
                twice = _decoded(found[counts > 1][0])
                raise RegionError(f"{file.path}: the picture {twice!r} occurs twice")
            names.append(own)
        sizes = {file.feature_size for file in self._files}
        if len(sizes) > 1:
            listed = ", ".join(f"{file.path} {file.feature_size}" for file in self._files)
            raise RegionError(f"files of region features with different widths: {listed}")
        self.feature_size = sizes.pop()
        every = np.concatenate(names)
        # Sorted columns instead of a dictionary: three million pictures would take half a gigabyte in every process.
        order = np.argsort(every, kind="stable")
        ordered = every[order]
        first = np.ones(len(order), dtype=np.bool_)
        first[1:] = ordered[1:] != ordered[:-1]
        self._sorted, self._places = ordered[first], order[first]
        self._starts = np.cumsum([0, *map(len, names)])
        self.max_regions = max(file.max_regions for file in self._files)

    def __repr__(self) -> str:
        return f"RegionFeatures({len(self)} pictures, {self.feature_size} wide)"

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) >= 0

    @property
    def keys(self) -> Texts:
        """The pictures, in the order of the files."""
        return Texts(_decoded(self._sorted[row]) for row in np.argsort(self._places))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of some pictures that have no regions here."""
        return [key for key in keys if self._find(key) < 0]

    def __getitem__(self, key: str) -> Regions:
        """The regions of a picture.

        Raises:
            KeyError: there are none.
            RegionError: they are damaged.
        """
        place = self._find(key)
        if place < 0:
            raise KeyError(key)
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        file = self._files[number]
        return _checked(file.read(place - int(self._starts[number])), f"{file.path}, picture {key!r}")

    def table(self, keys: Iterable[str]) -> RegionTable:
        """The regions of several pictures in memory.

        Raises:
            RegionError: a picture has none, or its regions are damaged.
        """
        wanted = Texts(keys)
        lacking = self.missing(wanted)
        if lacking:
            some = ", ".join(lacking[:3])
            raise RegionError(
                f"{', '.join(map(str, self.paths[:3]))}: {len(lacking)} of {len(wanted)} pictures have no region "
                f"features, such as {some}; `assemble data <paper> --extract-regions` makes them"
            )
        found = [self[key] for key in wanted]
        # Of a folder of MMF only the first picture has been counted.
        shape = (len(wanted), max([self.max_regions, *map(len, found)]))
        table = RegionTable(
            wanted,
            np.zeros((*shape, self.feature_size), dtype=np.float32),
            np.zeros((*shape, 5), dtype=np.float32),
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.bool_),
        )
        for row, regions in enumerate(found):
            count = len(regions)
            table.features[row, :count] = regions.features
            table.boxes[row, :count] = regions.box_vectors
            table.labels[row, :count] = regions.labels
            table.mask[row, :count] = True
        return table

    def _find(self, key: str) -> int:
        encoded = _encoded(key)
        row = int(np.searchsorted(self._sorted, encoded))
        return int(self._places[row]) if row < len(self._sorted) and self._sorted[row] == encoded else -1


def _checked(regions: Regions, where: str) -> Regions:
    if not len(regions):
        raise RegionError(f"{where}: no regions; at least one is needed")
    if not (np.isfinite(regions.features).all() and np.isfinite(regions.boxes).all()):
        raise RegionError(f"{where}: features or boxes that are no finite numbers; extract them anew")
    if regions.height <= 0 or regions.width <= 0:
        raise RegionError(f"{where}: a picture of height {regions.height} and width {regions.width} has no size")
    right, bottom = float(regions.boxes[:, 2].max()), float(regions.boxes[:, 3].max())
    beyond = right > 1.05 * regions.width or bottom > 1.05 * regions.height
    if beyond and right <= regions.height and bottom <= regions.width:
        raise RegionError(
            f"{where}: boxes reach to {right:g}, {bottom:g} in a picture {regions.width} wide and {regions.height} "
            "high; the size must be stored as height, then width, also under the name `wh`"
        )
    return regions


def _key_of(name: str, key: KeyKind, path: Path) -> str:
    stem = picture_key(name)
    if key == "stem":
        return stem
    digits = re.findall(r"\d+", stem)
    if not digits:
        raise RegionError(f"{path}: image_id {name!r} has no number, which here is the row of its caption")
    return str(int(digits[-1]))


def _encoded(name: str) -> bytes:
    # File names need not be UTF-8.
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------- layouts
class _File(ABC):
    """Region features in one layout."""

    path: Path
    feature_size: int
    max_regions: int

    @abstractmethod
    def names(self) -> Sequence[str]:
        """What the file calls its pictures."""

    @abstractmethod
    def read(self, row: int) -> Regions:
        """The regions of one of them; not checked."""


def _open(path: Path) -> _File:
    if path.is_dir():
        return _MmfFolder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of region features")
    if path.suffix.lower() not in PACKED_SUFFIXES:
        raise RegionError(f"{path}: region features are {', '.join(PACKED_SUFFIXES)} files or a folder of .npy files")
    return _PackedFile(path)


class _PackedFile(_File):
    """Columns over all pictures, in HDF5 or in NumPy's archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = -1
        self._columns: dict[str, Any] = {}
        columns = self._opened()
        lengths = {name: column.shape[0] for name, column in columns.items() if column.ndim}
        features, boxes, labels = columns["features"], columns["boxes"], columns["labels"]
        shapes = {self._named.get(name, name): column.shape for name, column in columns.items()}
        shares = columns.get(_PROBABILITIES, labels)
        fits = (
            len(lengths) == len(columns)
            and len(set(lengths.values())) == 1
            and features.ndim == 3
            and boxes.shape == (*features.shape[:2], 4)
            and labels.shape[:2] == shares.shape[:2] == features.shape[:2]
            and labels.ndim == (3 if self._named["labels"] == _PROBABILITIES else 2)
            and (shares is labels or shares.ndim == 3)
            and columns["size"].shape[1:] == (2,)
            and columns["count"].ndim == 1
        )
        if not fits:
            raise RegionError(f"{path}: its columns do not fit each other: {shapes}")
        self.feature_size, self.max_regions = features.shape[2], features.shape[1]
        counts = np.asarray(columns["count"])
        if len(counts) and (counts.min() < 0 or counts.max() > self.max_regions):
            raise RegionError(f"{path}: num_boxes runs from {counts.min()} to {counts.max()} of {self.max_regions}")

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not pass to another process.
        return {**self.__dict__, "_columns": {}, "_owner": -1}

    def names(self) -> list[str]:
        found = np.asarray(self._opened()["image_id"])
        return [_decoded(value) if isinstance(value, bytes) else str(value) for value in found.tolist()]

    def read(self, row: int) -> Regions:
        columns = self._opened()
        try:
            count = int(columns["count"][row])
            height, width = (int(value) for value in columns["size"][row])
            shares = None
            if _PROBABILITIES in columns:
                shares = np.asarray(columns[_PROBABILITIES][row, :count], dtype=np.float32)
            named = self._named["labels"] != _PROBABILITIES
            labels = np.asarray(columns["labels"][row, :count]) if named else np.asarray(shares).argmax(axis=-1)
            return Regions(
                np.asarray(columns["features"][row, :count], dtype=np.float32),
                np.asarray(columns["boxes"][row, :count], dtype=np.float32),
                labels.astype(np.int64),
                height,
                width,
                shares,
            )
        except OSError as error:
            raise RegionError(f"{self.path}, row {row}: cannot be read ({error}); the file may be truncated") from error

    def _opened(self) -> dict[str, Any]:
        # A handle of HDF5 that was opened before a fork must not be used after it.
        if self._owner != os.getpid():
            try:
                found = _numpy_columns(self.path) if self.path.suffix.lower() == ".npz" else _hdf5_columns(self.path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise RegionError(f"{self.path}: damaged, or no {self.path.suffix} file ({error})") from error
            self._named = {}
            for field, names in _FIELDS.items():
                name = next((name for name in names if name in found), None)
                if name is None:
                    raise RegionError(
                        f"{self.path}: no {' or '.join(names)}; it holds {', '.join(sorted(found)) or 'nothing'}"
                    )
                self._named[field] = name
            self._columns = {field: found[name] for field, name in self._named.items()}
            if _PROBABILITIES in found:
                self._columns[_PROBABILITIES] = found[_PROBABILITIES]
            self._owner = os.getpid()
        return self._columns


def _hdf5_columns(path: Path) -> dict[str, Any]:
    h5py = optional_package("h5py", "features")

    file = h5py.File(path, "r")
    return {name: file[name] for name in file if isinstance(file[name], h5py.Dataset)}


def _numpy_columns(path: Path) -> dict[str, Any]:
    """Columns of an archive, mapped where it is not compressed, so that a large one is not read as a whole."""
    columns: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                columns[name] = loaded[name]
                continue
            with path.open("rb") as stream:
                # After the fixed part of a member's own header: lengths of its name and of its extra field.
                stream.seek(member.header_offset + 26)
                lengths = np.frombuffer(stream.read(4), dtype="<u2")
                stream.seek(member.header_offset + 30 + int(lengths.sum()))
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, kind = read(stream)
                place = stream.tell()
            if kind.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not opened for safety")
            if place + kind.itemsize * int(np.prod(shape)) > path.stat().st_size:
                raise ValueError(f"{name} ends too early")
            if 0 in shape:
                columns[name] = np.zeros(shape, dtype=kind)
            else:
                columns[name] = np.memmap(path, kind, "r", place, shape, "F" if fortran else "C")
    return columns


class _MmfFolder(_File):
    """Two files per picture, as MMF's script writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = sorted(entry.name.removesuffix(_INFO) for entry in os.scandir(path) if entry.name.endswith(_INFO))
        if not self._names:
            raise RegionError(f"{path}: holds no *{_INFO}, so it is no folder of MMF's region features")
        first = self.read(0)
        # Every picture has as many as the script was asked for; the first tells how many.
        self.feature_size, self.max_regions = first.features.shape[1], len(first.features)

    def names(self) -> list[str]:
        return self._names

    def read(self, row: int) -> Regions:
        name = self._names[row]
        path = self.path / f"{name}.npy"
        try:
            with named(path):
                features = np.load(path, allow_pickle=False)
            info = _plain_object(self.path / f"{name}{_INFO}")
            boxes, labels = np.asarray(info["bbox"]), np.asarray(info["objects"])
            count = min(int(info.get("num_boxes", len(boxes))), len(features))
            height, width = int(info["image_height"]), int(info["image_width"])
        except FileNotFoundError as error:
            raise RegionError(f"{error.filename}: missing beside {name}{_INFO}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, EOFError, pickle.UnpicklingError) as error:
            raise RegionError(f"{path}: it or its {_INFO} is damaged ({error!r})") from error
        if features.ndim != 2 or boxes.shape != (len(features), 4) or labels.shape != (len(features),):
            raise RegionError(f"{path}: {features.shape} features for boxes {boxes.shape} and objects {labels.shape}")
        return Regions(
            features[:count].astype(np.float32),
            boxes[:count].astype(np.float32),
            labels[:count].astype(np.int64),
            height,
            width,
        )


class _StandIn:
    """What a pickle gets in place of something of NumPy's.

    A pickle may set any attribute of what has no `__setstate__`, so each of these has one.
    """

    held: Any = None

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets what cannot be set")


class _Kind(_StandIn):
    """A dtype: one of numbers, or that of the object that `np.save` wraps a dictionary in."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise pickle.UnpicklingError(f"it holds an array of {code!r:.40}, which is not opened for safety")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, and what records and objects have); nothing but the order is taken.
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|")):
            raise pickle.UnpicklingError("it holds a damaged type of an array")
        self.order = ">" if state[1] == ">" else "<"


class _Array(_StandIn):
    """An array that is made empty and filled by its state, of which a new one is made here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise pickle.UnpicklingError("it holds a damaged array")
        _, shape, kind, fortran, content = state
        if isinstance(content, list) and len(content) == 1 and shape == ():
            self.held = content[0]  # the wrapped dictionary; no array is made
        else:
            self.held = _numbers(content, kind, shape, "F" if fortran else "C")


class _Buffer(_StandIn):
    """An array out of a buffer, as newer pickles have it."""

    def __init__(self, content: Any, kind: Any, shape: Any, order: Any = "C") -> None:
        self.held = _numbers(content, kind, shape, order)


class _Number(_StandIn):
    """A number of NumPy's."""

    def __init__(self, kind: Any, content: Any) -> None:
        self.held = _numbers(content, kind, ())[()]


class _Bytes(_StandIn):
    """Bytes as old pickles write them: as text in Latin-1."""

    def __new__(cls, text: Any, _: Any = None) -> Any:
        if not isinstance(text, str):
            raise pickle.UnpicklingError("it holds damaged bytes")
        return text.encode("latin1")


#: Codes of numbers, and of an object on machines of 64 and 32 bits.
_CODES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8", "O4"})
#: All that MMF's files name, with NumPy 1 and 2, and what they get for it. Nothing is looked up.
_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Number,
    ("numpy._core.multiarray", "scalar"): _Number,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Bytes,
}


def _numbers(content: Any, kind: Any, shape: Any, order: Any = "C") -> npt.NDArray[Any]:
    """A new array of numbers out of bytes, after a look at every part."""
    if not (isinstance(content, bytes | bytearray) and isinstance(kind, _Kind) and order in ("C", "F")):
        raise pickle.UnpicklingError("it holds a damaged array")
    if kind.code.startswith("O"):
        raise pickle.UnpicklingError("it holds an array of objects, which is not opened for safety")
    if not (isinstance(shape, tuple) and len(shape) <= 8 and all(type(one) is int and one >= 0 for one in shape)):
        raise pickle.UnpicklingError("it holds an array of a damaged shape")
    numbers = np.dtype(kind.order + kind.code)
    if math.prod(shape) * numbers.itemsize != len(content):
        raise pickle.UnpicklingError(f"it holds {len(content)} bytes for an array of {shape!r:.80}")
    return np.frombuffer(bytes(content), dtype=numbers).reshape(shape, order=order)


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain data and arrays of numbers; a file from a stranger can neither run nor import anything.

    NumPy's own hooks are not called: their state, which the file chooses, can hold raw pointers.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not opened for safety")
        return _STAND_INS[module, name]


def _plain_object(path: Path) -> dict[str, Any]:
    """The dictionary of a file, with arrays and numbers as values; other values are left out."""
    with named(path), path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, kind = read(stream)
        if not kind.hasobject:
            raise ValueError("an array of numbers where a dictionary is expected")
        try:
            found = _PlainUnpickler(stream).load()
        except (AttributeError, LookupError, RecursionError, OverflowError, MemoryError) as error:
            raise pickle.UnpicklingError(f"no plain data: {error!r}") from None
    found = found.held if isinstance(found, _Array) else found
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where a dictionary is expected")
    values = {name: value.held if isinstance(value, _StandIn) else value for name, value in found.items()}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray | np.generic | int | float)}


# ---------------------------------------------------------------------------------------------------- writing
def write_regions(
    path: str | os.PathLike[str],
    rows: Iterable[tuple[str, Regions]],
    half: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> int:
    """Write a packed file, `.h5` or `.npz`, whole or not at all.

    Args:
        path: the file; missing folders are made, an older file is replaced.
        rows: name and regions of every picture. HDF5 is written as they come; the other layout holds all in memory.
        half: keep the features with 16 bits.
        identity: what they were made with, for :func:`identity_of`.

    Returns:
        Number of pictures.

    Raises:
        ValueError: the suffix is neither, there are no pictures, or their features differ in width.
    """
    path = Path(path)
    if path.suffix.lower() not in PACKED_SUFFIXES:
        raise ValueError(f"{path}: the name must end with {', '.join(PACKED_SUFFIXES)}")
    count = 0
    note = None if identity is None else json.dumps(dict(identity), sort_keys=True)

    def write(temporary: Path) -> None:
        nonlocal count
        count = (_write_numpy if path.suffix.lower() == ".npz" else _write_hdf5)(temporary, _blocks(rows, half), note)
        if not count:
            raise ValueError(f"{path}: there are no pictures to write region features of")

    write_whole(path, write)
    return count


def identity_of(path: Path) -> dict[str, Any] | None:
    """What the features of a packed file were made with; None where nothing says so."""
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as columns:
            note = columns[_IDENTITY].item() if _IDENTITY in columns else None
    else:
        h5py = optional_package("h5py", "features")

        with h5py.File(path, "r") as file:
            note = file.attrs.get(_IDENTITY)
    return None if note is None else json.loads(note)


def _blocks(rows: Iterable[tuple[str, Regions]], half: bool) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Columns of some hundreds of pictures at a time, each block padded to its own largest number of regions."""
    held: list[tuple[str, Regions]] = []
    width = 0
    for name, regions in rows:
        width = width or regions.features.shape[1]
        if regions.features.shape[1] != width:
            raise ValueError(f"picture {name!r}: {regions.features.shape[1]} features where others have {width}")
        held.append((name, regions))
        if len(held) == _WRITTEN_AT_ONCE:
            yield _packed(held, half)
            held = []
    if held:
        yield _packed(held, half)


def _packed(held: Sequence[tuple[str, Regions]], half: bool) -> dict[str, npt.NDArray[Any]]:
    most = max(len(regions) for _, regions in held)

    def column(values: Sequence[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
        padded = np.zeros((len(held), most, *values[0].shape[1:]), dtype=kind)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
        return padded

    every = [regions for _, regions in held]
    shares = [regions.distribution for regions in every if regions.distribution is not None]
    columns = {
        "image_id": np.array([_encoded(name) for name, _ in held], dtype=np.bytes_),
        "height_width": np.array([(regions.height, regions.width) for regions in every], dtype=np.int32),
        "num_boxes": np.array([len(regions) for regions in every], dtype=np.int32),
        "bbox": column([regions.boxes for regions in every], np.float32),
        "features": column([regions.features for regions in every], np.float16 if half else np.float32),
        "objects": column([regions.labels for regions in every], np.int32),
    }
    if shares:
        if len(shares) < len(every):
            raise ValueError("only some of the pictures have a distribution over the classes")
        columns[_PROBABILITIES] = column(shares, np.float16 if half else np.float32)
    return columns


def _write_numpy(path: Path, blocks: Iterable[dict[str, npt.NDArray[Any]]], note: str | None) -> int:
    held = list(blocks)
    if not held:
        return 0
    most = max(block["features"].shape[1] for block in held)

    def joined(name: str) -> npt.NDArray[Any]:
        parts = [block[name] for block in held]
        if parts[0].ndim > 1 and name != "height_width":
            parts = [np.pad(part, [(0, 0), (0, most - part.shape[1])] + [(0, 0)] * (part.ndim - 2)) for part in parts]
        return np.concatenate(parts)

    columns = {name: joined(name) for name in held[0]}
    if note is not None:
        columns[_IDENTITY] = np.array(note)
    with path.open("wb") as stream:
        np.savez(stream, **columns)  # type: ignore[arg-type]
    return len(columns["num_boxes"])


def _write_hdf5(path: Path, blocks: Iterable[dict[str, npt.NDArray[Any]]], note: str | None) -> int:
    h5py = optional_package("h5py", "features")

    count = 0
    with h5py.File(path, "w") as file:
        if note is not None:
            file.attrs[_IDENTITY] = note
        for block in blocks:
            added = len(block["num_boxes"])
            for name, values in block.items():
                if name == "image_id":
                    values = values.astype(h5py.string_dtype())
                if name not in file:
                    limits = tuple(None if axis < 2 and name != "height_width" else size for axis, size in
                                   enumerate(values.shape))  # fmt: skip
                    limits = (None, *limits[1:])
                    # One picture per chunk: pictures are read one by one and in random order.
                    file.create_dataset(name, data=values, maxshape=limits, chunks=_chunks(values))
                    continue
                column = file[name]
                shape = [count + added, *column.shape[1:]]
                if values.ndim > 1 and name != "height_width":
                    shape[1] = max(shape[1], values.shape[1])
                column.resize(shape)
                if values.ndim > 1:
                    column[count:, : values.shape[1]] = values
                else:
                    column[count:] = values
            count += added
    return count


def _chunks(values: npt.NDArray[Any]) -> tuple[int, ...]:
    return (1, *values.shape[1:]) if values.ndim == 3 else (max(len(values), 1), *values.shape[1:])
