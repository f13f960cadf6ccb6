"""MCT's image term against lightly's MoCo step: ResNet-50 on 96 x 96 pixels, batch 16, queues of 65,536 keys.

Process CPU time on one thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.encoders.image import ImageResNet
from papers.mct.loss import MultimodalContrast
from papers.mct.module import MCTModule
from tests.benchmarks.speed import compare, in_turns

BATCH, PIXELS, QUEUE = 16, 96, 65_536
WARM_UP, ROUNDS = 2, 8
Step = Callable[[], None]


def _batch() -> dict[str, Tensor]:
    return {
        "image_query": torch.randn(BATCH, 3, PIXELS, PIXELS),
        "image_key": torch.randn(BATCH, 3, PIXELS, PIXELS),
        "image_id": torch.randint(118_000, (BATCH,)),
    }


def _image_step() -> Step:
    module = MCTModule(
        ImageResNet(), MultimodalContrast(weight_cc=0.0, weight_cross=0.0, temperature=0.2, queue_size=QUEUE)
    )
    optimizer = torch.optim.SGD(module.model.image.parameters(), 0.03, 0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        batch = _batch()
        queries = module.queries(batch)
        module.update_average()
        keys = module.keys(batch)
        loss = module.loss(queries, keys, batch["image_id"])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.loss.enqueue(keys, batch["image_id"])

    return step


def _lightly_step() -> Step:
    """MoCo v2 as lightly's documentation puts it together."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
    from torchvision.models import resnet50

    backbone = nn.Sequential(*list(resnet50(weights=None).children())[:-1])
    head = MoCoProjectionHead(2048, 2048, 128)
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    for part in (key_backbone, key_head):
        deactivate_requires_grad(part)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.03, 0.9, weight_decay=1e-4)

    def step() -> None:
        batch = _batch()
        update_momentum(backbone, key_backbone, m=0.999)
        update_momentum(head, key_head, m=0.999)
        query = head(backbone(batch["image_query"]).flatten(start_dim=1))
        with torch.no_grad():
            images, order = batch_shuffle(batch["image_key"])
            key = batch_unshuffle(key_head(key_backbone(images).flatten(start_dim=1)), order)
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def test_the_image_term_against_lightly() -> None:
    """Baseline: lightly's MoCo step. Both draw the same kind of batch inside the step."""
    pytest.importorskip("lightly", reason="lightly is not installed; `make bench` installs it where it can")
    torch.manual_seed(0)
    steps = {"lightly": _lightly_step(), "ours": _image_step()}
    seconds = in_turns(steps, ROUNDS, WARM_UP)
    # As fast, within the noise: no gate.
    compare("MoCo's step, ResNet-50, 16 images of 96 pixels", "lightly", seconds["ours"], seconds["lightly"])
