"""Embeds and searches images and captions with a trained MCT."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from common.data.image_transforms import ImageTransform
from common.data.media import read_image
from common.data.text import (
    CaptionTokenizer,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    WordVocabulary,
    normalize_caption,
    pad_tokens,
)
from common.encoders.image import ImageResNet
from common.encoders.text import BertEncoder, GRUEncoder
from common.errors import StageError
from common.models.finished_stage import FinishedStage, instantiate
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
from papers.mct import networks
from papers.mct.loss import MultimodalContrast
from papers.mct.networks import Tower


class MCT(networks.MCT, TrainedModel):
    """A trained `networks.MCT`; `embedding` selects the heads ([3]).

    `inter` compares images with captions. `intra`, which J_ii and J_tag train, compares images with images.
    """

    paper = "mct"
    kinds = ("papers.mct.module.MCTModule",)
    classes: ClassVar[tuple[type, ...]] = (
        Tower, ImageResNet, BertEncoder, GRUEncoder, WordPieceTokenizer, SentencePieceTokenizer, WordVocabulary,
    )  # fmt: skip
    example = "mct/mini/seed0/mct"
    otherwise = "has no embeddings of images and captions: give the checkpoint of a pre-training stage, such as mct"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")

    pixels: ImageTransform
    tokenizer: CaptionTokenizer | None = None

    def __init__(self, image: Tower, text: Tower | None = None) -> None:
        super().__init__(image, text)
        self.embedding = "inter" if "inter" in image.embeds else "intra"

    @property
    def reads(self) -> tuple[Modality, ...]:
        return self.embeds if self.text is not None else ("image",)

    def read_inputs(self, trained: Trained) -> None:
        self.pixels = self.input(trained, "image", ImageTransform).with_training(False)
        if self.text is not None:
            self.tokenizer = self.input(trained, "tokenizer", CaptionTokenizer)
            self.tokenizer.read(trained.file(self.tokenizer.file_name))

    @classmethod
    def card_usage(cls, trained: Trained) -> str:
        # Without weight_cross, no loss made images and captions comparable.
        across = trained.model["init_args"]["image"]["init_args"]["inter_dim"]
        return "usage_without_cross" if across is None else "usage"

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        arguments = without_sources(stage.config["model"])["init_args"]
        # Only the loss's widths are used; queues of the configured size may take gigabytes.
        loss = instantiate(with_arguments(arguments["loss"], queue_size=1), MultimodalContrast)

        def tower(modality: Literal["image", "text"]) -> dict[str, Any]:
            built = {"backbone": arguments[f"{modality}_encoder"], **loss.widths(modality), "heads": arguments["heads"]}
            return {"class_path": path_of(Tower), "init_args": built}

        weights = renamed(stage.state, image="model.image", text="model.text")
        reads_captions = any(name.startswith("text.") for name in weights)
        towers = {"image": tower("image"), "text": tower("text") if reads_captions else None}
        inputs: dict[str, Any] = {"image": asdict(data.image), "tokenizer": None}
        files: dict[str, bytes] = {}
        if data.tokenizer is not None and reads_captions:
            if data.tokenizer.file is not None:
                data.tokenizer.prepare()
            elif not data.tokenizer.restore(stage.data_state):
                data.prepare_data()
            field = data.tokenizer.field
            inputs["tokenizer"] = with_arguments(stage.config["data"]["init_args"]["tokenizer"], **{field: None})
            files[data.tokenizer.file_name] = data.tokenizer.content
        return Trained({"class_path": path_of(cls), "init_args": towers}, inputs, weights, files)

    def read_image(self, file: str | Path) -> Tensor:
        """Read an image as the encoder needs it, float32 [3, S, S]."""
        return self.pixels(read_image(Path(file)))[0]

    @torch.no_grad()
    def features(self, images: Items) -> Tensor:
        """Compute the images' backbone features [B, D], for transfer to other tasks."""
        return self.image.features(torch.stack(self.read_all("image", images)).to(self.device)).float()

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """Embed images as unit vectors [B, d]."""
        return self._of(self.image(torch.stack(self.read_all("image", images)).to(self.device)))

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """Embed captions as unit vectors [B, d], comparable with image embeddings if `embedding` is `inter`."""
        if self.text is None or self.tokenizer is None:
            raise StageError("this model was trained without captions and can only embed images")
        rows = [self.tokenizer.encode(normalize_caption(text)) for text in self.read_all("text", texts)]
        return self._of(self.text(pad_tokens(rows, self.tokenizer.pad_id).to(self.device)))

    def _of(self, embeddings: dict[str, Tensor]) -> Tensor:
        if self.embedding not in embeddings:
            raise StageError(f"this model has no embedding {self.embedding!r}; it has {', '.join(embeddings)}")
        return embeddings[self.embedding].float()

    def compare(self, query_modality: Modality, query: Any, modality: Modality, gallery: Any) -> Tensor:
        """Return the cosine scores [N] of a query with each gallery item."""
        if query_modality != modality and self.embedding != "inter":
            raise StageError(
                f"this model cannot compare {query_modality} with {modality}: its `{self.embedding}` embeddings were "
                "trained inside each modality alone; give the checkpoint of a stage with weight_cross, such as mct"
            )
        return super().compare(query_modality, query, modality, gallery)


MODEL = MCT
