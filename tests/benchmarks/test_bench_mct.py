"""What a step of MCT costs beside its encoders, against lightly's MoCo step, and the memory of its queues.

ResNet-50 on 96 x 96 pixels, BERT base on 30 tokens, batch 16, queues of 65,536 keys, as in docs/papers/mct.md [14].
Process CPU time on one thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.encoders.image import ImageResNet
from common.encoders.text import BertEncoder
from common.training.optimizers import CombinedOptimizer
from papers.mct.loss import MultimodalContrast
from papers.mct.module import MCTModule
from tests.benchmarks.speed import compare, in_turns

BATCH, PIXELS, TOKENS, TAGS, QUEUE = 16, 96, 30, 80, 65_536
WARM_UP, ROUNDS = 2, 8
Step = Callable[[], None]


def _batch() -> dict[str, Tensor]:
    return {
        "image_query": torch.randn(BATCH, 3, PIXELS, PIXELS),
        "image_key": torch.randn(BATCH, 3, PIXELS, PIXELS),
        "tokens_query": torch.randint(1, 30_000, (BATCH, TOKENS)),
        "tokens_key": torch.randint(1, 30_000, (BATCH, TOKENS)),
        "tags": torch.rand(BATCH, TAGS) < 0.04,
        "image_id": torch.randint(118_000, (BATCH,)),
    }


def _optimizer(module: MCTModule) -> CombinedOptimizer:
    """As the module makes them, without a trainer that knows the number of steps."""
    parts: list[torch.optim.Optimizer] = [
        torch.optim.SGD(module.model.image.parameters(), 0.03, 0.9, weight_decay=1e-4, fused=True)
    ]
    if module.model.text is not None:
        parts.append(torch.optim.AdamW(module.model.text.parameters(), 4e-5, fused=True))
    return CombinedOptimizer(parts)


def test_a_step_against_its_bare_encoder_passes() -> None:
    """Baseline: queries forwards and backwards, keys forwards, clipping and optimizers, of the same encoders and heads.

    On top come the objective, the queues and the averages. They are timed inside the step as well, since the difference
    of two long times is as uncertain as these are.
    """
    torch.manual_seed(0)
    loss = MultimodalContrast(weight_tag=1.0, queue_size=QUEUE, tag_count=TAGS)
    module = MCTModule(ImageResNet(), loss, BertEncoder())
    optimizer = _optimizer(module)
    text = module.model.text
    assert text is not None
    batch = _batch()
    inside: list[float] = []

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimizer.step()

    def bare() -> None:
        queries = module.queries(batch)
        keys = module.keys(batch)
        learn(torch.stack([(queries[name] * keys[name]).sum() for name in queries]).sum())

    def whole() -> None:
        queries = module.queries(batch)
        start = time.process_time()
        module.update_average()
        spent = time.process_time() - start
        keys = module.keys(batch)
        start = time.process_time()
        loss = module.loss(queries, keys, batch["image_id"], batch["tags"])["loss"]
        spent += time.process_time() - start
        learn(loss)
        start = time.process_time()
        module.loss.enqueue(keys, batch["image_id"], batch["tags"])
        inside.append(spent + time.process_time() - start)

    seconds = in_turns({"bare": bare, "whole": whole}, ROUNDS, WARM_UP)
    compare("MCT's step, ResNet-50 and BERT, 16 samples", "the bare passes", seconds["whole"], seconds["bare"])
    line = compare("MCT's objective, queues and averages", "the bare passes", inside[WARM_UP:], seconds["bare"])
    line.stays_below(0.12)


def _image_step() -> Step:
    module = MCTModule(
        ImageResNet(), MultimodalContrast(weight_cc=0.0, weight_cross=0.0, temperature=0.2, queue_size=QUEUE)
    )
    optimizer = _optimizer(module)

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
