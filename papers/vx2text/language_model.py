"""T5 for VX2TEXT: the encoder takes embeddings, and the decoder generates text or scores options."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from common.types import Fraction, PositiveFloat, PositiveInt
from papers.vx2text.loss import per_answer


class LanguageModel(nn.Module):
    """T5 with random weights. The default sizes are those of T5-base (222,903,552 parameters).

    `papers.vx2text.weights.load_language_model` loads released weights. `embedding_scale` is the standard deviation of
    the initial embeddings. 1 is too large for a small network. All methods take the encoder's input embeddings [B, N,
    D] and their mask [B, N]. Labels are padded with -100.

    Source: [6].
    """

    network: ClassVar[Any] = T5ForConditionalGeneration

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
            attn_implementation="sdpa",  # other implementations don't accept the mask of `over_queries`
        )  # type: ignore[call-arg]
        self.t5: Any = self.network(config)
        with torch.no_grad():
            self.t5.shared.weight.mul_(embedding_scale)

    @property
    def width(self) -> int:
        return int(self.t5.config.d_model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed word pieces as [..., D]. Negative ids mark places of modality tokens, and get arbitrary values."""
        return self.t5.shared(tokens.clamp(min=0))

    def forward(self, embeddings: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Score the next word [B, M, V] at every place of the answer `labels` [B, M], given the words before it."""
        return self.t5(
            inputs_embeds=embeddings,
            attention_mask=over_queries(mask),
            decoder_input_ids=self.t5.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits

    @torch.no_grad()
    def generate(self, embeddings: Tensor, mask: Tensor, beams: int = 5, max_tokens: int = 30) -> Tensor:
        """Generate word pieces [B, <= max_tokens + 1] by beam search, or greedily with one beam.

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
        """Score each option's letter (one word piece) as the first word of the answer: [B, O].

        Source: [7], `label`.
        """
        # The decoder starts with its start token, so the scores of the first word don't depend on the label passed.
        return self(embeddings, mask, letters[:, :1])[:, 0].float().gather(1, letters)

    @torch.no_grad()
    def option_scores(self, embeddings: Tensor, mask: Tensor, options: Tensor) -> Tensor:
        """Return the mean log-likelihood [B, O] of each answer [B, O, M], in nats per token. Run the encoder once.

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
        losses, words = per_answer(logits, flat)
        return -(losses / words.clamp(min=1)).view(batch, count)


def over_queries(mask: Tensor) -> Tensor:
    """Reshape a mask [B, N] to [B, 1, 1, N]. With [B, N], transformers would make the host wait for the device."""
    return mask[:, None, None]


class OptionClassifier(LanguageModel):
    """Picks an option with T5's encoder and a linear layer on the prompt's last state. It can't generate text.

    Source: [9], `no_decoder`.
    """

    network = T5EncoderModel

    def __init__(self, options: PositiveInt = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(self.width, options)

    def forward(self, embeddings: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score the options: [B, 1, options], in place of scores of an answer's only word. `labels` are unused."""
        states = self.t5(inputs_embeds=embeddings, attention_mask=over_queries(mask)).last_hidden_state
        last = mask.long().cumsum(1).argmax(1)
        return self.head(states[torch.arange(len(last), device=last.device), last])[:, None]
