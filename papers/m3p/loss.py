"""Training losses of M3P, computed from one forward pass per group of pairs.

A text `block` comes from `MultitaskSteps`, and a `batch` of pairs from `PairItems.collate`.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def text_terms(model: M3P, block: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute `xmlm`, masked language modeling of a block of text.

    Source: [6.1].
    """
    hidden = model.encoder(block["tokens"], block["token_mask"], languages=block.get("languages"))
    return {"xmlm": _word_loss(model, hidden.flatten(0, 1), block)}


def pair_terms(
    model: M3P,
    batch: dict[str, Tensor],
    weights: Mapping[str, float],
    soft_classes: bool = False,
    temperature: float = 0.1,
) -> dict[str, Tensor]:
    """Compute the losses of a batch of pairs from one forward pass, and the `accuracy` of the match.

    Accuracy is the share of groups whose true pair scores highest. `vlm_ce` and `vlm_bce` train the match. The other
    losses are computed if their weight in `weights` is positive: `mlm`, masked words; `mrm_class` and `mrm_regression`,
    masked regions; `alignment`, optimal transport between words and regions, for a true and a false pair per group;
    `itm`, two-way matching of the same two pairs; `contrast`, see `embedding_contrast`, for in-batch pairs.

    Args:
        soft_classes: compare a region's class with the detector's whole distribution, by KL divergence.

    Source: [6.2] and [14].
    """

    def trains(*names: str) -> bool:
        return any(weights.get(name, 0.0) > 0 for name in names)

    encoder, in_batch = model.encoder, "group" in batch
    join = all_pairs if in_batch else _each_pair
    image = encoder.start_regions(batch["regions"], batch["boxes"], batch["region_mask"])
    text = encoder.start_text(batch["tokens"], batch["token_mask"], image.shape[1])
    start, mask = join(image, text), join(batch["region_mask"], batch["token_mask"])
    true, false = batch["true"], batch["false"]
    aligned = trains("alignment", "itm")
    whole = torch.cat([true, false]) if aligned else true
    first, hidden = encoder.encode_pairs(start, mask, whole)

    logits = model.match_head(first).float()
    scores = logits.unflatten(0, (len(true), -1))
    positive = true % scores.shape[1]
    ce, bce = in_batch_matching(scores, batch["group"]) if in_batch else candidate_matching(scores, positive)
    terms = {"vlm_ce": ce, "vlm_bce": bce, "accuracy": _accuracy(scores.detach(), positive)}
    if trains("contrast"):
        terms["contrast"], _ = embedding_contrast(model, batch, temperature)
    positions = hidden[: len(true)].flatten(0, 1)
    if trains("mlm") and "word_places" in batch:
        terms["mlm"] = _word_loss(model, positions, batch)
    if trains("mrm_class", "mrm_regression") and "region_places" in batch:
        terms |= _region_terms(model, positions[batch["region_places"]], batch, soft_classes)
    if aligned:
        count = image.shape[1]
        matched = torch.arange(len(whole), device=whole.device) < len(true)
        terms["alignment"] = word_region_alignment(
            hidden[:, count:], hidden[:, :count], mask[whole, count:], mask[whole, :count], matched
        )
        chosen = logits[whole]
        terms["itm"] = image_text_matching(torch.stack([torch.zeros_like(chosen), chosen], 1), matched.long())
    return terms


def _each_pair(images: Tensor, texts: Tensor) -> Tensor:
    """Concatenate rows [P, R, ...] and [P, L, ...] to pairs [P, R + L, ...]."""
    return torch.cat([images, texts], dim=1)


def _accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Return the share of rows whose true candidate scores highest. A tie counts as a miss."""
    return ((scores >= scores.gather(1, target[:, None])).sum(1) == 1).float().mean()


def _word_loss(model: M3P, positions: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logits = model.words(positions[batch["word_places"]])
    return masked_language_modeling(logits, batch["word_targets"]) * share_of_mean(len(logits), logits.device)


def _region_terms(model: M3P, hidden: Tensor, batch: dict[str, Tensor], soft_classes: bool) -> dict[str, Tensor]:
    """Compute `mrm_class` and `mrm_regression` from the hidden states [K, D] of masked regions."""
    logits = model.region_heads.classes(hidden)
    if soft_classes:
        loss = masked_region_kl(logits, batch["region_distributions"])
    else:
        loss = masked_region_classification(logits, batch["region_classes"])
    weight = share_of_mean(len(hidden), loss.device)
    regression = masked_region_regression(model.region_heads.regression(hidden), batch["region_features"])
    return {"mrm_class": loss * weight, "mrm_regression": regression * weight}


def embedding_contrast(model: M3P, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Contrast the mean region and the mean word embeddings of in-batch pairs, in both directions.

    Pairs of the same `group` [B] aren't negatives of each other. Also return the share of images whose caption ranks
    first.
    """
    image = model.encoder.mean_of_regions(batch["regions"], batch["boxes"], batch["region_mask"])
    text = model.encoder.mean_of_words(batch["tokens"], batch["token_mask"])
    scores = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T / temperature
    loss, _ = in_batch_matching(scores, batch["group"])
    return loss, (scores.detach().argmax(1) == torch.arange(len(scores), device=scores.device)).float().mean()
