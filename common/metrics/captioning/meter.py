"""Caption scores of a whole evaluation, collected batch by batch from all processes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from common.memory.collective import is_distributed, rank
from common.metrics.captioning.caption_set import check_captions
from common.metrics.captioning.protocols import Protocol
from common.metrics.captioning.scoring import CaptionScores, Tokenizer, check_options, score_captions
from common.metrics.gathering import gather_objects


class CaptionMeter:
    """Caption scores over batches and processes, every sample counted once. For the options see `score_captions`.

    Examples:
        >>> meter = CaptionMeter(with_meteor=False)
        >>> meter.update([4, 7], ["a dog runs", "yes"], [["a dog is running"], ["yes", "yes he does"]])
        >>> round(meter.compute().measured["rouge_l"], 3)
        0.779
    """

    def __init__(
        self,
        protocol: Protocol = "coco",
        *,
        official_quirks: bool = True,
        tokenizer: Tokenizer = "python",
        with_meteor: bool = True,
    ) -> None:
        check_options(protocol, tokenizer)  # before an epoch is spent
        self.protocol: Protocol = protocol
        self.official_quirks = official_quirks
        self.tokenizer: Tokenizer = tokenizer
        self.with_meteor = with_meteor
        self._samples: dict[int, tuple[str, tuple[str, ...]]] = {}

    def reset(self) -> None:
        self._samples.clear()

    def update(
        self, index: Tensor | Sequence[int], candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> None:
        """Add B samples by `index`, at least one reference each. The first candidate of a repeated sample counts."""
        indices = [operator.index(one) for one in (index.tolist() if isinstance(index, Tensor) else index)]
        for field, values in (("candidates", candidates), ("references", references)):
            if isinstance(values, str) or len(values) != len(indices):
                got = "one string" if isinstance(values, str) else f"{len(values)}"
                raise ValueError(f"{field}: expected one entry for each of {len(indices)} samples, got {got}")
        check_captions(indices, candidates, references)
        for one, candidate, texts in zip(indices, candidates, references):
            _add(self._samples, one, candidate, tuple(texts))

    def compute(self) -> CaptionScores:
        """The scores over all samples of all processes, `ids` ascending; the first process computes them."""
        samples: dict[int, tuple[str, tuple[str, ...]]] = {}
        gathered = gather_objects(list(self._samples.items()))
        for one, (candidate, references) in gathered:
            _add(samples, one, candidate, references)
        if not is_distributed():
            return self._score(samples)
        answer: list[CaptionScores | str | None] = [None]
        if rank() == 0:
            try:
                answer = [self._score(samples)]
            except Exception as error:  # whatever it is, the others must not wait for it
                answer = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(answer, src=0)
        if not isinstance(answer[0], CaptionScores):
            raise RuntimeError(f"the first process could not score the captions: {answer[0]}")
        return answer[0]

    def _score(self, samples: dict[int, tuple[str, tuple[str, ...]]]) -> CaptionScores:
        ordered = sorted(samples)
        return score_captions(
            {one: samples[one][0] for one in ordered},
            {one: samples[one][1] for one in ordered},
            self.protocol,
            official_quirks=self.official_quirks,
            tokenizer=self.tokenizer,
            with_meteor=self.with_meteor,
        )


def _add(
    samples: dict[int, tuple[str, tuple[str, ...]]], index: int, candidate: str, references: tuple[str, ...]
) -> None:
    known = samples.setdefault(index, (candidate, references))
    if known[1] != references:
        raise ValueError(
            f"sample {index} came with two different sets of references; is the index of every sample its own?"
        )
