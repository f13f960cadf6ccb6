"""M3P as a LightningModule: several tasks on three streams share every update.

Pre-training and fine-tuning are the same step: fine-tuning leaves the match of image and caption alone on, in one
language or in several. Both are tested by searching captions by images and images by captions, in every language.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from common.training.optimizers import clip_by_norm, fused, warm_up_then_inverse_sqrt
from common.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from papers.m3p import monitoring
from papers.m3p.data import RegionTextData, check_sizes
from papers.m3p.evaluation import RetrievalTest
from papers.m3p.loss import WeightSchedule, relation_terms, text_terms, with_places
from papers.m3p.model import M3P
from papers.m3p.weights import load_into_model

Batch = dict[str, Any]
Weight = float | str


class M3PModule(pl.LightningModule):
    """Multitask multilingual multimodal training ([6] and [9]).

    Every training batch is one iteration: some steps on text of sampled languages and some on groups of images and
    captions. Their losses are summed, and one update follows. A weight may be a number or a schedule over iterations,
    such as "0:1,1000:0"; a task whose weight is always 0 is not computed.

    Args:
        model: encoder and heads.
        weight_xmlm: of masked words of text alone.
        weight_mlm: of masked words of captions.
        weight_mrm_class, weight_mrm_regression: of the classes and the features of masked regions.
        weight_t2i, weight_i2t: of the match, searching images by a caption and captions by an image.
        vlm_ce_weight, vlm_bce_weight: within these, of the softmax over the candidates and of a yes or no for each.
        soft_classes: the target of a region's class is the detector's distribution, by KL, and not its best class.
        alignment_weight: of the optimal transport between words and regions; not of the paper.
        itm_weight: of two-way matching of one true and one false pair; not of the paper.
        contrast_weight, contrast_temperature: of a contrast of mean word and region embeddings, beside pairs of a whole
            batch; not of the paper.
        pretrained: checkpoint or folder of XLM-R, or checkpoint of another stage or of the released code; None starts
            from random weights.
        position_offset: see `load_into_model`.
        learning_rate, warmup_steps: see `adam`.
        tokens_per_batch, captions_per_image: of the test, see `RetrievalTest`.

    Raises:
        ValueError: a weight is no schedule, no task is on, or the temperature is not positive.
    """

    def __init__(
        self,
        model: M3P,
        weight_xmlm: Weight = 1.0,
        weight_mlm: Weight = 1.0,
        weight_mrm_class: Weight = 1.0,
        weight_mrm_regression: Weight = 1.0,
        weight_t2i: Weight = 1.0,
        weight_i2t: Weight = 1.0,
        vlm_ce_weight: NonNegativeFloat = 1.0,
        vlm_bce_weight: NonNegativeFloat = 1.0,
        soft_classes: bool = False,
        alignment_weight: NonNegativeFloat = 0.0,
        itm_weight: NonNegativeFloat = 0.0,
        contrast_weight: NonNegativeFloat = 0.0,
        contrast_temperature: PositiveFloat = 0.1,
        pretrained: str | None = None,
        position_offset: NonNegativeInt = 2,
        learning_rate: PositiveFloat = 1e-4,
        warmup_steps: NonNegativeInt = 4000,
        tokens_per_batch: PositiveInt = 65536,
        captions_per_image: PositiveInt | None = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"], logger=False)
        if contrast_temperature <= 0:
            raise ValueError(f"model.contrast_temperature is {contrast_temperature}: it must be positive")
        self.model = model
        self.test = RetrievalTest(tokens_per_batch, captions_per_image)
        self.schedules = {
            name: WeightSchedule(self.hparams[f"weight_{name}"], f"model.weight_{name}")
            for name in ("xmlm", "mlm", "mrm_class", "mrm_regression", "t2i", "i2t")
        }
        self.on = {name for name, schedule in self.schedules.items() if schedule.ever}
        if not self.on:
            raise ValueError("model: no task is on, one of the weights must not be 0")
        # What no task trains must not wait for a gradient on another process.
        joint = model.encoder.joint_language_embedding
        model.encoder.language.requires_grad_("xmlm" in self.on or joint)
        model.vocabulary_head.requires_grad_(bool(self.on & {"xmlm", "mlm"}))
        model.region_heads.requires_grad_(bool(self.on & {"mrm_class", "mrm_regression"}))
        model.match_head.requires_grad_(bool(self.on & {"t2i", "i2t"}) or itm_weight > 0)

    # -- training ------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return with_places(batch) if self.trainer.training else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = self.weights_at(self.trainer.fit_loop.total_batch_idx)
        blocks = batch["xmlm"] if "xmlm" in self.on else []
        groups = [(kind, group) for relation in batch["relations"] for kind, group in relation.items()]
        read = [("xmlm", text_terms(self.model, block)) for block in blocks]
        read += [(kind, self.relation_terms(kind, group)) for kind, group in groups]
        losses: list[Tensor] = []
        logs: dict[str, list[Tensor]] = {}
        for kind, terms in read:
            for name, value in terms.items():
                logs.setdefault(f"train/{name}", []).append(value.detach())
                if name in ("vlm_ce", "vlm_bce"):  # weighted within the direction
                    losses.append(weights[kind] * weights[name] * value)
                elif name in weights:
                    losses.append(weights[name] * value)
        loss = torch.stack(losses).sum()
        means = {name: torch.stack(values).mean() for name, values in logs.items()}
        self.log_dict({"train/loss": loss.detach(), **means}, batch_size=self.data.batch_size)
        return loss

    def weights_at(self, iteration: int) -> dict[str, float]:
        """Weight of every term and of every kind of group."""
        h: Any = self.hparams
        weights = {name: schedule(iteration) for name, schedule in self.schedules.items()}
        return weights | {
            "in_batch": (weights["t2i"] + weights["i2t"]) / 2,  # all pairs of a batch are both directions at once
            "vlm_ce": h.vlm_ce_weight,
            "vlm_bce": h.vlm_bce_weight,
            "alignment": h.alignment_weight,
            "itm": h.itm_weight,
            "contrast": h.contrast_weight,
        }

    def relation_terms(self, kind: str, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a group of pairs that are on."""
        h: Any = self.hparams
        return relation_terms(
            self.model,
            group,
            kind,
            words="mlm" in self.on,
            regions=bool(self.on & {"mrm_class", "mrm_regression"}),
            soft_classes=h.soft_classes,
            alignment=h.alignment_weight > 0 or h.itm_weight > 0,
            contrast_temperature=h.contrast_temperature if h.contrast_weight > 0 else None,
        )

    def configure_optimizers(self) -> Any:
        return adam(self, self.hparams["learning_rate"], self.hparams["warmup_steps"])

    configure_gradient_clipping = clip_by_norm

    # -- start ---------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> RegionTextData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        check_sizes(self.model.encoder, self.data)
        if self.hparams["pretrained"] is not None and self.trainer.ckpt_path is None:
            start_from(self.hparams["pretrained"], self.model, self.hparams["position_offset"])

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.test.reset(self)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test.update(self.model, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test.compute(self.model).items()})
        monitoring.draw(self, self.test)


def adam(module: pl.LightningModule, learning_rate: float, warmup_steps: int) -> Any:
    """Adam with XLM's settings: a linear warm-up from 1e-7, then the inverse square root of the step.

    Source: [7].
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, **fused(module))
    factor = warm_up_then_inverse_sqrt(warmup_steps, min(1e-7 / learning_rate, 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def start_from(path: str, model: M3P, position_offset: int = 2) -> None:
    """Load the weights that training starts from; see `load_into_model`."""
    left = load_into_model(model, path, "model.pretrained", position_offset)
    if left:
        rank_zero_info(f"{path}: {len(left)} tensors are not used: {', '.join(left)}")
