"""T5 as VX2TEXT uses it: its encoder takes embeddings, its decoder writes text or scores options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from common.types import Fraction, PositiveFloat, PositiveInt


class LanguageModel(nn.Module):
    """T5: its encoder takes embeddings, its decoder writes text.

    Built with random weights; `papers.vx2text.weights.load_language_model` gives it released ones.

    Args:
        vocabulary_size, width, layers, attention_heads, key_width, feed_forward_width, dropout: by default those of
            T5-base (222,903,552 parameters).
        embedding_scale: fresh embeddings have deviation 1, too much for a small network.

    Source: [6].
    """

    def __init__(
        self,
        vocabulary_size: PositiveInt = 32128,
        width: PositiveInt = 768,
        layers: PositiveInt = 12,
        attention_heads: PositiveInt = 12,
        key_width: PositiveInt = 64,
        feed_forward_width: PositiveInt = 3072,
        dropout: Fraction = 0.1,
        embedding_scale: PositiveFloat = 1.0,
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

        Source: [7].
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
    def letter_scores(self, embeddings: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
        """Score of each option's letter as the first word of the answer.

        Args:
            embeddings, mask: of the encoder's input [B, N, D] and [B, N].
            letters: the word piece of each letter [B, O].

        Returns:
            [B, O].

        Source: [7], `label`.
        """
        # The decoder starts from its own first word: which label is given does not matter for the first step.
        return self(embeddings, mask, letters[:, :1])[:, 0].float().gather(1, letters)

    @torch.no_grad()
    def option_scores(self, embeddings: Tensor, mask: Tensor, options: Tensor) -> Tensor:
        """Mean log-likelihood of each answer; the encoder runs once.

        Args:
            embeddings, mask: of the encoder's input [B, N, D] and [B, N].
            options: word pieces of the answers [B, O, M]; -100 where there is none.

        Returns:
            [B, O] in nats per token.

        Source: [7], `loglik`.
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

    Source: [9], `no_decoder`.
    """

    def __init__(self, options: PositiveInt = 5, **kwargs: Any) -> None:
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


def first_largest(scores: Tensor) -> Tensor:
    """Position [B] of the largest of [B, O]; of equal ones the first, on every device."""
    return (scores == scores.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)
