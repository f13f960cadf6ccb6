"""Running text in many languages as blocks of tokens ([6.1])."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.text import XLMRTokenizer
from common.files import cache_folder, exclusive, make_folder, settled, stamp_of, write_whole

Ints = npt.NDArray[np.int64]
# Texts are made into tokens this many at a time.
CHUNK = 10_000


class LanguageStream:
    """The text of a language as blocks of `bptt` tokens in `batch_size` rows ([6.1]).

    All sentences, each closed by `</s>`, are one stream. It is filled up with closing tokens at its beginning and cut
    into as many pieces as a batch has rows; block i holds the i-th `bptt` tokens of every piece, moved by one, so that
    the first block begins with a closing token.

    Args:
        tokens: token ids of the stream, closing tokens included; may lie on disk.
        batch_size: rows of a block.
        bptt: tokens of a row.
        end_id: the closing token.
    """

    def __init__(self, tokens: npt.NDArray[Any], batch_size: int, bptt: int, end_id: int = 2) -> None:
        if not len(tokens):
            raise ValueError("a stream without tokens has no blocks")
        self.tokens = tokens
        self.batch_size = batch_size
        self.bptt = bptt
        self.end_id = end_id
        self._blocks = -(-len(tokens) // (batch_size * bptt))

    def __len__(self) -> int:
        """Number of blocks."""
        return self._blocks

    def block(self, number: int, rows: slice = slice(None)) -> Ints:
        """Some rows of a block, int64 [B, bptt]."""
        number = range(self._blocks)[number]
        piece = self._blocks * self.bptt
        filled = self.batch_size * piece - len(self.tokens)
        start = np.arange(self.batch_size, dtype=np.int64)[rows] * piece
        offset = number * self.bptt + np.arange(self.bptt) - 1
        position = start[:, None] + offset - filled
        # What stands before a piece is not its neighbour's end but a closing token.
        inside = (position >= 0) & (offset >= 0)
        return np.where(inside, self.tokens[np.where(inside, position, 0)], self.end_id).astype(np.int64)


def language_probabilities(counts: Mapping[str, int], alpha: float) -> dict[str, float]:
    """How often each language is drawn: proportional to (its share of the sentences)^alpha; uniformly for alpha -1.

    Args:
        counts: sentences of each language.
        alpha: 1 for the shares themselves, 0 (or -1, as the released code writes it) for all alike.

    Source: [6.1], after Conneau et al., "XLM-R", section 3.1.
    """
    if not counts:
        raise ValueError("data.languages: name at least one, or set data.xmlm_steps to 0")
    empty = [language for language, count in counts.items() if count < 1]
    if empty:
        raise ValueError(f"data.languages: there is no text in {', '.join(empty)}; add it or leave the language out")
    if alpha < 0 and alpha != -1:
        raise ValueError(f"data.language_alpha is 0 or above, 0 for all languages alike; got {alpha}")
    shares = np.array(list(counts.values()), dtype=np.float64) / sum(counts.values())
    weights = shares ** max(alpha, 0.0)
    return dict(zip(counts, (weights / weights.sum()).tolist()))


# -- tokens ------------------------------------------------------------------------------------------------------------


def stream_tokens(texts: Sequence[str], tokenizer: XLMRTokenizer, identity: str | None = None) -> npt.NDArray[np.int32]:
    """Token ids of texts, one text after the other, each closed by `</s>`.

    Args:
        texts: what to make tokens of.
        tokenizer: makes them.
        identity: tells these texts from all others. The tokens of many texts are then kept in the cache folder, and
            read from there without taking memory; None makes them anew.

    Returns:
        int32 [tokens].
    """

    def chunks() -> Iterator[npt.NDArray[np.int32]]:
        for first in range(0, len(texts), CHUNK):
            rows = tokenizer.pieces(texts[first : first + CHUNK])
            yield np.fromiter((token for row in rows for token in (*row, tokenizer.end_id)), dtype=np.int32)

    def together() -> npt.NDArray[np.int32]:
        return np.concatenate([np.zeros(0, dtype=np.int32), *chunks()])

    if identity is None or len(texts) <= CHUNK:
        return together()
    digest = hashlib.sha256(f"tokens 1 {tokenizer.fingerprint} {identity}".encode()).hexdigest()
    kept = cache_folder() / "tokens" / f"{digest[:32]}.int32"
    try:
        if not kept.is_file():

            def write(path: Path) -> None:
                with path.open("wb") as stream:
                    for chunk in chunks():
                        stream.write(chunk.tobytes())

            # One process of a node makes them, the others read them; of Wikipedia they are tens of gigabytes.
            make_folder(kept.parent)
            with exclusive(kept.parent.with_suffix(".lock")):
                if not kept.is_file():
                    write_whole(kept, write)
        return np.memmap(kept, dtype=np.int32, mode="r")
    except OSError:
        # A cache that cannot be written costs time and memory only.
        return together()


def file_identity(path: Path) -> str | None:
    """What tells the content of a file from others; None for a file that was changed just now."""
    stamp = stamp_of(path)
    return f"{os.path.abspath(path)} {list(stamp)}" if settled(stamp) else None
