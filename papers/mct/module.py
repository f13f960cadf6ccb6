"""MCT as a LightningModule: the paper's algorithm, readable top to bottom.

One image backbone and one text backbone are trained by contrast inside each modality (momentum contrast on two views of
an image and of a caption, and a variant whose positives share tags) and across them (a margin loss between an image and
its caption). Keys come from momentum encoders and wait in queues. Which terms are on decides what the method is: the
image term alone is MoCo v2, without tags it is MCT, with them MCT (with tag).

The other pre-training of the paper's tables, VirTex, is in `bicaptioning.py`; what is trained with labels, in
`evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.data.text import text_numbers
from common.encoders.text import BertEncoder
from common.metrics.gathering import RowsOncePerSample
from common.metrics.retrieval import caption_retrieval, owner_rows
from common.training.optimisers import CombinedOptimizer, cosine_by_epoch, fused
from papers.mct import monitoring
from papers.mct.data import PretrainingData
from papers.mct.loss import MultimodalContrast
from papers.mct.model import MomentumTower, Tower


class MCT(pl.LightningModule):
    """Multimodal contrastive training (specification 1 to 6). A weight of 0 switches a loss and its modules off.

    Args:
        image_encoder: backbone with `feature_dim`; the one that transfers.
        text_encoder: backbone of the captions; null when no loss reads them.
        weight_ii, weight_tag, weight_cc, weight_cross: weights of the image, tag, caption and image-caption losses.
        heads: `separate` heads inside and across modalities, the paper's, or one `shared` hidden layer.
        intra_dim, inter_dim: widths of the two embeddings.
        head_hidden_dim: width of the hidden layer of every head; null for that of its backbone.
        head_batch_norm: normalise that layer over the batch; the method does not.
        temperature: of the losses inside a modality.
        inter_loss: `hinge`, the margin loss, or `infonce`.
        margin: alpha of the hinge.
        inter_reduction: over the negatives: `mean`, `sum` (the formula as printed) or `max`.
        temperature_cross: of the image-caption loss when it is `infonce`.
        epsilon: two images are positives of the tag loss when they share more tags than this.
        tag_count: tags of the data set.
        queue_size, queue_dtype: entries of each queue, and their precision (`float16` halves the memory).
        queue_warm: `random` entries count as negatives until they are overwritten (MoCo), or are `masked`.
        mask_same_image: entries of the anchor's own image are no negatives.
        momentum: share of a key parameter that an update keeps.
        key_bn_groups: shuffled groups in which one device encodes keys, for their batch normalisation.
        image_learning_rate, image_momentum, image_weight_decay: SGD of the image tower.
        text_learning_rate, text_weight_decay, text_clip_norm: AdamW of the text tower.
        image_warmup_epochs, text_warmup_epochs: length of a linear warm-up; the cosine of MoCo v2 falls every epoch.
        seed: seed of the queues' first entries.

    Raises:
        ValueError: a loss needs an encoder or tags that are not there, the data does not fit, or the precision freezes
            the averages.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module | None = None,
        weight_ii: float = 1.0,
        weight_tag: float = 1.0,
        weight_cc: float = 1.0,
        weight_cross: float = 20.0,
        heads: Literal["separate", "shared"] = "separate",
        intra_dim: int = 128,
        inter_dim: int = 1024,
        head_hidden_dim: int | None = None,
        head_batch_norm: bool = False,
        temperature: float = 0.07,
        inter_loss: Literal["hinge", "infonce"] = "hinge",
        margin: float = 0.2,
        inter_reduction: Literal["mean", "sum", "max"] = "mean",
        temperature_cross: float = 0.07,
        epsilon: float = 0.5,
        tag_count: int = 80,
        queue_size: int = 65536,
        queue_dtype: Literal["float32", "float16"] = "float32",
        queue_warm: Literal["random", "masked"] = "random",
        mask_same_image: bool = True,
        momentum: float = 0.999,
        key_bn_groups: int = 1,
        image_learning_rate: float = 0.03,
        image_momentum: float = 0.9,
        image_weight_decay: float = 1e-4,
        text_learning_rate: float = 4e-5,
        text_weight_decay: float = 1e-2,
        text_clip_norm: float = 1.0,
        image_warmup_epochs: float = 0.0,
        text_warmup_epochs: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder"], logger=False)
        if not (weight_ii > 0 or weight_tag > 0 or weight_cross > 0):
            raise ValueError(
                "no loss trains the image encoder: one of weight_ii, weight_tag, weight_cross must not be 0"
            )
        reads_captions = weight_cc > 0 or weight_cross > 0
        if reads_captions and text_encoder is None:
            raise ValueError("model.text_encoder is null, but weight_cc or weight_cross is not 0: both read captions")

        def tower(backbone: nn.Module, intra: bool) -> MomentumTower:
            return MomentumTower(
                Tower(
                    backbone,
                    intra_dim=intra_dim if intra else None,
                    inter_dim=inter_dim if weight_cross > 0 else None,
                    hidden_dim=head_hidden_dim,
                    shared=heads == "shared",
                    batch_norm=head_batch_norm,
                )
            )

        self.image = tower(image_encoder, weight_ii > 0 or weight_tag > 0)
        self.text = tower(text_encoder, weight_cc > 0) if reads_captions and text_encoder is not None else None
        self.objective = MultimodalContrast(
            weight_ii=weight_ii, weight_tag=weight_tag, weight_cc=weight_cc, weight_cross=weight_cross,
            intra_dim=intra_dim, inter_dim=inter_dim, temperature=temperature, inter_loss=inter_loss, margin=margin,
            inter_reduction=inter_reduction, temperature_cross=temperature_cross, epsilon=epsilon,
            tag_count=tag_count if weight_tag > 0 else 0, queue_size=queue_size, queue_dtype=queue_dtype,
            queue_warm=queue_warm, mask_same_image=mask_same_image, seed=seed,
        )  # fmt: skip
        self.to_enqueue: list[tuple[dict[str, Tensor], Tensor, Tensor | None]] = []

    # -- training ------------------------------------------------------------------------------------------------------

    def queries(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trained embeddings of one view of every image and caption, by the loss that compares them."""
        image = self.image.query(batch["image_query"])
        text = {} if self.text is None else self.text.query(batch["tokens_query"])
        return self._named(ii=image.get("intra"), cc=text.get("intra"), ic=image.get("inter"), ci=text.get("inter"))

    def keys(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Momentum embeddings of the other view; across modalities an image's key is its caption's, and vice versa."""
        image = self.image.keys(batch["image_key"], groups=self.hparams["key_bn_groups"])
        text = {} if self.text is None else self.text.keys(batch["tokens_key"], shuffle=False)
        return self._named(ii=image.get("intra"), cc=text.get("intra"), ic=text.get("inter"), ci=image.get("inter"))

    def _named(self, **embeddings: Tensor | None) -> dict[str, Tensor]:
        return {name: value for name, value in embeddings.items() if value is not None}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # The order is the algorithm's (specification 6): keys by the average of the query parameters before this step's
        # update, losses against the queues before this step's keys.
        queries = self.queries(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            for tower in (self.image, self.text):
                if tower is not None:
                    tower.update(self.hparams["momentum"])
        keys = self.keys(batch)
        tags = batch["tags"] if self.hparams["weight_tag"] > 0 else None
        terms = self.objective(queries, keys, batch["image_id"], tags)
        self.to_enqueue.append((keys, batch["image_id"], tags))
        size = len(batch["image_id"])
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=size)
        return terms["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Not before: all parts of an accumulated batch meet the same queues.
        for written in self.to_enqueue:
            self.objective.enqueue(*written)
        self.to_enqueue.clear()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.text is not None:
            nn.utils.clip_grad_norm_(self.text.query.parameters(), self.hparams["text_clip_norm"])

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        epochs = int(self.trainer.max_epochs or 0)
        if epochs < 1:
            raise ValueError(
                "trainer.max_epochs must be at least 1: the learning rate falls along a cosine over all epochs"
            )
        per_epoch = max(int(self.trainer.estimated_stepping_batches) // epochs, 1)
        cosine = cosine_by_epoch(epochs, per_epoch)

        def schedule(warmup_epochs: float) -> Callable[[int], float]:
            return lambda step: cosine(step) * min(1.0, (step + 1) / max(warmup_epochs * per_epoch, 1.0))

        parts: list[torch.optim.Optimizer] = [
            torch.optim.SGD(
                self.image.query.parameters(), h.image_learning_rate, h.image_momentum,
                weight_decay=h.image_weight_decay, **fused(self),
            )
        ]  # fmt: skip
        schedules = [schedule(h.image_warmup_epochs)]
        if self.text is not None:
            # One-dimensional are biases and normalisations.
            decayed = [p for p in self.text.query.parameters() if p.ndim > 1]
            others = [p for p in self.text.query.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": h.text_weight_decay}, {"params": others, "weight_decay": 0.0}]
            parts.append(torch.optim.AdamW(groups, h.text_learning_rate, **fused(self)))
            schedules += [schedule(h.text_warmup_epochs)] * 2
        optimizer = CombinedOptimizer(parts)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    @property
    def data(self) -> PretrainingData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if stage == "fit" and str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {self.trainer.precision} rounds the small steps of the momentum averages to "
                "nothing, so that the keys never move: use bf16-mixed"
            )
        if self.hparams["weight_tag"] > 0 and not len(self.data.tag_names):
            raise ValueError(
                "model.weight_tag is not 0, but the data set has no tags: put instances_*.json beside its captions, or "
                "set model.weight_tag to 0"
            )
        if self.hparams["weight_tag"] > 0 and len(self.data.tag_names) != self.hparams["tag_count"]:
            raise ValueError(
                f"model.tag_count is {self.hparams['tag_count']}, the data set has {len(self.data.tag_names)} tags; "
                "set model.tag_count to that number"
            )
        if self.text is not None and getattr(self.data, "tokenizer", self.text) is None:
            raise ValueError("data.tokenizer is null, but weight_cc or weight_cross reads captions: give it a class")
        text_encoder = getattr(getattr(self.text, "query", None), "backbone", None)
        if isinstance(text_encoder, BertEncoder) and stage == "fit" and self.trainer.ckpt_path is None:
            text_encoder.require_weights()
        size = getattr(text_encoder, "vocabulary_size", None)
        if size is not None and self.data.vocabulary_size > size:
            raise ValueError(
                f"the tokenizer has {self.data.vocabulary_size} pieces, model.text_encoder {size} embeddings; raise "
                "model.text_encoder.vocabulary_size"
            )
        # DDP would broadcast every buffer at every step: 0.6 GB of queues that are equal already.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers() if name.startswith("objective.")]
        )

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:
            self.objective.initialise()
        alone_on_gpu = self.trainer.world_size == 1 and self.trainer.strategy.root_device.type == "cuda"
        if alone_on_gpu and self.hparams["key_bn_groups"] == 1:
            # A single device has no others to exchange keys with (specification 6).
            rank_zero_warn(
                "model.key_bn_groups is 1 on a single GPU: batch normalisation sees the same samples in queries "
                "and keys, which can be told by it; the loss falls and the features are poor. Set "
                "model.key_bn_groups to 4"
            )

    def check_replicas(self) -> None:
        """Raise when the queues of two ranks differ."""
        self.objective.check_replicas()

    # -- what is measured after training -------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._images = RowsOncePerSample("feature", "embedding")
        self._captions = RowsOncePerSample("embedding", "image", "text")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            feature = self.image.query.features(batch["image"])
            embeddings = self.image.query.project(feature)
            self._images.update(batch["index"], feature=feature.float(), embedding=list(embeddings.values())[-1])
        elif self.text is not None:
            embeddings = self.text.query(batch["tokens"])
            self._captions.update(
                batch["index"], embedding=list(embeddings.values())[-1], image=batch["image_index"],
                text=text_numbers(batch["tokens"], batch["lengths"]),
            )  # fmt: skip

    def on_test_epoch_end(self) -> None:
        data, media = self.data, Path(self.trainer.default_root_dir) / "media"
        index, images = self._images.compute(self.device)
        rows = index.cpu().numpy()
        tags = torch.from_numpy(data.held_out_annotations.tags[rows]).to(self.device)
        metrics = {
            "neighbours_with_a_tag": monitoring.tagged_neighbours(images["feature"], tags),
            "uniformity": monitoring.uniformity(images["embedding"]),
        }
        if self.trainer.is_global_zero:
            names = [data.tag_names[row.argmax()] if row.any() else "no tag" for row in tags.cpu().numpy()]
            monitoring.draw_map(self, images["feature"], names, media / "map.png", self.hparams["seed"])
        if self.text is not None and self.hparams["weight_cross"] > 0:
            position, captions = self._captions.compute(self.device)
            row, known = owner_rows(index, captions["image"])
            caption, words = captions["embedding"][known], captions["text"][known]
            metrics |= caption_retrieval(images["embedding"], caption, row)
            same_words = caption_retrieval(images["embedding"], caption, row, equal_text=words)
            metrics |= {f"{name}_equal_text": value for name, value in same_words.items()}
            metrics["t2i_chance_medr"] = torch.tensor(len(index) / 2)
            if self.trainer.is_global_zero:
                text = [data.held_out_captions.text[place] for place in position[known].tolist()]
                monitoring.draw_retrieval(
                    self, images["embedding"], caption, row, lambda i: data.held_out_images.preview(int(rows[i])),
                    text, media, data.credit,
                )  # fmt: skip
        self.log_dict({f"test/{name}": value.to(self.device, torch.float32) for name, value in metrics.items()})
