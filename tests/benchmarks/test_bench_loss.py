"""Time of a step of AVID's loss (forward, backward, bank update) at the paper's sizes, beside the released code's form.

The released code's form gathers the negative rows of each bank as [B, K, d], multiplies batch by
batch, leaves the gradient to autograd and writes rows by index; ours does the same with checks, any terms and repeated
clips. Process CPU time on one thread. No ratio is asserted: a step of training takes many times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.nce import nce
from papers.avid_cma.loss import BankLoss, skip_rows
from tests.benchmarks.speed import compare, in_turns

ITEMS, DIM, NEGATIVES, BATCH, POSITIVES, WITHIN = 240_000, 128, 1024, 32, 32, 64
SETTINGS = ["cross", "joint", "cma"]
#: Video, audio and clip numbers of a batch to the loss, whose gradient is taken and whose banks are updated.
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def official_step(loss: BankLoss, setting: str) -> Step:
    """The released code's form, from the same banks, with the same negatives."""
    video_bank, audio_bank = loss.video_bank.vectors.clone(), loss.audio_bank.vectors.clone()

    def scores(embedding: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(rows, embedding[:, :, None]).squeeze(2) / 0.07

    def gather(bank: Tensor, rows: Tensor) -> Tensor:
        return bank.index_select(0, rows.flatten()).view(*rows.shape, DIM)

    def step(video: Tensor, audio: Tensor, index: Tensor) -> Tensor:
        video, audio = F.normalize(video, dim=1), F.normalize(audio, dim=1)
        positives = loss.positive_set[index].long()
        excluded = torch.cat([positives, index[:, None]], dim=1).sort(dim=1).values
        raw = torch.randint(ITEMS - excluded.shape[1], (BATCH, NEGATIVES), generator=torch.Generator().manual_seed(0))
        negatives = skip_rows(raw, excluded)
        negatives_v, negatives_a = gather(video_bank, negatives), gather(audio_bank, negatives)
        own_v, own_a = gather(video_bank, index[:, None]), gather(audio_bank, index[:, None])
        v2a = nce(scores(video, own_a), scores(video, negatives_a), 2.2)
        a2v = nce(scores(audio, own_v), scores(audio, negatives_v), 2.2)
        total = (v2a + a2v) / 2
        if setting == "joint":
            v2v = nce(scores(video, own_v), scores(video, negatives_v), 2.2)
            a2a = nce(scores(audio, own_a), scores(audio, negatives_a), 2.2)
            total = (total + (v2v + a2a) / 2) / 2
        if setting == "cma":
            near_v, near_a = negatives_v[:, :WITHIN], negatives_a[:, :WITHIN]
            v2v = nce(scores(video, gather(video_bank, positives)), scores(video, near_v), 2.2)
            a2a = nce(scores(audio, gather(audio_bank, positives)), scores(audio, near_a), 2.2)
            total = (total + (v2v + a2a) / 2) / 2
        total.backward()
        with torch.no_grad():
            video_bank[index] = F.normalize(0.5 * video_bank[index] + 0.5 * video, dim=1)
            audio_bank[index] = F.normalize(0.5 * audio_bank[index] + 0.5 * audio, dim=1)
        return total.detach()

    return step


def our_step(loss: BankLoss) -> Step:
    def step(video: Tensor, audio: Tensor, index: Tensor) -> Tensor:
        total = loss(video, audio, index)["loss"]
        total.backward()
        return total.detach()

    return step


@pytest.mark.parametrize("setting", SETTINGS)
def test_step(setting: str) -> None:
    more: dict[str, Any] = {}
    if setting == "cma":
        more = {"positives": POSITIVES, "within_negatives": WITHIN, "positive_within": 1.0}
    loss = BankLoss(NEGATIVES, instance_within=float(setting == "joint"), **more).allocate(ITEMS, DIM)
    generator = torch.Generator().manual_seed(0)
    loss.positive_set.copy_(torch.randint(ITEMS, loss.positive_set.shape, generator=generator).sort(dim=1).values)
    loss.normalizer.fill_(2.2)

    def fed(step: Step) -> Callable[[], Tensor]:
        def run() -> Tensor:
            video, audio = (torch.randn(BATCH, DIM, generator=generator, requires_grad=True) for _ in range(2))
            return step(video, audio, torch.randint(ITEMS, (BATCH,), generator=generator))

        return run

    steps = {"ours": fed(our_step(loss)), "official": fed(official_step(loss, setting))}
    assert all(4.0 < float(step()) < 20.0 for step in steps.values())
    seconds = in_turns(steps, 30, warm_up=5)
    compare(f"AVID's loss, {setting}, 240,000 clips", "the released code's form", seconds["ours"], seconds["official"])
