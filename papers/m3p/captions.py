"""Tokenizes captions of one language, and pools captions of several languages by image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.data.datasets.captioned import LanguageCaptioned
from common.data.text import XLMRTokenizer, pad_tokens
from common.files import cache_folder, exclusive, make_folder, settled, stamp_of, write_whole
from papers.m3p.masking import Ints

# Number of texts to tokenize at a time.
CHUNK = 10_000

Tokens = npt.NDArray[np.integer[Any]]


class CaptionTokens:
    """The captions of a split of a data set in one language. Each caption is tokenized only once."""

    def __init__(self, dataset: LanguageCaptioned, split: str, language: str, tokenizer: XLMRTokenizer) -> None:
        self.dataset = dataset
        self.split = split
        self.captions = dataset.captions(split, language)
        self.texts: Sequence[str] = self.captions.captions.column
        self.tokenizer = tokenizer
        self._tokens = stream_tokens(self.texts, tokenizer, self.captions.fingerprint())
        # A closing token follows every caption, and no piece has its id.
        self._ends = np.flatnonzero(self._tokens == tokenizer.end_id)

    def pieces(self, number: int) -> Tokens:
        """Return the pieces of a caption, without boundary tokens."""
        first = self._ends[number - 1] + 1 if number else 0
        return self._tokens[first : self._ends[number]]


class CaptionPool:
    """The images `keys`, in this order, with their captions in one or more languages."""

    def __init__(self, sets: Sequence[CaptionTokens], keys: Sequence[str]) -> None:
        self.sets = sets
        self._bases = np.cumsum([0, *(len(tokens.texts) for tokens in sets)])
        rows_of = [_rows(tokens.captions.keys, keys) for tokens in sets]
        image = np.concatenate(
            [np.repeat(rows, np.diff(tokens.captions.captions.starts)) for rows, tokens in zip(rows_of, sets)]
        )
        used = np.flatnonzero(image >= 0)
        self._captions = used[np.argsort(image[used], kind="stable")]
        self.counts = np.bincount(image[used], minlength=len(keys))
        self._starts = np.cumsum([0, *self.counts])
        # Groups are numbered per set, so an image gets its group from the first set that contains it.
        groups = np.full((len(keys), 2), -1, dtype=np.int64)
        for number, (rows, tokens) in enumerate(zip(rows_of, sets)):
            new = np.flatnonzero((rows >= 0) & (groups[rows, 0] < 0))
            groups[rows[new]] = np.stack([np.full(len(new), number), tokens.captions.groups[new]], axis=1)
        self.groups = np.unique(groups, axis=0, return_inverse=True)[1].reshape(-1)

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, image: int) -> Ints:
        return self._captions[self._starts[image] : self._starts[image + 1]]

    def caption(self, number: int) -> tuple[CaptionTokens, int]:
        """Return the set of a caption, and the caption's number in that set."""
        which = int(np.searchsorted(self._bases, number, side="right")) - 1
        return self.sets[which], number - int(self._bases[which])


def _rows(keys: Sequence[str], images: Sequence[str]) -> Ints:
    """Return the position of each key among the images, or -1 if it is missing."""
    if keys is images:
        return np.arange(len(keys))
    row_of = {key: row for row, key in enumerate(images)}
    return np.array([row_of.get(key, -1) for key in keys], dtype=np.int64)


def forced_captions(count: int, wanted: int, rng: np.random.Generator) -> Ints:
    """Choose exactly `wanted` of `count` captions at random, int64 [wanted]. Repeat captions if there are too few.

    Source: [8] (`seq_per_img`).
    """
    order = rng.permutation(count)[:wanted]
    return np.concatenate([order, rng.integers(count, size=max(wanted - count, 0))])


def pad_captions(captions: Sequence[Tokens], tokenizer: XLMRTokenizer) -> Tensor:
    """Add boundary tokens to the pieces of captions, and padding: int64 [P, L]."""
    return pad_tokens([(tokenizer.start_id, *pieces, tokenizer.end_id) for pieces in captions], tokenizer.pad_id)


# -- tokens of many texts ----------------------------------------------------------------------------------------------


def stream_tokens(texts: Sequence[str], tokenizer: XLMRTokenizer, identity: str | None = None) -> npt.NDArray[np.int32]:
    """Tokenize texts, each closed by `</s>`, to ids int32 [tokens]. Cache the ids of large sets by `identity`."""

    def chunks() -> Iterator[npt.NDArray[np.int32]]:
        for first in range(0, len(texts), CHUNK):
            rows = tokenizer.pieces(texts[first : first + CHUNK])
            yield np.fromiter((token for row in rows for token in (*row, tokenizer.end_id)), dtype=np.int32)

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            for chunk in chunks():
                stream.write(chunk.tobytes())

    if identity is not None and len(texts) > CHUNK:
        digest = hashlib.sha256(f"tokens 1 {tokenizer.fingerprint} {identity}".encode()).hexdigest()
        cached = cache_folder() / "tokens" / f"{digest[:32]}.int32"
        # Continue without the cache if it isn't writable; this only costs time and memory.
        with suppress(OSError):
            if not cached.is_file():  # another user's cache may be read-only
                make_folder(cached.parent)
                # One process per node writes the file, and the others read it; Wikipedia's takes tens of gigabytes.
                with exclusive(cached.parent.with_suffix(".lock")):
                    if not cached.is_file():
                        write_whole(cached, write)
            return np.memmap(cached, dtype=np.int32, mode="r")
    return np.concatenate([np.zeros(0, dtype=np.int32), *chunks()])


def file_identity(path: Path) -> str | None:
    """Return a cache key for a file's content, or None if the file changed too recently for its time to identify it."""
    stamp = stamp_of(path)
    return f"{os.path.abspath(path)} {list(stamp)}" if settled(stamp) else None
