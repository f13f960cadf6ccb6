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
from tests.benchmarks.speed import Line, add, amount, compare, in_turns

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


def test_queues_in_float16() -> None:
    """Baseline: queues in float32. Bytes of the keys, of all that the queues hold, and CPU time of the losses."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(118_000, (BATCH,), generator=draw)
    tags = torch.rand(BATCH, TAGS, generator=draw) < 0.04
    keys: dict[str, int] = {}
    held: dict[str, int] = {}
    steps: dict[str, Step] = {}
    for name in ("float32", "float16"):
        objective = MultimodalContrast(weight_tag=1.0, tag_count=TAGS, queue_size=QUEUE, queue_dtype=name)  # type: ignore[arg-type]
        keys[name] = sum(queue.vectors.nbytes for queue in objective.queues.values())  # type: ignore[operator, union-attr, misc]
        held[name] = sum(buffer.nbytes for buffer in objective.buffers())
        steps[name] = _objective_step(objective, ids, tags)
    seconds = in_turns(steps, ROUNDS, WARM_UP)
    compare("MCT's objective, queues in float16", "in float32", seconds["float16"], seconds["float32"])
    mega = {name: amount(size / 1e6, "MB") for name, size in held.items()}
    share = held["float16"] / held["float32"]
    add(Line("MCT's queues in float16", "in float32", mega["float16"], mega["float32"], share))
    assert keys["float32"] == QUEUE * (2 * 128 + 2 * 1024) * 4
    assert keys["float16"] == keys["float32"] / 2
    assert share < 0.51


def _objective_step(objective: MultimodalContrast, ids: Tensor, tags: Tensor) -> Step:
    def unit(width: int) -> Tensor:
        return nn.functional.normalize(torch.randn(BATCH, width), dim=1)

    widths = {"ii": 128, "cc": 128, "ic": 1024, "ci": 1024}

    def step() -> None:
        queries = {name: unit(width).requires_grad_() for name, width in widths.items()}
        keys = {name: unit(width) for name, width in widths.items()}
        objective(queries, keys, ids, tags)["loss"].backward()
        objective.enqueue(keys, ids, tags)

    return step
