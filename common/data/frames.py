"""Clips stored as folders of numbered frames, without sound."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.images import ImageCache, read_image
from common.data.media import DecodedCache, MediaError, MediaFile
from common.data.windows import Limits, select_frames

#: Frames per second of the frames of TVQA.
FRAME_RATE = 3.0
_NUMBERED = re.compile(r"(?:.*\D)?0*(\d+)\.(?:jpe?g|png)", re.IGNORECASE)


class FrameFolder:
    """The frames of one clip, with the interface of :class:`MediaFile`; a missing number repeats the previous one."""

    def __init__(self, path: str | os.PathLike[str], cache: ImageCache | None = None) -> None:
        self.path = Path(path)
        self.video_fps = FRAME_RATE
        self._cache = cache
        found: dict[int, str] = {}
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            raise MediaError.of(self.path, f"cannot be read: {error.strerror or error}") from error
        for name in names:
            match = _NUMBERED.fullmatch(name)
            # Some systems create hidden files when they copy pictures.
            if match and not name.startswith("."):
                found[int(match[1])] = name
        if not found:
            raise MediaError.of(self.path, "holds no numbered frame (00001.jpg, 00002.jpg, ...)")
        self._numbers = np.array(sorted(found))
        self._names = [found[number] for number in self._numbers.tolist()]

    @property
    def video_limits(self) -> Limits:
        return 0.0, int(self._numbers[-1]) / self.video_fps

    @property
    def audio_limits(self) -> None:
        return None

    def read_video(self, start: float, duration: float, fps: float) -> tuple[Tensor, float]:
        end = self.video_limits[1]
        indices, actual_start = select_frames(start, duration, fps, self.video_fps, end)
        if not len(indices):
            raise MediaError.of(self.path, f"no frame between {start:.3f} and {min(start + duration, end):.3f} s")
        held = np.searchsorted(self._numbers, indices + 1, side="right") - 1
        rows, places = np.unique(np.maximum(held, 0), return_inverse=True)
        frames = [self._frame(row) for row in rows.tolist()]
        sizes = sorted({frame.shape[:2] for frame in frames})
        if len(sizes) > 1:
            raise MediaError.of(self.path, f"the frame size changes ({sizes[0]}, {sizes[1]})")
        return torch.from_numpy(np.stack(frames)[places]), actual_start

    def read_audio(self, start: float, duration: float, sample_rate: int) -> Tensor:
        raise MediaError.of(self.path, "has no audio stream")

    def fill_cache(self) -> None:
        if self._cache is not None:
            for row in range(len(self._names)):
                self._frame(row)

    def close(self) -> None:
        """Nothing stays open."""

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _frame(self, row: int) -> np.ndarray:
        path = self.path / self._names[row]
        return np.asarray(read_image(path) if self._cache is None else self._cache.get(path))


class MediaCaches:
    """This process's caches for decoded files and frames, of at most `max_bytes` each; 0 = no cache."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.files = DecodedCache.shared(max_bytes) if max_bytes else None
        self.frames = ImageCache.shared(max_bytes) if max_bytes else None


def open_media(path: Path, caches: MediaCaches | None = None) -> MediaFile | FrameFolder:
    if path.is_dir():
        return FrameFolder(path, cache=None if caches is None else caches.frames)
    return MediaFile(path, None if caches is None else caches.files)
