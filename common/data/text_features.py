"""Features of captions by a frozen text encoder, computed once and stored.

An encoder maps (tokens int64 [n, T], length int64 [n]) to words [n, T, E] and sentences [n, E] in float32; words are
zero from `length` on, and the boundary tokens are words like any other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.data.annotations import Rows
from common.data.text import CaptionTokenizer
from common.files import exclusive, named, write_atomically

SentencePool = Literal["official", "masked_mean"]

STORE_VERSION = 1
# Captions between two notes of how far the store is: what an interruption costs at most.
KEPT_EVERY = 4096
# How many captions are tokenized again to see that a store was made with the same tokenizer.
COMPARED_CAPTIONS = 256
_BERT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


class FeaturesMissing(FileNotFoundError):
    """There is no store of text features where one is needed; the message says how to make it."""


class FeaturesStale(ValueError):
    """A store of text features was made of other captions, tokens or weights than are wanted now."""


def checked_pool(pool: str) -> SentencePool:
    """The name of a pooling.

    Raises:
        ValueError: there is no such pooling.
    """
    if pool not in get_args(SentencePool):
        raise ValueError(f"sentence_pool: {pool!r} is not one of {', '.join(get_args(SentencePool))}")
    return pool  # type: ignore[return-value]


def valid_mask(length: Tensor, tokens: int) -> Tensor:
    """Which of T places hold a token, bool [n, T].

    Args:
        length: number of tokens of each row, int64 [n].
        tokens: T.
    """
    return torch.arange(tokens, device=length.device) < length[:, None]


def pool_sentence(words: Tensor, length: Tensor, pool: SentencePool) -> Tensor:
    """Sentence vectors [n, E] of word vectors.

    Args:
        words: [n, T, E], with what the encoder emits at padded places.
        length: number of tokens that count, [n].
        pool: `official`, the sum over all T places divided by the length, which mixes in the padded ones; or
            `masked_mean`, the mean over the tokens that count.
    """
    if pool == "masked_mean":
        words = words * valid_mask(length, words.shape[1])[..., None]
    return words.sum(1) / length[:, None].to(words.dtype)


def encode_texts(texts: Sequence[str], tokenizer: CaptionTokenizer) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n, T], filled up with the tokenizer's padding, and their numbers int64 [n]; T is its maximum."""
    rows = [tokenizer.encode(text) for text in texts]
    length = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.full((len(rows), tokenizer.max_tokens), tokenizer.pad_id, dtype=np.int64)
    tokens[np.arange(tokenizer.max_tokens) < length[:, None]] = [token for row in rows for token in row]
    return torch.from_numpy(tokens), torch.from_numpy(length)


class TextEncoder(Protocol):
    """What a store is made by.

    Attributes:
        feature_dim: E.
    """

    feature_dim: int

    def hidden_states(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Last hidden states [n, T, E], those of padded places included."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, which lie where it computes."""
        ...


class FeatureStore:
    """Features of all captions of a split, memory-mapped: float16 words of the tokens that count, nothing else.

    What the official pooling mixes in is not kept, so the sentences of both poolings are.

    Args:
        folder: what `make_store` wrote.

    Raises:
        FeaturesMissing: there is no store.
        FeaturesStale: it is damaged, or of another version of this code.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with named(folder / "store.json"):
                self.identity: dict[str, Any] = json.loads((folder / "store.json").read_bytes())
            with named(folder / "starts.npy"):
                self.starts: npt.NDArray[np.int64] = np.load(folder / "starts.npy")
            self._arrays: dict[str, npt.NDArray[np.float16]] = {}
            shapes = {name: self._array(name).shape for name in ("words", *get_args(SentencePool))}
            captions, width = len(self.starts) - 1, self.identity["width"]
            expected = {"words": (int(self.starts[-1]), width)} | dict.fromkeys(
                get_args(SentencePool), (captions, width)
            )
            if shapes != expected:
                raise ValueError(f"its arrays have the shapes {shapes}, expected {expected}")
        except FileNotFoundError as error:
            raise FeaturesMissing(f"{folder} is no store of text features ({error.filename} is missing)") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise FeaturesStale(f"{folder} is damaged ({error}): delete it") from None

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.starts) - 1

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself; pickling would copy them.
        return {**self.__dict__, "_arrays": {}}

    @property
    def width(self) -> int:
        """E."""
        return int(self.identity["width"])

    @property
    def max_tokens(self) -> int:
        """T."""
        return int(self.identity["max_tokens"])

    def lengths(self, captions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of tokens of some captions, int64 [n]."""
        return self.starts[captions + 1] - self.starts[captions]

    def read(self, captions: npt.NDArray[np.int64], pool: SentencePool) -> tuple[Tensor, Tensor, Tensor]:
        """Features of some captions.

        Args:
            captions: their numbers, int64 [n].
            pool: which sentences.

        Returns:
            Words float32 [n, T, E], zero beyond the length; sentences float32 [n, E]; lengths int64 [n].
        """
        starts, lengths = self.starts[captions], self.lengths(captions)
        words = np.zeros((len(captions), self.max_tokens, self.width), dtype=np.float32)
        places = np.arange(self.max_tokens)
        valid = places < lengths[:, None]
        words[valid] = self._array("words")[(starts[:, None] + places)[valid]]
        sentences = self._array(pool)[captions].astype(np.float32)
        return torch.from_numpy(words), torch.from_numpy(sentences), torch.from_numpy(lengths)

    def _array(self, name: str) -> npt.NDArray[np.float16]:
        if name not in self._arrays:
            with named(self.folder / f"{name}.npy"):
                self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]


@dataclass(frozen=True)
class StoredFeatures:
    """Where the stores of text features are, and of which BERT.

    Args:
        folder: holds one store for each data set, split and T.
        bert: folder with BERT's released weights. Where it is missing, as on a machine that only trains, a store is not
            checked against it.
    """

    folder: str
    bert: str

    def path(self, dataset: str, split: str, max_tokens: int) -> Path:
        """Folder of one store."""
        return Path(self.folder).expanduser() / f"{dataset}-{split}-{max_tokens}"

    def state(self, dataset: str, split: str, captions: Rows[str], tokenizer: CaptionTokenizer) -> str:
        """What is there of a store, in words: "present", "missing", "half made", or why it is out of date."""
        path = self.path(dataset, split, tokenizer.max_tokens)
        try:
            self.open(dataset, split, captions, tokenizer)
        except FeaturesMissing:
            return "half made" if path.with_name(f"{path.name}.partial").is_dir() else "missing"
        except FeaturesStale as error:
            return f"out of date: {error}"
        return "present"

    def open(self, dataset: str, split: str, captions: Rows[str], tokenizer: CaptionTokenizer) -> FeatureStore:
        """The store of a split, after a check that it is of these captions, this tokenizer and this BERT.

        Args:
            dataset, split: names.
            captions: of the split's images, in order; the store's numbers count them all.
            tokenizer: makes tokens of them, prepared.

        Raises:
            FeaturesMissing: there is none.
            FeaturesStale: it is of something else.
        """
        path = self.path(dataset, split, tokenizer.max_tokens)
        if not path.is_dir():
            raise FeaturesMissing(f"{path} does not exist")
        store = FeatureStore(path)
        wanted = identity_of(captions, tokenizer, self._bert_digest())
        changed = [name for name, value in wanted.items() if value is not None and store.identity.get(name) != value]
        if "captions" in changed and "tokenizer" in changed:
            changed.remove("tokenizer")  # its digest is over captions, so it says nothing any more
        if changed:
            raise FeaturesStale(f"{path} is out of date, it was made of other {', '.join(changed)}: delete it")
        return store

    def _bert_digest(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return bert_digest(Path(self.bert).expanduser())
        return None


def identity_of(captions: Rows[str], tokenizer: CaptionTokenizer, bert: str | None) -> dict[str, Any]:
    """What a store depends on: digests of captions, tokenizer and BERT, and T."""
    count = int(captions.starts[-1])
    texts = hashlib.sha256()
    for number in range(count):
        texts.update(captions.value(number).encode("utf-8", "surrogatepass") + b"\0")
    tokens = hashlib.sha256(f"{tokenizer.vocabulary_size} {tokenizer.max_tokens}".encode())
    for number in np.unique(np.linspace(0, max(count - 1, 0), min(count, COMPARED_CAPTIONS)).astype(np.int64)).tolist():
        tokens.update(np.array(tokenizer.encode(captions.value(number)), dtype="<i8").tobytes())
    return {
        "version": STORE_VERSION,
        "captions": texts.hexdigest(),
        "tokenizer": tokens.hexdigest(),
        "max_tokens": tokenizer.max_tokens,
        "bert": bert,
    }


@functools.lru_cache(maxsize=4)
def bert_digest(folder: Path) -> str:
    """SHA-256 over configuration and weights of a BERT.

    Raises:
        FileNotFoundError: the folder lacks them.
    """
    state = hashlib.sha256()
    found = [folder / name for name in _BERT_FILES if (folder / name).is_file()]
    if len(found) < 2:
        raise FileNotFoundError(
            f"{folder} must hold config.json and model.safetensors of BERT base, uncased. Nothing is downloaded; fetch "
            f"it once with `hf download google-bert/bert-base-uncased --local-dir {folder}`"
        )
    for path in found[:2]:
        with path.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()


def make_store(
    folder: Path,
    captions: Rows[str],
    tokenizer: CaptionTokenizer,
    encoder: TextEncoder,
    bert: str | None,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    described: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """Compute and write the features of all captions; goes on with what an interrupted call left behind.

    The store appears under its name only when it is whole.

    Args:
        folder: the store.
        captions: texts of each image.
        tokenizer: makes tokens of them, prepared.
        encoder: makes features of these, on the device that it lies on.
        bert: digest of its files.
        batch_size: captions at a time.
        advance: called with the number of captions that were finished.
        described: what else the store should say about itself.

    Raises:
        OSError: the disk has no room for it.
        ValueError: the features are not finite.
    """
    identity = {**identity_of(captions, tokenizer, bert), "width": encoder.feature_dim, **(described or {})}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        with contextlib.suppress(FeaturesMissing, FeaturesStale):
            # Another process made it while this one waited.
            if (store := FeatureStore(folder)).identity == identity:
                return store
        done = _done(partial, identity)
        if done is None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _allocate(partial, captions, tokenizer, encoder.feature_dim)
            done = 0
            _note(partial, identity, done)
        advance(done)
        _fill(partial, captions, tokenizer, encoder, identity, done, batch_size, advance)
        if not (partial / "starts.npy").is_file():
            # Without file locks another process has filled the same files and put them in place.
            shutil.rmtree(partial, ignore_errors=True)
            return FeatureStore(folder)
        write_atomically(partial / "store.json", json.dumps(identity, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    return FeatureStore(folder)


def _fill(
    partial: Path,
    captions: Rows[str],
    tokenizer: CaptionTokenizer,
    encoder: TextEncoder,
    identity: Mapping[str, Any],
    done: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Compute what is left of a store."""
    count = int(captions.starts[-1])
    starts = np.load(partial / "starts.npy")
    arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in ("words", *get_args(SentencePool))}
    device = next(encoder.parameters()).device
    kept = done
    for first in range(done, count, batch_size):
        last = min(first + batch_size, count)
        tokens, length = encode_texts([captions.value(number) for number in range(first, last)], tokenizer)
        tokens, length = tokens.to(device), length.to(device)
        states = encoder.hidden_states(tokens, length)
        arrays["words"][starts[first] : starts[last]] = _half(states[valid_mask(length, tokens.shape[1])])
        for pool in get_args(SentencePool):
            arrays[pool][first:last] = _half(pool_sentence(states, length, pool))
        advance(last - first)
        if last - kept >= KEPT_EVERY or last == count:
            for array in arrays.values():
                array.flush()
            _note(partial, identity, last)
            kept = last


def _half(features: Tensor) -> npt.NDArray[np.float16]:
    halves = features.half().cpu().numpy()
    if not np.isfinite(halves).all():
        raise ValueError("BERT's features are not finite in half precision: its weights are damaged, get them anew")
    return halves


def _done(partial: Path, identity: Mapping[str, Any]) -> int | None:
    """How many captions an interrupted call finished; None where there is nothing to go on with."""
    try:
        note = json.loads((partial / "progress.json").read_bytes())
        return int(note["done"]) if note["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(partial: Path, identity: Mapping[str, Any], done: int) -> None:
    write_atomically(partial / "progress.json", json.dumps({"identity": dict(identity), "done": done}))


def _allocate(partial: Path, captions: Rows[str], tokenizer: CaptionTokenizer, width: int) -> None:
    """Files of the final size."""
    count = int(captions.starts[-1])
    lengths = [len(tokenizer.encode(captions.value(number))) for number in range(count)]
    starts = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]).astype(np.int64)
    needed = 2 * width * (int(starts[-1]) + len(get_args(SentencePool)) * count)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(f"{partial}: the text features need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
    np.save(partial / "starts.npy", starts)
    for name, rows in ({"words": int(starts[-1])} | dict.fromkeys(get_args(SentencePool), count)).items():
        np.lib.format.open_memmap(partial / f"{name}.npy", "w+", np.float16, (rows, width)).flush()
