"""Measure how long picture and sound of each clip overlap, to leave out clips that are too short before training."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.data.item_dataset import TooManyBrokenFiles
from common.data.listing import Clip, Listing
from common.data.media import MediaError, MediaFile, restrict
from common.files import cache_folder, console, exclusive, usable_cores, write_whole

#: A listing with a larger fraction of unreadable files is an error.
MOST_UNREADABLE = 0.05
#: Write the cache after this many files.
_AT_ONCE = 5000
#: Transient errors, after which a file is not recorded as unreadable.
_PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}
#: Values for an unreadable file, and for one without picture or without sound. NaN: not measured yet.
_UNREADABLE, _ONE_SIDED = -2.0, -1.0


def long_enough(listing: Listing, seconds: float) -> Listing:
    """Keep the clips whose picture and sound overlap for more than `seconds`. The listing's notes count the others."""
    common = common_seconds(listing)
    broken = common == _UNREADABLE
    if broken.sum() > MOST_UNREADABLE * len(listing):
        some = ", ".join(listing.names[row] for row in np.flatnonzero(broken)[:5])
        raise TooManyBrokenFiles(
            f"{listing.name}: {broken.sum():,} of {len(listing):,} files cannot be read, more than "
            f"{MOST_UNREADABLE:.0%}. First: {some}. Repair or remove them, and delete {kept_at(listing)} to check "
            "them again"
        )
    kept = common > seconds
    if not kept.any():
        raise ValueError(f"{listing.name}: no clip has picture and sound for more than {seconds:g} s")
    one_sided, short = int((common == _ONE_SIDED).sum()), int(((common >= 0) & ~kept).sum())
    note = (
        f"{len(listing) - kept.sum():,} of {len(listing):,} clips are left out: {one_sided:,} without picture or "
        f"sound, {short:,} with {seconds:g} s or less of both, {broken.sum():,} unreadable"
    )
    if broken.any():
        note += (
            f" (cached: delete {kept_at(listing).relative_to(cache_folder())} in the cache folder after repairing them)"
        )
    notes = listing.notes if kept.all() else (*listing.notes, note)
    version = f"{listing.version}, more than {seconds:g} s of picture and sound"
    return replace(listing.subset(np.flatnonzero(kept)), version=version, notes=notes)


def common_seconds(listing: Listing) -> npt.NDArray[np.float64]:
    """Return for how many seconds picture and sound of each clip overlap, [N]. The result is cached on disk."""
    path = kept_at(listing)
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_suffix(".lock")), ThreadPoolExecutor(min(32, 4 * usable_cores())) as pool:
        measured = _kept(listing)
        left = np.flatnonzero(np.isnan(measured))
        for first in range(0, len(left), _AT_ONCE):
            if len(left) > _AT_ONCE:
                console().print(f"  {listing.name}: checking for sound, {first:,} of {len(left):,} files")
            rows = left[first : first + _AT_ONCE]
            measured[rows] = list(pool.map(lambda row: _of_clip(listing[int(row)]), rows))
            write_whole(path, lambda file: np.save(file, measured))
    return measured


def kept_at(listing: Listing) -> Path:
    """Return the cache file for the durations of a listing."""
    key = hashlib.sha256(f"{os.path.abspath(listing.root)}\0{listing.fingerprint()}".encode()).hexdigest()[:16]
    return cache_folder() / "durations" / f"{listing.name}-{key}.npy"


def _kept(listing: Listing) -> npt.NDArray[np.float64]:
    with contextlib.suppress(OSError, ValueError, EOFError):  # a damaged cache is measured again
        measured = np.load(kept_at(listing))
        if measured.shape == (len(listing),):
            return measured
    return np.full(len(listing), np.nan)


def _of_clip(clip: Clip) -> float:
    try:
        with MediaFile(clip.path) as media:
            info = media.info
    except MediaError as error:
        # Do not cache a transient error.
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING:
            raise
        return _UNREADABLE
    if info.video_limits is None or info.audio_limits is None:
        return _ONE_SIDED
    video = restrict(info.video_limits, clip.start, clip.end)
    audio = restrict(info.audio_limits, clip.start, clip.end)
    return max(min(video[1], audio[1]) - max(video[0], audio[0]), 0.0)
