"""Loss, accuracy, exact match and caption metrics of a test set. Over all processes, every sample counts once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.memory.collective import rank
from common.metrics.captioning import Protocol, score_captions
from common.metrics.gathering import OncePerSample, gather_objects


@dataclass(frozen=True)
class GeneratedText:
    """A generated or chosen text, and references. `answer` is the original answer. Missing texts are ""."""

    text: str
    answer: str
    references: Sequence[str]
    question: str = ""
    kind: str = ""

    @property
    def matches(self) -> bool:
        """Return whether the text equals the answer, ignoring spaces and case."""
        return plain(self.text) == plain(self.answer)


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


class TextTest:
    """Collects losses, chosen options and generated texts over a test set.

    | name | of |
    |---|---|
    | `samples`, `loss` | all samples: their number, and the cross entropy per word piece |
    | `accuracy` | samples with options, in percent |
    | `exact_match`, `exact_match_<kind>` | generated texts that equal the original answer |
    | `distinct` | how many different texts were generated |
    | `bleu_1` ... `cider` | generated texts under the first protocol; other protocols as `<protocol>/<name>` |

    Args:
        protocols: protocols of the caption metrics; see `common.metrics.captioning`. `avsd_1ref` compares with the
            original answer alone. `avsd7` and `avsd8` ignore samples that only have the original answer, because scores
            with one and with six references aren't comparable.
        meteor: also compute METEOR if Java is installed.

    Attributes:
        texts: after `compute`, the generated texts of all processes by sample.

    Source: docs/papers/vx2text.md [11].
    """

    def __init__(self, protocols: Sequence[Protocol] = (), meteor: bool = True) -> None:
        self.protocols = protocols
        self.meteor = meteor
        self.reset()

    def reset(self) -> None:
        self._loss = OncePerSample("loss", "words")
        self._choices = OncePerSample("accuracy")
        self._own_texts: dict[int, GeneratedText] = {}  # the texts of this process
        self.texts: dict[int, GeneratedText] = {}

    def update_loss(self, index: Tensor, loss: Tensor, words: Tensor) -> None:
        """Add samples [B] with the summed cross entropy [B] and the number of word pieces [B] of their answers."""
        self._loss.update(index, loss=loss, words=words)

    def update_choices(self, index: Tensor, picked: Tensor, correct: Tensor) -> None:
        """Add samples [B] with the chosen and the correct option [B]. The correct option is -1 if it is not public."""
        known = correct >= 0
        self._choices.update(index[known], accuracy=100.0 * (picked == correct).float()[known])

    def update_texts(self, index: Tensor, texts: Iterable[GeneratedText]) -> None:
        """Add samples [B] with texts. If a sample repeats, keep the first text."""
        for sample, text in zip(index.tolist(), texts):
            self._own_texts.setdefault(sample, text)

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """Compute all metrics. Every process must call this, and gets the same values."""
        loss, choices = self._loss.compute(device), self._choices.compute(device)
        self.texts = {}
        for sample, text in gather_objects(sorted(self._own_texts.items())):
            self.texts.setdefault(sample, text)
        metrics = {"samples": loss["count"]}
        if loss["words"] > 0:  # 0 if the answers are not public
            metrics["loss"] = loss["loss"] / loss["words"]
        if choices["count"] > 0:
            metrics["accuracy"] = choices["accuracy"]
        elif self.texts:
            found = {**exact_match([text for _, text in sorted(self.texts.items())]), **self._caption_metrics()}
            metrics |= {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in found.items()}
        return metrics

    def _caption_metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if rank() == 0:
            for number, protocol in enumerate(self.protocols):
                compared = {sample: references_of(text, protocol) for sample, text in sorted(self.texts.items())}
                references = {sample: texts for sample, texts in compared.items() if texts}
                texts = {sample: self.texts[sample].text for sample in references}
                if references:
                    scores = score_captions(texts, references, protocol, with_meteor=self.meteor).measured
                    found |= {name if number == 0 else f"{protocol}/{name}": x for name, x in scores.items()}
        return gather_objects([found])[0]


def exact_match(texts: Sequence[GeneratedText]) -> dict[str, float]:
    """Compute how many texts match the answer, over all questions and for each kind. Also count distinct texts."""
    found = {"distinct": float(len({plain(text.text) for text in texts}))}
    known = [text for text in texts if text.answer]
    for kind in ["", *sorted({text.kind for text in known} - {""})]:
        matches = [float(text.matches) for text in known if kind in ("", text.kind)]
        if matches:
            found[f"exact_match_{kind}" if kind else "exact_match"] = sum(matches) / len(matches)
    return found


def references_of(text: GeneratedText, protocol: str) -> list[str]:
    """Return the references that a protocol uses. Empty if the protocol ignores the sample."""
    if protocol == "avsd_1ref":
        return [text.answer] if text.answer else []
    if protocol in ("avsd7", "avsd8") and len(text.references) < 2:
        return []  # the file with the six references is missing
    return list(text.references)
