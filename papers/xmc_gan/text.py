"""XMC-GAN's text encoder, frozen BERT.

It maps (tokens int64 [n, T], length int64 [n]) to (words [n, T, E], sentence [n, E]) in float32. Word vectors after the
first `length` are zero. Boundary tokens count as words ([2.2]).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from common.data.text_features import SentencePool, pool_sentence, valid_mask
from common.encoders.text import BertEncoder


class BertText(nn.Module):
    """Frozen BERT in evaluation mode. Word vectors are the last hidden states; the sentence vector pools them.

    Args:
        pretrained: folder of released weights, or a name in transformers' local cache. Nothing is downloaded; missing
            files raise an error at the first use. None means random weights, to load from a checkpoint.
        sentence_pool: see `pool_sentence`; the official pooling needs tokens padded to the data set's T.
        sizes: arguments of `BertEncoder`; None reads the configuration next to the weights.

    Shapes:
        tokens int64 [n, T], length int64 [n] -> words [n, T, E], sentence [n, E]; E is 768 for BERT base

    Source: [2.1]: bert-base-uncased, last_hidden_state, no gradients.
    """

    def __init__(
        self,
        pretrained: str | None,
        sentence_pool: SentencePool = "official",
        sizes: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.sentence_pool = sentence_pool
        self.sizes = sizes or ({} if pretrained is None else bert_sizes(Path(pretrained)))
        self.encoder = BertEncoder(pretrained, dropout=0.0, **self.sizes)
        self.feature_dim = self.encoder.feature_dim
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BertText:
        """Stay in evaluation mode, because the features must equal the stored features."""
        return super().train(False)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Return the last hidden states [n, T, E], including padding."""
        # Use full precision even in mixed-precision training, because the features must equal those of the store.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.encoder.forward_tokens(tokens, valid_mask(length, tokens.shape[1])).float()

    def forward(self, tokens: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        words = self.hidden_states(tokens, length)
        mask = valid_mask(length, tokens.shape[1])[..., None]
        return words * mask, pool_sentence(words, length, self.sentence_pool)


def bert_sizes(folder: Path) -> dict[str, int]:
    """Read the sizes from the configuration file next to the weights. Return {} if it is missing or damaged."""
    try:
        stated = json.loads((folder / "config.json").read_bytes())
        return {
            "vocabulary_size": stated["vocab_size"],
            "hidden_size": stated["hidden_size"],
            "layers": stated["num_hidden_layers"],
            "attention_heads": stated["num_attention_heads"],
            "intermediate_size": stated["intermediate_size"],
            "max_tokens": stated["max_position_embeddings"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        # The encoder reads the same files next and reports the error.
        return {}
