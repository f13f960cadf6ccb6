"""M3P as a LightningModule: multitask training on three streams.

Fine-tuning takes the same steps as pre-training, but with only the matching loss, in one language or several. The test
retrieves captions for images and images for captions in every language.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from common.memory.collective import OverlappedAverage, average_in_place
from common.training.optimizers import clip_by_norm, fused, warm_up_then_inverse_sqrt
from common.training.selection import BestWeights
from common.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from papers.m3p import monitoring
from papers.m3p.data import RegionTextData, check_sizes
from papers.m3p.encoder import M3P
from papers.m3p.loss import pair_terms, text_terms
from papers.m3p.pairs import InBatch
from papers.m3p.search import RetrievalTest
from papers.m3p.weights import load_into_model

#: Losses for matching images and captions.
MATCH = ("vlm_ce", "vlm_bce")


class M3PModule(pl.LightningModule):
    """Multitask multilingual multimodal training ([6] and [9]).

    A training batch is one iteration: some steps on text in sampled languages, and some on groups of images and
    captions. Tasks with weight 0 aren't computed.

    `updates` has two modes. `per_group` runs the backward pass after every group of losses. In every `accumulate`-th
    iteration, starting with the first, it updates after each group. The first of these updates also uses the gradients
    summed since the previous update. `per_cycle` sums the losses of an iteration, averages them over `accumulate`
    iterations, and then updates once. Steps, checkpoints and the learning rate schedule count updates.

    Args:
        weight_xmlm, weight_mlm: weights of the losses of masked words in text alone, and in captions.
        weight_mrm_class, weight_mrm_regression: weights of the losses of masked regions' classes and features.
        weight_t2i, weight_i2t: weights of matching, by choosing an image for a caption and a caption for an image.
        vlm_ce_weight, vlm_bce_weight: weights, within matching, of the softmax over candidates and of the binary loss.
        soft_classes, alignment_weight, itm_weight, contrast_weight, contrast_temperature: see `pair_terms`; not in the
            paper.
        pretrained, position_offset: see `load_into_model`; None means random weights.
        learning_rate, warmup_steps: see `adam`; warm-up counts updates.
        selection: weights to test and to keep in the last checkpoint: `best` by `validate`, or `last`.
        select_every: iterations between two validations.
        tokens_per_batch, captions_per_image: see `RetrievalTest`.

    Source: [6.3] for the updates.
    """

    def __init__(
        self,
        model: M3P,
        weight_xmlm: NonNegativeFloat = 1.0,
        weight_mlm: NonNegativeFloat = 1.0,
        weight_mrm_class: NonNegativeFloat = 1.0,
        weight_mrm_regression: NonNegativeFloat = 1.0,
        weight_t2i: NonNegativeFloat = 1.0,
        weight_i2t: NonNegativeFloat = 1.0,
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
        warmup_steps: PositiveInt = 4000,
        updates: Literal["per_group", "per_cycle"] = "per_group",
        accumulate: PositiveInt = 4,
        clip_norm: PositiveFloat | None = 5.0,
        selection: Literal["best", "last"] = "last",
        select_every: PositiveInt = 3125,
        tokens_per_batch: PositiveInt = 65536,
        captions_per_image: PositiveInt | None = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"], logger=False)
        self.automatic_optimization = False
        self.model = model
        self.best = BestWeights(model, "accuracy", "iteration") if selection == "best" else None
        self.selected_by = "last" if self.best is None else "best on validation"
        self.groups = 1
        self.held: dict[str, Tensor] = {}
        self.averages = OverlappedAverage()
        self.test = RetrievalTest(tokens_per_batch, captions_per_image)
        self.weights = {
            "xmlm": weight_xmlm,
            "mlm": weight_mlm,
            "mrm_class": weight_mrm_class,
            "mrm_regression": weight_mrm_regression,
            "t2i": weight_t2i,
            "i2t": weight_i2t,
            "in_batch": (weight_t2i + weight_i2t) / 2,  # all pairs of a batch include both directions
            "vlm_ce": vlm_ce_weight,
            "vlm_bce": vlm_bce_weight,
            "alignment": alignment_weight,
            "itm": itm_weight,
            "contrast": contrast_weight,
        }
        # Freeze parameters that no task trains, because processes would wait for their gradients.
        model.encoder.language.requires_grad_(weight_xmlm > 0)
        model.vocabulary_head.requires_grad_(weight_xmlm + weight_mlm > 0)
        model.region_heads.requires_grad_(weight_mrm_class + weight_mrm_regression > 0)
        model.match_head.requires_grad_(weight_t2i + weight_i2t + itm_weight > 0)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        h: Any = self.hparams
        iteration = self.trainer.fit_loop.total_batch_idx
        weights = self.weights
        losses: list[Tensor] = []
        logs: dict[str, list[Tensor]] = {}
        self.groups = 0
        for kind, terms in self.terms_of(batch):
            self.groups += 1
            for name, value in terms.items():
                logs.setdefault(f"train/{name}", []).append(value.detach())
            # Match losses are also multiplied by the weight of their direction.
            factors = {
                name: weights[name] * (weights[kind] if name in MATCH else 1.0) for name in terms if name in weights
            }
            weighted = [factor * terms[name] for name, factor in factors.items()]
            if h.updates == "per_group" and any(factors.values()):
                self.learn(torch.stack(weighted).sum(), kind, updates=iteration % h.accumulate == 0)
            losses += weighted if h.updates == "per_cycle" else [value.detach() for value in weighted]
        loss = torch.stack(losses).sum()
        if h.updates == "per_cycle":
            self.learn(loss / h.accumulate, "cycle", updates=(iteration + 1) % h.accumulate == 0)
        means = {name: torch.stack(values).mean() for name, values in logs.items()}
        self.log_dict({"train/loss": loss.detach(), **means}, batch_size=self.data.batch_size)
        return loss.detach()

    def terms_of(self, batch: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the kind and the losses of each group in an iteration: first text blocks, then groups of pairs."""
        for block in batch["xmlm"] if self.weights["xmlm"] > 0 else []:
            yield "xmlm", text_terms(self.model, block)
        h: Any = self.hparams
        for relation in batch["relations"]:
            for kind, group in relation.items():
                yield kind, pair_terms(self.model, group, self.weights, h.soft_classes, h.contrast_temperature)

    def configure_optimizers(self) -> Any:
        return adam(self, self.hparams["learning_rate"], self.hparams["warmup_steps"])

    # -- updates -------------------------------------------------------------------------------------------------------

    def learn(self, loss: Tensor, kind: str, updates: bool) -> None:
        """Add the gradients of a loss. With `updates`, average them over processes and update."""
        with torch.autocast(self.device.type, enabled=False):  # keeps the backward pass of losses in float32
            if not updates:
                loss.backward()
                return
            optimizer: Any = self.optimizers()
            learning = [p for p in self.parameters() if p.requires_grad]
            with self.averages.of(learning, kind):
                loss.backward()
                for parameter in learning:
                    # As in the released code, a parameter unused since the last update still moves by its momentum.
                    if parameter.grad is None and parameter in optimizer.state:
                        parameter.grad = torch.zeros_like(parameter)
        self.update()

    def update(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        clip_by_norm(self, optimizer, self.hparams["clip_norm"])

    @property
    def batches_per_update(self) -> float:
        """Average number of iterations per update. Known after one iteration, which counts the groups."""
        h: Any = self.hparams
        return h.accumulate / (self.groups if h.updates == "per_group" else 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the gradients since the last update, averaged over the processes."""
        gathered = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        average_in_place(list(gathered.values()))
        checkpoint["gathered"] = gathered
        if self.best is not None:
            checkpoint["selection"] = self.best.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.held = checkpoint.get("gathered", {})
        if self.best is not None and "selection" in checkpoint:
            self.best.load(checkpoint["selection"])

    def on_train_start(self) -> None:
        for name, parameter in self.named_parameters():
            if name in self.held:
                parameter.grad = self.held[name].to(parameter)
        self.held = {}

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        iteration = self.trainer.fit_loop.total_batch_idx
        if self.best is not None and iteration % self.hparams["select_every"] == 0:
            self.best.compare(self, self.validate, iteration, iteration)

    def on_train_end(self) -> None:
        self.zero_grad()  # drop gradients since the last update; the released code doesn't use them either
        if self.best is not None:
            iterations = self.trainer.fit_loop.total_batch_idx + 1
            self.best.compare(self, self.validate, iterations, iterations, at_end=True)
            self.best.restore()

    def validate(self) -> dict[str, float]:
        """Return the percentage of validation groups whose true pair scores highest, equal on all processes.

        Source: [10].
        """
        strategy, hits, count = self.trainer.strategy, 0.0, 0.0
        precision = strategy.precision_plugin
        with precision.forward_context():
            for batch in self.data.validation_loader():
                (relation,) = strategy.batch_to_device(precision.convert_input(batch))["relations"]
                groups = len(batch["index"])
                for group in relation.values():
                    hits += float(pair_terms(self.model, group, {})["accuracy"]) * groups
                    count += groups
        hits, count = strategy.reduce(torch.tensor([hits, count], device=self.device), reduce_op="sum").tolist()
        return {"accuracy": 100 * hits / count}

    # -- start ---------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> RegionTextData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        check_sizes(self.model.encoder, self.data)
        if stage == "fit" and str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16 needs scaled losses, which several updates per step do not have: use bf16-mixed"
            )
        if stage == "fit" and self.hparams["soft_classes"] and not self.data.distributions:
            raise ValueError("model.soft_classes needs the detector's distributions: set data.distributions to true")
        if stage == "fit" and self.weights["contrast"] > 0 and not isinstance(self.data.candidates, InBatch):
            raise ValueError("model.contrast_weight compares the pairs of a batch: set data.vlm_candidates to in_batch")
        if stage == "fit" and self.best is not None:
            self.data.validation_loader()  # the record names the split even if a resumed run doesn't validate again
        if self.hparams["pretrained"] is not None and self.trainer.ckpt_path is None:
            start_from(self.hparams["pretrained"], self.model, self.hparams["position_offset"])

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Raise an error for a class that the model lacks. On an accelerator, the lookup aborts without a message."""
        count = self.model.region_heads.classifier.out_features
        for group in (group for relation in batch.get("relations", []) for group in relation.values()):
            if "region_classes" in group and (group["region_classes"] >= count).any():
                raise ValueError(
                    f"a region is of class {int(group['region_classes'].max())} and model.model.region_classes is "
                    f"{count}: give it the number of the detector's classes, plus one for the background"
                )
        return batch

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.test.reset(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test.update(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        selected = self.best.metrics() if self.best is not None else {}
        metrics: dict[str, Any] = {**self.test.compute(), **selected}
        self.log_dict({f"test/{name}": value for name, value in metrics.items()})
        monitoring.draw(self, self.test)


def adam(module: pl.LightningModule, learning_rate: float, warmup_steps: int) -> Any:
    """Return Adam and a schedule with XLM's settings: linear warm-up from 1e-7, then inverse square root decay.

    Source: [7].
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, **fused(module))
    factor = warm_up_then_inverse_sqrt(warmup_steps, min(1e-7 / learning_rate, 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def start_from(path: str, model: M3P, position_offset: int = 2) -> None:
    left = load_into_model(model, path, "model.pretrained", position_offset)
    if left:
        parts = sorted({name.removeprefix("module.").partition(".")[0] for name in left})
        rank_zero_only(print)(f"  {path}: not used: {', '.join(parts)}", flush=True)
