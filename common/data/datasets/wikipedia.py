"""Text without pictures: one plain file per language, such as Wikipedia."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common.data.annotations import kept_columns, read_once
from common.data.datasets.base import DatasetStatus, MediaDataset, Scan
from common.data.sequences import MadeOnDemand
from common.files import named, open_regular


class TextLines(MadeOnDemand[str]):
    """The non-blank lines of a UTF-8 text file, read lazily."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._limits = kept_columns(path, _line_limits)["limits"]
        if not len(self._limits):
            raise ValueError(f"{path}: holds no text; write one sentence per line")
        self._bytes: npt.NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process must map the file itself.
        return {**self.__dict__, "_bytes": None}

    def __len__(self) -> int:
        return len(self._limits)

    def _item(self, position: int) -> str:
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        start, end = self._limits[position]
        try:
            return bytes(self._bytes[start:end]).decode("utf-8").strip().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 at byte {start + error.start}; convert the file") from None


def _line_limits(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the byte offsets where every non-blank line starts and ends."""
    with named(path), open_regular(path) as stream:
        # Blank lines get a negative length.
        lines = np.fromiter((-len(line) if line.isspace() else len(line) for line in stream), np.int64)
    after = np.cumsum(np.abs(lines))
    return {"limits": np.stack([after - lines, after], axis=1)[lines > 0]}


class WikipediaText(MediaDataset):
    """Sentences in several languages, one per line. By default, all languages with files.

    Source: docs/papers/m3p.md [6.1] and [8]. The official code reads `{lang}.{train,valid}.pth`, which contain the
    tokens of these files.
    """

    name = "wikipedia"
    title = "Wikipedia text"
    splits = ("train", "valid")
    optional_splits = frozenset({"valid"})
    split_aliases: ClassVar[Mapping[str, str]] = {"val": "valid", "validation": "valid"}
    streams = ()
    expected_layout = "<language>.train.txt and <language>.valid.txt   (UTF-8, one sentence per line; en, de, ...)"
    size = "100 GB for the 100 languages of the released model"
    license = "CC BY-SA 4.0"
    source = (
        "https://dumps.wikimedia.org/<language>wiki/latest/<language>wiki-latest-pages-articles.xml.bz2, converted to "
        "plain text with `python -m wikiextractor.WikiExtractor` and split into sentences"
    )

    def __init__(self, root: str | os.PathLike[str], languages: Sequence[str] | None = None) -> None:
        super().__init__(root)
        self._wanted = None if languages is None else tuple(sorted(languages))

    @property
    def unit(self) -> str:
        return "sentences"

    @property
    def languages(self) -> tuple[str, ...]:
        self.require_folder()
        available = tuple(sorted(path.name.split(".")[0] for path in self.root.glob("[!.]*.train.txt")))
        if not (self._wanted or available):
            raise self._lacks(self.root, "no file of text")
        return self._wanted or available

    def sentences(self, split: str, language: str) -> TextLines:
        split, _ = self._checked(split, None)
        return _text_lines(self._one_of(f"{language}.{split}.txt", reason=f"no text in {language!r}"))

    def _scan(self, split: str, fold: int | None) -> Scan:
        raise self._lacks(self.root, "text has no media files to list")

    def status(self) -> DatasetStatus:
        counts: dict[str, int] = {}
        problems = []
        try:
            languages = self.languages
        except FileNotFoundError as error:
            languages, problems = (), [str(error)]
        for language in languages:
            for split in self.splits:
                try:
                    counts[f"{split} {language}"] = len(self.sentences(split, language))
                except (FileNotFoundError, ValueError) as error:
                    if split in self.optional_splits and isinstance(error, FileNotFoundError):
                        continue
                    problems.append(str(error))
        return DatasetStatus(self, "text files" if counts else "", counts, problems)


_text_lines = read_once(256)(TextLines)
