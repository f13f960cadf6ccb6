"""Made-up batches of AVID-CMA, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import torch

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.avid_cma.data import PretrainingData
from papers.avid_cma.module import AVID, CMA

#: The recipe that stands for the paper where one is measured.
RECIPE = "avid"
WITHOUT_FILES: dict[str, Any] = {}


class _Clips:
    """Stands for a listing: how many clips there are is all that pre-training asks."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return "synthetic"


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module; see `common.stages.synthetic`."""
    if not isinstance(data, PretrainingData):
        raise unknown_data("avid_cma", data, (PretrainingData,))
    published = data.dataset.published_count(data.split, None)
    items = 1000 if data.world is not None or published is None else published
    batch = {
        "video": draw.normal(size, 3, data.video.frames, data.video.crop, data.video.crop),
        "index": draw.integers(0, items, size),
        "label": draw.integers(0, 1, size),
        "audio": _sounds(data, size, draw),
    }
    facts: dict[str, Any] = {"listing": _Clips(items), "statistics_of_bins": {}}
    known = None if published is None else published * data.clips_per_video
    return Example(batch, batches_of_epoch(known, data.batch_size), facts)


def _sounds(data: PretrainingData, size: int, draw: Draw) -> torch.Tensor:
    transform = data.audio_transform(training=False)
    return draw.normal(size, 1, transform.num_frames, transform.num_bins)


def prepare(module: Any) -> None:
    """Let a stage start without the checkpoint that it starts from, in the state of its later steps."""
    if not isinstance(module, AVID):
        return
    started = module.on_fit_start

    def start() -> None:
        started()
        assert module.criterion is not None
        module.criterion.normaliser.fill_(1000.0)
        module.criterion._normaliser_is_set = True

    def mine() -> None:
        criterion: Any = module.criterion
        criterion.positive_set.copy_(torch.arange(criterion.num_positives, dtype=torch.int32))
        criterion._is_mined = True

    module.on_fit_start = start  # type: ignore[method-assign]
    if isinstance(module, CMA):
        module.hparams["warm_start"] = "synthetic"
        module.take_over = lambda path, fingerprint: None  # type: ignore[method-assign]
        module._mine = mine  # type: ignore[method-assign]
