"""Cuts text in many languages into blocks of tokens ([6.1]), and draws the blocks and captions of a step ([6.3])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from common.data.text import XLMRTokenizer
from papers.m3p.masking import DEFAULT_MASKING, NO_LABEL, WORD_NOISE, Ints, Masking, mask_words
from papers.m3p.pairs import PairItems


@dataclass(frozen=True, eq=False)
class LanguageStream:
    """The text of a language as blocks of `batch_size` rows with `bptt` tokens each ([6.1]).

    All sentences, each closed by `</s>`, form one stream. The stream is padded with closing tokens at the start and cut
    into one piece per row. Block i has the i-th `bptt` tokens of every piece. All tokens are shifted right by one, so
    the first block starts with a closing token. `tokens` may be memory-mapped.
    """

    tokens: npt.NDArray[Any]
    batch_size: int
    bptt: int
    end_id: int = 2

    def __len__(self) -> int:
        return -(-len(self.tokens) // (self.batch_size * self.bptt))

    def block(self, number: int) -> Ints:
        """Return a block, int64 [batch_size, bptt]."""
        piece = len(self) * self.bptt
        filled = self.batch_size * piece - len(self.tokens)
        start = np.arange(self.batch_size, dtype=np.int64) * piece
        offset = number * self.bptt + np.arange(self.bptt) - 1
        position = start[:, None] + offset - filled
        # A piece starts after a closing token, not after the end of the previous piece.
        inside = (position >= 0) & (offset >= 0)
        return np.where(inside, self.tokens[np.where(inside, position, 0)], self.end_id).astype(np.int64)


def language_probabilities(counts: Sequence[int], alpha: float) -> list[float]:
    """Return the probability of each language, proportional to (its share of the sentences)^alpha.

    Source: [6.1], after Conneau et al., "XLM-R", section 3.1.
    """
    weights = (np.array(counts, dtype=np.float64) / sum(counts)) ** alpha
    return (weights / weights.sum()).tolist()


# -- steps -------------------------------------------------------------------------------------------------------------

#: `xmlm`: text blocks; `relations`: `PairItems` batches; `index`: their images, to report a non-finite loss.
Step = dict[str, Any]
#: Numbers of an epoch's independent random streams.
_TEXT_ORDER, _PAIR_ORDER, _TEXT_NOISE, _LANGUAGES = range(4)


def draw_sources(probabilities: Sequence[float], steps: int, draws: int, rng: np.random.Generator) -> Ints:
    """Sample sources with replacement. Limit `draws` to the number of sources.

    Returns:
        The source's number, and how often the source was drawn before in the epoch: int64 [steps, draws, 2]
    """
    draws = min(draws, len(probabilities))
    chosen = np.zeros(0, dtype=np.int64)
    if draws:
        chosen = rng.choice(len(probabilities), size=steps * draws, p=probabilities)
    turn = np.empty_like(chosen)
    for number in range(len(probabilities)):
        drawn = np.flatnonzero(chosen == number)
        turn[drawn] = np.arange(len(drawn))
    return np.stack([chosen, turn], axis=-1).reshape(steps, draws, 2)


@dataclass(frozen=True)
class Schedule:
    """The settings of an epoch's steps.

    Args:
        batch_size: pairs or groups of a batch, over all ranks.
        xmlm_steps, relation_steps: languages and caption sets to draw per step, limited to their numbers.
        text_groups: number of groups of rows in a text block, each with separately drawn languages; row i belongs to
            group i mod `text_groups`.
    """

    steps: int
    batch_size: int
    xmlm_steps: int
    relation_steps: int
    text_groups: int = 1
    seed: int = 0


@dataclass
class MultitaskSteps(Dataset[Step]):
    """The steps of an epoch: some text blocks and some batches of pairs.

    A step depends only on (seed, epoch, step). Each group of rows draws separate languages, like each process of the
    released code. Rank r of W reads rows r, r + W, ... of a batch, so the batches of W ranks together equal a single
    rank's batch. With as many groups as ranks, each rank reads one group.

    A text block has `tokens` int64 and `token_mask` bool [B, L], `languages` [B], `word_places` [K] among the B * L
    positions, and `word_targets` [K].

    Args:
        streams: text of each language in blocks with the rows of one group, in the order of the language numbers.
        languages: probability of each stream.
        pairs: caption sets, all equally likely.

    Source: [6.3].
    """

    streams: Sequence[LanguageStream]
    languages: Sequence[float]
    pairs: Sequence[PairItems]
    schedule: Schedule
    tokenizer: XLMRTokenizer
    masking: Masking | None = None
    rank: int = 0
    world_size: int = 1
    _epoch: tuple[int, Ints, Ints] | None = None
    _orders: dict[tuple[int, ...], tuple[tuple[int, int], Ints]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, key: tuple[int, int]) -> Step:
        epoch, step = key
        languages, relations = self.draws(epoch)
        texts = [self._text((epoch, step, draw), sources) for draw, sources in enumerate(languages[step].tolist())]
        samples = [(self.pairs[number], self._pairs(epoch, number, turn)) for number, turn in relations[step].tolist()]
        return {
            "xmlm": texts,
            "relations": [pairs.collate(batch) for pairs, batch in samples],
            "index": torch.tensor([int(sample["index"]) for _, batch in samples for sample in batch]),
        }

    def draws(self, epoch: int) -> tuple[Ints, Ints]:
        """Draw the languages [steps, draws, groups, 2] and the caption sets [steps, draws, 2] of an epoch.

        The last axis is that of `draw_sources`. Cache the last result.
        """
        if self._epoch is None or self._epoch[0] != epoch:
            plan = self.schedule
            rng = np.random.default_rng((plan.seed, epoch))
            languages = [draw_sources(self.languages, plan.steps, plan.xmlm_steps, rng)]
            uniform = [1 / max(len(self.pairs), 1)] * len(self.pairs)
            relations = draw_sources(uniform, plan.steps, plan.relation_steps, rng)
            for group in range(1, plan.text_groups):
                rng = np.random.default_rng((plan.seed, epoch, group, 0, _LANGUAGES))
                languages.append(draw_sources(self.languages, plan.steps, plan.xmlm_steps, rng))
            self._epoch = (epoch, np.stack(languages, axis=2), relations)
        return self._epoch[1:]

    def _order(self, count: int, epoch: int, again: int, *source: int) -> Ints:
        """Return the order of a source's `count` blocks or pairs in pass `again` of an epoch. Cache the last order."""
        last = self._orders.get(source)
        if last is None or last[0] != (epoch, again):
            rng = np.random.default_rng((self.schedule.seed, epoch, again, *source))
            last = self._orders[source] = ((epoch, again), rng.permutation(count))
        return last[1]

    def _text(self, place: tuple[int, int, int], sources: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Make this rank's rows of the text block at `place`: epoch, step, draw. Rows of different groups alternate."""
        groups = [self._block(place, group, *source) for group, source in enumerate(sources)]
        joined = {name: np.stack([group[name] for group in groups], axis=1) for name in groups[0]}
        flat = {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in joined.items()}
        block = {name: rows[self.rank :: self.world_size] for name, rows in flat.items()}
        labels = block.pop("labels").ravel()
        places = np.flatnonzero(labels != NO_LABEL)
        block |= {"word_places": places, "word_targets": labels[places]}
        return {name: torch.from_numpy(rows) for name, rows in block.items()}

    def _block(self, place: tuple[int, int, int], group: int, number: int, turn: int) -> dict[str, Any]:
        """Make the rows of a group from a language's stream. The stream was drawn `turn` times before in the epoch."""
        groups = (group,) if group else ()  # group 0's seed has no group number, to match recorded runs
        stream, tokenizer = self.streams[number], self.tokenizer
        again, block = divmod(turn, len(stream))
        tokens = stream.block(int(self._order(len(stream), place[0], again, number, _TEXT_ORDER, *groups)[block]))
        # Draw for the rows of all ranks, so that masking doesn't depend on the number of ranks.
        rng = np.random.default_rng((self.schedule.seed, *place, _TEXT_NOISE, *groups))
        noise, valid = rng.random((*tokens.shape, WORD_NOISE)), tokens != tokenizer.pad_id
        maskable = valid & (np.arange(tokens.shape[1]) > 0)  # includes closing tokens inside a row
        sizes = tokenizer.mask_id, tokenizer.vocabulary_size
        masking = self.masking or DEFAULT_MASKING
        masked, labels = mask_words(tokens, maskable, noise, *sizes, masking, each_row=False)
        return {"tokens": masked, "token_mask": valid, "labels": labels, "languages": np.full(len(tokens), number)}

    def _pairs(self, epoch: int, number: int, turn: int) -> list[dict[str, Any]]:
        pairs, batch_size = self.pairs[number], self.schedule.batch_size
        again, batch = divmod(turn, len(pairs) // batch_size)
        order = self._order(len(pairs), epoch, again, number, _PAIR_ORDER)
        rows = order[batch * batch_size : (batch + 1) * batch_size][self.rank :: self.world_size]
        # Random numbers also depend on the pass, because an epoch reads a small set many times.
        return [pairs[(epoch << 16) + again, int(row)] for row in rows]
