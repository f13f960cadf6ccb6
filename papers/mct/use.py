"""A trained MCT to use: embeddings of images and captions that can be compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.data.image_transforms import ImageTransform
from common.data.images import read_image
from common.data.text import (
    CaptionTokenizer,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    WordVocabulary,
    normalise_caption,
    pad_tokens,
)
from common.encoders.image import ImageResNet
from common.encoders.text import BertEncoder, GRUEncoder
from common.errors import StageError
from common.stages.export import (
    Items,
    Modality,
    Trained,
    TrainedModel,
    renamed,
    with_arguments,
    without_sources,
)
from common.stages.finished import FinishedStage
from papers.mct import module


class MCT(TrainedModel):
    """Trained encoders of images and captions.

    Args:
        trained: see `common.stages.export.Trained`; `MCT.from_export(path)` reads it.

    Attributes:
        image, text: `papers.mct.model.Tower`; text is None where the stage read no captions.
        embedding: which head's embeddings are given: `inter`, those that compare images with captions, or `intra`,
            those that compare images with images; the first that there is when loaded. One vector of an image then
            serves every search; between images alone, `intra` is what J_ii and J_tag trained (specification 3).
    """

    paper = "mct"
    kinds = ("papers.mct.module.MCT",)
    classes: ClassVar[tuple[type, ...]] = (
        module.MCT, ImageResNet, BertEncoder, GRUEncoder,
        WordPieceTokenizer, SentencePieceTokenizer, WordVocabulary,
    )  # fmt: skip
    example = "mct/mini/seed0/mct"
    otherwise = "has no embeddings of images and captions: give the checkpoint of a pre-training, such as mct"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")
    retrieves: ClassVar[tuple[tuple[Modality, Modality], ...]] = (
        ("text", "image"), ("image", "text"), ("image", "image"), ("text", "text"),
    )  # fmt: skip
    limits = (
        "For research on learning from images and their captions: features of images, and search of images by images "
        "and, where it was trained across them (weight_cross above 0), of images and captions by each other. What it "
        "knows of the world is what its images and captions showed and said, with their errors and biases. "
        "It is not made to recognise persons or to decide about them. The method is covered by US patent 12,223,439."
    )
    usage = 'model.embed_image("picture.jpg") @ model.embed_text("a dog on a sofa").T'

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        built = self.build(trained)
        self.image = built.image.query
        self.text = None if built.text is None else built.text.query
        self.embedding = "intra" if built.hparams["weight_cross"] == 0 else "inter"
        self._pixels = self.input(trained, "image", ImageTransform).with_training(False)
        self.tokenizer: CaptionTokenizer | None = None
        if self.text is not None:
            self.tokenizer = self.input(trained, "tokenizer", CaptionTokenizer)
            self.tokenizer.read(trained.file(self.tokenizer.file_name))
        self.fill(trained)

    @classmethod
    def usage_of(cls, trained: Trained) -> str:
        if trained.model["init_args"].get("weight_cross") == 0:  # no loss made images and captions comparable
            return 'model.embed_image("picture.jpg") @ model.embed_image("another.jpg").T'
        return cls.usage

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        # No key and no queue is needed to use the model; the configuration's queues may take gigabytes.
        model = with_arguments(without_sources(stage.config["model"]), queue_size=1)
        weights = renamed(stage.state, image="image.query", text="text.query")
        inputs: dict[str, Any] = {"image": asdict(data.image), "tokenizer": None}
        files: dict[str, bytes | Path] = {}
        if data.tokenizer is not None and any(name.startswith("text.") for name in weights):
            data.prepare_data()
            field = data.tokenizer.field
            inputs["tokenizer"] = with_arguments(stage.config["data"]["init_args"]["tokenizer"], **{field: None})
            files[data.tokenizer.file_name] = data.tokenizer.content
        return Trained(model, inputs, weights, files)

    def read_image(self, file: str | Path) -> Tensor:
        """A picture as the encoder reads it, float32 [3, S, S].

        Raises:
            ImageError: it cannot be read.
        """
        return self._pixels(read_image(file))[0]

    @torch.no_grad()
    def features(self, images: Items) -> Tensor:
        """Features of images before the heads, which transfer to other tasks, [B, D].

        Args:
            images: a file, some files, or what `read_image` gives of them.

        Raises:
            ImageError: a file cannot be read.
        """
        return self.image.features(torch.stack(self.read_all("image", images)).to(self.device)).float()

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """Unit vectors [B, d] of images.

        Args:
            images: a file, some files, or what `read_image` gives of them.

        Raises:
            ImageError: a file cannot be read.
        """
        return self._of(self.image(torch.stack(self.read_all("image", images)).to(self.device)))

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """Unit vectors [B, d] of captions; they can be compared with those of images when `embedding` is `inter`.

        Args:
            texts: one caption or several.

        Raises:
            StageError: the stage read no captions.
        """
        if self.text is None or self.tokenizer is None:
            raise StageError("this model was trained without captions and embeds images alone")
        rows = [self.tokenizer.encode(normalise_caption(text)) for text in self.read_all("text", texts)]
        return self._of(self.text(pad_tokens(rows, self.tokenizer.pad_id).to(self.device)))

    def compare(self, query_modality: Modality, query: Any, modality: Modality, searched: Any) -> Tensor:
        """Scores [N] of a query with everything that is searched, the cosine of the embeddings.

        Raises:
            StageError: an image and a caption are to be compared by embeddings that no loss made comparable.
        """
        if query_modality != modality and self.embedding != "inter":
            raise StageError(
                f"this model cannot compare {query_modality} with {modality}: its `{self.embedding}` embeddings were "
                "trained inside each modality alone; give the checkpoint of a stage with weight_cross, such as mct"
            )
        return super().compare(query_modality, query, modality, searched)

    def _of(self, embeddings: dict[str, Tensor]) -> Tensor:
        if self.embedding not in embeddings:
            raise StageError(f"embedding: {self.embedding!r} is not there, but {', '.join(embeddings)}")
        return embeddings[self.embedding].float()


MODEL = MCT
