"""Baseline with one encoder for images and captions: network, data and training. It isn't from the paper.

A transformer reads the places of the image's last feature map together with the words of a caption. It learns to
predict masked words and whether image and caption match. Evaluations use only the backbones, which are those of MCT.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.item_dataset import Item, Sample
from common.data.text import WordPieceTokenizer, text_numbers
from common.encoders.text import BertEncoder
from common.losses.masked import masked_language_modeling
from common.losses.matching import in_batch_matching
from common.memory.collective import rank, share_of_mean, world_size
from common.memory.groups import groups_here, split_groups
from common.metrics.gathering import RowsOncePerSample, first_occurrences, gather_rows
from common.metrics.retrieval import owner_rows, score_retrieval
from common.protocols.captions import check_vocabulary
from common.training.examples import Example, RandomTensors
from common.training.optimizers import adamw, refuse_clip_value
from common.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from papers.mct.data import CaptionedViews, PretrainingData

#: Token id of padding.
PAD = 0
#: Maximum pairs per batch when all images are scored with all captions; limits the memory.
PAIRS_AT_ONCE = 2048


def mask_words(tokens: list[int], share: float, mask_id: int, rng: np.random.Generator) -> list[int]:
    """Mask each inner word of a caption with probability `share`, at least one. Draw one random number per word."""
    noise = rng.random(max(len(tokens) - 2, 0))
    chosen = noise < max(share, noise.min(initial=1.0) + 1e-9)
    return [tokens[0], *np.where(chosen, mask_id, tokens[1:-1]).tolist(), tokens[-1]]


class MaskedViews(CaptionedViews):
    """Adds captions with a share of masked words to the views: `tokens_<view>_masked`."""

    def __init__(self, *args: Any, masked_words: float = 0.15, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked_words = masked_words

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        sample = super().read(item, rng)
        mask_id = self.tokenizer.mask_id  # type: ignore[union-attr]
        for view in ("query", "key"):
            sample[f"tokens_{view}_masked"] = mask_words(sample[f"tokens_{view}"], self.masked_words, mask_id, rng)
        return sample


class MaskedPretrainingData(PretrainingData):
    """MCT's training images and captions, with a share of masked words."""

    views = MaskedViews

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: WordPieceTokenizer,
        masked_words: Fraction = 0.15,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.masked_words = masked_words

    @property
    def view_options(self) -> dict[str, Any]:
        return {**super().view_options, "masked_words": self.masked_words}

    def collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        batch = super().collate(samples)
        batch.pop("image_key", None)
        return with_places(batch)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        batch = {"image_query": self.example_images(size, draw)["image"]} | {
            name: torch.arange(size) for name in ("index", "image_id")
        }
        for view in ("query", "key"):
            tokens = batch[f"tokens_{view}"] = self.example_captions(size, draw)
            batch[f"lengths_{view}"] = torch.full((size,), tokens.shape[1])
            batch[f"tokens_{view}_masked"] = tokens.clone()
            batch[f"tokens_{view}_masked"][:, 1::7] = 1
        return Example(with_places(batch), self.published_batches())


def with_places(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the masked words to a batch: `places_<view>` [K], indices into the B * L tokens, and `targets_<view>` [K].

    Compute the indices on the host, because an accelerator would have to wait for K.
    """
    for view in ("query", "key") if "tokens_query_masked" in batch else ():
        tokens = batch[f"tokens_{view}"]
        places = (batch[f"tokens_{view}_masked"] != tokens).flatten().nonzero()[:, 0]
        batch |= {f"places_{view}": places, f"targets_{view}": tokens.flatten()[places]}
    return batch


class PairEncoder(nn.Module):
    """A transformer that reads an image (one token per place of its last feature map) and a caption, or only a caption.

    Places of images get BERT's second segment embedding, so that both backbones have the same parameters as in MCT.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: BertEncoder) -> None:
        super().__init__()
        width = text_encoder.feature_dim
        self.max_tokens = text_encoder.max_tokens
        # Named like MCT's towers, so that the same code reads the backbones.
        self.image = nn.ModuleDict({"backbone": image_encoder})
        self.text = nn.ModuleDict({"backbone": text_encoder})
        self.projection = nn.Linear(image_encoder.feature_dim, width)  # type: ignore[arg-type]
        self.match = nn.Linear(width, 1)
        self.word = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(text_encoder.vocabulary_size))

    @property
    def bert(self) -> Any:
        return self.text["backbone"].bert

    def start_images(self, images: Tensor) -> Tensor:
        """Map images to inputs [B, P, D] of the transformer."""
        grid = self.image["backbone"].forward_map(images).flatten(2).transpose(1, 2)  # type: ignore[operator]
        second = torch.ones(grid.shape[:2], dtype=torch.int64, device=grid.device)
        return self.bert.embeddings(inputs_embeds=self.projection(grid), token_type_ids=second)

    def start_captions(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, L] to inputs [B, L, D] of the transformer."""
        return self.bert.embeddings(input_ids=tokens)

    def encode(self, text: Tensor, tokens: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of places [B, P, D] (empty without an image) and of words [B, L, D]."""
        image = text[:, :0] if image is None else image
        mask = F.pad(tokens != PAD, (image.shape[1], 0), value=True)
        states = torch.cat([image, text], 1)
        hidden = self.bert.encoder(states, attention_mask=mask[:, None, None, :]).last_hidden_state
        return hidden[:, : image.shape[1]], hidden[:, image.shape[1] :]

    def scores(self, image: Tensor, text: Tensor, tokens: Tensor) -> Tensor:
        """Score every image [N, P, D] with every caption [M, L, D] by reading both together: [N, M] ([11]).

        A linear layer maps the product of the mean state of the places and the state of the first token to the score.
        """
        images, captions = len(image), len(text)
        pairs = image.repeat_interleave(captions, 0)
        places, words = self.encode(text.repeat(images, 1, 1), tokens.repeat(images, 1), pairs)
        return self.match(places.mean(1) * words[:, 0]).view(images, captions)

    def words(self, hidden: Tensor) -> Tensor:
        """Score all words for hidden states [K, D]: [K, V]. The output layer is tied to the word embeddings."""
        return F.linear(self.word(hidden), self.bert.embeddings.word_embeddings.weight, self.word_bias)


class OneEncoder(pl.LightningModule):
    """Trains one encoder by matching images with captions and by predicting masked words ([11]).

    The loss is the sum of three: matching of all pairs of images and captions within a group (cross entropy in both
    directions and of every pair); masked words of a caption given its image; and masked words of another caption
    without an image, so that the transformer also learns text alone. The test is retrieval by the matching score.

    Args:
        candidates: images and captions per group; a batch of B has B / candidates groups, each on one device.
        image_learning_rate, learning_rate: of AdamW, for the image encoder and for the rest.
        weight_decay: of matrices only.
        warmup_fraction: share of the steps with linear warm-up. The other steps have cosine decay.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: BertEncoder,
        candidates: PositiveInt = 16,
        image_learning_rate: PositiveFloat = 1e-4,
        learning_rate: PositiveFloat = 4e-5,
        weight_decay: NonNegativeFloat = 1e-2,
        warmup_fraction: Fraction = 0.1,
        clip_norm: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder"], logger=False)
        self.model = PairEncoder(image_encoder, text_encoder)

    def setup(self, stage: str) -> None:
        data, encoder = self.trainer.datamodule, self.model.text["backbone"]  # type: ignore[attr-defined]
        if stage == "fit" and self.trainer.ckpt_path is None:
            encoder.require_weights()  # type: ignore[operator]
        check_vocabulary(self, encoder)
        if stage != "fit":
            return
        refuse_clip_value(self, "model.clip_norm")
        size, devices = self.hparams["candidates"], self.trainer.world_size
        if data.batch_size % (size * devices):
            raise ValueError(
                f"data.batch_size is {data.batch_size}, but must be a multiple of model.candidates x devices "
                f"({size} x {devices} = {size * devices})"
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image = self.model.start_images(batch["image_query"])
        # The key's caption is flipped like the query's image.
        terms = {
            "match": self.match(batch, image),
            "words": self.masked_words(batch, "key", image),
            "words_alone": self.masked_words(batch, "query"),
        }
        terms["loss"] = terms["match"] + terms["words"] + terms["words_alone"]
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(image))
        return terms["loss"]

    def match(self, batch: dict[str, Tensor], image: Tensor) -> Tensor:
        """Compute the matching loss within groups. Pairs with the same image or the same text aren't negatives."""
        tokens = batch["tokens_key"]
        same = torch.stack([batch["image_id"], text_numbers(tokens, batch["lengths_key"])], 1)
        groups = groups_here("model.candidates", len(image), self.hparams["candidates"])
        parts = zip(*(split_groups(x, groups) for x in (image, self.model.start_captions(tokens), tokens, same)))
        losses = [sum(in_batch_matching(self.model.scores(*pairs), group)) for *pairs, group in parts]
        return torch.stack(losses).mean()  # type: ignore[arg-type]

    def masked_words(self, batch: dict[str, Tensor], view: str, image: Tensor | None = None) -> Tensor:
        """Compute the cross entropy of a view's masked words, averaged over the masked words of all processes."""
        tokens = batch[f"tokens_{view}_masked"]
        _, hidden = self.model.encode(self.model.start_captions(tokens), tokens, image)
        logits = self.model.words(hidden.flatten(0, 1)[batch[f"places_{view}"]])
        return masked_language_modeling(logits, batch[f"targets_{view}"]) * share_of_mean(len(logits), logits.device)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), self.hparams["clip_norm"])

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        rates = {"model.image.": h.image_learning_rate, "": h.learning_rate}
        return adamw(self, rates, h.weight_decay, h.warmup_fraction)

    # -- evaluation after training -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._images = RowsOncePerSample("start")
        self._captions = RowsOncePerSample("tokens", "image", "text")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self._images.update(batch["index"], start=self.model.start_images(batch["image"]))
        else:
            tokens = batch["tokens"]
            # Pad to equal length, so that they can be gathered.
            padded = F.pad(tokens, (0, self.model.max_tokens - tokens.shape[1]), value=PAD)
            self._captions.update(
                batch["index"], tokens=padded, image=batch["image_index"], text=text_numbers(tokens, batch["lengths"])
            )

    def on_test_epoch_end(self) -> None:
        index, images = self._images.compute(self.device)
        _, captions = self._captions.compute(self.device)
        row, readable = owner_rows(index, captions["image"])
        # Encode each text once, no matter how many images have it. Each process scores its part of the images.
        _, number = torch.unique(captions["text"][readable], return_inverse=True)
        tokens = captions["tokens"][readable][first_occurrences(number)]
        part = images["start"].tensor_split(world_size())[rank()]
        scores = gather_rows(self.scores_of_all(part, tokens))[:, number]
        metrics = score_retrieval(scores, row)
        metrics |= {f"{name}_equal_text": value for name, value in score_retrieval(scores, row, number).items()}
        metrics["t2i_chance_medr"] = torch.tensor(len(index) / 2)
        self.log_dict({f"test/{name}": value.to(self.device, torch.float32) for name, value in metrics.items()})

    def scores_of_all(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Score every image with every caption: float32 [N, M] for image [N, P, D] and tokens [M, L]."""
        scores = image.new_zeros(len(image), len(tokens), dtype=torch.float32)
        lengths = (tokens != PAD).sum(1)
        # Batch captions of similar length, to limit padding.
        for places in lengths.argsort(stable=True).split(PAIRS_AT_ONCE // 8):
            words = tokens[places, : int(lengths[places].max())]
            text = self.model.start_captions(words)
            # A process may have no images.
            for rows in torch.arange(len(image), device=image.device).split(8) if len(image) else ():
                scores[rows[:, None], places] = self.model.scores(image[rows], text, words).float()
        return scores
