"""The AVID and AVID-CMA losses: each clip must find its own row of a memory bank. CMA adds mined positives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.losses.nce import estimate_normalizer, nce_per_anchor
from common.memory.bank import MemoryBank
from common.memory.collective import all_gather_rows, broadcast_from_rank_zero, mean_over_ranks, rank
from common.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from papers.avid_cma.mining import Agreement, mine_positives

Modality = Literal["v", "a"]
CROSS: tuple[tuple[Modality, Modality], ...] = (("v", "a"), ("a", "v"))
WITHIN: tuple[tuple[Modality, Modality], ...] = (("v", "v"), ("a", "a"))


class Term(NamedTuple):
    """A term of the loss: compares embeddings of the modality `query` with the memory bank of the modality `bank`."""

    kind: Literal["instance", "positive"]
    query: Modality
    bank: Modality
    weight: float

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.query}2{self.bank}"


class BankLoss(nn.Module):
    """Weighted mean of contrastive terms against a video bank and an audio bank.

    `instance_v2a` compares the video embedding with the audio bank. The positive is the clip's own row (`instance`) or
    its mined rows (`positive`); other clips of the batch are never positives. The banks get no gradient: after
    computing the loss, each step averages the new embeddings into their rows.

    Args:
        negatives: K, the number of rows drawn per clip, with replacement.
        within_negatives: number of negatives for the within-modal terms, the first ones of each clip; None for all.
        positives: P, the number of mined rows per clip; 0 for AVID.
        agreement: see `mine_positives`.
        instance_cross, instance_within, positive_cross, positive_within: weights of the terms. The first two are
            (1, 0) for AVID-Cross (the method), (0, 1) for Self, (1, 1) for Joint. CMA uses (1, 0, 0, 1).
        bank_momentum: weight of the old row in an update; a pair gives (video, audio).
        official_quirks: if there are mined positives, a clip may be its own negative, as in the released code.

    Source: [4] to [7].
    """

    video_bank: MemoryBank
    audio_bank: MemoryBank
    normalizer: Tensor
    positive_set: Tensor

    def __init__(
        self,
        negatives: PositiveInt = 1024,
        within_negatives: PositiveInt | None = None,
        positives: NonNegativeInt = 0,
        agreement: Agreement = "consensus",
        instance_cross: NonNegativeFloat = 1.0,
        instance_within: NonNegativeFloat = 0.0,
        positive_cross: NonNegativeFloat = 0.0,
        positive_within: NonNegativeFloat = 0.0,
        temperature: PositiveFloat = 0.07,
        bank_momentum: Fraction | tuple[Fraction, Fraction] = 0.5,
        official_quirks: bool = False,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        terms = [
            *(Term("instance", *pair, instance_cross) for pair in CROSS),
            *(Term("instance", *pair, instance_within) for pair in WITHIN),
            *(Term("positive", *pair, positive_cross) for pair in CROSS),
            *(Term("positive", *pair, positive_within) for pair in WITHIN),
        ]
        self.terms = [term for term in terms if term.weight]
        if not self.terms:
            raise ValueError("every weight of model.loss is 0: one of instance_* and positive_* must be positive")
        if not positives and (positive_cross or positive_within):
            raise ValueError(
                f"{positive_cross=}, {positive_within=} need mined positives: raise positives, or set them to 0"
            )
        if within_negatives is not None and within_negatives > negatives:
            raise ValueError(f"{within_negatives=} must be at most {negatives=}, or null for all of them")
        self.negatives, self.within_negatives, self.positives = negatives, within_negatives, positives
        self.agreement, self.temperature = agreement, temperature
        self.bank_momentum = bank_momentum if isinstance(bank_momentum, tuple | list) else (bank_momentum,) * 2
        self.official_quirks, self.seed = official_quirks, seed
        self.num_items = 0
        self.step = 0  # training steps so far; seed, rank and step determine the negatives
        self.register_buffer("normalizer", torch.tensor(-1.0))  # Z of NCE; -1 means the first training step sets it

    def allocate(self, num_items: int, dim: int) -> Self:
        """Create the banks with one row per training clip. Call this when the size of the data set is known."""
        if num_items < self.positives + 2:
            raise ValueError(
                f"num_items={num_items} is too small for positives={self.positives}: every clip needs that many other "
                "clips as positives and at least one more as a negative. Use more clips, or lower `positives`."
            )
        self.num_items = num_items
        # A separate generator, so that the banks don't depend on earlier draws, such as those for the audio statistics.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.video_bank = MemoryBank(num_items, dim, self.bank_momentum[0])
            self.audio_bank = MemoryBank(num_items, dim, self.bank_momentum[1])
        self.register_buffer("positive_set", torch.full((num_items, self.positives), -1, dtype=torch.int32))
        return self

    def forward(
        self, video: Tensor, audio: Tensor, index: Tensor, negative_index: Tensor | None = None, update: bool = True
    ) -> dict[str, Tensor]:
        """Compute `loss` (with gradient) and each term (detached) in float32, then update the banks.

        Args:
            index: clip numbers in the data set listing.
            negative_index: rows to use as negatives; None draws them.
            update: False (validation) leaves banks, normalizer and step unchanged.

        Shapes:
            video, audio [B, d], not yet normalized; index [B]; negative_index [B, K]
        """
        with torch.autocast(video.device.type, enabled=False):
            embeddings = {"v": F.normalize(video.float(), dim=1), "a": F.normalize(audio.float(), dim=1)}
            positives = self.positive_set[index].long()
            if negative_index is None:
                negative_index = self.draw_negatives(index, positives, training=update)
            rows = torch.cat([index[:, None], positives, negative_index], dim=1)
            banks = {"v": self.video_bank.lookup(rows), "a": self.audio_bank.lookup(rows)}  # [B, 1 + P + K, d]
            terms, normalizer = {}, self.normalizer
            for term in self.terms:
                scores = torch.einsum("bd,bcd->bc", embeddings[term.query], banks[term.bank]) / self.temperature
                instance, mined, drawn = scores.split([1, self.positives, negative_index.shape[1]], dim=1)
                picked = instance if term.kind == "instance" else mined
                if term.query == term.bank:
                    drawn = drawn[:, : self.within_negatives]
                if self.step == 0 and normalizer < 0:  # read Z only once, because reading it waits for the device
                    normalizer = estimate_normalizer(drawn)
                    if update:  # fixed from now on; in validation, ranks may have different values
                        normalizer = self.normalizer.copy_(mean_over_ranks(normalizer))
                terms[term.name] = nce_per_anchor(picked, drawn, normalizer).mean()
            weighted = [term.weight * terms[term.name] for term in self.terms]
            loss = torch.stack(weighted).sum() / sum(term.weight for term in self.terms)
            if update:
                index, video, audio = all_gather_rows(index, embeddings["v"], embeddings["a"])
                self.video_bank.write(index, video)
                self.audio_bank.write(index, audio)
                self.step += 1
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def draw_negatives(self, index: Tensor, positives: Tensor, training: bool) -> Tensor:
        """Draw rows [B, K] uniformly, except the clip's own and its positives. Depends on seed, rank and step."""
        excluded = torch.cat([positives, index[:, None]], dim=1).sort(dim=1).values
        if self.official_quirks and self.positives:
            excluded = positives
        # Only the step needs to be saved. Validation always draws the same rows, so that its losses are comparable.
        stream = f"{self.seed}/{rank()}/{self.step if training else 'validation'}"
        seed = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=7).digest(), "little")
        high, shape = self.num_items - excluded.shape[1], (len(index), self.negatives)
        raw = torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
        if index.is_cuda:
            raw = raw.pin_memory()
        return skip_rows(raw.to(index.device, non_blocking=True), excluded)

    @torch.no_grad()
    def mine(self) -> Tensor:
        """Search the banks for the positives of every clip: int32 [N, P]. The ranks share the work."""
        if self.positives:
            banks = self.video_bank.vectors, self.audio_bank.vectors
            self.positive_set.copy_(mine_positives(*banks, self.positives, self.agreement))
        return self.positive_set

    @torch.no_grad()
    def load_banks(self, memory: Mapping[str, Tensor]) -> None:
        """Copy banks and normalizer from another `BankLoss`, and reset the step and the positives."""
        buffers = {name: value for name, value in self.named_buffers() if name != "positive_set"}
        wrong = [name for name, value in buffers.items() if name not in memory or memory[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"model.warm_start has no memory banks that fit ({', '.join(wrong)}): give the checkpoint of an AVID "
                "stage with the same data set listing and the same embedding width."
            )
        for name, value in buffers.items():
            value.copy_(memory[name])
        self.positive_set.fill_(-1)
        self.step = 0

    def synchronize(self) -> None:
        """Copy rank 0's banks and normalizer to all ranks. Call this once, before mining and the first step."""
        self.video_bank.synchronize()
        self.audio_bank.synchronize()
        broadcast_from_rank_zero(self.normalizer)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        self.step = int(state["step"])


def skip_rows(raw: Tensor, excluded: Tensor) -> Tensor:
    """Map uniform draws from [0, N - E) to uniform draws from the N rows without the E excluded ones.

    A draw r [B, K] increases by the number of excluded rows p_j [B, E] with p_j - j <= r, where p is ascending ([5]).
    """
    thresholds = excluded - torch.arange(excluded.shape[1], device=excluded.device)
    return raw + torch.searchsorted(thresholds, raw, right=True)
