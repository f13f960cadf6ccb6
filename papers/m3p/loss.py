"""Training losses of M3P from the hidden states of one forward pass per group of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.losses.alignment import word_region_alignment
from common.losses.masked import (
    masked_language_modeling,
    masked_region_classification,
    masked_region_kl,
    masked_region_regression,
)
from common.losses.matching import candidate_matching, image_text_matching, in_batch_matching
from common.memory.collective import share_of_mean
from papers.m3p.encoder import M3P, all_pairs

#: A block of text or a group of pairs, see `PairCollator` and `MultitaskSteps`.
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PairTasks:
    """Tasks on pairs besides matching.

    Args:
        words, regions: those that are masked.
        soft_classes: compare the class of a region with the detector's whole distribution by KL.
        alignment: optimal transport between words and regions of a true and a false pair per group, and two-way
            matching of these pairs.
        contrast_temperature: contrast mean embeddings in the batch, for in-batch pairs; not in the paper.
    """

    words: bool = True
    regions: bool = True
    soft_classes: bool = False
    alignment: bool = False
    contrast_temperature: float | None = None


MATCH_ALONE = PairTasks(words=False, regions=False)


def text_terms(model: M3P, block: Batch) -> Batch:
    """`xmlm`, masked language modeling of a block of text.

    Source: [6.1].
    """
    hidden = model.encoder(block["tokens"], block["token_mask"], languages=block.get("languages"))
    return {"xmlm": _word_loss(model, hidden.flatten(0, 1), block)}


def pair_terms(model: M3P, group: Batch, tasks: PairTasks) -> Batch:
    """Losses of a group of pairs (`vlm_ce`, `vlm_bce`, `mlm`, `mrm_class`, ...), and the `accuracy` of the match.

    Accuracy is the share of groups whose true pair scores highest. All losses come from one forward pass.

    Source: [6.2] and [14].
    """
    start, mask, true, false = _pairs(model, group)
    whole = torch.cat([true, false]) if tasks.alignment else true
    first, hidden = model.encoder.encode_pairs(start, mask, whole)
    logits = model.match_head(first).float()
    terms = _match_terms(logits.unflatten(0, (len(true), -1)), group)
    if "group" in group and tasks.contrast_temperature is not None:
        terms["contrast"], _ = embedding_contrast(model, group, tasks.contrast_temperature)
    positions = hidden[: len(true)].flatten(0, 1)
    if tasks.words and "word_places" in group:
        terms["mlm"] = _word_loss(model, positions, group)
    if tasks.regions and "region_places" in group:
        terms |= _region_terms(model, positions[group["region_places"]], group, tasks.soft_classes)
    if tasks.alignment:
        count = group["regions"].shape[1]
        matched = torch.arange(len(whole), device=whole.device) < len(true)
        terms["alignment"] = word_region_alignment(
            hidden[:, count:], hidden[:, :count], mask[whole, count:], mask[whole, :count], matched
        )
        chosen = logits[whole]
        terms["itm"] = image_text_matching(torch.stack([torch.zeros_like(chosen), chosen], 1), matched.long())
    return terms


def _pairs(model: M3P, group: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start [P, S, D] and mask [P, S] of all pairs, and rows [G] of the true pairs and of one false pair per group."""
    image = model.encoder.start_regions(group["regions"], group["boxes"], group["region_mask"])
    text = model.encoder.start_text(group["tokens"], group["token_mask"], image.shape[1])
    if "group" in group:  # all images with all captions of the batch
        number = torch.arange(len(text), device=text.device)
        true, false = number * (len(text) + 1), number * len(text) + _next_other(group["group"])
        return all_pairs(image, text), all_pairs(group["region_mask"], group["token_mask"]), true, false
    start, mask = torch.cat([image, text], 1), torch.cat([group["region_mask"], group["token_mask"]], 1)
    positive = group["positive"]
    candidates = len(start) // len(positive)
    first = torch.arange(len(positive), device=positive.device) * candidates
    return start, mask, first + positive, first + (positive + 1) % candidates


def _next_other(group: Tensor) -> Tensor:
    """For each pair, the next one of another group [B], or simply the next one if there is no other group."""
    size = len(group)
    number = torch.arange(size, device=group.device)
    behind = (number[None, :] - number[:, None]) % size  # how far behind each pair every other one is
    behind = behind.masked_fill(group[:, None] == group[None, :], size)
    return torch.where((behind < size).any(1), behind.argmin(1), (number + 1) % size)


def _match_terms(logits: Tensor, group: Batch) -> Batch:
    """`vlm_ce`, `vlm_bce` and `accuracy` of the logits [G, N] of all candidates."""
    if "group" in group:
        target = torch.arange(len(logits), device=logits.device)
        ce, bce = in_batch_matching(logits, group["group"])
    else:
        target = group["positive"]
        ce, bce = candidate_matching(logits, target)
    scores = logits.detach()
    first = (scores >= scores.gather(1, target[:, None])).sum(1) == 1
    return {"vlm_ce": ce, "vlm_bce": bce, "accuracy": first.float().mean()}


def _word_loss(model: M3P, positions: Tensor, batch: Batch) -> Tensor:
    logits = model.words(positions[batch["word_places"]])
    return masked_language_modeling(logits, batch["word_targets"]) * share_of_mean(len(logits), logits.device)


def _region_terms(model: M3P, hidden: Tensor, group: Batch, soft_classes: bool) -> Batch:
    """`mrm_class` and `mrm_regression` of the hidden states [K, D] of masked regions."""
    logits = model.region_heads.classes(hidden)
    if soft_classes:
        loss = masked_region_kl(logits, group["region_distributions"])
    else:
        loss = masked_region_classification(logits, group["region_classes"])
    weight = share_of_mean(len(hidden), loss.device)
    regression = masked_region_regression(model.region_heads.regression(hidden), group["region_features"])
    return {"mrm_class": loss * weight, "mrm_regression": regression * weight}


def embedding_contrast(model: M3P, group: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Contrast of the mean region embeddings and mean word embeddings of in-batch pairs, in both directions.

    Pairs of the same `group` [B] aren't negatives of each other. Also the share of images that find their caption.
    """
    image = model.encoder.mean_of_regions(group["regions"], group["boxes"], group["region_mask"])
    text = model.encoder.mean_of_words(group["tokens"], group["token_mask"])
    scores = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T / temperature
    loss, _ = in_batch_matching(scores, group["group"])
    return loss, (scores.detach().argmax(1) == torch.arange(len(scores), device=scores.device)).float().mean()
