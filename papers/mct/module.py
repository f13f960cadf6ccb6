"""MCT as a LightningModule: the paper's algorithm, readable from top to bottom.

Momentum encoders compute the keys, and queues store them. The enabled losses define the method: MoCo v2 uses only the
image loss, MCT uses all losses but the tag loss, and MCT (with tag) uses all losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.data.text import text_numbers
from common.encoders.text import BertEncoder
from common.memory.momentum import update_average
from common.metrics.gathering import RowsOncePerSample
from common.metrics.retrieval import caption_retrieval, owner_rows
from common.protocols.captions import check_vocabulary
from common.training.optimizers import (
    CombinedOptimizer,
    cosine_by_epoch,
    fused,
    refuse_clip_value,
    refuse_half_weights,
)
from common.types import Fraction, Momentum, NonNegativeFloat, PositiveFloat
from papers.mct import monitoring
from papers.mct.data import PretrainingData
from papers.mct.loss import MultimodalContrast
from papers.mct.networks import MCT, Heads, Tower, encode_keys


class MCTModule(pl.LightningModule):
    """Trains image and text encoders with MCT, multimodal contrastive training ([1] to [6]).

    Args:
        image_encoder: backbone with a `feature_dim`; evaluations use this part.
        loss: defines the contrasts and the embedding widths. Heads and towers without a contrast aren't built.
        momentum: weight of the old parameter when a query parameter updates a momentum encoder.
        image_learning_rate, image_momentum, image_weight_decay: SGD of the image tower.
        text_learning_rate, text_weight_decay, text_clip_norm: AdamW of the text tower.
        image_warmup_epochs, text_warmup_epochs: linear warm-up; then MoCo v2's cosine decay, updated every epoch.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        loss: MultimodalContrast,
        text_encoder: nn.Module | None = None,
        heads: Heads = Heads(),  # noqa: B008 - frozen
        momentum: Fraction = 0.999,
        image_learning_rate: PositiveFloat = 0.03,
        image_momentum: Momentum = 0.9,
        image_weight_decay: NonNegativeFloat = 1e-4,
        text_learning_rate: PositiveFloat = 4e-5,
        text_weight_decay: NonNegativeFloat = 1e-2,
        text_clip_norm: PositiveFloat = 1.0,
        image_warmup_epochs: NonNegativeFloat = 0.0,
        text_warmup_epochs: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder", "loss", "heads"], logger=False)
        if not any(loss.widths("text").values()):
            text_encoder = None
        elif text_encoder is None:
            raise ValueError("model.text_encoder is null, but weight_cc or weight_cross is not 0; both need captions")
        self.model = MCT(
            Tower(image_encoder, **loss.widths("image"), heads=heads),
            None if text_encoder is None else Tower(text_encoder, **loss.widths("text"), heads=heads),
        )
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.loss = loss
        self.to_enqueue: list[tuple[dict[str, Tensor], Tensor, Tensor | None]] = []

    # -- training ------------------------------------------------------------------------------------------------------

    def queries(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the trained embeddings of one view of every image and caption, named by contrast."""
        embeddings = {"image": self.model.image(batch["image_query"])}
        if self.model.text is not None:
            embeddings["text"] = self.model.text(batch["tokens_query"])
        return {name: embeddings[query][head] for name, query, _, head in self.loss.contrasts()}

    @torch.no_grad()
    def keys(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the momentum embeddings of the other view of every image and caption, named by contrast."""
        embeddings = {"image": encode_keys(self.average.image, batch["image_key"])}
        if self.average.text is not None:
            embeddings["text"] = self.average.text(batch["tokens_key"])
        return {name: embeddings[key][head] for name, _, key, head in self.loss.contrasts()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # The order of [6]: first update the moving average, then the losses use the queues without this step's keys.
        queries = self.queries(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.update_average()
        keys = self.keys(batch)
        tags = batch["tags"] if self.loss.weights["tag"] else None
        terms = self.loss(queries, keys, batch["image_id"], tags)
        self.to_enqueue.append((keys, batch["image_id"], tags))
        size = len(batch["image_id"])
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=size)
        return terms["loss"]

    def update_average(self) -> None:
        # The momentum encoders' batch normalization keeps the statistics of their own batches.
        update_average(self.average.parameters(), self.model.parameters(), self.hparams["momentum"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Write keys only now, so that all parts of an accumulated batch use the same queues.
        for written in self.to_enqueue:
            self.loss.enqueue(*written)
        self.to_enqueue.clear()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.model.text is not None:
            nn.utils.clip_grad_norm_(self.model.text.parameters(), self.hparams["text_clip_norm"])

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        epochs = int(self.trainer.max_epochs or 0)
        if epochs < 1:
            raise ValueError("trainer.max_epochs must be at least 1: the learning rate decays over all epochs")
        steps = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(-(-steps // epochs), 1)  # max_steps may end within an epoch
        cosine = cosine_by_epoch(epochs, per_epoch)

        def schedule(warmup_epochs: float) -> Callable[[int], float]:
            return lambda step: cosine(step) * min(1.0, (step + 1) / max(warmup_epochs * per_epoch, 1.0))

        parts: list[torch.optim.Optimizer] = [
            torch.optim.SGD(
                self.model.image.parameters(), h.image_learning_rate, h.image_momentum,
                weight_decay=h.image_weight_decay, **fused(self),
            )
        ]  # fmt: skip
        schedules = [schedule(h.image_warmup_epochs)]
        if self.model.text is not None:
            # Biases and normalization weights are one-dimensional.
            decayed = [p for p in self.model.text.parameters() if p.ndim > 1]
            others = [p for p in self.model.text.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": h.text_weight_decay}, {"params": others, "weight_decay": 0.0}]
            parts.append(torch.optim.AdamW(groups, h.text_learning_rate, **fused(self)))
            schedules += [schedule(h.text_warmup_epochs)] * 2
        optimizer = CombinedOptimizer(parts)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- start and resume ----------------------------------------------------------------------------------------------

    @property
    def data(self) -> PretrainingData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            refuse_clip_value(self, "model.text_clip_norm" if self.model.text is not None else "nothing")
            refuse_half_weights(
                self, "the small steps of the momentum averages to nothing, so that the keys never move"
            )
        if self.loss.weights["tag"] and len(self.data.tag_names) != self.loss.tag_count:
            raise ValueError(
                f"model.loss.tag_count is {self.loss.tag_count}, the data set has {len(self.data.tag_names)} tags: set "
                "tag_count to that number, add instances_*.json to COCO's annotations, or set weight_tag to 0"
            )
        if self.model.text is not None:
            encoder = self.model.text.backbone
            if getattr(self.data, "tokenizer", encoder) is None:
                raise ValueError("data.tokenizer is null, but weight_cc or weight_cross needs captions: give a class")
            if isinstance(encoder, BertEncoder) and stage == "fit" and self.trainer.ckpt_path is None:
                encoder.require_weights()
            check_vocabulary(self, encoder)
        # DDP would broadcast all buffers at every step: 0.6 GB of queues that are already equal.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers() if name.startswith("loss.")]
        )

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:
            self.loss.synchronize()

    # -- evaluation after training -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._images = RowsOncePerSample("feature", "embedding")
        self._captions = RowsOncePerSample("embedding", "image", "text")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            feature = self.model.image.features(batch["image"])
            embeddings = self.model.image.project(feature)
            self._images.update(batch["index"], feature=feature.float(), embedding=list(embeddings.values())[-1])
        elif self.model.text is not None:
            embeddings = self.model.text(batch["tokens"])
            self._captions.update(
                batch["index"], embedding=list(embeddings.values())[-1], image=batch["image_index"],
                text=text_numbers(batch["tokens"], batch["lengths"]),
            )  # fmt: skip

    def on_test_epoch_end(self) -> None:
        data = self.data
        index, images = self._images.compute(self.device)
        rows = index.cpu().numpy()
        tags = torch.from_numpy(data.held_out_annotations.tags[rows]).to(self.device)
        metrics = {
            "neighbours_with_a_tag": monitoring.tagged_neighbors(images["feature"], tags),
            "uniformity": monitoring.uniformity(images["embedding"]),
        }
        if self.model.text is not None and "inter" in self.model.image.embeds:
            position, captions = self._captions.compute(self.device)
            row, readable = owner_rows(index, captions["image"])
            caption, words = captions["embedding"][readable], captions["text"][readable]
            metrics |= caption_retrieval(images["embedding"], caption, row)
            same_words = caption_retrieval(images["embedding"], caption, row, equal_text=words)
            metrics |= {f"{name}_equal_text": value for name, value in same_words.items()}
            metrics["t2i_chance_medr"] = torch.tensor(len(index) / 2)
            if self.trainer.is_global_zero:
                text = [data.held_out_captions.text[place] for place in position[readable].tolist()]
                monitoring.draw_retrieval(
                    self, images["embedding"], caption, row, lambda i: data.held_out_images.preview(int(rows[i])),
                    text, data.credit,
                )  # fmt: skip
        self.log_dict({f"test/{name}": value.to(self.device, torch.float32) for name, value in metrics.items()})
