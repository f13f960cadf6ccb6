"""VX2TEXT as a LightningModule: the paper's algorithm, readable from top to bottom.

A classifier names a few categories for each clip, which become word-like tokens. In training, Gumbel noise perturbs the
choice, and a relaxation passes the gradient. A text encoder-decoder reads these tokens with the words of speech,
history and question. The cross-entropy of the answer trains all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from common.metrics.captioning import Protocol
from common.metrics.gathering import OncePerSample
from common.protocols.text import GeneratedText, TextTest
from common.training.callbacks import batch_generator, own_rows
from common.training.optimizers import adamw, clip_by_norm
from common.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat
from papers.vx2text.data import VideoTextData
from papers.vx2text.fusion import VX2Text
from papers.vx2text.gumbel import gumbel_noise
from papers.vx2text.language_model import OptionClassifier
from papers.vx2text.loss import per_answer, text_loss
from papers.vx2text.monitoring import TokenWords
from papers.vx2text.weights import load_classifier, load_language_model

Batch = dict[str, Any]


class VX2TextModule(pl.LightningModule):
    """Trains and tests VX2TEXT ([6] to [8]).

    Args:
        auxiliary_weight: weight of a classification loss; always 0, because no source mentions such a loss.
        protocols: protocols of the caption metrics. Metrics of the first protocol have no prefix.
        meteor: compute METEOR, which needs Java and 1.5 GB.
        learning_rate: for the language model; `table_learning_rate` is for category tables and projections.
        weight_decay, warmup_fraction: see `adamw`.
        text_pretrained: a T5 folder, or the checkpoint of a stage with a language model; None means random weights.
        video_pretrained, audio_pretrained: a released classifier, or the checkpoint of a stage with a classifier.
    """

    configure_gradient_clipping = clip_by_norm

    def __init__(
        self,
        model: VX2Text,
        auxiliary_weight: Literal[0] = 0,
        protocols: Sequence[Protocol] = ("coco",),
        meteor: bool = True,
        learning_rate: PositiveFloat = 1e-4,
        table_learning_rate: PositiveFloat = 1e-4,
        video_learning_rate: PositiveFloat = 2e-5,
        audio_learning_rate: PositiveFloat = 2e-5,
        weight_decay: NonNegativeFloat = 0.01,
        warmup_fraction: Fraction = 0.05,
        text_pretrained: str | None = None,
        video_pretrained: str | None = None,
        audio_pretrained: str | None = None,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"], logger=False)
        self.model = model
        self.test = TextTest(protocols, meteor)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        embeddings, mask, named = self.model(batch, self.noise(batch))
        loss = text_loss(self.model.language_model(embeddings, mask, batch["labels"]), batch["labels"])
        logs = {"train/loss": loss.detach(), "train/input_tokens": mask.sum(1).float().mean()}
        logs["train/answer_tokens"] = (batch["labels"] >= 0).sum(1).float().mean()
        if "speech_cut" in batch:
            logs["train/speech_cut"] = batch["speech_cut"].float().mean()
        for name, (_, scores) in named.items():
            log_probability = scores.detach().float().log_softmax(-1)
            logs[f"train/{name}_entropy"] = -(log_probability.exp() * log_probability).sum(-1).mean()
        self.log_dict(logs, batch_size=len(mask))
        return loss

    def noise(self, batch: Batch) -> dict[str, Tensor]:
        """Draw Gumbel noise for the joint batch of all processes, and return this process's rows."""
        samples = len(batch["labels"]) * self.trainer.world_size
        generator = batch_generator(self, self.hparams["seed"])
        noise: dict[str, Tensor] = {}
        for name, tokens in self.model.tokens.items():
            shape = tokens.noise_shape(batch[name].shape[1])
            if shape is not None:
                noise[name] = own_rows(self, gumbel_noise(samples, *shape, generator=generator))
        return noise

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, tokens in self.model.tokens.items():
                gradients = [p.grad for p in tokens.classifier.parameters() if p.grad is not None]
                if gradients:
                    self.log(f"train/{name}_gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        embeddings, mask, _ = self.model(batch)
        loss, words = per_answer(self.model.language_model(embeddings, mask, batch["labels"]), batch["labels"])
        # Weight by words and sum over processes at the end, because one may have a batch less. Use a float, because the
        # sum over processes would truncate an integer.
        count: Any = float(words.sum())
        self.log("val/loss", loss.sum() / max(count, 1.0), batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        rates = {
            "model.language_model.": h.learning_rate,
            "model.tokens.video.classifier.": h.video_learning_rate,
            "model.tokens.audio.classifier.": h.audio_learning_rate,
            "model.tokens.": h.table_learning_rate,
        }
        return adamw(self, rates, h.weight_decay, h.warmup_fraction)

    # -- start and resume ----------------------------------------------------------------------------------------------

    @property
    def data(self) -> VideoTextData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        self._check_data()
        self.model.read_names(self.data.tokenizer)
        if stage == "fit" and self.trainer.ckpt_path is None:
            h: Any = self.hparams
            if h.text_pretrained is not None:
                load_language_model(self.model.language_model, h.text_pretrained, "model.text_pretrained")
            for name, tokens in self.model.tokens.items():
                if h[f"{name}_pretrained"] is not None:
                    load_classifier(tokens.classifier, h[f"{name}_pretrained"], name, f"model.{name}_pretrained")
            self.model.start_tables()

    def _check_data(self) -> None:
        data, tokens = self.data, self.model.tokens
        limits = {name: getattr(data.prompt.limits, f"{name}_tokens") for name in tokens}
        decides = isinstance(self.model.language_model, OptionClassifier)
        for ours, theirs, field in (
            (sorted(tokens), sorted(data.modalities), "modalities"),
            *((part.tokens, limits[name], f"{name}_tokens") for name, part in tokens.items()),
            (decides, data.scoring == "position", "language_model as OptionClassifier and data.scoring as position"),
        ):
            if ours != theirs:
                raise ValueError(f"model.model.{field} is {ours}, but {theirs} in the data: set both to the same value")

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.test.reset()
        self.speech_cut = OncePerSample("speech_cut")
        self.token_words = TokenWords(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        index = batch["index"]
        embeddings, mask, named = self.model(batch)
        logits = self.model.language_model(embeddings, mask, batch["labels"])
        self.test.update_loss(index, *per_answer(logits, batch["labels"]))
        texts, picked = self.model.texts(batch, embeddings, mask, self.data.tokenizer)
        if picked is not None:
            self.test.update_choices(index, picked, batch["correct"])
        columns = [batch[name] for name in ("answer_text", "references", "question_text", "kind")]
        self.test.update_texts(index, map(GeneratedText, texts, *columns))
        if "speech_cut" in batch:
            self.speech_cut.update(index, speech_cut=batch["speech_cut"].float())
        self.token_words.update(batch, named)

    def on_test_epoch_end(self) -> None:
        metrics = {**self.test.compute(self.device), **self.token_words.compute(self.device)}
        if (speech := self.speech_cut.compute(self.device))["count"] > 0:
            metrics["speech_cut"] = speech["speech_cut"].float()
        self.log_dict({f"test/{name}": value for name, value in metrics.items()})
        self.token_words.draw(self.test)
