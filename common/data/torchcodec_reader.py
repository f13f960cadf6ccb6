"""Pictures and sound of media files by torchcodec and the system's FFmpeg, in place of PyAV's.

`ASSEMBLE_READER=torchcodec` asks for it. It is no setting of a recipe: frames and samples are chosen by their time
stamps as PyAV's are. Where torchcodec cannot say which is the wanted one (stamps off the grid, gaps, pictures to be
turned, sample types that it rounds), nothing is returned, and PyAV reads instead. Files that are kept decoded in
memory are always read by PyAV. Between releases of FFmpeg, a sample may be a step of 16 bits off; and the noise
that AAC makes up depends on where decoding began, which the two choose differently.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data import shards
from common.errors import StageError, nearest

#: Environment variable that names the reader.
SWITCH = "ASSEMBLE_READER"
READERS = ("pyav", "torchcodec")
_Pixels = npt.NDArray[np.uint8]


def wanted() -> bool:
    """Whether torchcodec is to read.

    Raises:
        StageError: The variable names no reader, or torchcodec or FFmpeg's libraries are missing.
    """
    name = os.environ.get(SWITCH) or READERS[0]
    if name not in READERS:
        raise StageError(f"{SWITCH}={name} is no reader: {nearest(name, READERS)}")
    if name == READERS[0]:
        return False
    reason = why_missing()
    if reason:
        raise StageError(f"{SWITCH}={name}, but {reason}. Leave {SWITCH} empty to read with PyAV")
    return True


@lru_cache(maxsize=1)
def why_missing() -> str:
    """What torchcodec lacks on this machine, and what to do; empty when it can be used."""
    try:
        importlib.import_module("torchcodec.decoders").Demuxer  # noqa: B018
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchcodec"):
            return f"torchcodec does not load: {error}"
        return "torchcodec is not installed: `make extra-decoders` in a checkout, else pip install 'torchcodec>=0.17'"
    except AttributeError:
        return "torchcodec is too old: `make extra-decoders` in a checkout, else pip install 'torchcodec>=0.17'"
    except (ImportError, OSError, RuntimeError):
        return "torchcodec does not load: it needs FFmpeg's shared libraries (apt install ffmpeg) and its own torch"
    return ""


def versions() -> dict[str, str]:
    """The version of torchcodec by its name, for a record; empty where PyAV reads."""
    return {} if os.environ.get(SWITCH) != READERS[1] or why_missing() else {READERS[1]: version()}


def version() -> str:
    """The version of torchcodec."""
    return str(importlib.import_module("torchcodec").__version__)


def read_frames(
    path: Path, stream: int, boundaries: npt.NDArray[np.float64], step: float, numbers: npt.NDArray[np.int64]
) -> _Pixels | None:
    """Frames that are on screen at the wanted times.

    Args:
        path: File, on its own or in a shard.
        stream: Number of the stream in the file.
        boundaries: For each picture, the time [T] in seconds before which it is stamped.
        step: Seconds from a frame to the next.
        numbers: The same pictures [T], counted from the stream's first.

    Returns:
        Pixels [T, H, W, 3], or None where PyAV has to look.
    """
    decoders = importlib.import_module("torchcodec.decoders")
    # The one before each is asked for as well: its stamp shows that the wanted one is the first of its interval.
    asked = np.unique(np.concatenate([numbers, np.maximum(numbers - 1, 0)]))
    try:
        source: Any = shards.source(path)
        decoder = decoders.VideoDecoder(source, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=1)
        if decoder.metadata.rotation or asked[-1] >= len(decoder):
            return None
        batch = decoder.get_frames_at(asked.tolist())
    except (RuntimeError, ValueError, IndexError):
        return None
    times = batch.pts_seconds.numpy()
    place = np.searchsorted(asked, numbers)
    before = np.where(numbers > 0, times[np.maximum(place - 1, 0)], -np.inf)
    certain = (times[place] < boundaries) & (times[place] >= boundaries - step) & (before < boundaries - step)
    pixels: _Pixels = batch.data.numpy()
    return pixels[place] if certain.all() else None


def read_samples(
    path: Path, stream: int, start: float, end: float, rate: int, least: float
) -> tuple[npt.NDArray[Any], float, str] | None:
    """Samples of a window at the file's own rate.

    Args:
        path: File, on its own or in a shard.
        stream: Number of the stream in the file.
        start, end: Window in seconds; it begins within the stream.
        rate: Samples per second of the file.
        least: Second up to which the samples must reach without a gap.

    Returns:
        Samples [N, channels], the time of the first in seconds, and PyAV's name of their packed type; or None where
        PyAV has to look.
    """
    decoders = importlib.import_module("torchcodec.decoders")
    # A whole number on the file's clock, so that sample 0 is where it would be counted from any frame.
    start = round(start * rate) / rate
    try:
        source: Any = shards.source(path)
        decoder = decoders.AudioDecoder(source, stream_index=stream)
        kind = str(decoder.metadata.sample_format).removesuffix("p")
        if kind not in ("flt", "s16") or decoder.metadata.sample_rate != rate:
            return None
        found = decoder.get_samples_played_in_range(start, end)
    except (RuntimeError, ValueError, IndexError):
        return None
    samples: npt.NDArray[Any] = found.data.numpy()
    if samples.shape[1] < (least - start) * rate:
        return None
    if kind == "s16":
        # It divides by 32,768, which floating point undoes exactly.
        samples = (samples * np.float32(32768.0)).astype(np.int16)
    return samples.T, float(found.pts_seconds), kind
