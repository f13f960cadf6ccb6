"""The model of VX2TEXT: video and audio become word tokens, from which a language model generates text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.types import PositiveFloat, PositiveInt
from papers.vx2text.language_model import LanguageModel
from papers.vx2text.prompt import PLACES, Modality
from papers.vx2text.tokens import ModalityClassifier, ModalityTokens, Table, Tokenization, pieces_of, place, table_of


class VX2Text(nn.Module):
    """Generates text from video, sound, speech and history ([1] to [8]).

    Args:
        video_classifier, audio_classifier: networks whose categories become tokens.
        modalities: the data's modalities. Classifiers of other modalities are dropped.
        video_tokens, audio_tokens: K, the tokens per clip.
        tokenization, temperature, table: see `ModalityTokens`.
    """

    tokens: Mapping[Modality, ModalityTokens]

    def __init__(
        self,
        language_model: LanguageModel,
        video_classifier: ModalityClassifier | None = None,
        audio_classifier: ModalityClassifier | None = None,
        modalities: Sequence[Modality] = ("video", "audio"),
        video_tokens: PositiveInt = 3,
        audio_tokens: PositiveInt = 3,
        tokenization: Tokenization = "st_topk",
        temperature: PositiveFloat = 1.0,
        table: Table = "learned",
        beams: PositiveInt = 5,
        max_answer_tokens: PositiveInt = 30,
    ) -> None:
        super().__init__()
        self.beams = beams
        self.max_answer_tokens = max_answer_tokens
        self.language_model = language_model
        parts = {"video": (video_classifier, video_tokens), "audio": (audio_classifier, audio_tokens)}
        self.tokens = nn.ModuleDict()  # type: ignore[assignment]
        for name, (classifier, count) in parts.items():
            if name in modalities:
                if classifier is None:
                    raise ValueError(f"model.model.modalities has {name}, but model.model.{name}_classifier is null")
                made = ModalityTokens(classifier, language_model.width, count, tokenization, temperature, table)
                self.tokens[name] = made  # type: ignore[index]

    def forward(
        self, batch: Mapping[str, Any], noise: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Embed a batch's prompts for the language model, and put the modality tokens into their places.

        Choose the most probable categories for modalities without Gumbel noise.

        Returns:
            Embeddings [B, N, D], mask [B, N], and for every modality its categories [B, S * K] and scores [B, S, C].
        """
        ids = batch["input_ids"]
        embeddings, mask = self.language_model.embed(ids), ids != 0
        named: dict[str, tuple[Tensor, Tensor]] = {}
        for name, tokens in self.tokens.items():
            table = table_of(tokens.pieces, self.language_model) if tokens.tied else None
            rows, chosen, scores = tokens(batch[name], (noise or {}).get(name), table)
            embeddings = place(embeddings, ids, rows, name)
            # Mask the tokens of a missing modality, because its input is only black or silent.
            absent = ~batch[f"{name}_present"][:, None] & (ids <= PLACES[name]) & (ids > PLACES[name] - rows.shape[1])
            mask = mask & ~absent
            named[name] = chosen, scores
        return embeddings, mask, named

    def read_names(self, tokenizer: Any) -> None:
        """Look up the word pieces of the categories' names."""
        for tokens in self.tokens.values():
            names = tokens.classifier.names
            tokens.pieces = pieces_of(names, tokenizer).to(tokens.classifier.fc.weight.device)

    @torch.no_grad()
    def start_tables(self) -> None:
        """Initialize each learned category embedding with the mean of the embeddings of its name's word pieces."""
        for tokens in self.tokens.values():
            if tokens.table is not None:
                tokens.table.weight.copy_(table_of(tokens.pieces, self.language_model))

    @torch.no_grad()
    def texts(
        self, batch: Mapping[str, Any], embeddings: Tensor, mask: Tensor, tokenizer: Any
    ) -> tuple[list[str], Tensor | None]:
        """Generate a text for every sample, or pick one of the sample's `options` by letter or likelihood.

        Return the texts and, for options, the positions [B] of the picked options. The first option wins ties.

        Source: [7].
        """
        if "options" not in batch:
            rows = self.language_model.generate(embeddings, mask, self.beams, self.max_answer_tokens)
            return [tokenizer.decode(row) for row in rows.tolist()], None
        if "answer_options" in batch:
            scores = self.language_model.letter_scores(embeddings, mask, batch["answer_options"])
        else:
            scores = self.language_model.option_scores(embeddings, mask, batch["option_labels"])
        # Pick the first of equal scores on every device.
        picked = (scores == scores.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)
        return [options[number] for options, number in zip(batch["options"], picked.tolist())], picked
