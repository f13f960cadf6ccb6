"""Running text in many languages as blocks of tokens, and which text and captions every step reads ([6.1], [6.3])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from common.data.item_dataset import Sample
from papers.m3p.masking import WORD_NOISE, Masking, mask_stream
from papers.m3p.pairs import PairCollator, PairItems

Ints = npt.NDArray[np.int64]


class LanguageStream:
    """The text of a language as blocks of `bptt` tokens in `batch_size` rows ([6.1]).

    All sentences, each closed by `</s>`, are one stream. It is filled up with closing tokens at its beginning and cut
    into as many pieces as a batch has rows; block i holds the i-th `bptt` tokens of every piece, moved by one, so that
    the first block begins with a closing token.

    Args:
        tokens: token ids of the stream, closing tokens included; may lie on disk.
        batch_size: rows of a block.
        bptt: tokens of a row.
        end_id: the closing token.
    """

    def __init__(self, tokens: npt.NDArray[Any], batch_size: int, bptt: int, end_id: int = 2) -> None:
        if not len(tokens):
            raise ValueError("a stream without tokens has no blocks")
        self.tokens = tokens
        self.batch_size = batch_size
        self.bptt = bptt
        self.end_id = end_id
        self._blocks = -(-len(tokens) // (batch_size * bptt))

    def __len__(self) -> int:
        """Number of blocks."""
        return self._blocks

    def block(self, number: int, rows: slice = slice(None)) -> Ints:
        """Some rows of a block, int64 [B, bptt]."""
        number = range(self._blocks)[number]
        piece = self._blocks * self.bptt
        filled = self.batch_size * piece - len(self.tokens)
        start = np.arange(self.batch_size, dtype=np.int64)[rows] * piece
        offset = number * self.bptt + np.arange(self.bptt) - 1
        position = start[:, None] + offset - filled
        # What stands before a piece is not its neighbour's end but a closing token.
        inside = (position >= 0) & (offset >= 0)
        return np.where(inside, self.tokens[np.where(inside, position, 0)], self.end_id).astype(np.int64)


def language_probabilities(counts: Mapping[str, int], alpha: float) -> dict[str, float]:
    """How often each language is drawn: proportional to (its share of the sentences)^alpha; uniformly for alpha -1.

    Args:
        counts: sentences of each language.
        alpha: 1 for the shares themselves, 0 (or -1, as the released code writes it) for all alike.

    Source: [6.1], after Conneau et al., "XLM-R", section 3.1.
    """
    if not counts:
        raise ValueError("data.languages: name at least one, or set data.xmlm_steps to 0")
    empty = [language for language, count in counts.items() if count < 1]
    if empty:
        raise ValueError(f"data.languages: there is no text in {', '.join(empty)}; add it or leave the language out")
    if alpha < 0 and alpha != -1:
        raise ValueError(f"data.language_alpha is 0 or above, 0 for all languages alike; got {alpha}")
    shares = np.array(list(counts.values()), dtype=np.float64) / sum(counts.values())
    weights = shares ** max(alpha, 0.0)
    return dict(zip(counts, (weights / weights.sum()).tolist()))


# -- steps -------------------------------------------------------------------------------------------------------------

#: Batch of a training step: `xmlm`, a list of blocks of text; `relations`, a list of batches of `PairCollator`; and
#: `index`, the images of these in their listings.
Step = dict[str, Any]
#: Independent random streams of an epoch.
_TEXT_ORDER, _PAIR_ORDER, _TEXT_NOISE, _LANGUAGES = range(4)


@dataclass(frozen=True)
class Draws:
    """What the steps of an epoch read.

    Args:
        chosen: stream or set of captions of each draw, int64 [steps, draws].
        turn: how often it was drawn before in this epoch, int64 [steps, draws].
    """

    chosen: Ints
    turn: Ints

    @classmethod
    def of(cls, probabilities: Sequence[float], steps: int, draws: int, rng: np.random.Generator) -> Draws:
        """Draw with replacement, at most as many a step as there are to choose from."""
        draws = min(draws, len(probabilities))
        if not draws:
            return cls(np.zeros((steps, 0), dtype=np.int64), np.zeros((steps, 0), dtype=np.int64))
        chosen = rng.choice(len(probabilities), size=steps * draws, p=probabilities)
        turn = np.empty_like(chosen)
        for number in range(len(probabilities)):
            drawn = np.flatnonzero(chosen == number)
            turn[drawn] = np.arange(len(drawn))
        return cls(chosen.reshape(steps, draws), turn.reshape(steps, draws))


@dataclass
class MultitaskSchedule:
    """Which languages and which sets of captions every step reads, as a function of (seed, epoch, step) alone.

    Languages are drawn for each of some groups of rows: the released code draws them in every process for itself. As a
    number of the recipe, it does not depend on how many processes there are here.

    Args:
        languages: probabilities of the languages.
        relations: number of sets of captions; all are drawn alike.
        xmlm_steps, relation_steps: draws of each kind per step, at most as many as there are to choose from.
        steps: of an epoch.
        seed: of the draws.
        text_groups: groups of rows of a block of text that draw their languages independently.

    Source: [6.3].
    """

    languages: Sequence[float]
    relations: int
    xmlm_steps: int
    relation_steps: int
    steps: int
    seed: int
    text_groups: int = 1
    _epoch: tuple[int, list[Draws], Draws] | None = None

    def of(self, epoch: int) -> tuple[list[Draws], Draws]:
        """Draws of languages, for each group of rows, and of sets of captions in an epoch; the last ones are kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            languages = [Draws.of(self.languages, self.steps, self.xmlm_steps, rng)]
            uniform = [1 / max(self.relations, 1)] * self.relations
            relations = Draws.of(uniform, self.steps, self.relation_steps, rng)
            for group in range(1, self.text_groups):
                own = np.random.default_rng((self.seed, epoch, group, 0, _LANGUAGES))
                languages.append(Draws.of(self.languages, self.steps, self.xmlm_steps, own))
            self._epoch = (epoch, languages, relations)
        return self._epoch[1:]


@dataclass
class MultitaskSteps(Dataset[Step]):
    """The steps of an epoch: a few blocks of text in some languages, and a few batches of pairs ([6.3]).

    A step is a function of (seed, epoch, step). Row i of a block of text belongs to group i mod `text_groups`, and each
    group has languages of its own. Of a batch, rank r of W reads rows r, r + W, ..., so that the batches of W ranks
    joined are that of one; with as many groups as ranks every rank reads languages of its own.

    Args:
        schedule: what each step reads; its seed is that of everything random.
        streams: text of each language in blocks of as many rows as a group has, in the order of the languages' numbers.
        pairs: pairs of each set of captions.
        collator: makes batches of pairs, and knows the tokenizer of the text.
        batch_size: pairs or groups of a batch over all ranks.
        masking: of the text.
        multiple_of: see `mask_stream`.
        rank, world_size: this process and the number of processes.
    """

    schedule: MultitaskSchedule
    streams: Sequence[LanguageStream]
    pairs: Sequence[PairItems]
    collator: PairCollator
    batch_size: int
    masking: Masking
    multiple_of: int = 1
    rank: int = 0
    world_size: int = 1
    _orders: dict[tuple[int, int, int], tuple[tuple[int, int], Ints]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, key: tuple[int, int]) -> Step:
        epoch, step = key
        languages, relations = self.schedule.of(epoch)
        samples = [
            self._pairs(epoch, int(number), int(relations.turn[step, draw]))
            for draw, number in enumerate(relations.chosen[step])
        ]
        return {
            "xmlm": [
                self._rows([self._block(epoch, step, draw, group, own) for group, own in enumerate(languages)])
                for draw in range(languages[0].chosen.shape[1])
            ],
            "relations": [self.collator(batch) for batch in samples],
            "index": indices_of([sample for batch in samples for sample in batch]),
        }

    def _order(self, kind: int, number: int, count: int, epoch: int, again: int, group: int = 0) -> Ints:
        """Order of the blocks or pairs of a source in its n-th pass of an epoch; the last one is kept."""
        last = self._orders.get((kind, number, group))
        if last is None or last[0] != (epoch, again):
            rng = np.random.default_rng((self.schedule.seed, epoch, again, number, kind, *_unless_zero(group)))
            last = self._orders[kind, number, group] = ((epoch, again), rng.permutation(count))
        return last[1]

    def _block(self, epoch: int, step: int, draw: int, group: int, draws: Draws) -> dict[str, Any]:
        """Text of one language for the rows of a group, masked."""
        number, turn = int(draws.chosen[step, draw]), int(draws.turn[step, draw])
        stream, tokenizer = self.streams[number], self.collator.tokenizer
        again, block = divmod(turn, len(stream))
        tokens = stream.block(int(self._order(_TEXT_ORDER, number, len(stream), epoch, again, group)[block]))
        # Drawn for the rows of all ranks, so that what is masked does not depend on their number.
        rng = np.random.default_rng((self.schedule.seed, epoch, step, draw, _TEXT_NOISE, *_unless_zero(group)))
        masked, labels = mask_stream(
            tokens,
            rng.random((*tokens.shape, WORD_NOISE)),
            tokenizer.mask_id,
            tokenizer.pad_id,
            tokenizer.vocabulary_size,
            self.masking,
            self.multiple_of,
        )
        return {
            "tokens": masked,
            "token_mask": tokens != tokenizer.pad_id,
            "labels": labels,
            "languages": np.full(len(tokens), number),
        }

    def _rows(self, groups: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The rows of this rank of a block whose groups take turns."""
        joined = {name: np.stack([group[name] for group in groups], axis=1) for name in groups[0]}
        flat = {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in joined.items()}
        return {name: torch.from_numpy(rows[self.rank :: self.world_size]) for name, rows in flat.items()}

    def _pairs(self, epoch: int, number: int, turn: int) -> list[Sample]:
        pairs = self.pairs[number]
        again, batch = divmod(turn, len(pairs) // self.batch_size)
        order = self._order(_PAIR_ORDER, number, len(pairs), epoch, again)
        first = batch * self.batch_size
        rows = order[first + self.rank : first + self.batch_size : self.world_size]
        # What an item draws depends on the pass, too: a small set is gone through many times in an epoch.
        return [pairs[(epoch << 16) + again, int(row)] for row in rows]


def indices_of(samples: Sequence[Sample]) -> torch.Tensor:
    """Positions of the samples' images in their listings, int64 [B], by which a loss that is not finite is told."""
    return torch.tensor([int(sample["index"]) for sample in samples], dtype=torch.int64)


def _unless_zero(group: int) -> tuple[int, ...]:
    """What tells the random streams of a group from those of the first one."""
    return (group,) if group else ()
