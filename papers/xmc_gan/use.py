"""Generates images for captions, and embeds images and captions, with a trained XMC-GAN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.image_transforms import SquashTransform
from common.data.media import read_image
from common.data.text import (
    WORD,
    CaptionTokenizer,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    WordVocabulary,
    normalize_caption,
)
from common.data.text_features import encode_texts
from common.errors import StageError
from common.models.finished_stage import FinishedStage
from common.models.safe_builder import path_of
from common.models.trained import (
    Items,
    Modality,
    Trained,
    TrainedModel,
    renamed,
    with_arguments,
    without_sources,
)
from papers.xmc_gan.miniature import NGramText
from papers.xmc_gan.networks import Captions, Discriminator, Generator, noise_of
from papers.xmc_gan.text import BertText, bert_sizes

#: Most words of a small vocabulary that a message lists.
LISTED_WORDS = 60


class XMCGAN(TrainedModel):
    """The averaged generator, the discriminator, and the text encoder of both.

    Images and captions are embedded in the space of the loss between images and sentences. `learned_words` are the
    words of the training captions if the vocabulary was learned from these captions, else None.
    """

    paper = "xmc_gan"
    kinds = ("papers.xmc_gan.module.XMCGANModule",)
    classes: ClassVar[tuple[type, ...]] = (
        Generator, Discriminator, BertText, NGramText, WordPieceTokenizer, SentencePieceTokenizer, WordVocabulary,
    )  # fmt: skip
    example = "xmc_gan/mini/seed0/xmc_gan"
    otherwise = "generates no images: give the checkpoint of a stage that does, such as xmc_gan"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")

    tokenizer: CaptionTokenizer
    learned_words: frozenset[str] | None

    def __init__(
        self, generator: Generator, discriminator: Discriminator, text_encoder: nn.Module, regions: bool = True
    ) -> None:
        super().__init__()
        if not regions:
            discriminator.regions = None
        self.generator = generator
        self.discriminator = discriminator
        self.text_encoder = text_encoder
        self._pixels = SquashTransform(generator.image_size, 0.0, training=False)

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data, config, learned = stage.data(), stage.config["model"]["init_args"], None
        if data.tokenizer.file is None:
            # The vocabulary comes from the training captions, which the miniature's world generates.
            data.prepare_data()
            data.setup("predict")
            data.tokenizer.restore(stage.data_state)
            captions = data.annotations[data.split].captions
            learned = sorted(
                {word for texts in captions for text in texts for word in WORD.findall(normalize_caption(text))}
            )
        else:
            data.tokenizer.prepare()
        # Use the generator that the test measured.
        generator = "generators.query" if config.get("evaluated") == "trained" else "generators.key"
        weights = renamed(stage.state, generator=generator, discriminator="discriminator")
        encoder = config["text_encoder"]
        if encoder is None:
            bert = BertText(data.text_features.bert, data.sentence_pool)
            bert.encoder.require_weights()
            weights |= {f"text_encoder.{name}": value for name, value in bert.state_dict().items()}
            sizes = {"pretrained": None, "sentence_pool": data.sentence_pool, "sizes": bert.sizes}
            encoder = {"class_path": path_of(BertText), "init_args": sizes}
        else:
            weights |= renamed(stage.state, text_encoder="text_encoder")
            if encoder["class_path"] == path_of(BertText) and not encoder["init_args"].get("sizes"):
                encoder = with_arguments(encoder, sizes=bert_sizes(Path(encoder["init_args"]["pretrained"])))
        parts = {"generator": config["generator"], "discriminator": config["discriminator"], "text_encoder": encoder}
        arguments = without_sources(parts)
        arguments["regions"] = any(name.startswith("discriminator.regions.") for name in weights)
        tokenizer = stage.config["data"]["init_args"]["tokenizer"]
        inputs = {"tokenizer": with_arguments(tokenizer, **{data.tokenizer.field: None}), "learned_words": learned}
        model = {"class_path": path_of(cls), "init_args": arguments}
        return Trained(model, inputs, weights, {data.tokenizer.file_name: data.tokenizer.content})

    def read_inputs(self, trained: Trained) -> None:
        self.tokenizer = self.input(trained, "tokenizer", CaptionTokenizer)
        self.tokenizer.read(trained.file(self.tokenizer.file_name))
        words = self.input(trained, "learned_words", list[str] | None)
        self.learned_words = None if words is None else frozenset(words)

    # -- captions ------------------------------------------------------------------------------------------------------

    def notes(self, caption: str) -> list[str]:
        """Return warnings about unknown words and about text that is cut."""
        tokenizer, learned, notes = self.tokenizer, self.learned_words, []
        pieces = WORD.findall(normalize_caption(caption))
        # Ignore punctuation: it is tokenized like words, but doesn't change the meaning of a caption.
        words = dict.fromkeys(piece for piece in pieces if any(letter.isalnum() for letter in piece))
        if not words:
            raise StageError("the caption is empty: describe the image in quotes")
        if learned is not None:
            unknown = [word for word in words if word not in learned]
        else:
            unknown = [word for word in words if "[UNK]" in tokenizer.decode(tokenizer.encode(word))]
        if unknown:
            listed = sorted(word for word in learned or () if word.isalnum())
            some = f"; it learned from {', '.join(listed)}" if 0 < len(listed) <= LISTED_WORDS else ""
            line = f"the model does not know {', '.join(unknown)}{some}"
            if len(unknown) == len(words):
                raise StageError(f"{caption!r}: {line}")
            notes.append(line)
        if more := tokenizer.excess(caption):
            read = tokenizer.decode(tokenizer.encode(caption))
            notes.append(f"too long by {more} tokens; what the model reads is {read!r}")
        return notes

    def vectors(self, captions: Sequence[str]) -> Captions:
        """Return word vectors [B, T, E], sentence vectors [B, E] and lengths [B] of captions."""
        tokens, length = (value.to(self.device) for value in encode_texts(captions, self.tokenizer))
        words, sentence = self.text_encoder(tokens, length)
        return Captions(words, sentence, length)

    # -- images --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, captions: str | Sequence[str], number: int = 1, seed: int = 0) -> Tensor:
        """Generate images [captions, number, 3, S, S] in [0, 1] on the CPU, with the same noise for every caption."""
        captions = [captions] if isinstance(captions, str) else list(captions)  # `list` would split a text into letters
        noise = noise_of(torch.arange(number), self.generator.z_dim, seed).to(self.device)
        vectors, rows = self.vectors(captions), []
        for row in range(len(captions)):
            repeated = (value[row : row + 1].expand(number, *value.shape[1:]) for value in vectors)
            rows.append(self.generator(noise, *repeated).float().clamp(0, 1).cpu())
        return torch.stack(rows)

    # -- embeddings ----------------------------------------------------------------------------------------------------

    def read_image(self, file: str | Path) -> Tensor:
        """Read an image as the discriminator needs it, float32 [3, S, S] in [0, 1]."""
        return self._pixels(read_image(Path(file)))[0]

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """Return the discriminator's features of images as unit vectors [B, P]."""
        pictures = torch.stack(self.read_all("image", images)).to(self.device)
        pictures = pictures.reshape(-1, *pictures.shape[-3:])  # `generate` returns them by caption
        return F.normalize(self.discriminator.features(pictures)[0].float(), dim=1)

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """Map captions into the space of the discriminator's features, as unit vectors [B, P]."""
        vectors = self.vectors(self.read_all("text", texts))
        return F.normalize(self.discriminator.sentence(vectors.sentence).float(), dim=1)


MODEL = XMCGAN
