"""Features of captions from a frozen text encoder, computed once and stored.

An encoder of width `feature_dim` (E) has a method `hidden_states(tokens int64 [n, T], length int64 [n])` that returns
float32 [n, T, E], including boundary tokens and padded positions.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.listing import spread
from common.data.regions import plain_column
from common.data.sequences import Rows
from common.data.text import CaptionTokenizer, pad_tokens
from common.errors import optional_package
from common.files import open_regular, parsing, write_whole

SentencePool = Literal["official", "masked_mean"]

STORE_VERSION = 2
# Tokenize this many captions again to check the tokenizer of a store.
COMPARED_CAPTIONS = 256
BERT_POSITIONS = 512
_BERT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_POOLS: tuple[SentencePool, ...] = get_args(SentencePool)


class FeaturesError(ValueError):
    """A store of text features is missing or damaged, or was made from different captions, tokens or weights."""


def valid_mask(length: Tensor, tokens: int) -> Tensor:
    """Mark the positions that hold a token, not padding: lengths [n] -> bool [n, T] with T = `tokens`."""
    return torch.arange(tokens, device=length.device) < length[:, None]


def pool_sentence(words: Tensor, length: Tensor, pool: SentencePool) -> Tensor:
    """Pool word vectors [n, T, E] to sentence vectors [n, E].

    `masked_mean` averages the valid tokens. `official` sums all positions, including the padding, and divides by the
    number of valid tokens.
    """
    if pool == "masked_mean":
        words = words * valid_mask(length, words.shape[1])[..., None]
    return words.sum(1) / length[:, None].to(words.dtype)


def encode_texts(texts: Sequence[str], tokenizer: CaptionTokenizer) -> tuple[Tensor, Tensor]:
    """Return token ids int64 [n, T], padded to the tokenizer's maximum T, and lengths int64 [n]."""
    rows = [tokenizer.encode(text) for text in texts]
    tokens = pad_tokens(rows, tokenizer.pad_id, tokenizer.max_tokens)
    return tokens, torch.tensor([len(row) for row in rows])


class FeatureStore:
    """Caption features of a split in an HDF5 file: float16 vectors of all valid tokens, and sentences of both poolings.

    Arrays are memory-mapped, so processes share the memory. `about` holds `made_of` (digest of captions and tokenizer),
    `bert` (digest of BERT), and the argument `described` of `make_store`.
    """

    def __init__(self, path: Path) -> None:
        h5py = optional_package("h5py", "features")

        self.path = path
        with parsing(path, FeaturesError), open_regular(path) as stream, h5py.File(stream) as file:
            self.about = dict(file.attrs)
            self.max_tokens = int(self.about["max_tokens"])
            columns = {name: plain_column(file, name) for name in ("words", *_POOLS)}
            self.starts: npt.NDArray[np.int64] = plain_column(file, "starts")[:]
            rows, self.width = columns["words"].shape
            sentences = {columns[name].shape for name in _POOLS}
            if self.starts.dtype != np.int64 or sentences != {(len(self.starts) - 1, self.width)}:
                raise ValueError(f"its columns have inconsistent shapes: starts {self.starts.shape}, {columns}")
            lengths = np.diff(self.starts, prepend=0, append=rows)
            if not (0 < self.max_tokens <= BERT_POSITIONS and 0 <= lengths.min() <= lengths.max() <= self.max_tokens):
                raise ValueError(f"its captions must have 0 to {self.max_tokens} tokens, at most {BERT_POSITIONS}")
            if lengths[0] or lengths[-1]:
                raise ValueError(f"its captions do not cover its {rows} words")
            if any(column.dtype != np.float16 or column.id.get_offset() is None for column in columns.values()):
                raise ValueError("its features must be float16, without chunks")
            self._arrays = {
                name: np.memmap(stream, np.float16, "r", column.id.get_offset(), column.shape)
                for name, column in columns.items()
            }

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Let another process map the file itself instead of unpickling a copy.
        return FeatureStore, (self.path,)

    def read(self, captions: npt.NDArray[np.int64], pool: SentencePool) -> tuple[Tensor, Tensor, Tensor]:
        """Return words float32 [n, T, E], zero-padded; sentences float32 [n, E]; lengths int64 [n]."""
        starts = self.starts[captions]
        lengths = self.starts[captions + 1] - starts
        words = np.zeros((len(captions), self.max_tokens, self.width), dtype=np.float32)
        places = np.arange(self.max_tokens)
        valid = places < lengths[:, None]
        words[valid] = self._arrays["words"][(starts[:, None] + places)[valid]]
        sentences = self._arrays[pool][captions].astype(np.float32)
        return torch.from_numpy(words), torch.from_numpy(sentences), torch.from_numpy(lengths)


@dataclass(frozen=True)
class StoredFeatures:
    """A folder with a store per data set, split and number of tokens T. Each is checked against the weights `bert`."""

    folder: str
    bert: str

    def path(self, dataset: str, split: str, max_tokens: int) -> Path:
        return Path(self.folder).expanduser() / f"{dataset}-{split}-{max_tokens}.h5"

    def open(self, dataset: str, split: str, captions: Rows[str], tokenizer: CaptionTokenizer) -> FeatureStore:
        """Open the store of a split. Raise if it was made from other captions, another tokenizer or another BERT."""
        store = FeatureStore(self.path(dataset, split, tokenizer.max_tokens))
        if store.about.get("made_of") != digest_of(captions, tokenizer):
            raise FeaturesError(f"{store.path} was made from other captions or by another tokenizer: delete it")
        try:
            bert = bert_digest(Path(self.bert).expanduser())
        except FileNotFoundError:
            return store
        if store.about.get("bert") != bert:
            raise FeaturesError(f"{store.path} was made by another BERT: delete it")
        return store


def digest_of(captions: Rows[str], tokenizer: CaptionTokenizer) -> str:
    """Return the SHA-256 of all captions and of the tokens of some captions, which shows if a store is outdated."""
    count = int(captions.starts[-1])
    state = hashlib.sha256(f"{STORE_VERSION} {tokenizer.vocabulary_size} {tokenizer.max_tokens}".encode())
    for number in range(count):
        state.update(captions.column[number].encode("utf-8", "surrogatepass") + b"\0")
    for number in spread(count, COMPARED_CAPTIONS):
        state.update(np.array(tokenizer.encode(captions.column[number]), dtype="<i8").tobytes())
    return state.hexdigest()


@functools.lru_cache(maxsize=4)
def bert_digest(folder: Path) -> str:
    """Return the SHA-256 of a BERT's configuration and weights."""
    state = hashlib.sha256()
    files = [folder / name for name in _BERT_FILES if (folder / name).is_file()]
    if len(files) < 2:
        raise FileNotFoundError(
            f"{folder} must hold config.json and model.safetensors of BERT base, uncased. Nothing is downloaded; fetch "
            f"it once with `hf download google-bert/bert-base-uncased --local-dir {folder}`"
        )
    for path in files[:2]:
        with path.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()


def make_store(
    path: Path,
    captions: Rows[str],
    tokenizer: CaptionTokenizer,
    encoder: Any,
    bert: str,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    described: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """Compute the features of all captions and write a store atomically. Adds `described` to the store's `about`."""
    h5py = optional_package("h5py", "features")

    count = int(captions.starts[-1])
    device = next(encoder.parameters()).device

    def encoded(first: int) -> tuple[Tensor, Tensor]:
        return encode_texts([captions.column[n] for n in range(first, min(first + batch_size, count))], tokenizer)

    def write(temporary: Path) -> None:
        lengths = torch.cat([encoded(first)[1] for first in range(0, count, batch_size)]).numpy()
        starts = np.concatenate([[0], np.cumsum(lengths)])
        with h5py.File(temporary, "w") as file:
            file["starts"] = starts
            for name in ("words", *_POOLS):
                rows = int(starts[-1]) if name == "words" else count
                file.create_dataset(name, (rows, encoder.feature_dim), np.float16)
            for first in range(0, count, batch_size):
                tokens, length = (part.to(device) for part in encoded(first))
                last = first + len(length)
                states = encoder.hidden_states(tokens, length)
                file["words"][starts[first] : starts[last]] = _half(states[valid_mask(length, tokens.shape[1])])
                for pool in _POOLS:
                    file[pool][first:last] = _half(pool_sentence(states, length, pool))
                advance(last - first)
            file.attrs.update(about)

    about = {"made_of": digest_of(captions, tokenizer), "bert": bert, "max_tokens": tokenizer.max_tokens}
    about |= described or {}
    write_whole(path, write)
    return FeatureStore(path)


def _half(features: Tensor) -> npt.NDArray[np.float16]:
    halves = features.half().cpu().numpy()
    if not np.isfinite(halves).all():
        raise ValueError(
            "BERT's features are not finite in half precision: its weights are damaged, download them again"
        )
    return halves
