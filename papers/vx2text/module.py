"""VX2TEXT as LightningModules: the paper's algorithm, readable top to bottom.

Video and sound become a few word-like tokens each: the most probable categories of a classifier, perturbed by Gumbel
noise in training, with a gradient through the relaxed choice (`VX2Text`). What stands in for released weights in the
miniature comes first: classifiers that learn to name what they see and hear (`ModalityClassification`), and a language
model that learns to answer from true words (`TextPretraining`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from common.training.optimisers import clip_by_norm, fused, warm_up_then_cosine
from papers.vx2text import monitoring
from papers.vx2text.data import VideoTextData
from papers.vx2text.evaluation import TextTest, WordsTest
from papers.vx2text.gumbel import gumbel_noise
from papers.vx2text.loss import per_answer, text_loss, words_loss
from papers.vx2text.model import (
    PLACES,
    LanguageModel,
    ModalityClassifier,
    ModalityTokens,
    OptionClassifier,
    Table,
    Tokenisation,
    pieces_of,
    place,
    table_of,
)
from papers.vx2text.weights import Modality, load_classifier, load_language_model

Batch = dict[str, Any]


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names) or "neither video nor audio"


def adamw(module: pl.LightningModule, rates: dict[str, float], weight_decay: float, warmup_share: float) -> Any:
    """AdamW with a rate for each part, a linear warm-up and half a cosine.

    Args:
        module: its trained parameters are taken.
        rates: start of a parameter's name to its learning rate; the first that fits counts.
        weight_decay: of matrices; norms and biases have none.
        warmup_share: share of the steps that the warm-up takes.

    Source: specification 8.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = next(prefix for prefix in rates if name.startswith(prefix))
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        **fused(module, on_cpu=False),
    )
    total = int(module.trainer.estimated_stepping_batches)
    factor = warm_up_then_cosine(round(warmup_share * total), total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class VideoTextModule(pl.LightningModule):
    """What the modules share: one learning rate for all that is trained, and the test.

    Args:
        test: of the held-out samples.
    """

    def __init__(self, test: TextTest | WordsTest) -> None:
        super().__init__()
        self.test: Any = test

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        return adamw(self, self.learning_rates(), self.hparams["weight_decay"], self.hparams["warmup_share"])

    def learning_rates(self) -> dict[str, float]:
        """Start of a parameter's name to its learning rate; the first that fits counts."""
        return {"": self.hparams["learning_rate"]}

    configure_gradient_clipping = clip_by_norm

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    @property
    def data(self) -> VideoTextData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # -- what is measured after training -------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.test.reset()

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test.compute(self.device).items()})


class ModalityClassification(VideoTextModule):
    """Training of a classifier whose categories are words, several of which are true at once.

    Stands in for released weights in the miniature: those of Kinetics for the video, of AudioSet for the sound.

    Args:
        classifier: the network and its categories.
        modality: `video` or `audio`.
        smoothing: share of the target that is spread over all categories. A classifier that is too sure of itself names
            nothing else when it is sampled from, so no gradient tells it of its errors.
        learning_rate, weight_decay, warmup_share: see `adamw`.

    Source: specification 14, step 1.
    """

    def __init__(
        self,
        classifier: ModalityClassifier,
        modality: Modality,
        smoothing: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_share: float = 0.05,
    ) -> None:
        super().__init__(WordsTest())
        self.save_hyperparameters(ignore=["classifier"], logger=False)
        self.classifier = classifier

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.classifier(batch[self.hparams["modality"]])
        loss = words_loss(logits, batch["words"], self.hparams["smoothing"])
        self.log("train/loss", loss.detach(), batch_size=len(logits))
        return loss

    # -- what is measured after training -------------------------------------------------------------------------------

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test.update(batch["index"], self.classifier(batch[self.hparams["modality"]]), batch["words"])


class TextPretraining(VideoTextModule):
    """Training of the language model on text alone, with words where the tokens of video and sound will be.

    Stands in for T5's own pre-training in the miniature.

    Args:
        language_model: the network.
        learning_rate, weight_decay, warmup_share: see `adamw`.

    Source: specification 14, step 2.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_share: float = 0.05,
    ) -> None:
        super().__init__(TextTest())
        self.save_hyperparameters(ignore=["language_model"], logger=False)
        self.language_model = language_model

    # -- the model -----------------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, N, D] of the prompts and which of them count [B, N]."""
        return self.language_model.embed(batch["input_ids"]), batch["input_ids"] != 0

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = text_loss(self.language_model(*self.inputs(batch), batch["labels"]), batch["labels"])
        self.log("train/loss", loss.detach(), batch_size=len(batch["labels"]))
        return loss

    # -- what is measured after training -------------------------------------------------------------------------------

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test.update_loss(batch, self.language_model(*self.inputs(batch), batch["labels"]))


class VX2Text(VideoTextModule):
    """Text from video, sound, speech and history (specification 1 to 8).

    Args:
        language_model: T5.
        video_classifier, audio_classifier: networks whose categories become tokens.
        modalities: which of video and audio are read, as in the data; the classifier of another one is dropped.
        video_tokens, audio_tokens: tokens of each clip, K.
        tokenisation, temperature, table: see `ModalityTokens`.
        auxiliary_weight: of a classification loss on the true categories, which only a miniature knows; a clip that
            lacks the modality has none.
        beams, max_answer_tokens: of the generation. Of several options one is picked as data.scoring says.
        protocols: of the caption metrics; those of the first are named without it.
        meteor: whether METEOR is among them, which takes Java and 1.5 GB.
        learning_rate: of the language model; `table_learning_rate`: of category tables and projections;
            `video_learning_rate`, `audio_learning_rate`: of the classifiers.
        weight_decay, warmup_share: see `adamw`.
        text_pretrained: folder of T5, or checkpoint of a stage with a language model; None starts from random weights.
        video_pretrained, audio_pretrained: released classifier, or checkpoint of a stage with one.
        seed: seed of the Gumbel noise.

    Raises:
        ValueError: in setup, when the data brings other modalities or makes room for another number of tokens; in
            training, when there is a classification loss and the data does not know the true categories.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        video_classifier: ModalityClassifier | None = None,
        audio_classifier: ModalityClassifier | None = None,
        modalities: Sequence[Modality] = ("video", "audio"),
        video_tokens: int = 3,
        audio_tokens: int = 3,
        tokenisation: Tokenisation = "st_topk",
        temperature: float = 1.0,
        table: Table = "learned",
        auxiliary_weight: float = 0.0,
        beams: int = 5,
        max_answer_tokens: int = 30,
        protocols: Sequence[str] = ("coco",),
        meteor: bool = True,
        learning_rate: float = 1e-4,
        table_learning_rate: float = 1e-4,
        video_learning_rate: float = 2e-5,
        audio_learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_share: float = 0.05,
        text_pretrained: str | None = None,
        video_pretrained: str | None = None,
        audio_pretrained: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(TextTest(beams, max_answer_tokens, tuple(protocols), meteor))
        self.save_hyperparameters(ignore=["language_model", "video_classifier", "audio_classifier"], logger=False)
        self.language_model = language_model
        self.tokens = nn.ModuleDict()
        for name, classifier, count in (
            ("video", video_classifier, video_tokens),
            ("audio", audio_classifier, audio_tokens),
        ):
            if name in modalities:
                if classifier is None:
                    raise ValueError(f"model.modalities has {name}, but model.{name}_classifier is null")
                self.tokens[name] = ModalityTokens(
                    classifier, language_model.width, count, tokenisation, temperature, table
                )
        # Word pieces of the categories' names, for a table that is tied to the word embeddings.
        self.pieces: dict[str, Tensor] = {}

    # -- the model -----------------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, noise: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Embeddings of the prompts with the tokens of all modalities in their places.

        Args:
            batch: prompts and clips.
            noise: Gumbel noise of every modality; without it the most probable categories are chosen.

        Returns:
            Embeddings [B, N, D], which of them count [B, N], and for every modality its categories [B, S * K] and
            scores [B, S, C].
        """
        ids = batch["input_ids"]
        embeddings, mask = self.language_model.embed(ids), ids != 0
        found: dict[str, Any] = {}
        for name, tokens in self.tokens.items():
            assert isinstance(tokens, ModalityTokens)
            clips = batch[name] if name == "video" else batch[name][:, None]
            table = table_of(self.pieces[name].to(ids.device), self.language_model) if name in self.pieces else None
            rows, chosen, scores = tokens(clips, (noise or {}).get(name), table)
            embeddings = place(embeddings, ids, rows, name)
            # A clip without this modality has no tokens, rather than invented ones.
            absent = ~batch[f"{name}_present"][:, None] & (ids <= PLACES[name]) & (ids > PLACES[name] - rows.shape[1])
            mask = mask & ~absent
            found[name] = (chosen, scores)
        return embeddings, mask, found

    # -- training ------------------------------------------------------------------------------------------------------

    def noise(self, batch: Batch) -> dict[str, Tensor]:
        """Gumbel noise of this process's samples, a part of the joint batch's.

        It depends on the seed and the number of the batch alone, and rank r of W holds samples r, r + W, ... of the
        joint batch: any number of processes draws the same, and so does a resumed run.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        generator = torch.Generator().manual_seed((self.hparams["seed"] << 32) + self.trainer.fit_loop.total_batch_idx)
        drawn: dict[str, Tensor] = {}
        for name, tokens in self.tokens.items():
            assert isinstance(tokens, ModalityTokens)
            shape = tokens.noise_shape(batch[name].shape[1] if name == "video" else 1)
            if shape is not None:
                joint = gumbel_noise(len(batch["labels"]) * world, *shape, generator=generator)
                drawn[name] = joint[rank::world].to(self.device, non_blocking=True)
        return drawn

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        embeddings, mask, found = self.inputs(batch, self.noise(batch))
        loss = text_loss(self.language_model(embeddings, mask, batch["labels"]), batch["labels"])
        logs = {"train/loss": loss.detach(), "train/input_tokens": mask.sum(1).float().mean()}
        logs["train/answer_tokens"] = (batch["labels"] >= 0).sum(1).float().mean()
        for name, (_, scores) in found.items():
            log_probability = scores.detach().float().log_softmax(-1)
            logs[f"train/{name}_entropy"] = -(log_probability.exp() * log_probability).sum(-1).mean()
            if self.hparams["auxiliary_weight"] > 0:
                marks = self._true_words(batch, name)
                loss = loss + self.hparams["auxiliary_weight"] * words_loss(scores.mean(1), marks)
        self.log_dict(logs, batch_size=len(mask))
        return loss

    def _true_words(self, batch: Batch, name: str) -> Tensor:
        if f"{name}_words" not in batch:
            raise ValueError(
                f"model.auxiliary_weight is {self.hparams['auxiliary_weight']}, but the data does not know the true "
                f"categories of its {name}: set it to 0, or give data.{name}_categories of a miniature"
            )
        return batch[f"{name}_words"] & batch[f"{name}_present"][:, None]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, tokens in self.tokens.items():
                gradients = [p.grad for p in tokens.classifier.parameters() if p.grad is not None]  # type: ignore[union-attr]
                if gradients:
                    self.log(f"train/{name}_gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        embeddings, mask, _ = self.inputs(batch)
        loss, words = per_answer(self.language_model(embeddings, mask, batch["labels"]), batch["labels"])
        # Weighed by words, and summed over processes at the end alone: one of them may have a batch less.
        count = words.sum()
        self.log("val/loss", loss.sum() / count.clamp(min=1.0), batch_size=int(count), sync_dist=True)

    def learning_rates(self) -> dict[str, float]:
        h: Any = self.hparams
        return {
            "language_model.": h.learning_rate,
            "tokens.video.classifier.": h.video_learning_rate,
            "tokens.audio.classifier.": h.audio_learning_rate,
            "tokens.": h.table_learning_rate,
        }

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.data
        if set(self.tokens) != set(data.modalities):
            raise ValueError(
                f"the model reads {_listed(self.tokens)}, the data brings {_listed(data.modalities)}: give "
                "model.modalities and data.modalities the same"
            )
        for name in self.tokens:
            room = getattr(data.prompt.limits, f"{name}_tokens")
            if self.tokens[name].tokens != room:
                raise ValueError(
                    f"model.{name}_tokens is {self.tokens[name].tokens}, but data.prompt.{name}_tokens makes room for "
                    f"{room} a clip: give both the same"
                )
        decides, asked = isinstance(self.language_model, OptionClassifier), data.scoring
        if decides != (asked == "position"):
            raise ValueError(
                f"model.language_model {'picks a position' if decides else 'writes'}, but data.scoring is {asked}: "
                "give an OptionClassifier and position together, or neither"
            )
        self.prepare(data.tokenizer)
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.take_over(data.tokenizer)

    def prepare(self, tokenizer: Any) -> None:
        """Look up the word pieces of the categories where their embeddings are tied to those of words."""
        if self.hparams["table"] == "tied" and self.hparams["tokenisation"] != "continuous":
            self.pieces = {name: pieces_of(t.classifier.names, tokenizer) for name, t in self.tokens.items()}  # type: ignore[union-attr, arg-type]

    def take_over(self, tokenizer: Any) -> None:
        """Load the weights that training starts from, and let the tables of categories start from words."""
        if self.hparams["text_pretrained"] is not None:
            load_language_model(self.language_model, self.hparams["text_pretrained"], "model.text_pretrained")
        for name, tokens in self.tokens.items():
            assert isinstance(tokens, ModalityTokens)
            path = self.hparams[f"{name}_pretrained"]
            if path is not None:
                load_classifier(tokens.classifier, path, name, f"model.{name}_pretrained")  # type: ignore[arg-type]
            pieces = pieces_of(tokens.classifier.names, tokenizer)
            # The module knows its device already, but its weights are moved there only later.
            device = next(self.language_model.parameters()).device
            tokens.start_table(table_of(pieces.to(device), self.language_model))

    # -- what is measured after training -------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        super().on_test_start()
        self.shift = monitoring.TokenShift(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        embeddings, mask, found = self.inputs(batch)
        self.test.update_loss(batch, self.language_model(embeddings, mask, batch["labels"]))
        self.test.update_text(batch, self.language_model, embeddings, mask, self.data.tokenizer)
        self.test.update_tokens(batch, found)
        self.shift.update(batch, found)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.shift.draw(self.test)
