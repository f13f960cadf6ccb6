"""M3P as LightningModules: the paper's algorithm, readable top to bottom.

Pre-training (`M3PPretraining`) lets several tasks on three streams share every update. Fine-tuning (`M3PRetrieval`)
goes on with the match of image and caption alone, in one language, or in several. What the miniature begins with, as it
has no XLM-R to start from, comes last (`WarmStart`). All are tested by searching captions by images and images by
captions, in every language.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from common.training.optimisers import clip_by_norm, fused, warm_up_then_inverse_sqrt
from papers.m3p import monitoring
from papers.m3p.data import RegionTextData
from papers.m3p.evaluation import RetrievalTest
from papers.m3p.loss import WeightSchedule, embedding_contrast, relation_terms, text_terms, with_places
from papers.m3p.model import M3PModel
from papers.m3p.weights import load_into_model

Batch = dict[str, Any]
Weight = float | str


def adam(module: pl.LightningModule, learning_rate: float, warmup_steps: int) -> Any:
    """Adam with XLM's settings: a linear warm-up from 1e-7, then the inverse square root of the step.

    Source: specification 7.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, **fused(module))
    factor = warm_up_then_inverse_sqrt(warmup_steps, min(1e-7 / learning_rate, 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RegionTextModule(pl.LightningModule):
    """What the modules share: what they start from, their optimiser, and the test by searching.

    Args:
        model: encoder and heads.
        test: of the retrieval.
    """

    def __init__(self, model: M3PModel, test: RetrievalTest) -> None:
        super().__init__()
        self.model = model
        self.test = test

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        return adam(self, self.hparams["learning_rate"], self.hparams["warmup_steps"])

    configure_gradient_clipping = clip_by_norm

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    @property
    def data(self) -> RegionTextData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        data, encoder = self.data, self.model.encoder
        for name, found, size in (
            ("vocabulary_size", data.vocabulary_size, encoder.vocabulary_size),
            ("languages", len(data.languages), encoder.languages),
            ("positions", data.max_regions + data.tokenizer.max_tokens, encoder.positions),
        ):
            if found > size:
                raise ValueError(f"the data has {found} for model.model.encoder.{name}, which is {size}; raise it")
        if data.feature_dim != encoder.feature_dim:
            raise ValueError(
                f"region features have {data.feature_dim} dimensions, model.model.encoder.feature_dim is "
                f"{encoder.feature_dim}: give it that number"
            )
        if encoder.joint_language_embedding:
            data.check_languages(encoder.languages)
        path = self.hparams["pretrained"]
        if path is not None and self.trainer.ckpt_path is None:
            self.take_over(path)

    def take_over(self, path: str) -> None:
        """Load the weights that training starts from.

        Raises:
            CheckpointError: the file is missing, damaged or of other sizes.
        """
        left = load_into_model(self.model, path, "model.pretrained", self.hparams.get("position_offset", 2))
        if left:
            rank_zero_info(f"{path}: {len(left)} tensors are not used: {', '.join(left)}")

    # -- what is measured after training -------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.test.reset(self)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test.update(self.model, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test.compute(self.model).items()})
        if not self.test.by_means:
            monitoring.draw(self, self.test)


class M3PPretraining(RegionTextModule):
    """Multitask multilingual multimodal pre-training (specification 6).

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
        pretrained: checkpoint or folder of XLM-R, or checkpoint of another stage; None starts from random weights.
        position_offset: see `load_into_model`.
        learning_rate, warmup_steps: see `adam`.
        tokens_per_batch, captions_per_image: of the test, see `RetrievalTest`.

    Raises:
        ValueError: a weight is no schedule, no task is on, or the temperature is not positive.
    """

    def __init__(
        self,
        model: M3PModel,
        weight_xmlm: Weight = 1.0,
        weight_mlm: Weight = 1.0,
        weight_mrm_class: Weight = 1.0,
        weight_mrm_regression: Weight = 1.0,
        weight_t2i: Weight = 1.0,
        weight_i2t: Weight = 1.0,
        vlm_ce_weight: float = 1.0,
        vlm_bce_weight: float = 1.0,
        soft_classes: bool = False,
        alignment_weight: float = 0.0,
        itm_weight: float = 0.0,
        contrast_weight: float = 0.0,
        contrast_temperature: float = 0.1,
        pretrained: str | None = None,
        position_offset: int = 2,
        learning_rate: float = 1e-4,
        warmup_steps: int = 4000,
        tokens_per_batch: int = 65536,
        captions_per_image: int | None = 5,
    ) -> None:
        super().__init__(model, RetrievalTest(tokens_per_batch, captions_per_image))
        self.save_hyperparameters(ignore=["model"], logger=False)
        if contrast_temperature <= 0:
            raise ValueError(f"model.contrast_temperature is {contrast_temperature}: it must be positive")
        self.weights = {
            name: WeightSchedule(self.hparams[f"weight_{name}"], f"model.weight_{name}")
            for name in ("xmlm", "mlm", "mrm_class", "mrm_regression", "t2i", "i2t")
        }
        if not any(weight.ever for weight in self.weights.values()):
            raise ValueError("model: no task is on, one of the weights must not be 0")
        # What no task trains must not wait for a gradient on another process.
        words = self._on("xmlm") or self._on("mlm")
        regions = self._on("mrm_class") or self._on("mrm_regression")
        matched = self._on("t2i") or self._on("i2t") or itm_weight > 0
        for part, trained in (
            (model.encoder.language, self._on("xmlm") or model.encoder.joint_language_embedding),
            (model.vocabulary, words), (model.regions, regions), (model.match, matched),
        ):  # fmt: skip
            part.requires_grad_(trained)

    # -- training ------------------------------------------------------------------------------------------------------

    def _on(self, task: str) -> bool:
        return self.weights[task].ever

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return with_places(batch) if self.trainer.training else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        h: Any = self.hparams
        iteration = self.trainer.fit_loop.total_batch_idx
        weight = {name: schedule(iteration) for name, schedule in self.weights.items()}
        weight |= {"alignment": h.alignment_weight, "itm": h.itm_weight, "contrast": h.contrast_weight}
        losses: list[Tensor] = []
        seen: dict[str, list[Tensor]] = {}

        def add(terms: dict[str, Tensor], matching: float = 0.0) -> None:
            of = weight | {"vlm_ce": matching * h.vlm_ce_weight, "vlm_bce": matching * h.vlm_bce_weight}
            for name, value in terms.items():
                seen.setdefault(name, []).append(value.detach())
                if name in of:
                    losses.append(of[name] * value)

        if self._on("xmlm"):
            for block in batch["xmlm"]:
                add(text_terms(self.model, block))
        for relation in batch["relations"]:
            for kind, group in relation.items():
                terms = relation_terms(
                    self.model, group, kind, words=self._on("mlm"),
                    regions=self._on("mrm_class") or self._on("mrm_regression"), soft_classes=h.soft_classes,
                    alignment=h.alignment_weight > 0 or h.itm_weight > 0,
                    contrast_temperature=h.contrast_temperature if h.contrast_weight > 0 else None,
                )  # fmt: skip
                # All pairs of a batch are both directions at once.
                both = (weight["t2i"] + weight["i2t"]) / 2
                add(terms, weight.get(kind, both))
        loss = torch.stack(losses).sum()
        means = {name: torch.stack(values).mean() for name, values in seen.items()}
        logs = {"train/loss": loss.detach(), **{f"train/{name}": value for name, value in means.items()}}
        self.log_dict(logs, batch_size=self.data.batch_size)
        return loss


class M3PRetrieval(RegionTextModule):
    """Fine-tuning for retrieval, and the test of it (specification 9 and 10).

    Which languages' captions are trained on is the data module's matter: English, each on its own, or all.

    Args:
        model: encoder and heads; those that predict words and regions are kept as they are.
        pretrained: checkpoint of pre-training, or of the released code; None starts from random weights.
        vlm_ce_weight, vlm_bce_weight: of the softmax over the candidates and of a yes or no for each.
        learning_rate, warmup_steps: see `adam`.
        tokens_per_batch, captions_per_image: of the test, see `RetrievalTest`.
    """

    def __init__(
        self,
        model: M3PModel,
        pretrained: str | None = None,
        vlm_ce_weight: float = 0.0,
        vlm_bce_weight: float = 1.0,
        learning_rate: float = 5e-5,
        warmup_steps: int = 4000,
        tokens_per_batch: int = 65536,
        captions_per_image: int | None = 5,
    ) -> None:
        super().__init__(model, RetrievalTest(tokens_per_batch, captions_per_image))
        self.save_hyperparameters(ignore=["model"], logger=False)
        for part in (model.vocabulary, model.regions):
            part.requires_grad_(False)
        model.encoder.language.requires_grad_(model.encoder.joint_language_embedding)

    # -- training ------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return with_places(batch) if "relations" in batch else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        h: Any = self.hparams
        found = [
            relation_terms(self.model, group, kind, words=False, regions=False)
            for relation in batch["relations"]
            for kind, group in relation.items()
        ]
        loss = torch.stack([h.vlm_ce_weight * one["vlm_ce"] + h.vlm_bce_weight * one["vlm_bce"] for one in found]).sum()
        accuracy = torch.stack([one["accuracy"] for one in found]).mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, batch_size=self.data.batch_size)
        return loss


class WarmStart(RegionTextModule):
    """What the miniature begins with in place of XLM-R: word and region embeddings that know of each other.

    The mean of a caption's word embeddings is compared with the mean of the image's region embeddings, by contrast in
    the batch. From random weights the encoder stays for long where all candidates look alike (specification 13.2).

    Args:
        model: only the tables of words and regions of its encoder are trained.
        temperature: of the contrast.
        pretrained: checkpoint of another stage; None starts from random weights.
        learning_rate, warmup_steps: see `adam`.
        captions_per_image: of the test, see `RetrievalTest`.

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(
        self,
        model: M3PModel,
        temperature: float = 0.1,
        pretrained: str | None = None,
        learning_rate: float = 1e-3,
        warmup_steps: int = 10,
        captions_per_image: int | None = 5,
    ) -> None:
        super().__init__(model.requires_grad_(False), RetrievalTest(1, captions_per_image, by_means=True))
        self.save_hyperparameters(ignore=["model"], logger=False)
        if temperature <= 0:
            raise ValueError(f"model.temperature is {temperature}: it must be positive")
        model.encoder.token.requires_grad_(True)
        model.encoder.region.requires_grad_(True)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = []
        for relation in batch["relations"]:
            for group in relation.values():
                found.append(embedding_contrast(self.model, group, self.hparams["temperature"]))
        loss, accuracy = (torch.stack(values).mean() for values in zip(*found))
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, batch_size=self.data.batch_size)
        return loss
