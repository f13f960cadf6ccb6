"""What is measured on held-out data: generated text, picked options, chosen categories. Every sample counts once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.metrics.captioning import METRICS, CaptionMeter, Protocol
from common.metrics.gathering import OncePerSample, gather_objects
from papers.vx2text.loss import per_answer
from papers.vx2text.model import LanguageModel


@dataclass(frozen=True)
class Written:
    """What the model wrote for a sample.

    Attributes:
        text: the generated text, or the picked option.
        answer: the original one; "" where it is withheld.
        references: texts that it is compared with.
        question: what was asked; "" for a description.
        kind: of the question, in the miniature; else "".
    """

    text: str
    answer: str
    references: tuple[str, ...]
    question: str
    kind: str

    @property
    def matches(self) -> bool:
        """Whether the text is the original one, apart from spaces and case."""
        return _plain(self.text) == _plain(self.answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def pick_by_label(
    language_model: LanguageModel, embeddings: Tensor, mask: Tensor, letters: Tensor
) -> tuple[Tensor, Tensor]:
    """Pick the option whose letter is the most probable first word, of those letters; ties go to the lower one.

    Args:
        language_model: the network.
        embeddings, mask: of the prompts [B, N, D] and [B, N].
        letters: the word piece of each option's letter [B, O].

    Returns:
        Picked options [B] and their scores [B, O].

    Source: specification 7, `label`.
    """
    # The decoder starts from its own first word: which label is given does not matter for the first step.
    scores = language_model(embeddings, mask, letters[:, :1])[:, 0].float().gather(1, letters)
    return first_largest(scores), scores


def pick_by_likelihood(
    language_model: LanguageModel, embeddings: Tensor, mask: Tensor, options: Tensor
) -> tuple[Tensor, Tensor]:
    """Pick the option whose text has the largest mean log-likelihood per word piece; ties go to the lower one.

    Args:
        language_model: the network.
        embeddings, mask: of the prompts [B, N, D] and [B, N].
        options: word pieces of the answers [B, O, M]; -100 where there is none.

    Returns:
        Picked options [B] and their scores [B, O].

    Source: specification 7, `loglik`.
    """
    scores = language_model.option_scores(embeddings, mask, options)
    return first_largest(scores), scores


def first_largest(scores: Tensor) -> Tensor:
    """Position [B] of the largest of [B, O]; of equal ones the first, on every device."""
    return (scores == scores.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)


def pick(batch: dict[str, Any], language_model: LanguageModel, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Pick one of the options of every sample [B], by their letters or by their text, whichever the batch brings."""
    if "answer_options" in batch:
        return pick_by_label(language_model, embeddings, mask, batch["answer_options"])[0]
    return pick_by_likelihood(language_model, embeddings, mask, batch["option_labels"])[0]


def generate(
    language_model: LanguageModel, embeddings: Tensor, mask: Tensor, tokenizer: Any, beams: int, max_tokens: int
) -> list[str]:
    """Text for every prompt of a batch."""
    rows = language_model.generate(embeddings, mask, beams, max_tokens)
    return [tokenizer.decode(row) for row in rows.tolist()]


def written(
    batch: dict[str, Any],
    language_model: LanguageModel,
    embeddings: Tensor,
    mask: Tensor,
    tokenizer: Any,
    beams: int,
    max_tokens: int,
) -> list[str]:
    """What the model writes for every sample: the picked option where there are options, else generated text."""
    if "options" in batch:
        return _options_at(batch, pick(batch, language_model, embeddings, mask))
    return generate(language_model, embeddings, mask, tokenizer, beams, max_tokens)


def _options_at(batch: dict[str, Any], picked: Tensor) -> list[str]:
    return [options[place] for options, place in zip(batch["options"], picked.tolist())]


class WordsTest:
    """How well a classifier names what is true of a clip.

    `precision`: share of true words among the most probable ones, as many as there are true ones; `loss`.
    """

    def __init__(self) -> None:
        self._meter = OncePerSample("precision", "loss")

    def reset(self) -> None:
        """Start counting anew."""
        self._meter.reset()

    def update(self, index: Tensor, logits: Tensor, words: Tensor) -> None:
        """Add clips with scores [B, C] and marks of the true categories [B, C]."""
        words = words.float()
        number = words.sum(1).clamp(min=1)
        loss = -(logits.float().log_softmax(1) * words).sum(1) / number
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        hits = (words * (rank < number[:, None])).sum(1)
        self._meter.update(index, precision=hits / number, loss=loss)

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """The means over all clips of all processes."""
        found = self._meter.compute(device)
        return {"precision": found["precision"], "loss": found["loss"], "clips": found["count"]}


class TextTest:
    """Loss, generated text and picked options over a test set.

    | name | of |
    |---|---|
    | `loss` | every sample: cross-entropy per word piece |
    | `accuracy` | samples with options, in percent |
    | `exact_match`, `exact_match_<kind>` | generated text that is the original answer; kinds in the miniature alone |
    | `distinct` | how many different texts were written |
    | `bleu_1` ... `cider` | generated text under the first protocol; others as `<protocol>/<name>` |
    | `video_token_precision`, ... | share of true categories among the chosen ones, in the miniature alone |

    METEOR is left out where Java is missing.

    Args:
        beams, max_tokens: of the generation.
        meteor: whether METEOR is among them.
        protocols: of the caption metrics. `avsd_1ref` is judged against the original answer alone; `avsd7` and `avsd8`
            leave out samples that have no other reference, since the two scales must not mix.

    Raises:
        ValueError: `beams` or `max_tokens` is below 1, or a protocol is unknown.
    """

    def __init__(
        self,
        beams: int = 5,
        max_tokens: int = 30,
        protocols: tuple[str, ...] = (),
        meteor: bool = False,
    ) -> None:
        for field, value in (("beams", beams), ("max_answer_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"model.{field} must be at least 1, got {value}")
        self.beams = beams
        self.max_tokens = max_tokens
        self.protocols = protocols
        self._captions: dict[str, CaptionMeter] = {
            name: CaptionMeter(_protocol(name), with_meteor=meteor) for name in protocols
        }
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._loss = OncePerSample("loss", "words")
        self._options = OncePerSample("accuracy")
        self._precision: dict[str, OncePerSample] = {}
        self._written: dict[int, Written] = {}
        self.written: dict[int, Written] = {}
        for meter in self._captions.values():
            meter.reset()

    def update_loss(self, batch: dict[str, Any], logits: Tensor) -> None:
        """Add the loss of a batch whose answers were given."""
        loss, words = per_answer(logits, batch["labels"])
        self._loss.update(batch["index"], loss=loss, words=words)

    def update_text(
        self, batch: dict[str, Any], language_model: LanguageModel, embeddings: Tensor, mask: Tensor, tokenizer: Any
    ) -> None:
        """Generate, or pick an option, for a batch of prompts."""
        if "options" in batch:
            picked = pick(batch, language_model, embeddings, mask)
            known = batch["correct"] >= 0
            right = 100.0 * (picked == batch["correct"]).float()
            self._options.update(batch["index"][known], accuracy=right[known])
            texts = _options_at(batch, picked)
        else:
            texts = generate(language_model, embeddings, mask, tokenizer, self.beams, self.max_tokens)
        columns = (batch[name] for name in ("answer_text", "references", "question_text", "kind"))
        for item, text, answer, references, question, kind in zip(batch["index"].tolist(), texts, *columns):
            self._written.setdefault(item, Written(text, answer, tuple(references), question, kind))

    def update_tokens(self, batch: dict[str, Any], found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Compare the chosen categories with the true ones, where those are known.

        Args:
            batch: marks the true categories of every modality [B, C], in the miniature.
            found: chosen categories [B, T] and scores of every modality.
        """
        for name, (chosen, _) in found.items():
            marks = batch.get(f"{name}_words")
            if marks is None or chosen.shape[1] == 0:
                continue
            known = batch[f"{name}_present"] & marks.any(1)
            share = marks.to(torch.float32).gather(1, chosen).mean(1)
            meter = self._precision.setdefault(name, OncePerSample("precision"))
            meter.update(batch["index"][known], precision=share[known])

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """All metrics, the same on every process."""
        loss = self._loss.compute(device)
        found: dict[str, Tensor] = {"samples": loss["count"]}
        if loss["words"] > 0:  # the answers are not withheld
            found["loss"] = loss["loss"] / loss["words"]
        names = sorted(set(gather_objects(list(self._precision))))
        for name in names:
            meter = self._precision.get(name, OncePerSample("precision"))
            precision = meter.compute(device)
            if precision["count"] > 0:
                found[f"{name}_token_precision"] = precision["precision"]
        self.written = {}
        for item, written in gather_objects(sorted(self._written.items())):
            self.written.setdefault(item, written)
        options = self._options.compute(device)
        if options["count"] > 0:
            found["accuracy"] = options["accuracy"]
        elif self.written:
            found |= self._judge(device)
        return found

    def _judge(self, device: torch.device) -> dict[str, Tensor]:
        known = [written for _, written in sorted(self.written.items()) if written.answer]
        found = {"distinct": float(len({_plain(written.text) for written in self.written.values()}))}
        kinds = ["", *sorted({written.kind for written in known} - {""})]
        for kind in kinds:
            matches = [float(written.matches) for written in known if kind in ("", written.kind)]
            if matches:
                found[f"exact_match_{kind}" if kind else "exact_match"] = sum(matches) / len(matches)
        for number, (protocol, meter) in enumerate(self._captions.items()):
            own = {item: _references(written, protocol) for item, written in self._written.items()}
            judged = [item for item, references in own.items() if references]
            meter.update(judged, [self._written[item].text for item in judged], [own[item] for item in judged])
            scores = meter.compute()
            for name in METRICS:
                value = scores.corpus[name]
                if value is not None and scores.ids:
                    found[name if number == 0 else f"{protocol}/{name}"] = value
        return {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in found.items()}


def _references(written: Written, protocol: str) -> list[str]:
    if protocol == "avsd_1ref":
        return [written.answer] if written.answer else []
    if protocol in ("avsd7", "avsd8") and len(written.references) < 2:
        return []  # the file with the six references is missing
    return list(written.references)


def _protocol(name: str) -> Protocol:
    return name  # type: ignore[return-value]  # an unknown one is refused by the meter
