"""A trained M3P to use: how well images and captions in many languages belong together, and embeddings of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.data.regions import RegionFeatures
from common.data.text import XLMRTokenizer
from common.errors import StageError
from common.stages.export import (
    Items,
    Modality,
    Trained,
    TrainedModel,
    nothing_to_read,
    renamed,
    with_arguments,
    without_sources,
)
from common.stages.finished import FinishedStage
from papers.m3p import module
from papers.m3p.evaluation import Gallery, PairScorer
from papers.m3p.model import M3PEncoder, M3PModel
from papers.m3p.pairs import RegionArrays, collate_regions
from papers.m3p.regions import RegionNetwork, read_region_network, region_rows


class M3P(TrainedModel):
    """A trained encoder of regions and of text in many languages.

    Args:
        trained: see `common.stages.export.Trained`; `M3P.from_export(path)` reads it.

    Attributes:
        model: `papers.m3p.model.M3PModel`.
        detector: the miniature's region network, which finds the regions of a picture file; None at paper scale, where
            regions come from files of features.
        languages: those that have numbers; text may be in any language that the vocabulary knows. Empty after a
            fine-tuning that does not say which languages the embeddings of its start are of.
        language: of the texts, one of these, where the encoder adds language embeddings; None adds none.
        regions: file of region features to look pictures up in, by their names without suffix; None for the detector.
    """

    paper = "m3p"
    kinds = ("papers.m3p.module.M3PPretraining", "papers.m3p.module.M3PRetrieval")
    classes: ClassVar[tuple[type, ...]] = (
        module.M3PPretraining, module.M3PRetrieval, M3PModel, M3PEncoder, RegionNetwork, XLMRTokenizer
    )  # fmt: skip
    example = "m3p/mini/seed0/m3p"
    otherwise = "matches no images with captions: give the checkpoint of a stage that does, such as m3p"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")
    retrieves: ClassVar[tuple[tuple[Modality, Modality], ...]] = (("text", "image"), ("image", "text"))
    compares_vectors = False
    options = ("language", "regions")
    limits = (
        "For research on images with captions in many languages: search of one by the other. Every pair is read by the "
        "encoder, so a large collection takes long. What it knows of a language is what its text and its dictionaries "
        "held; it inherits their errors and biases. It is not made to recognise persons or to decide about them."
    )
    usage = 'model.match(["picture.png"], ["ein roter Apfel", "a green pear"])'

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = self.build(trained).model
        self.detector: RegionNetwork | None = self.input(trained, "detector", RegionNetwork | None)
        self.tokenizer: XLMRTokenizer = self.input(trained, "tokenizer", XLMRTokenizer)
        self.tokenizer.read(trained.file(XLMRTokenizer.file_name))
        self.max_regions: int = self.input(trained, "max_regions", int)
        self.languages: list[str] = self.input(trained, "languages", list[str])
        self.language: str | None = None
        self.regions: RegionFeatures | None = None
        self.fill(trained)

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        data.prepare_tokenizer()
        weights = renamed(stage.state, model="model")
        embeddings = len(weights["model.encoder.language.weight"])
        inputs: dict[str, Any] = {
            "tokenizer": with_arguments(stage.config["data"]["init_args"]["tokenizer"], model=None),
            "max_regions": data.max_regions,
            "languages": data.languages if data.numbers_languages(embeddings) else [],
            "detector": None,
        }
        if data.region_network is not None:
            detector = read_region_network(data.region_network)
            weights |= {f"detector.{name}": value for name, value in detector.state_dict().items()}
            inputs["detector"] = detector.settings
        files: dict[str, bytes | Path] = {XLMRTokenizer.file_name: data.tokenizer.content}
        return Trained(without_sources(stage.config["model"]), inputs, weights, files)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def read_image(self, file: str | Path) -> RegionArrays:
        """The regions of a picture.

        Args:
            file: the picture; with `regions`, its name without suffix is enough.

        Raises:
            ImageError: it cannot be read.
            RegionError: `regions` has no such picture.
            StageError: there is neither a detector nor a file of features.
        """
        if self.regions is not None:
            table = self.regions.table([Path(file).stem])
            count = min(int(table.mask.sum()), self.max_regions)
            return RegionArrays(table.features[0, :count], table.boxes[0, :count], table.labels[0, :count])
        if self.detector is None:
            raise StageError(
                "this model reads regions of pictures and has no detector of its own: give a file of region features, "
                "which `assemble data m3p --extract-regions` makes, as --regions FILE"
            )
        from common.data.images import read_image

        read_image(file)  # raises for a picture that cannot be read; the detector passes it over
        ((_, found),) = region_rows(self.detector, [(str(file), Path(file))])
        count = self.max_regions
        return RegionArrays(found.features[:count], found.box_vectors[:count], found.labels[:count])

    def _start(self, images: Items) -> tuple[Tensor, Tensor]:
        """Regions as the first block reads them [B, R, D], and which of them count [B, R]."""
        none = torch.tensor(0)
        samples = [{"regions": one, "index": none, "skipped": none} for one in self.read_all("image", images)]
        batch = collate_regions(samples, self.max_regions)
        mask = batch["region_mask"].to(self.device)
        start = self.model.encoder.start_regions(batch["regions"].to(self.device), batch["boxes"].to(self.device), mask)
        return start, mask

    def _tokens(self, texts: Items) -> tuple[Tensor, Tensor]:
        """Ids [B, L] and which of them count [B, L], on the CPU."""
        rows = [torch.tensor(self.tokenizer.encode(text)) for text in self.read_all("text", texts)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id)
        return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

    @property
    def _language(self) -> int | None:
        if self.language is None:
            return None
        if not self.languages:
            raise StageError(
                f"--language {self.language}: this stage does not say which languages its model was pre-trained with; "
                "leave the language out, take the stage of pre-training, or fine-tune again with data.languages"
            )
        if self.language not in self.languages:
            raise StageError(f"--language {self.language}: the model knows {', '.join(self.languages)}")
        return self.languages.index(self.language)

    # -- outputs -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """The encoder's state [B, D] at the first region of each picture read without text.

        It is no vector that can be compared with one of a text: this model reads both together, see `match`.

        Args:
            images: a file, some files, or what `read_image` gives of them.

        Raises:
            ImageError, RegionError, StageError: see `read_image`.
        """
        start, mask = self._start(images)
        return self.model.encoder.encode(start, mask, "first")[:, 0].float()

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """The encoder's state [B, D] at the first token of each text read without regions.

        Args:
            texts: one text or several, in any language.
        """
        ids, mask = (value.to(self.device) for value in self._tokens(texts))
        number = self._language
        languages = None if number is None else torch.full((len(ids),), number, device=self.device)
        start = self.model.encoder.start_text(ids, mask, 0, languages)
        return self.model.encoder.encode(start, mask, "first")[:, 0].float()

    @torch.no_grad()
    def match(self, images: Items, texts: Items) -> Tensor:
        """How well every image and every text belong together, scores float32 [N, M] on the CPU; higher is better.

        Args:
            images: a file, some files, or what `read_image` gives of them.
            texts: one text or several, in any language.

        Raises:
            ImageError, RegionError, StageError: see `read_image`.
        """
        return self._scores(*self._start(images), *self._tokens(texts))

    def _scores(self, start: Tensor, mask: Tensor, ids: Tensor, token_mask: Tensor) -> Tensor:
        rows = torch.arange(len(ids))
        gallery = Gallery(start, mask, ids, token_mask, torch.zeros_like(rows), rows, torch.arange(len(start)))
        return PairScorer(self.model, tokens_per_batch=65536).score(gallery, language=self._language)

    def searched(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> tuple[Any, list[int]]:
        found = list(self.samples(modality, items, skipped))
        if not found:
            raise StageError(nothing_to_read(modality, items, skipped))
        return [sample for _, sample in found], [place for place, _ in found]

    def compare(self, query_modality: Modality, query: Any, modality: Modality, searched: Any) -> Tensor:
        images, texts = ([query], searched) if query_modality == "image" else (searched, [query])
        return self.match(images, texts).flatten()


MODEL = M3P
