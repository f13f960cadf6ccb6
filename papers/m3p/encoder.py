"""The encoder of M3P for text alone or regions and text, and its heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.losses.info_nce import at_least_float32
from common.types import Fraction, PositiveInt

#: Token id of padding ([2]).
PADDING = 1
#: Epsilon of every LayerNorm; XLM-R has 1e-5 ([3]).
EPSILON = 1e-12

#: Captions of similar length per batch, padded to the longest.
CAPTIONS_TOGETHER = 64

Positions = Literal["all", "first"]


class RegionEmbedding(nn.Module):
    """Embeds the detector's features and boxes of image regions.

    Shapes:
        features [B, R, feature_dim], L2-normalized; boxes [B, R, 5], L2-normalized -> [B, R, D]

    Source: [3], image embedding.
    """

    def __init__(self, feature_dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.feature = nn.Linear(feature_dim, width)
        self.box = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        return self.dropout(self.norm(self.feature(features) + self.box(boxes)))


class Block(nn.Module):
    """A transformer block that normalizes after each of its two sums.

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

    def forward(self, hidden: Tensor, mask: Tensor, positions: Positions = "all") -> Tensor:
        """Output [B, S, D] for hidden states [B, S, D], zero where the mask bool [B, S] is False; a row needs one True.

        `first` computes only the first output position, [B, 1, D], which is much cheaper and still attends to all.
        """
        asking = hidden if positions == "all" else hidden[:, :1]
        wanted = mask if positions == "all" else mask[:, :1]
        # torch scales the queries and computes the softmax in float32 even for half precision.
        attended = F.scaled_dot_product_attention(
            self._split(self.query(asking)),
            self._split(self.key(hidden)),
            self._split(self.value(hidden)),
            attn_mask=mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        attended = attended.transpose(1, 2).flatten(2)
        hidden = self.attention_norm(asking + self.dropout(self.output(attended)))
        hidden = self.output_norm(hidden + self.dropout(self.contract(F.gelu(self.expand(hidden)))))
        return hidden * wanted[..., None]

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class M3PEncoder(nn.Module):
    """One encoder with two kinds of input: text alone, or regions followed by text.

    Args:
        vocabulary_size: XLM-R's is 250,002.
        width: D.
        attention_heads: a divisor of D.
        positions: longest sequence of regions and tokens together.
        languages: number of language embeddings; with 1, none is added.
        dropout, attention_dropout: for sums and for attention weights.
        joint_language_embedding: also add language embeddings to tokens that follow regions. The released code builds
            the ids but doesn't use them.

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
        joint_language_embedding: bool = False,
    ) -> None:
        super().__init__()
        if width % attention_heads:
            raise ValueError(f"encoder.attention_heads is {attention_heads}, which does not divide width {width}")
        if layers < 1 or languages < 1:
            raise ValueError(f"encoder: needs a layer and a language, got layers={layers}, languages={languages}")
        self.vocabulary_size = vocabulary_size
        self.width = width
        self.positions = positions
        self.languages = languages
        self.feature_dim = feature_dim
        self.joint_language_embedding = joint_language_embedding
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

    # -- what a sequence begins with -----------------------------------------------------------------------------------

    def start_text(
        self, token_ids: Tensor, token_mask: Tensor, first: int = 0, languages: Tensor | None = None
    ) -> Tensor:
        """Vectors [B, L, D] of tokens int64 [B, L] for the first block, independent of regions and other tokens.

        Args:
            token_mask: valid tokens, bool [B, L].
            first: position of the first token: 0 without regions, R after R regions.
            languages: ids [B] or [B, L] of embeddings to add; None adds none.
        """
        last = first + token_ids.shape[1]
        if last > self.positions:
            raise ValueError(
                f"a sequence of {first} regions and {token_ids.shape[1]} tokens is longer than the {self.positions} "
                "positions of the encoder: shorten data.max_tokens or the number of regions, or raise encoder.positions"
            )
        vectors = self.token(token_ids) + self.position.weight[first:last]
        if languages is not None and self.languages > 1:
            vectors = vectors + self.language(languages if languages.ndim == 2 else languages[:, None])
        return self.dropout(self.norm(vectors)) * token_mask[..., None]

    def start_regions(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Vectors [B, R, D] of regions (zero if masked) for the first block, which can be reused for many texts.

        Shapes:
            regions [B, R, feature_dim], boxes [B, R, 5], both L2-normalized; region_mask bool [B, R]
        """
        vectors = self.region(regions, boxes) + self.position.weight[: regions.shape[1]]
        return self.dropout(self.norm(vectors)) * region_mask[..., None]

    # -- the blocks ----------------------------------------------------------------------------------------------------

    def encode(self, start: Tensor, mask: Tensor, positions: Positions = "all") -> Tensor:
        """Hidden states [B, S, D], or [B, 1, D], of `start` [B, S, D]; zero where the mask bool [B, S] is False."""
        hidden, mask = self._before_the_last(start, mask)
        return self.blocks[-1](hidden, mask, positions)

    def encode_pairs(self, start: Tensor, mask: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the first position of all pairs [P, D], and of all positions of the true pairs [G, S, D].

        Shapes:
            start [P, S, D]; mask bool [P, S]; whole [G], rows with all positions
        """
        hidden, mask = self._before_the_last(start, mask)
        last = self.blocks[-1]
        return last(hidden, mask, "first")[:, 0], last(hidden[whole], mask[whole])

    def _before_the_last(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = at_least_one(mask)
        *earlier, _ = self.blocks
        for block in earlier:
            hidden = block(hidden, mask)
        return hidden, mask

    def forward(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        regions: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, R + L, D] of text, or of regions followed by text; zero at invalid positions.

        Shapes:
            token_ids int64 [B, L]; token_mask bool [B, L]; languages [B] or [B, L]
            regions [B, R, feature_dim], boxes [B, R, 5], both L2-normalized; region_mask bool [B, R], None for all
        """
        if regions is None:
            return self.encode(self.start_text(token_ids, token_mask, 0, languages), token_mask)
        return self.encode(*self.start_joint(token_ids, token_mask, regions, boxes, region_mask, languages))

    def start_joint(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        regions: Tensor,
        boxes: Tensor | None,
        region_mask: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Vectors [B, R + L, D] of regions and text for the first block, and their mask [B, R + L]."""
        if boxes is None:
            raise ValueError("regions without boxes: the encoder needs to know where a region is")
        if region_mask is None:
            region_mask = torch.ones(regions.shape[:2], dtype=torch.bool, device=regions.device)
        added = languages if self.joint_language_embedding else None
        start = torch.cat(
            [
                self.start_regions(regions, boxes, region_mask),
                self.start_text(token_ids, token_mask, regions.shape[1], added),
            ],
            dim=1,
        )
        return start, torch.cat([region_mask, token_mask], dim=1)

    # -- means without any block, for a warm start ---------------------------------------------------------------------

    def mean_of_words(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Mean word embedding [B, D] of tokens [B, L]."""
        return _mean(self.token(token_ids), token_mask)

    def mean_of_regions(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Mean region embedding [B, D] of features [B, R, feature_dim] and boxes [B, R, 5]."""
        return _mean(self.region(regions, boxes), region_mask)


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(rows.dtype)
    return (rows * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def at_least_one(mask: Tensor) -> Tensor:
    """The mask with the first position enabled in empty rows, because attention over nothing is NaN."""
    empty = ~mask.any(1, keepdim=True)
    return torch.cat([mask[:, :1] | empty, mask[:, 1:]], dim=1)


class MatchHead(nn.Module):
    """Whether image and text match: a logit from the hidden state of the first region.

    Always in float32, because rounding to bfloat16 makes many of the compared logits equal, and ties count as misses.

    Shapes:
        [B, D] -> [B]

    Source: [3], match head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def pooled(self, first: Tensor) -> Tensor:
        """[B, D], at least float32, from the hidden state [B, D] of the first position."""
        with torch.autocast(first.device.type, enabled=False):
            return torch.tanh(_in_full_precision(self.dense, first))

    def forward(self, first: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return _in_full_precision(self.score, self.pooled(first))[..., 0]


def _in_full_precision(layer: nn.Linear, x: Tensor) -> Tensor:
    """Output of a layer with the input and weights raised to float32."""
    weight = at_least_float32(layer.weight)
    return F.linear(x.to(weight.dtype), weight, at_least_float32(layer.bias))


class RegionHeads(nn.Module):
    """Predicts the class (0 is background) and the feature of masked regions.

    Source: [3], other heads.
    """

    def __init__(self, width: int, classes: int, feature_dim: int) -> None:
        super().__init__()
        self.regression = nn.Linear(width, feature_dim)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.classifier = nn.Linear(width, classes)

    def classes(self, hidden: Tensor) -> Tensor:
        """Logits [K, classes] of hidden states [K, D]."""
        return self.classifier(self.norm(F.gelu(self.dense(hidden))))


class VocabularyHead(nn.Module):
    """Logits of words: product with the word embeddings, plus a bias.

    Source: [3]; tied, without a transformation in between.
    """

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits [K, V] of hidden states [K, D], by the word embeddings [V, D]."""
        return F.linear(hidden, table, self.bias)


def all_pairs(left: Tensor, right: Tensor) -> Tensor:
    """All pairs of rows [R, ...] and [L, ...], concatenated: [A * B, R + L, ...], A is the outer index."""
    images, texts = len(left), len(right)
    first = left[:, None].expand(images, texts, *left.shape[1:])
    second = right[None].expand(images, texts, *right.shape[1:])
    return torch.cat([first, second], dim=2).flatten(0, 1)


def similar_lengths(token_mask: Tensor, together: int = CAPTIONS_TOGETHER) -> list[Tensor]:
    """Groups of caption numbers of similar length, shortest first."""
    return list(token_mask.sum(1).argsort(stable=True).split(together))


class M3P(nn.Module):
    """The encoder with the heads of all tasks; `region_classes` include background (0).

    Source: [3].
    """

    def __init__(self, encoder: M3PEncoder, region_classes: PositiveInt = 1600) -> None:
        super().__init__()
        self.encoder = encoder
        self.match_head = MatchHead(encoder.width)
        self.region_heads = RegionHeads(encoder.width, region_classes, encoder.feature_dim)
        self.vocabulary_head = VocabularyHead(encoder.vocabulary_size)

    def words(self, hidden: Tensor) -> Tensor:
        """Logits [K, V] of the words at hidden states [K, D]."""
        return self.vocabulary_head(hidden, self.encoder.token.weight)

    @torch.inference_mode()
    def score_tile(
        self,
        image: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        language: int | None = None,
        tokens_per_batch: int = 65536,
    ) -> Tensor:
        """Match scores [N, M] float32 of all pairs of some images and a few captions.

        Args:
            language: number of the captions' language, if the encoder adds language embeddings to text with regions.

        Shapes:
            image [N, R, D] of `start_regions`; image_mask bool [N, R]
            tokens int64 [M, W], cut to the longest caption; token_mask bool [M, W]
        """
        longest, regions = max(int(token_mask.sum(1).max()), 1), image.shape[1]
        tokens, mask = (rows[:, :longest].to(image.device) for rows in (tokens, token_mask))
        languages = None
        if language is not None and self.encoder.joint_language_embedding:
            languages = torch.full((len(tokens),), language, device=image.device)
        text = self.encoder.start_text(tokens, mask, regions, languages)
        images = max(1, tokens_per_batch // (len(tokens) * (regions + longest)))
        scores = [
            self.match_head(self.encoder.encode(all_pairs(start, text), all_pairs(known, mask), "first")[:, 0])
            for start, known in zip(image.split(images), image_mask.split(images))
        ]
        return torch.cat(scores).float().unflatten(0, (len(image), len(tokens)))
