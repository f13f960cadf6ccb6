"""Base of the miniature worlds. A world is rendered once into a cache folder for its parameters, under a lock."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.status import Status

from common.files import cache_folder, exclusive

Write = Callable[[Path, Callable[[], None]], None]


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write a JPEG of uint8 [H, W, 3] without color subsampling, because glyphs are only a few pixels wide."""
    Image.fromarray(image).save(path, "JPEG", quality=95, subsampling=0)


def arguments_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments that affect the files. `variables` is `locals()` at the start of a world's constructor."""
    return {name: value for name, value in variables.items() if name not in ("self", "root", "__class__")}


class World:
    """Generates small data sets as files, in the layouts of real data sets.

    :meth:`prepare` renders the files once. The folder's name contains a hash of everything that affects the files. The
    classes for the real data sets read the files. For each data set, a method `_fill_<name>` writes into an empty
    folder; the function `write` that it is given makes folders and counts media files. `root` is the folder for all
    worlds. None means `worlds` in the cache folder (`$ASSEMBLE_CACHE`, else the user's cache folder).
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    # Part of the cache key: increase it when the files change.
    version: ClassVar[int]
    # Attribution that figures with pictures of this world must show.
    credit: ClassVar[str] = ""

    def __init__(self, parameters: Mapping[str, Any], root: str | None) -> None:
        self.parameters = dict(parameters)
        self._root = root

    def recipe(self) -> dict[str, Any]:
        """Return everything that affects the files, as plain data."""
        return {"version": self.version, "parameters": self.parameters}

    @property
    def folder(self) -> Path:
        parent = cache_folder() / "worlds" if self._root is None else Path(self._root).expanduser()
        key = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()[:16]
        return parent / f"{self.kind}-{key}"

    def root_of(self, name: str) -> Path:
        """Return the folder of the data set `name` in this world."""
        if name not in self.names:
            raise ValueError(f"the {self.title} has no data set {name!r}; it has {', '.join(self.names)}")
        return self.folder / name

    def place(self, dataset: Any) -> None:
        """Make a data set read this world's files. `dataset.name` must be one of `names`."""
        dataset.root = self.root_of(dataset.name)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        """Render the data sets `names` (None: all) that are missing. If another process renders, wait."""
        wanted = self.names if names is None else tuple(names)
        if all(self.root_of(name).is_dir() for name in wanted):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.folder / ".lock") as locked:
            missing = [name for name in wanted if not self.root_of(name).is_dir()]
            if not missing:
                return
            for leftover in self.folder.glob(".rendering-*") if locked else ():
                # This process holds the lock, so the writer was killed. Without locks, the writer may be running.
                shutil.rmtree(leftover, ignore_errors=True)
            with Console(stderr=True).status("") as status:
                for name in missing:
                    self._render(name, status)

    def _render(self, name: str, status: Status) -> None:
        final = self.root_of(name)
        scratch = Path(tempfile.mkdtemp(dir=self.folder, prefix=".rendering-"))
        written = itertools.count(1)

        def write(path: Path, render: Callable[[], None]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            render()
            status.update(f"rendering {name} of the {self.title}, file {next(written):,}")

        try:
            getattr(self, f"_fill_{name}")(scratch, write)
            scratch.chmod(0o755)  # a temporary folder is private, but a cache is shared
            try:
                os.replace(scratch, final)
            except OSError:
                # Without file locks, two processes may render the same data. Keep the files of the first one.
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
