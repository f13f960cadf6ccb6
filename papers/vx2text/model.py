"""The networks of VX2TEXT: modality classifiers, the language model, and what joins them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from papers.vx2text.gumbel import DifferentiableTokeniser
from papers.vx2text.prompt import AUDIO_PLACE, VIDEO_PLACE

#: Reserved ids that a prompt holds in the places of modality tokens: this for the first token, one less for each next.
PLACES = {"video": VIDEO_PLACE, "audio": AUDIO_PLACE}

#: What makes the tokens: an estimator of `papers.vx2text.gumbel` that trains the classifier; or `frozen` (the most
#: probable categories of a frozen classifier), `nondifferentiable` (sampled as by `st_topk`, no gradient comes
#: back) or `continuous` (projected features of a trained encoder).
Tokenisation = Literal[
    "st_topk", "st_independent", "soft", "st_topk_selected", "frozen", "nondifferentiable", "continuous"
]
#: Embeddings of categories: a parameter that starts at the mean of their names' word embeddings, or that mean itself.
Table = Literal["learned", "tied"]


def category_names(categories: Sequence[str] | str | None) -> list[str]:
    """Names of a classifier's categories, lower-cased.

    Args:
        categories: the names; or a file with one name a line, or AudioSet's `class_labels_indices.csv`; None for the
            400 actions of Kinetics, in the order of torchvision's weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there are no names, or some twice, also in other letters; or a table lacks the column of names.
    """
    if categories is None:
        from torchvision.models.video import R2Plus1D_18_Weights

        names = list(R2Plus1D_18_Weights.KINETICS400_V1.meta["categories"])
    elif isinstance(categories, str):
        path = Path(categories)
        if not path.is_file():
            raise FileNotFoundError(
                f"model categories: {path} does not exist; for AudioSet it is class_labels_indices.csv of its release, "
                "else a text file with one name a line"
            )
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            table = csv.DictReader(text.splitlines())
            if "display_name" not in (table.fieldnames or ()):
                raise ValueError(
                    f"model categories: {path} has no column display_name; give class_labels_indices.csv of AudioSet's "
                    "release, or a text file with one name a line"
                )
            names = [row["display_name"] or "" for row in table]
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        names = list(categories)
    names = [name.lower() for name in names]
    if not names or len(set(names)) != len(names):
        raise ValueError("model categories: a classifier needs at least one category, and no name twice")
    return names


class ModalityClassifier(nn.Module):
    """A classifier whose categories are the words of its modality.

    Args:
        encoder: network with `feature_dim` features.
        categories: see `category_names`.

    Source: specification 3.
    """

    def __init__(self, encoder: nn.Module, categories: Sequence[str] | str | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = category_names(categories)
        self.fc = nn.Linear(int(encoder.feature_dim), len(self.names))  # type: ignore[arg-type]

    def forward(self, clip: Tensor) -> Tensor:
        """Scores [B, C] of the categories before any softmax."""
        return self.scores(self.encoder(clip))

    def scores(self, features: Tensor) -> Tensor:
        """Scores [B, C] of the categories from features [B, feature_dim]."""
        return self.fc(features)


class SigmoidClassifier(ModalityClassifier):
    """A classifier that was trained with a sigmoid for each category, as PANNs are, taken at its word.

    A category's probability is the share of its sigmoid in the sum of all, where `ModalityClassifier` takes the softmax
    of the scores before it. Weights and parameters are the same.

    Args:
        encoder, categories: see `ModalityClassifier`.

    Source: specification 3, `sigmoid_normalised`.
    """

    def scores(self, features: Tensor) -> Tensor:
        """Logarithms [B, C] of the sigmoids, float32: their softmax is each one's share."""
        return F.logsigmoid(self.fc(features).float())


class LanguageModel(nn.Module):
    """T5: its encoder takes embeddings, its decoder writes text.

    Built with random weights; `papers.vx2text.weights.load_language_model` gives it released ones.

    Args:
        vocabulary_size, width, layers, attention_heads, key_width, feed_forward_width, dropout: by default those of
            T5-base (222,903,552 parameters).
        embedding_scale: fresh embeddings have deviation 1, too much for a small network.

    Source: specification 6.
    """

    def __init__(
        self,
        vocabulary_size: int = 32128,
        width: int = 768,
        layers: int = 12,
        attention_heads: int = 12,
        key_width: int = 64,
        feed_forward_width: int = 3072,
        dropout: float = 0.1,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        config = T5Config(
            vocab_size=vocabulary_size,
            d_model=width,
            d_kv=key_width,
            d_ff=feed_forward_width,
            num_layers=layers,
            num_heads=attention_heads,
            dropout_rate=dropout,
            decoder_start_token_id=0,
        )  # type: ignore[call-arg]
        self.t5: Any = self._network(config)
        with torch.no_grad():
            self.t5.shared.weight.mul_(embedding_scale)

    def _network(self, config: T5Config) -> Any:
        return T5ForConditionalGeneration(config)

    @property
    def width(self) -> int:
        """Width of an embedding, D."""
        return int(self.t5.config.d_model)

    @property
    def vocabulary_size(self) -> int:
        """Number of word embeddings."""
        return int(self.t5.config.vocab_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., D] of word pieces; negative ids, the places of modality tokens, give any value."""
        return self.t5.shared(tokens.clamp(min=0))

    def forward(self, embeddings: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Scores [B, M, V] of the next word at every place of the answer, the answer so far given.

        Args:
            embeddings: of the encoder's input [B, N, D].
            mask: which of them count [B, N].
            labels: word pieces of the answer [B, M]; -100 where there is none.
        """
        return self.t5(
            inputs_embeds=embeddings,
            attention_mask=over_queries(mask),
            decoder_input_ids=self.t5.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits

    @torch.no_grad()
    def generate(self, embeddings: Tensor, mask: Tensor, beams: int = 5, max_tokens: int = 30) -> Tensor:
        """Word pieces [B, <= max_tokens + 1] by beam search, or greedily with one beam.

        Source: specification 7.
        """
        return self.t5.generate(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_tokens,
            length_penalty=1.0,
        )

    @torch.no_grad()
    def option_scores(self, embeddings: Tensor, mask: Tensor, options: Tensor) -> Tensor:
        """Mean log-likelihood of each answer; the encoder runs once.

        Args:
            embeddings, mask: of the encoder's input [B, N, D] and [B, N].
            options: word pieces of the answers [B, O, M]; -100 where there is none.

        Returns:
            [B, O] in nats per token.

        Source: specification 7, `loglik`.
        """
        batch, count, length = options.shape
        encoded = self.t5.encoder(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        flat = options.reshape(batch * count, length)
        logits = self.t5(
            encoder_outputs=(encoded.repeat_interleave(count, dim=0),),
            attention_mask=mask.long().repeat_interleave(count, dim=0),
            decoder_input_ids=self.t5.prepare_decoder_input_ids_from_labels(flat),
            use_cache=False,
        ).logits
        counted = flat != -100
        likelihood = logits.float().log_softmax(-1).gather(2, flat.clamp(min=0)[:, :, None])[:, :, 0]
        return ((likelihood * counted).sum(1) / counted.sum(1).clamp(min=1)).view(batch, count)


def over_queries(mask: Tensor) -> Tensor:
    """A mask [B, N] in the form that attention takes, [B, 1, 1, N].

    Given a flat one, transformers asks the device whether anything is masked, and the host waits for the answer.
    """
    return mask[:, None, None]


class OptionClassifier(LanguageModel):
    """T5's encoder alone: a linear layer on the state at the prompt's last position picks one of several options.

    The discriminative counterpart to a model that writes its answer; it cannot write.

    Args:
        options: how many a question has.
        kwargs: see LanguageModel.

    Source: specification 9, `no_decoder`.
    """

    def __init__(self, options: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(self.width, options)

    def _network(self, config: T5Config) -> nn.Module:
        return T5EncoderModel(config)

    def forward(self, embeddings: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores [B, 1, options] of the options, in the place of those of an answer's only word.

        Args:
            embeddings: of the encoder's input [B, N, D].
            mask: which of them count [B, N].
            labels: not used.
        """
        states = self.t5(inputs_embeds=embeddings, attention_mask=over_queries(mask)).last_hidden_state
        last = mask.long().cumsum(1).argmax(1)
        return self.head(states[torch.arange(len(last), device=last.device), last])[:, None]

    def generate(self, *_: Any, **__: Any) -> Tensor:
        raise TypeError("an option classifier has no decoder: it writes no text")

    def option_scores(self, *_: Any, **__: Any) -> Tensor:
        raise TypeError("an option classifier has no decoder: it tells no likelihood of a text")


class ContinuousTokens(nn.Module):
    """The alternative that the paper argues against: the pooled feature, mapped to embeddings, without categories.

    Source: specification 9, `continuous`.
    """

    def __init__(self, feature_dim: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(feature_dim, tokens * width)

    def forward(self, features: Tensor) -> Tensor:
        """[B, tokens, D] of features [B, feature_dim]."""
        return self.linear(features).view(len(features), self.tokens, -1)


class ModalityTokens(nn.Module):
    """A modality's classifier and tokeniser: from clips to embeddings that the language model reads as words.

    Batch normalisation of the classifier keeps its statistics, in training too. A classifier that does not learn is in
    evaluation mode altogether.

    Args:
        classifier: of the modality.
        width: of an embedding, D.
        tokens: per clip, K.
        tokenisation: see `Tokenisation`.
        temperature: tau.
        table: see `Table`; a learned one is zero until `start_table` or a checkpoint fills it.

    Source: specification 4, 8 and 9.
    """

    def __init__(
        self,
        classifier: ModalityClassifier,
        width: int,
        tokens: int,
        tokenisation: Tokenisation = "st_topk",
        temperature: float = 1.0,
        table: Table = "learned",
    ) -> None:
        super().__init__()
        if tokenisation not in get_args(Tokenisation):
            raise ValueError(
                f"model.tokenisation must be one of {', '.join(get_args(Tokenisation))}, got {tokenisation!r}"
            )
        self.classifier = classifier
        self.tokens = tokens
        self.learns = tokenisation not in ("frozen", "nondifferentiable")
        self.sampled = tokenisation not in ("frozen", "continuous")
        self.tokeniser: DifferentiableTokeniser | None = None
        self.continuous: ContinuousTokens | None = None
        if tokenisation == "continuous":
            self.continuous = ContinuousTokens(int(classifier.encoder.feature_dim), width, tokens)  # type: ignore[arg-type]
            # Without a use here it would be a parameter without gradient, which distributed training refuses.
            classifier.fc.requires_grad_(False)
        else:
            estimator: Any = tokenisation if self.learns else "st_topk"
            categories = len(classifier.names)
            self.tokeniser = DifferentiableTokeniser(
                torch.zeros(categories, width) if table == "learned" else None, tokens, estimator, temperature
            )
            if tokens > categories:
                raise ValueError(f"{tokens} tokens cannot be chosen from {categories} categories")
        if not self.learns:
            classifier.requires_grad_(False)
        # Lightning leaves modules in the mode in which it finds them, so this must not wait for its call.
        self.train()

    def train(self, mode: bool = True) -> ModalityTokens:
        super().train(mode)
        if not self.learns:
            self.classifier.eval()
        for module in self.classifier.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def start_table(self, rows: Tensor) -> None:
        """Let a learned table start from the embeddings of the categories' names [C, D]."""
        if self.tokeniser is not None and self.tokeniser.table is not None:
            with torch.no_grad():
                self.tokeniser.table.copy_(rows)

    def noise_shape(self, clips: int) -> tuple[int, int, int] | None:
        """Shape of the Gumbel noise of one sample, [clips, draws, C]; None where none is needed."""
        if self.tokeniser is None or not self.sampled:
            return None
        return clips, self.tokeniser.draws, len(self.classifier.names)

    def forward(
        self, clips: Tensor, noise: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, categories and scores of the clips of every sample.

        Args:
            clips: [B, S, ...], S clips each.
            noise: Gumbel noise [B, S, draws, C]; None chooses without.
            table: embeddings of the categories [C, D] in place of learned ones.

        Returns:
            Embeddings [B, S * K, D] in the order of the clips, categories [B, S * K] (empty when continuous), scores
            [B, S, C].
        """
        batch, count = clips.shape[:2]
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            features = self.classifier.encoder(clips.flatten(0, 1))
            logits = self.classifier.scores(features)
        if self.continuous is not None:
            embeddings = self.continuous(features)
            chosen = torch.zeros(len(features), 0, dtype=torch.int64, device=features.device)
        else:
            assert self.tokeniser is not None
            embeddings, chosen = self.tokeniser(logits, None if noise is None else noise.flatten(0, 1), table)
        return (
            embeddings.reshape(batch, count * self.tokens, -1),
            chosen.reshape(batch, -1),
            logits.view(batch, count, -1),
        )


def place(embeddings: Tensor, ids: Tensor, tokens: Tensor, modality: str) -> Tensor:
    """Put modality tokens into their places among the words.

    Args:
        embeddings: of the words [B, N, D].
        ids: of the prompt, with reserved ids in the places of modality tokens [B, N].
        tokens: of the modality [B, T, D].
        modality: `video` or `audio`.

    Returns:
        [B, N, D].

    Raises:
        ValueError: the modality is unknown.
    """
    if modality not in PLACES:
        raise ValueError(f"modality must be one of {', '.join(PLACES)}, got {modality!r}")
    number = PLACES[modality] - ids
    here = (number >= 0) & (number < tokens.shape[1])
    row = number.clamp(0, tokens.shape[1] - 1)[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.where(here[:, :, None], tokens.to(embeddings.dtype).gather(1, row), embeddings)


def pieces_of(names: Sequence[str], tokenizer: Any) -> Tensor:
    """Word pieces of every name, padded with -1 [C, P].

    Args:
        names: of the categories.
        tokenizer: has `encode(text) -> ids`, with or without the token that ends a text.
    """
    special = (tokenizer.pad_id, tokenizer.eos_id)
    # A name without a piece of its own would have no mean; the end of a text stands in.
    rows = [[piece for piece in tokenizer.encode(name) if piece not in special] or [tokenizer.eos_id] for name in names]
    pieces = torch.full((len(rows), max(map(len, rows))), -1)
    for row, found in zip(pieces, rows):
        row[: len(found)] = torch.tensor(found)
    return pieces


def table_of(pieces: Tensor, language_model: LanguageModel) -> Tensor:
    """Embedding of every category: the mean of the embeddings of its name's word pieces [C, D].

    Args:
        pieces: as `pieces_of` makes them [C, P].
        language_model: whose word embeddings are taken; a gradient flows to them.

    Source: specification 4.
    """
    counted = (pieces >= 0)[:, :, None]
    return (language_model.embed(pieces) * counted).sum(1) / counted.sum(1)
