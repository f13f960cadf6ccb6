"""The losses of MCT: contrast within images, within captions and between them, against queues of momentum keys.

With only the image loss, this is MoCo v2. The functions return the loss of every anchor [B] ([4]). They take scores of
B anchors, divided by the temperature for softmax losses: `positive` [B] with the anchor's own key, and `negatives`
[B, K] with the keys in the queue. `mask` [B, K] or [1, K] marks the valid keys of the queue.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.losses.info_nce import at_least_float32, info_nce_per_anchor
from common.losses.margin import Reduction, queue_hinge
from common.memory.collective import all_gather_rows
from common.memory.queue import KeyQueue, Warm
from common.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

InterLoss = Literal["hinge", "infonce"]
Modality = Literal["image", "text"]
Head = Literal["intra", "inter"]
#: For each contrast: the modality of the queries, the modality of the keys, and the head of both.
CONTRASTS: dict[str, tuple[Modality, Modality, Head]] = {
    "ii": ("image", "image", "intra"),
    "cc": ("text", "text", "intra"),
    "ic": ("image", "text", "inter"),
    "ci": ("text", "image", "inter"),
}


def instance_loss(positive: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
    """J_ii and J_cc: find the anchor's own key among all keys of the queue (InfoNCE)."""
    return info_nce_per_anchor(positive[:, None], negatives, mask)


def tag_loss(
    positive: Tensor,
    negatives: Tensor,
    related: Tensor,
    mask: Tensor | None = None,
    instance: Tensor | None = None,
) -> Tensor:
    """J_tag: the mean of -log softmax over the positives, which are the own key and the keys of `related` images.

    `related` is bool [B, K]. All positives stay in the softmax's denominator. So the loss is J_ii (`instance`, if
    already computed) plus the mean, over positives, of (own key's score - positive's score). Keys outside `mask` are
    neither negatives nor positives.
    """
    positive, negatives = at_least_float32(positive), at_least_float32(negatives)
    if mask is not None:
        related, negatives = related & mask, negatives.masked_fill(~mask, 0.0)  # zero times NaN would be NaN
    if instance is None:
        instance = instance_loss(positive, negatives, mask)
    chosen = related.to(negatives.dtype)
    count = chosen.sum(dim=1)
    # Not `where`, which writes two more matrices of this size, in the forward and the backward pass.
    attracted = torch.bmm(negatives[:, None], chosen[:, :, None]).flatten()
    return instance + (count * positive - attracted) / (1 + count)


def cross_modal_loss(
    positive: Tensor,
    negatives: Tensor,
    loss: InterLoss = "hinge",
    margin: float = 0.2,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """J_ic and J_ci: the own key must be closer than the queue's keys by a margin. The ablation is `infonce`."""
    if loss == "infonce":
        return instance_loss(positive, negatives, mask)
    return queue_hinge(positive, negatives, margin, reduction, mask)


class MultimodalContrast(nn.Module):
    """Weighted sum of the losses of MCT, each against its queue of momentum keys.

        J = weight_ii J_ii + weight_tag J_tag + weight_cc J_cc + weight_cross (J_ic + J_ci)

    A weight of zero disables a loss and its queue. Queries and keys are named after their contrast (`CONTRASTS`); J_tag
    uses J_ii's queries and keys. A step computes the losses, runs the backward pass, and then calls `enqueue`.

    Args:
        temperature: of J_ii, J_tag and J_cc.
        temperature_cross: of J_ic and J_ci for `infonce`.
        margin: alpha, the margin of J_ic and J_ci for `hinge`.
        epsilon: images are related if they share more than `epsilon` tags.
        inter_loss: `hinge` (the method) or `infonce`.
        inter_reduction: how to reduce the hinge over negatives. The paper's `sum` starts at alpha times the queue size.
        queue_size: K, the number of keys in each queue.
        queue_warm: see KeyQueue.
        mask_same_image: ignore queue keys of the anchor's own image, both as negatives and as positives of J_tag.
        intra_dim, inter_dim: widths of the embeddings within a modality and across modalities.
        tag_count: number of tags; 0 for data without tags.

    Source: [4] and [5].
    """

    def __init__(
        self,
        weight_ii: NonNegativeFloat = 1.0,
        weight_tag: NonNegativeFloat = 0.0,
        weight_cc: NonNegativeFloat = 1.0,
        weight_cross: NonNegativeFloat = 20.0,
        temperature: PositiveFloat = 0.07,
        temperature_cross: PositiveFloat = 0.07,
        margin: NonNegativeFloat = 0.2,
        epsilon: NonNegativeFloat = 0.5,
        inter_loss: InterLoss = "hinge",
        inter_reduction: Reduction = "mean",
        queue_size: PositiveInt = 65536,
        queue_dtype: Literal["float32"] = "float32",
        queue_warm: Warm = "random",
        mask_same_image: bool = True,
        intra_dim: PositiveInt = 128,
        inter_dim: PositiveInt = 1024,
        tag_count: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.weights = {"ii": weight_ii, "tag": weight_tag, "cc": weight_cc, "ic": weight_cross, "ci": weight_cross}
        if not any(self.weights.values()):
            raise ValueError("weight_ii, weight_tag, weight_cc and weight_cross are all 0: one must be positive")
        if weight_tag and not tag_count:
            raise ValueError(
                f"weight_tag={weight_tag} enables J_tag, but the data have no tags (tag_count=0): add tags to the data "
                "set (for COCO, the instances annotations), or set weight_tag to 0"
            )
        self.margin, self.epsilon, self.inter_loss, self.inter_reduction = margin, epsilon, inter_loss, inter_reduction
        self.mask_same_image, self.tag_count, self.seed = mask_same_image, tag_count, seed
        self.dims = {"intra": intra_dim, "inter": inter_dim}
        self.temperatures = {"intra": temperature, "inter": temperature_cross if inter_loss == "infonce" else None}
        self.queues = nn.ModuleDict()
        for position, (name, (_, _, head)) in enumerate(CONTRASTS.items()):
            if self.weights[name] or (name == "ii" and weight_tag):
                tags = tag_count if name == "ii" and weight_tag else 0
                self.queues[name] = KeyQueue(queue_size, self.dims[head], tags, queue_warm, seed=4 * seed + position)

    def contrasts(self) -> list[tuple[str, Modality, Modality, Head]]:
        """List the contrasts with a queue: name, modality of queries, modality of keys, and the head of both towers."""
        return [(name, *CONTRASTS[name]) for name in self.queues]

    def widths(self, modality: Modality) -> dict[str, int | None]:
        """Return the widths `intra_dim` and `inter_dim` of a modality's heads; None for a head that no loss uses."""
        needed = {head for _, *sides, head in self.contrasts() if modality in sides}
        return {f"{head}_dim": dim if head in needed else None for head, dim in self.dims.items()}

    def forward(
        self,
        queries: dict[str, Tensor],
        keys: dict[str, Tensor],
        image_id: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch of unit vectors in at least float32. Only queries get a gradient.

        Shapes:
            queries, keys [B, intra_dim] or [B, inter_dim]; image_id [B]; tags [B, T]

        Returns:
            Scalar `loss` with gradient, and detached scalars: every unweighted loss by name; `accuracy_<name>`, how
            often the own key scores above the queue; `active_ic` and `active_ci`, negatives within the margin per
            anchor; `positives`, J_tag's positives per anchor, including the own key; `queue_fill`, the share of the
            queues that has keys.
        """
        terms: dict[str, Tensor] = {}
        reported: dict[str, Tensor] = {}
        with torch.autocast(next(iter(keys.values())).device.type, enabled=False):
            for name, queue in self.named_queues():
                query, key, head = at_least_float32(queries[name]), at_least_float32(keys[name]), CONTRASTS[name][2]
                if temperature := self.temperatures[head]:
                    query = query / temperature
                positive, negatives = queue.scores(query, key.detach())
                keep = queue.negatives_mask(image_id if self.mask_same_image else None)
                reported[f"accuracy_{name}"] = (
                    1 - _marked(negatives >= positive[:, None], keep).any(dim=1).float().mean()
                )
                if head == "inter":
                    losses = cross_modal_loss(
                        positive, negatives, self.inter_loss, self.margin, self.inter_reduction, keep
                    )
                    terms[name] = losses.mean()
                    if self.inter_loss == "hinge":
                        active = negatives > (positive - self.margin)[:, None]
                        reported[f"active_{name}"] = _per_anchor(_marked(active, keep))
                    continue
                instance = instance_loss(positive, negatives, keep)
                terms[name] = instance.mean()
                if queue.tag_count and tags is not None:
                    related = queue.shared_tags(tags, self.epsilon)
                    terms["tag"] = tag_loss(positive, negatives, related, keep, instance).mean()
                    reported["positives"] = 1 + _per_anchor(_marked(related, keep))
            reported["queue_fill"] = queue.valid.float().mean()
            terms = {name: term for name, term in terms.items() if self.weights[name]}
            loss: Any = sum(self.weights[name] * term for name, term in terms.items())
        return {"loss": loss, **{name: value.detach() for name, value in {**terms, **reported}.items()}}

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor], image_id: Tensor | None = None, tags: Tensor | None = None) -> None:
        """Write a step's keys (as in `forward`) into the queues after the backward pass. Call this on all ranks."""
        queues = self.named_queues()
        rows = [keys[name].to(queue.vectors.dtype) for name, queue in queues]
        image_id, tags, *gathered = all_gather_rows(image_id, tags, *rows)
        for (_, queue), joined in zip(queues, gathered):
            queue.write(joined, image_id, tags if queue.tag_count else None)

    def named_queues(self) -> list[tuple[str, KeyQueue]]:
        return list(self.queues.items())  # type: ignore[arg-type]

    def synchronize(self) -> None:
        """Copy the queues of rank 0 to all ranks. Call this once, before the first step."""
        for _, queue in self.named_queues():
            queue.synchronize()


def _marked(chosen: Tensor, keep: Tensor | None) -> Tensor:
    return chosen if keep is None else chosen & keep


def _per_anchor(chosen: Tensor) -> Tensor:
    # Convert to float32 first, because a sum of booleans converts to 64-bit integers.
    return chosen.float().sum() / len(chosen)
