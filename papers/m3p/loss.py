"""Training losses of M3P from the hidden states of one forward pass per group of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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

#: One group of pairs: tokens and regions of every pair, labels of the true ones (see `with_places`).
Group = dict[str, Tensor]
IN_BATCH = "in_batch"


class WeightSchedule:
    """Weight of a loss over the iterations: a number, or linear interpolation between points.

    "0:1,1000:0" falls from 1 to 0 in a thousand iterations and stays 0.

    Source: [6.2].
    """

    def __init__(self, points: float | str, field: str = "model") -> None:
        try:
            if isinstance(points, str) and ":" in points:
                pairs = [point.split(":") for point in points.split(",")]
                self.points = [(int(iteration), float(weight)) for iteration, weight in pairs]
            else:
                self.points = [(0, float(points))]
        except ValueError:
            raise ValueError(
                f"{field}: a weight is a number or a list such as '0:1,1000:0' of iterations and weights, "
                f"got {points!r}"
            ) from None
        iterations = [iteration for iteration, _ in self.points]
        if iterations[0] != 0 or sorted(set(iterations)) != iterations:
            raise ValueError(f"{field}: the iterations of a weight must rise from 0, got {points!r}")
        if not all(0 <= weight < math.inf for _, weight in self.points):
            raise ValueError(f"{field}: a weight must be a number from 0, got {points!r}")

    @property
    def ever(self) -> bool:
        return any(weight != 0 for _, weight in self.points)

    def __call__(self, iteration: int) -> float:
        """Weight at an iteration, counted from 0."""
        for (start, before), (end, after) in zip(self.points, self.points[1:]):
            if iteration < end:
                return before + (after - before) * (iteration - start) / (end - start)
        return self.points[-1][1]


def with_places(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A training batch with the positions of its labels, computed on the host before it goes to an accelerator.

    Args:
        batch: `xmlm`: text batches with `labels` [B, L]. `relations`: maps kind to group, with the optional entries
            `word_labels` [P, L], `region_labels` [P, R] and `region_targets` [P, R, F], or [K, F] of the labeled
            regions in order. A label of -1 means none.

    Returns:
        The batch with other entries instead of labels. These are `word_places` and `region_places` [K] among the R + L
        positions of the G true pairs, `word_targets` [K], `region_classes` [K], `region_features` [K, F], `true_rows`
        [G].
    """
    xmlm = []
    for block in batch["xmlm"]:
        labels = block["labels"].flatten()
        places = (labels >= 0).nonzero()[:, 0]
        kept = {name: value for name, value in block.items() if name != "labels"}
        xmlm.append(kept | {"word_places": places, "word_targets": labels[places]})
    relations = [
        {kind: _group_with_places(kind, group) for kind, group in relation.items()} for relation in batch["relations"]
    ]
    return {"xmlm": xmlm, "relations": relations}


def _group_with_places(kind: str, group: Group) -> Group:
    regions = group["regions"].shape[1]
    sequence = regions + group["tokens"].shape[1]
    if kind == IN_BATCH:
        rows = torch.arange(len(group["tokens"]))
    else:
        groups = len(group["positive"])
        rows = torch.arange(groups) * (len(group["tokens"]) // groups) + group["positive"]
    labeled = ("word_labels", "region_labels", "region_targets", "region_distributions")
    converted = {name: value for name, value in group.items() if name not in labeled} | {"true_rows": rows}
    if "word_labels" in group:
        labels = group["word_labels"][rows]
        row, column = (labels >= 0).nonzero(as_tuple=True)
        converted |= {"word_places": row * sequence + regions + column, "word_targets": labels[row, column]}
    if "region_labels" in group:
        labels = group["region_labels"][rows]
        row, column = (labels >= 0).nonzero(as_tuple=True)
        converted |= {"region_places": row * sequence + column, "region_classes": labels[row, column]}
        for name, short in (("region_targets", "region_features"), ("region_distributions", "region_distributions")):
            if name in group:  # of all regions, or of those alone that have a label
                converted[short] = group[name][rows[row], column] if group[name].ndim == 3 else group[name]
    return converted


def text_terms(model: M3P, block: Group) -> dict[str, Tensor]:
    """`xmlm`, masked language modeling of `tokens` [B, L], `token_mask`, `languages` [B] and places of `with_places`.

    Source: [6.1].
    """
    hidden = model.encoder(block["tokens"], block["token_mask"], languages=block.get("languages"))
    logits = model.words(hidden.flatten(0, 1)[block["word_places"]])
    loss = masked_language_modeling(logits, block["word_targets"])
    return {"xmlm": loss * share_of_mean(len(logits), loss.device)}


def relation_terms(
    model: M3P,
    group: Group,
    kind: str,
    words: bool = True,
    regions: bool = True,
    soft_classes: bool = False,
    alignment: bool = False,
    contrast_temperature: float | None = None,
) -> dict[str, Tensor]:
    """Losses of one group of pairs, all from one forward pass.

    Args:
        group: pairs and places of `with_places`; `languages` [P] if the encoder adds their embeddings to text with
            regions, and `group` [B] for in-batch pairs.
        kind: `t2i` or `i2t` for groups of N candidates; `in_batch` pairs all B images with all B captions.
        soft_classes: compare the class of a region with the detector's whole distribution by KL.
        alignment: optimal transport between words and regions of a true and a false pair per group, and two-way
            matching of these pairs.
        contrast_temperature: adds a contrast of mean embeddings in the batch, see `embedding_contrast`; not in the
            paper.

    Returns:
        Scalars `vlm_ce`, `vlm_bce`; `mlm`; `mrm_class` and `mrm_regression`; `alignment` and `itm`; `contrast`; and
        `accuracy`, the share of groups whose true pair scores highest.

    Source: [6.2] and [14].
    """
    start, mask, true, false = _pairs(model, group, kind)
    whole = torch.cat([true, false]) if alignment else true
    first, hidden = model.encoder.encode_pairs(start, mask, whole)
    logits = model.match_head(first).float()
    terms = _match_terms(logits.unflatten(0, (len(true), -1)), group, kind)
    if kind == IN_BATCH and contrast_temperature is not None:
        terms["contrast"], _ = embedding_contrast(model, group, contrast_temperature)
    positions = hidden[: len(true)].flatten(0, 1)
    if words and "word_places" in group:
        words_at = model.words(positions[group["word_places"]])
        loss = masked_language_modeling(words_at, group["word_targets"])
        terms["mlm"] = loss * share_of_mean(len(words_at), loss.device)
    if regions and "region_places" in group:
        terms |= _region_terms(model, positions[group["region_places"]], group, soft_classes)
    if alignment:
        count = group["regions"].shape[1]
        matched = torch.arange(len(whole), device=whole.device) < len(true)
        terms["alignment"] = word_region_alignment(
            hidden[:, count:], hidden[:, :count], mask[whole, count:], mask[whole, :count], matched
        )
        chosen = logits[whole]
        terms["itm"] = image_text_matching(torch.stack([torch.zeros_like(chosen), chosen], 1), matched.long())
    return terms


def _match_terms(logits: Tensor, group: Group, kind: str) -> dict[str, Tensor]:
    """`vlm_ce`, `vlm_bce` and `accuracy` of the logits [G, N] of all candidates."""
    if kind == IN_BATCH:
        target = torch.arange(len(logits), device=logits.device)
        ce, bce = in_batch_matching(logits, group.get("group"))
    else:
        target = group["positive"]
        ce, bce = candidate_matching(logits, target)
    scores = logits.detach()
    first = (scores >= scores.gather(1, target[:, None])).sum(1) == 1
    return {"vlm_ce": ce, "vlm_bce": bce, "accuracy": first.float().mean()}


def _region_terms(model: M3P, hidden: Tensor, group: Group, soft_classes: bool) -> dict[str, Tensor]:
    """`mrm_class` and `mrm_regression` of the hidden states [K, D] of masked regions."""
    logits = model.region_heads.classes(hidden)
    if not soft_classes:
        loss = masked_region_classification(logits, group["region_classes"])
    elif "region_distributions" in group:
        loss = masked_region_kl(logits, group["region_distributions"])
    else:
        raise ValueError(
            "model.soft_classes needs the detector's distributions, which these region features do not have"
        )
    weight = share_of_mean(len(hidden), loss.device)
    regression = masked_region_regression(model.region_heads.regression(hidden), group["region_features"])
    return {"mrm_class": loss * weight, "mrm_regression": regression * weight}


def _pairs(model: M3P, group: Group, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start [P, S, D] and mask [P, S] of all pairs, and rows [G] of the true pairs and of one false pair per group."""
    encoder, true = model.encoder, group["true_rows"]
    if kind != IN_BATCH:
        start, mask = encoder.start_joint(
            group["tokens"], group["token_mask"], group["regions"], group["boxes"], group["region_mask"],
            group.get("languages"),
        )  # fmt: skip
        candidates = len(start) // len(true)
        first = torch.arange(len(true), device=true.device) * candidates
        return start, mask, true, first + (true - first + 1) % candidates
    size = len(group["tokens"])
    image = encoder.start_regions(group["regions"], group["boxes"], group["region_mask"])
    added = group.get("languages") if encoder.joint_language_embedding else None
    text = encoder.start_text(group["tokens"], group["token_mask"], image.shape[1], added)
    start, mask = all_pairs(image, text), all_pairs(group["region_mask"], group["token_mask"])
    return start, mask, true * (size + 1), true * size + _next_other(true, group.get("group"))


def _next_other(true: Tensor, group: Tensor | None) -> Tensor:
    """For each pair [B], the next one of another group, or simply the next one if there is no other group."""
    size = len(true)
    following = (true + 1) % size
    if group is None:
        return following
    behind = (true[None, :] - true[:, None]) % size  # how far behind each pair every other one stands
    behind = behind.masked_fill(group[:, None] == group[None, :], size)
    return torch.where((behind < size).any(1), behind.argmin(1), following)


def embedding_contrast(model: M3P, group: Group, temperature: float) -> tuple[Tensor, Tensor]:
    """`contrast` of mean region embeddings and mean word embeddings of `in_batch` pairs."""
    image = model.encoder.mean_of_regions(group["regions"], group["boxes"], group["region_mask"])
    text = model.encoder.mean_of_words(group["tokens"], group["token_mask"])
    return contrast(image, text, temperature, group.get("group"))


def contrast(image: Tensor, text: Tensor, temperature: float, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding the partner in the batch, in both directions, and the share of images that find it.

    Image and text [B, D] in a row are partners; pairs of the same `group` [B] aren't negatives of each other.
    """
    scores = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T / temperature
    loss, _ = in_batch_matching(scores, group)
    return loss, (scores.detach().argmax(1) == torch.arange(len(scores), device=scores.device)).float().mean()
