"""Matches and searches images and captions in many languages with a trained M3P."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.data.regions import RegionFeatures, Regions, picture_key
from common.data.text import XLMRTokenizer, pad_tokens
from common.errors import StageError
from common.models.finished_stage import FinishedStage
from common.models.safe_builder import path_of
from common.models.trained import Items, Modality, Trained, TrainedModel, with_arguments, without_sources
from papers.m3p import encoder
from papers.m3p.encoder import M3PEncoder, similar_lengths
from papers.m3p.images import region_batch
from papers.m3p.regions import RegionNetwork, read_region_network, region_rows


class M3P(encoder.M3P, TrainedModel):
    """A trained `encoder.M3P`, loaded with `M3P.from_export(path)`: matches images and captions in many languages.

    Attributes:
        detector: the miniature's region network; None at paper scale, where regions come from feature files.
        regions: region features by picture name without suffix; None uses the detector.
        languages: languages with an embedding; text may be in any language of the vocabulary. Empty if the fine-tuning
            didn't list the languages of pre-training.
    """

    paper = "m3p"
    kinds = ("papers.m3p.module.M3PModule",)
    classes: ClassVar[tuple[type, ...]] = (M3PEncoder, RegionNetwork, XLMRTokenizer)
    example = "m3p/mini/seed0/m3p"
    otherwise = "cannot compare images and captions: give the checkpoint of a pre-training stage, such as m3p"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")
    retrieval = "pairs"

    tokenizer: XLMRTokenizer
    max_regions: int
    detector: RegionNetwork | None
    regions: RegionFeatures | None = None
    languages: list[str]
    _language: int | None = None

    @property
    def language(self) -> str | None:
        """The language of texts that are embedded without an image. None adds no language embedding."""
        return None if self._language is None else self.languages[self._language]

    @language.setter
    def language(self, name: str | None) -> None:
        if name is not None and name not in self.languages:
            languages = ", ".join(self.languages) or (
                "no language: leave it out, use the pre-training stage, or fine-tune again with data.languages"
            )
            raise StageError(f"--language {name}: the model knows {languages}")
        self._language = None if name is None else self.languages.index(name)

    # -- use -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """Return the encoder's state [B, D] at each picture's first region, without text. Texts aren't comparable."""
        start, mask = self._start(images)
        return self.encoder.encode(start, mask, True)[:, 0].float()

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """Return the encoder's state [B, D] at each text's first token, without regions."""
        ids, mask = (value.to(self.device) for value in self._tokens(texts))
        languages = None if self._language is None else torch.full((len(ids),), self._language, device=self.device)
        start = self.encoder.start_text(ids, mask, 0, languages)
        return self.encoder.encode(start, mask, True)[:, 0].float()

    @torch.no_grad()
    def match(self, images: Items, texts: Items) -> Tensor:
        """Score images (paths or `read_image` results) with texts: float32 [N, M] on the CPU. Higher is better."""
        start, mask = self._start(images)
        ids, token_mask = self._tokens(texts)
        scores = torch.empty(len(start), len(ids))
        for captions in similar_lengths(token_mask):
            scores[:, captions] = self.score_tile(start, mask, ids[captions], token_mask[captions]).cpu()
        return scores

    def gallery(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> tuple[Any, list[int]]:
        samples = list(self.samples(modality, items, skipped))
        return [sample for _, sample in samples], [number for number, _ in samples]

    def compare(self, query_modality: Modality, query: Any, modality: Modality, gallery: Any) -> Tensor:
        images, texts = ([query], gallery) if query_modality == "image" else (gallery, [query])
        return self.match(images, texts).flatten()

    # -- inputs --------------------------------------------------------------------------------------------------------

    def read_image(self, file: str | Path) -> Regions:
        """Return the regions of a picture. With `regions` set, the picture's name without suffix is enough."""
        if self.regions is not None:
            if self.regions.feature_size != self.encoder.feature_dim:
                raise StageError(
                    f"--regions: the features have {self.regions.feature_size} dimensions, but the model needs "
                    f"{self.encoder.feature_dim}: use the detector that the model was trained with"
                )
            regions = self.regions[picture_key(Path(file).name)]
        elif self.detector is None:
            raise StageError(
                "this model reads region features and has no detector: pass a file of features as --regions FILE; "
                "`assemble data m3p --extract-regions` makes one"
            )
        else:
            ((_, regions),) = region_rows(self.detector, [(str(file), Path(file))])
        return regions.first(self.max_regions)

    def _start(self, images: Items) -> tuple[Tensor, Tensor]:
        """Return inputs [B, R, D] of the first block, and their mask [B, R]."""
        batch = region_batch(self.read_all("image", images), self.max_regions)
        regions, boxes, mask = (batch[name].to(self.device) for name in ("regions", "boxes", "region_mask"))
        return self.encoder.start_regions(regions, boxes, mask), mask

    def _tokens(self, texts: Items) -> tuple[Tensor, Tensor]:
        """Return ids [B, L] and their mask [B, L], on the CPU."""
        rows = [self.tokenizer.encode(text) for text in self.read_all("text", texts)]
        ids = pad_tokens(rows, self.tokenizer.pad_id)
        return ids, ids != self.tokenizer.pad_id

    # -- out of a finished stage or an export --------------------------------------------------------------------------

    @classmethod
    def card_usage(cls, trained: Trained) -> str:
        return "usage_without_detector" if trained.inputs["detector"] is None else "usage"

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        if not data.tokenizer.restore(stage.data_state):
            if data.world is not None:
                data.world.prepare(["sentencepiece"])
            data.tokenizer.prepare()
        weights = {name.removeprefix("model."): value for name, value in stage.state.items()}
        languages = data.languages
        # Fine-tuning uses the languages of its sets, whose numbers may differ from those in pre-training.
        if data.stated_languages is None and len(languages) != len(weights["encoder.language.weight"]):
            languages = []
        inputs: dict[str, Any] = {
            "tokenizer": with_arguments(stage.config["data"]["init_args"]["tokenizer"], model=None),
            "max_regions": data.max_regions,
            "languages": languages,
            "detector": None,
        }
        if data.region_network is not None:
            detector = read_region_network(data.region_network)
            weights |= {f"detector.{name}": value for name, value in detector.state_dict().items()}
            inputs["detector"] = detector.settings
        files = {XLMRTokenizer.file_name: data.tokenizer.content}
        model = {**without_sources(stage.config["model"]["init_args"]["model"]), "class_path": path_of(cls)}
        return Trained(model, inputs, weights, files)

    def read_inputs(self, trained: Trained) -> None:
        self.detector = self.input(trained, "detector", RegionNetwork | None)
        self.tokenizer = self.input(trained, "tokenizer", XLMRTokenizer)
        self.tokenizer.read(trained.file(XLMRTokenizer.file_name))
        self.max_regions = self.input(trained, "max_regions", int)
        self.languages = self.input(trained, "languages", list[str])


MODEL = M3P
