"""The encoder of M3P, which reads text alone or regions and text, and its heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32
from common.types import Fraction, PositiveInt

#: Token id for padding ([2]).
PADDING = 1
#: Epsilon of every LayerNorm; XLM-R uses 1e-5 ([3]).
EPSILON = 1e-12

#: Number of captions of similar length in a batch, which is padded to the longest.
CAPTIONS_TOGETHER = 64


class RegionEmbedding(nn.Module):
    """Embeds the features and boxes of image regions. Both must have unit length.

    Source: [3], image embedding.
    """

    def __init__(self, feature_dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.feature = nn.Linear(feature_dim, width)
        self.box = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Map features [B, R, feature_dim] and boxes [B, R, 5] to vectors [B, R, D]."""
        return self.dropout(self.norm(self.feature(features) + self.box(boxes)))


class Block(nn.Module):
    """A transformer block that normalizes after each of its two sums (post-norm).

    Source: [3], block.
    """

    def __init__(
        self, width: int, attention_heads: int, feed_forward_width: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads = attention_heads
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.expand = nn.Linear(width, feed_forward_width)
        self.contract = nn.Linear(feed_forward_width, width)
        self.output_norm = nn.LayerNorm(width, EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Map hidden states [B, S, D] to [B, S, D], zero where the mask bool [B, S] is False. Each row needs a True.

        `first_only` computes only the first position's output [B, 1, D]. It still attends to all positions, but is much
        cheaper.
        """
        queries, query_mask = (hidden[:, :1], mask[:, :1]) if first_only else (hidden, mask)
        # torch scales the queries and computes the softmax in float32, even for half precision.
        attended = F.scaled_dot_product_attention(
            self._split(self.query(queries)),
            self._split(self.key(hidden)),
            self._split(self.value(hidden)),
            attn_mask=mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        attended = attended.transpose(1, 2).flatten(2)
        hidden = self.attention_norm(queries + self.dropout(self.output(attended)))
        hidden = self.output_norm(hidden + self.dropout(self.contract(F.gelu(self.expand(hidden)))))
        return hidden * query_mask[..., None]

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class M3PEncoder(nn.Module):
    """An encoder for two kinds of input: text alone, or regions followed by text.

    Args:
        vocabulary_size: XLM-R's is 250,002.
        width: D.
        positions: longest sequence of regions and tokens together.
        languages: number of language embeddings, which are added only to text alone; 1 adds none.
        joint_language_embedding: always False: as in the released code, tokens after regions get no language embedding.

    Source: [3]; default sizes from the commands in the README.
    """

    def __init__(
        self,
        vocabulary_size: PositiveInt = 250002,
        width: PositiveInt = 768,
        layers: PositiveInt = 12,
        attention_heads: PositiveInt = 12,
        feed_forward_width: PositiveInt = 3072,
        positions: PositiveInt = 514,
        languages: PositiveInt = 100,
        feature_dim: PositiveInt = 2048,
        dropout: Fraction = 0.1,
        attention_dropout: Fraction = 0.1,
        joint_language_embedding: Literal[False] = False,
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.width = width
        self.positions = positions
        self.languages = languages
        self.feature_dim = feature_dim
        self.token = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.position = nn.Embedding(positions, width)
        self.language = nn.Embedding(languages, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.region = RegionEmbedding(feature_dim, width, dropout)
        self.blocks = nn.ModuleList(
            Block(width, attention_heads, feed_forward_width, dropout, attention_dropout) for _ in range(layers)
        )
        with torch.no_grad():
            for table in (self.token, self.position, self.language):
                table.weight.normal_(std=width**-0.5)
            self.token.weight[PADDING].zero_()

    # -- inputs of the first block -------------------------------------------------------------------------------------

    def start_text(
        self, token_ids: Tensor, token_mask: Tensor, first: int = 0, languages: Tensor | None = None
    ) -> Tensor:
        """Embed tokens int64 [B, L] with mask bool [B, L] as vectors [B, L, D]. Tokens don't affect one another yet.

        `first` is the position of the first token: 0 without regions, R after R regions. `languages` [B] are ids of
        embeddings to add.
        """
        vectors = self.token(token_ids) + self.position.weight[first : first + token_ids.shape[1]]
        if languages is not None and self.languages > 1:
            vectors = vectors + self.language(languages)[:, None]
        return self.dropout(self.norm(vectors)) * token_mask[..., None]

    def start_regions(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Embed regions [B, R, feature_dim] with boxes [B, R, 5] and mask bool [B, R] as [B, R, D], zero if masked."""
        vectors = self.region(regions, boxes) + self.position.weight[: regions.shape[1]]
        return self.dropout(self.norm(vectors)) * region_mask[..., None]

    # -- the blocks ----------------------------------------------------------------------------------------------------

    def encode(self, start: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Map `start` [B, S, D] to hidden states [B, S, D], or [B, 1, D] if `first_only`. Masked positions are zero."""
        hidden, mask = self._before_the_last(start, mask)
        return self.blocks[-1](hidden, mask, first_only)

    def encode_pairs(self, start: Tensor, mask: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first hidden state of every pair [P, D], and all hidden states of the pairs in `whole` [G, S, D].

        Shapes:
            start [P, S, D]; mask bool [P, S]; whole [G]
        """
        hidden, mask = self._before_the_last(start, mask)
        last = self.blocks[-1]
        return last(hidden, mask, True)[:, 0], last(hidden[whole], mask[whole])

    def _before_the_last(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Let an empty row attend to its first position, because attention over nothing is NaN.
        mask = torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden, mask)
        return hidden, mask

    def forward(self, token_ids: Tensor, token_mask: Tensor, languages: Tensor | None = None) -> Tensor:
        """Return the hidden states [B, L, D] of text alone, zero where the mask is False; see `start_text`."""
        return self.encode(self.start_text(token_ids, token_mask, 0, languages), token_mask)

    # -- means without any block, for a warm start ---------------------------------------------------------------------

    def mean_of_words(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Average the word embeddings of tokens [B, L]: [B, D]."""
        return _mean(self.token(token_ids), token_mask)

    def mean_of_regions(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Average the region embeddings of features [B, R, feature_dim] and boxes [B, R, 5]: [B, D]."""
        return _mean(self.region(regions, boxes), region_mask)


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(rows.dtype)
    return (rows * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class MatchHead(nn.Module):
    """Scores whether image and text match, from the hidden state of the first region.

    Computes in float32, because rounding to bfloat16 makes many logits equal, and ties count as misses.

    Source: [3], match head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, first: Tensor) -> Tensor:
        """Map hidden states [B, D] to logits [B], in at least float32."""
        pooled = torch.tanh(_in_full_precision(self.dense, first))
        return _in_full_precision(self.score, pooled)[..., 0]


def _in_full_precision(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight = at_least_float32(layer.weight)
        return F.linear(x.to(weight.dtype), weight, at_least_float32(layer.bias))


class RegionHeads(nn.Module):
    """Predicts the class (0 is background) and the features of masked regions.

    Source: [3], other heads.
    """

    def __init__(self, width: int, classes: int, feature_dim: int) -> None:
        super().__init__()
        self.regression = nn.Linear(width, feature_dim)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.classifier = nn.Linear(width, classes)

    def classes(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, D] to logits [K, classes]."""
        return self.classifier(self.norm(F.gelu(self.dense(hidden))))


def all_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Concatenate each of A rows [R, ...] with each of B rows [L, ...]: [A * B, R + L, ...], row a * B + b."""
    images, texts = len(left), len(right)
    first = left[:, None].expand(images, texts, *left.shape[1:])
    second = right[None].expand(images, texts, *right.shape[1:])
    return torch.cat([first, second], dim=2).flatten(0, 1)


def similar_lengths(token_mask: Tensor) -> list[Tensor]:
    """Return groups of caption numbers with similar lengths, shortest first."""
    return list(token_mask.sum(1).argsort(stable=True).split(CAPTIONS_TOGETHER))


class M3P(nn.Module):
    """The encoder with the heads of all tasks. `region_classes` includes background (0).

    Source: [3].
    """

    def __init__(self, encoder: M3PEncoder, region_classes: PositiveInt = 1600) -> None:
        super().__init__()
        self.encoder = encoder
        self.match_head = MatchHead(encoder.width)
        self.region_heads = RegionHeads(encoder.width, region_classes, encoder.feature_dim)
        # The head's weights are the word embeddings, without a transformation in between.
        self.vocabulary_head = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(encoder.vocabulary_size))})

    def words(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, D] to logits [K, V] of the words."""
        return F.linear(hidden, self.encoder.token.weight, self.vocabulary_head["bias"])

    @torch.inference_mode()
    def score_tile(
        self, image: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, tokens_per_batch: int = 65536
    ) -> Tensor:
        """Score the match of all pairs of some images and a few captions, float32 [N, M].

        Shapes:
            image [N, R, D] of `start_regions`; image_mask bool [N, R]
            tokens int64 [M, W], cut to the longest caption; token_mask bool [M, W]
        """
        longest, regions = max(int(token_mask.sum(1).max()), 1), image.shape[1]
        tokens, mask = (rows[:, :longest].to(image.device) for rows in (tokens, token_mask))
        text = self.encoder.start_text(tokens, mask, regions)
        images = max(1, tokens_per_batch // (len(tokens) * (regions + longest)))
        scores = [
            self.match_head(self.encoder.encode(all_pairs(start, text), all_pairs(present, mask), True)[:, 0])
            for start, present in zip(image.split(images), image_mask.split(images))
        ]
        return torch.cat(scores).float().unflatten(0, (len(image), len(tokens)))
