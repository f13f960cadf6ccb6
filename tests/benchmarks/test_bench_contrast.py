"""Compare contrastive losses and MCT's image term with lightly, and losses over two processes with open_clip.

The two implementations alternate, so that other load slows both alike. With one process, the tests measure CPU time on
one thread. Two processes wait for each other, so the tests measure wall time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.image import ImageResNet
from common.losses.info_nce import info_nce_per_anchor
from common.memory.collective import gather_with_gradient
from common.memory.queue import KeyQueue
from papers.mct.loss import MultimodalContrast
from papers.mct.module import MCTModule
from papers.xmc_gan.loss import XMCGANLoss
from tests.benchmarks.speed import Step, compare, in_turns, peer
from tests.distributed.harness import run_distributed

BATCH, PIXELS, QUEUE = 16, 96, 65_536


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
    """Build MoCo v2 as in lightly's documentation."""
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
    """Compare with lightly's MoCo step. Each step makes its own random batch of the same size."""
    peer("lightly.loss")
    torch.manual_seed(0)
    steps = {"lightly": _lightly_step(), "ours": _image_step()}
    seconds = in_turns(steps, 8, warm_up=2)
    # Our step is as fast as lightly's within the noise, so the test has no limit.
    compare("MoCo's step, ResNet-50, 16 images of 96 pixels", "lightly", seconds["ours"], seconds["lightly"])


def _with_gradient(loss: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, inputs)

    return step


def _compare_losses(what: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-6)
    seconds = in_turns({"theirs": theirs, "ours": ours}, 10)
    compare(what, peer, seconds["ours"], seconds["theirs"])


def test_nt_xent_against_lightly() -> None:
    """Compare SimCLR's loss. The negatives of a view are all other views in the batch, except the paired view."""
    theirs = peer("lightly.loss").NTXentLoss(temperature=0.1)
    torch.manual_seed(0)
    views = torch.randn(2, 512, 128, requires_grad=True)
    negatives = ~torch.eye(512, dtype=torch.bool).repeat(2, 2)

    def ours() -> Tensor:
        unit = F.normalize(views.flatten(0, 1), dim=1)
        scores = unit @ unit.T / 0.1
        return info_nce_per_anchor(scores.diagonal(512).repeat(2)[:, None], scores, negatives).mean()

    what = "NT-Xent with gradient, 512 pairs of 128"
    _compare_losses(what, "lightly", _with_gradient(ours, views), _with_gradient(lambda: theirs(*views), views))


def test_a_queue_against_lightly() -> None:
    """Compare MoCo's loss and its queue of keys. A step computes the loss, then replaces the queue's oldest keys."""
    theirs = peer("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128))
    torch.manual_seed(0)
    query, key = torch.randn(256, 128, requires_grad=True), F.normalize(torch.randn(256, 128), dim=1)
    queue = KeyQueue(QUEUE, 128)
    queue.vectors.copy_(theirs.memory_bank.bank)

    def loss() -> Tensor:
        own, others = queue.scores(F.normalize(query, dim=1) / 0.2, key)
        return info_nce_per_anchor(own[:, None], others).mean()

    def ours() -> tuple[Tensor, ...]:
        found = _with_gradient(loss, query)()
        queue.write(key)
        return found

    what = "InfoNCE with gradient, 256 queries, a queue of 65,536 keys of 128"
    _compare_losses(what, "lightly", ours, _with_gradient(lambda: theirs(query, key), query))


def _over_two_processes(rank: int) -> dict[str, list[float]]:
    theirs = peer("open_clip.loss").ClipLoss(gather_with_grad=True, rank=rank, world_size=2)
    torch.manual_seed(rank)
    pairs, target = torch.randn(2, 256, 512, requires_grad=True), torch.arange(512)

    def plain() -> Tensor:
        image, text = (gather_with_gradient(part) for part in F.normalize(pairs, dim=2))
        logits = 10 * image @ text.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    steps = {
        "theirs": _with_gradient(lambda: theirs(*F.normalize(pairs, dim=2), 10.0), pairs),
        "plain": _with_gradient(plain, pairs),
        "measured": _with_gradient(lambda: XMCGANLoss().pairs(*pairs).loss / 2, pairs),
    }
    for step in steps.values():
        torch.testing.assert_close(step(), steps["theirs"](), rtol=1e-4, atol=1e-6)
    return in_turns(steps, 20, 2, time.perf_counter)


def test_a_gathered_loss_against_open_clip() -> None:
    """Compare our gather, and XMC-GAN's sentence loss, which also measures accuracy and entropy."""
    peer("open_clip.loss")
    seconds = run_distributed(_over_two_processes, 2)[0]
    what = "2 processes, 256 pairs of 512 each"
    compare(f"symmetric InfoNCE with gradient, {what}", "open_clip", seconds["plain"], seconds["theirs"])
    compare(f"XMC-GAN's loss of sentences, {what}", "open_clip", seconds["measured"], seconds["theirs"])
