"""Made-up batches of the data modules that make none themselves, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.avid_cma.data import VideoClassificationData
from papers.avid_cma.evaluation import ActionRecognition

#: The recipe that stands for the paper where one is measured.
RECIPE = "avid"
WITHOUT_FILES: dict[str, Any] = {}


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module; see `common.stages.synthetic`."""
    if not isinstance(data, VideoClassificationData):
        raise unknown_data("avid_cma", data, (VideoClassificationData,))
    published = data.dataset.published_count(data.train_split, data.fold)
    items = 1000 if data.world is not None or published is None else published
    batch = {
        "video": draw.normal(size, 3, data.video.frames, data.video.crop, data.video.crop),
        "index": draw.integers(0, items, size),
        "label": draw.integers(0, module.num_classes, size),
    }
    known = None if published is None else published * data.clips_per_video
    return Example(batch, batches_of_epoch(known, data.batch_size), {"num_classes": None})


def prepare(module: Any) -> None:
    """Let a stage start in the state of its later steps."""
    if isinstance(module, ActionRecognition):
        module.warmup_epochs = 0  # the longer part, in which the encoder learns
