"""Text encoders: BERT, and a GRU for cross-modal search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.types import Fraction, PositiveFloat, PositiveInt


class BertEncoder(nn.Module):
    """BERT without the pooler, 108,891,648 parameters. The feature is the first token's last hidden state.

    Downloads nothing. If the released files are missing, you can still build the encoder to print a configuration or
    load a checkpoint. Using the encoder without weights raises an error.

    Args:
        pretrained: folder with released weights, or a name in the local cache of transformers. None starts from random
            weights. The other size arguments must match the files.
        hidden_size: width of the hidden states; equals `feature_dim`.
        max_tokens: number of position embeddings.
        initializer_range: standard deviation of random weights. The default suits BERT's width. In a narrow network,
            use a larger value; otherwise, the first token hardly depends on the other tokens.

    Shapes:
        tokens int64 [B, L], mask bool [B, L] -> [B, feature_dim]

    Examples:
        >>> bert = BertEncoder(hidden_size=32, layers=2, attention_heads=4, intermediate_size=64)
        >>> bert(torch.tensor([[101, 2023, 102]]), torch.ones(1, 3, dtype=torch.bool)).shape
        torch.Size([1, 32])

    Source: docs/papers/mct.md [3] and [7]: bert-base-uncased, [CLS] before the tanh pooler.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        vocabulary_size: PositiveInt = 30522,
        hidden_size: PositiveInt = 768,
        layers: PositiveInt = 12,
        attention_heads: PositiveInt = 12,
        intermediate_size: PositiveInt = 3072,
        max_tokens: PositiveInt = 512,
        dropout: Fraction = 0.1,
        initializer_range: PositiveFloat = 0.02,
    ) -> None:
        super().__init__()
        # Imported here, because it takes seconds and reading a configuration doesn't need it.
        from transformers import BertConfig, BertModel

        sizes: dict[str, Any] = {
            "vocab_size": vocabulary_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": attention_heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": max_tokens,
        }
        options: dict[str, Any] = {
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "attn_implementation": "sdpa",
        }
        self.feature_dim = hidden_size
        self.vocabulary_size = vocabulary_size
        self.max_tokens = max_tokens
        self._missing: str | None = None
        bert: nn.Module | None = None
        if pretrained is not None:
            try:
                bert = _released_bert(pretrained, sizes, options)
            except FileNotFoundError as error:
                self._missing = str(error)
        if bert is None:
            config = BertConfig(**sizes, **options, initializer_range=initializer_range)
            bert = BertModel(config, add_pooling_layer=False)
        self.bert = bert

    def require_weights(self) -> None:
        """Raise FileNotFoundError if the released weights are missing and no checkpoint has been loaded."""
        if self._missing is not None:
            raise FileNotFoundError(self._missing)

    def forward_tokens(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the last hidden states [B, L, feature_dim] of tokens [B, L].

        `mask` (bool [B, L]) is True for tokens to attend to, by default all but the padding (0). The first token is
        always attended to. Ignore the states of tokens whose `mask` is False.
        """
        self.require_weights()
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(f"tokens: expected [B, L] with L up to {self.max_tokens}, got {list(tokens.shape)}")
        mask = tokens != 0 if mask is None else mask.bool()
        # A row without tokens would divide by zero in attention.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        # transformers takes a 4-D mask as is. It looks at the values of a 2-D mask, which makes the host wait for the
        # accelerator.
        return self.bert(tokens, attention_mask=mask[:, None, None, :]).last_hidden_state

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.forward_tokens(tokens, mask)[:, 0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self._missing = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _released_bert(pretrained: str, sizes: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Load a released BERT without the pooler. Check that the files are complete and match the configured sizes."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    loader: Any = BertModel
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Silence the warning about unused pre-training heads; missing weights are checked below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = BertConfig.from_pretrained(pretrained, local_files_only=True)
        for name, wanted in sizes.items():
            if getattr(found, name) != wanted:
                raise ValueError(f"{name} is {getattr(found, name)} in the files, but {wanted} in the configuration")
        model, report = loader.from_pretrained(
            pretrained,
            add_pooling_layer=False,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
        if report["missing_keys"]:
            raise ValueError(f"BERT's tensors are missing, such as {min(report['missing_keys'])}")
    except OSError:
        raise FileNotFoundError(
            f"text_encoder.pretrained: no config.json and model.safetensors in {pretrained}, and no such name in the "
            "local cache of transformers. Download them once, with `hf download google-bert/bert-base-uncased "
            f"--local-dir {pretrained}`, or set pretrained to null for random weights"
        ) from None
    except Exception as error:
        raise ValueError(f"text_encoder.pretrained: the weights in {pretrained} cannot be used: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    # transformers returns it in evaluation mode.
    return model.train()


class GRUEncoder(nn.Module):
    """VSE++'s caption encoder: a GRU over word embeddings. The feature is the state after the last word.

    Shapes:
        tokens int64 [B, L] -> unit vectors [B, hidden_size]

    Source: docs/papers/mct.md [9], cross-modal search.
    """

    def __init__(
        self,
        vocabulary_size: PositiveInt,
        embedding_dim: PositiveInt = 300,
        hidden_size: PositiveInt = 1024,
        layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.feature_dim = hidden_size
        self.vocabulary_size = vocabulary_size
        self.embed = nn.Embedding(vocabulary_size, embedding_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(embedding_dim, hidden_size, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, L], padded with 0 at the end, as unit vectors [B, feature_dim] in float32 or float64."""
        # Padding comes last, so it changes no earlier state. Packing is slower: the host waits for the lengths.
        states, _ = self.rnn(self.embed(tokens))
        # Counting the nonzero tokens would be wrong, because 0 is also SentencePiece's unknown token.
        last = (torch.arange(tokens.shape[1], device=tokens.device) * (tokens != 0)).amax(1)
        features = states[torch.arange(len(tokens), device=tokens.device), last]
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
