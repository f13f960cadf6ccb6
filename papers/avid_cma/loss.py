"""AVID and CMA objectives: instance discrimination against memory banks, and its extension to mined positives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.losses.info_nce import info_nce_per_anchor
from common.losses.nce import estimate_normaliser, nce_per_anchor
from common.memory.bank import MemoryBank, RowContrast, interleave, last_occurrence
from common.memory.collective import all_gather_concat, broadcast_from_rank_zero, mean_over_ranks, rank, world_size
from papers.avid_cma.mining import Agreement, estimate_cost, mine_positives

Estimator = Literal["nce", "info_nce"]
# (positives [b, 2, P], negatives [b, 2, K]) -> the mean loss of each direction [2]
Contrast = Callable[[Tensor, Tensor], Tensor]


class BankObjective(nn.Module):
    """What both objectives share: two banks, uniform negatives, the normaliser, and the order of a step.

    A step reads the positives and negatives from the banks, computes the loss, and then blends the batch into the
    banks; embeddings of one batch are never compared with each other. A subclass says which rows an anchor is
    compared with (`_positives`, `_excluded`) and which terms the loss has (`_terms`, `_weights`).

    Source: specification 4 to 7.
    """

    normaliser: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int,
        negatives: int,
        temperature: float,
        bank_momentum: float | tuple[float, float],
        estimator: Estimator,
        seed: int,
    ) -> None:
        super().__init__()
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if estimator not in ("nce", "info_nce"):
            raise ValueError(f"estimator must be 'nce' or 'info_nce', got {estimator!r}")
        video_momentum, audio_momentum = (
            (bank_momentum, bank_momentum) if isinstance(bank_momentum, int | float) else bank_momentum
        )
        self.num_items = num_items
        self.negatives = negatives
        self.temperature = temperature
        self.estimator = estimator
        self.seed = seed
        self.step = 0  # training steps so far; with seed and rank it determines the next negatives
        self.video_bank = MemoryBank(num_items, dim, video_momentum)
        self.audio_bank = MemoryBank(num_items, dim, audio_momentum)
        interleave([self.video_bank, self.audio_bank])
        self._rows = RowContrast()
        # -1 means that no training step has set it yet.
        self.register_buffer("normaliser", torch.tensor(-1.0))
        self._normaliser_is_set = False  # known on the host, so that a step need not ask the device

    # -- what a subclass defines ---------------------------------------------------------------------------------------

    num_positives: int = 0

    def _positives(self, index: Tensor) -> Tensor:
        """Rows [B, P] of the other positives."""
        return index.new_empty(len(index), 0)

    def _excluded(self, index: Tensor, positives: Tensor) -> Tensor:
        """Rows [B, E], ascending, that are no negatives of an anchor."""
        raise NotImplementedError

    def _terms(self, cross: Tensor, within: Tensor, contrast: Contrast) -> dict[str, Tensor]:
        """Terms of the loss, each a pair of directions.

        Args:
            cross: scores of the video embedding against the audio bank, and of the audio embedding against the video
                bank.
            within: scores of the video embedding against the video bank, and of the audio embedding against the audio
                bank.
            contrast: the estimator.

        Shapes:
            cross, within [b, 2, 1 + P + K], columns: the anchor's own row, its P other positives, its K negatives
        """
        raise NotImplementedError

    def _weights(self) -> dict[str, float]:
        """Weight of every term of `_terms` in the loss, before they are normalised to one, in order of evaluation."""
        raise NotImplementedError

    def _names(self, term: str) -> tuple[str, str]:
        """Names under which the two directions of a term are reported."""
        raise NotImplementedError

    # -- a step --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        video_embedding: Tensor,
        audio_embedding: Tensor,
        index: Tensor,
        generator: torch.Generator | None = None,
        negative_index: Tensor | None = None,
        update: bool = True,
    ) -> dict[str, Tensor]:
        """Loss of a batch, and the update of the banks.

        Computed in float32 also under autocast. Gradient flows to the embeddings only.

        Args:
            video_embedding: raw projections; normalised here.
            audio_embedding: raw projections; normalised here.
            index: item numbers in the data set listing.
            generator: CPU generator for the negatives; by default they follow from seed, rank and step.
            negative_index: rows to use as negatives instead of drawing them.
            update: False in validation: banks, normaliser and step stay as they are.

        Shapes:
            video_embedding [B, d]; audio_embedding [B, d]; index [B]; negative_index [B, K]

        Returns:
            `loss` (scalar with gradient) and every term under its name (scalars, detached).
        """
        index = index.long()
        with torch.autocast(video_embedding.device.type, enabled=False):
            video = F.normalize(video_embedding.float(), dim=1)
            audio = F.normalize(audio_embedding.float(), dim=1)
            positives = self._positives(index)
            if negative_index is None:
                negative_index = self._draw_negatives(index, positives, generator, update)
            rows = torch.cat([index[:, None], positives, negative_index.long()], dim=1)

            embeddings = torch.stack([video, audio], dim=1)
            queries = embeddings / self.temperature  # so that the dot products are the scores
            banks = interleave([self.video_bank, self.audio_bank])
            normaliser = self._normaliser_of_step(queries.detach(), banks, rows, update)
            contrast = self._contrast(normaliser)
            weights = {term: weight for term, weight in self._weights().items() if weight}

            def loss(scores: Tensor) -> tuple[Tensor, Tensor]:
                terms = self._terms(*_cross_and_within(scores), contrast)
                weighted = [weight * terms[term].mean() for term, weight in weights.items()]
                return torch.stack(weighted).sum() / sum(weights.values()), torch.cat([terms[term] for term in weights])

            total, directions = self._rows.loss(queries, banks, rows, loss)
            if update:
                self._update_banks(index, embeddings.detach())
        names = [name for term in weights for name in self._names(term)]
        return {"loss": total, **dict(zip(names, directions.detach().unbind()))}

    def _contrast(self, normaliser: Tensor) -> Contrast:
        if self.estimator == "info_nce":
            return lambda positives, negatives: info_nce_per_anchor(positives, negatives).mean(dim=0)
        return lambda positives, negatives: nce_per_anchor(positives, negatives, normaliser).mean(dim=0)

    def _update_banks(self, index: Tensor, embeddings: Tensor) -> None:
        index, embeddings = all_gather_concat(index), all_gather_concat(embeddings)
        last = last_occurrence(index)
        self.video_bank.blend(index, embeddings[:, 0], last)
        self.audio_bank.blend(index, embeddings[:, 1], last)
        self.step += 1

    # -- negatives -----------------------------------------------------------------------------------------------------

    def _draw_negatives(
        self, index: Tensor, positives: Tensor, generator: torch.Generator | None, training: bool
    ) -> Tensor:
        excluded = self._excluded(index, positives)
        if generator is None:
            generator = torch.Generator().manual_seed(self._draw_seed(training))
        shape = (len(index), self.negatives)
        raw = torch.randint(self.num_items - excluded.shape[1], shape, generator=generator)
        if index.is_cuda:
            raw = raw.pin_memory()
        return skip_rows(raw.to(index.device, non_blocking=True), excluded)

    def _draw_seed(self, training: bool) -> int:
        # Counter-based: nothing to save but the step, and every rank draws its own stream. Validation draws the same
        # numbers every time, so that its loss is comparable from epoch to epoch.
        stream = f"{self.seed}/{rank()}/{self.step if training else 'validation'}"
        return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=7).digest(), "little")

    # -- normaliser ----------------------------------------------------------------------------------------------------

    def _normaliser_of_step(self, queries: Tensor, banks: Tensor, rows: Tensor, update: bool) -> Tensor:
        if self.estimator != "nce" or self.normaliser_is_set():
            return self.normaliser
        scores = self._rows.scores(queries, banks, rows)
        estimates: list[Tensor] = []

        def record(positives: Tensor, negatives: Tensor) -> Tensor:
            # The first term that is evaluated decides, in its first direction.
            estimates.append(estimate_normaliser(negatives[:, 0]))
            return estimates[0].expand(2)

        self._terms(*_cross_and_within(scores), record)
        if not update:
            return estimates[0]  # a guess for this batch alone; ranks may validate different numbers of batches
        # Frozen from here on: there is no moving average.
        self.normaliser.copy_(mean_over_ranks(estimates[0]))
        self._normaliser_is_set = True
        return self.normaliser

    def normaliser_is_set(self) -> bool:
        """Whether a training step or a checkpoint has set the normaliser. Asks the device only until it is."""
        if not self._normaliser_is_set:
            self._normaliser_is_set = bool(self.normaliser > 0)
        return self._normaliser_is_set

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self) -> None:
        """Give every rank the banks and the normaliser of rank 0. Call once, before the first step."""
        broadcast_from_rank_zero(interleave([self.video_bank, self.audio_bank]))
        broadcast_from_rank_zero(self.normaliser)
        self._normaliser_is_set = False

    @torch.no_grad()
    def load_from_avid(self, state: dict[str, Any]) -> None:
        """Take over the banks and the normaliser of a trained AVID objective; the step counter starts fresh.

        Args:
            state: state dict of an `InstanceDiscrimination`, with or without the prefix `criterion.`.

        Raises:
            KeyError: when a bank or the normaliser is missing.
            ValueError: when the banks belong to another listing or width, or the normaliser was never set.
        """
        state = {key.removeprefix("criterion."): value for key, value in state.items()}
        wanted = ("video_bank.vectors", "audio_bank.vectors", "normaliser")
        missing = [key for key in wanted if key not in state]
        if missing:
            raise KeyError(f"warm_start lacks {', '.join(missing)}: it is not the checkpoint of an AVID pre-training")
        for bank, key in ((self.video_bank, wanted[0]), (self.audio_bank, wanted[1])):
            if state[key].shape != bank.vectors.shape:
                raise ValueError(
                    f"warm_start: {key} is {tuple(state[key].shape)}, this objective needs "
                    f"{tuple(bank.vectors.shape)}. Banks only fit the very data set listing and embedding width "
                    "that they were trained with."
                )
        normaliser = torch.as_tensor(state["normaliser"], dtype=torch.float32).reshape(())
        if self.estimator == "nce" and not normaliser > 0:
            raise ValueError("warm_start: the normaliser was never set; the AVID checkpoint holds no training step")
        self.video_bank.vectors.copy_(state["video_bank.vectors"])
        self.audio_bank.vectors.copy_(state["audio_bank.vectors"])
        self.normaliser.copy_(normaliser)
        self._normaliser_is_set = False

    def check_replicas(self, rows: int = 1024) -> None:
        """Raise unless all ranks agree, bit for bit, on a sample of bank rows.

        Args:
            rows: rows compared in each bank.

        Raises:
            RuntimeError: names the bank and the ranks that differ.
        """
        self.video_bank.check_replicas("the video bank", rows)
        self.audio_bank.check_replicas("the audio bank", rows)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        self.step = int(state["step"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._normaliser_is_set = False  # look again


class InstanceDiscrimination(BankObjective):
    """AVID: pick the stored vector of one's own instance out of random ones.

        v2a = NCE(v against A), a2v = NCE(a against V), v2v = NCE(v against V), a2a = NCE(a against A)
        loss = (cross_weight * (v2a + a2v) / 2 + within_weight * (v2v + a2a) / 2) / (cross_weight + within_weight)

    Args:
        num_items: items of the data set listing.
        dim: width of an embedding.
        negatives: rows drawn per anchor, with replacement, K; may exceed `num_items`.
        temperature: divides every dot product.
        bank_momentum: share of the old row that an update keeps; a pair gives (video, audio).
        cross_weight: weight of the other modality's bank. Cross (the method) is (1, 0), Self (0, 1), Joint (1, 1).
        within_weight: weight of the same modality's bank.
        estimator: "nce" (the paper) or "info_nce".
        seed: seed of the negatives.

    Raises:
        ValueError: when an argument is out of range.

    Source: specification 4 to 6.
    """

    def __init__(
        self,
        num_items: int,
        dim: int = 128,
        negatives: int = 1024,
        temperature: float = 0.07,
        bank_momentum: float | tuple[float, float] = 0.5,
        cross_weight: float = 1.0,
        within_weight: float = 0.0,
        estimator: Estimator = "nce",
        seed: int = 0,
    ) -> None:
        if num_items < 2:
            raise ValueError(f"num_items must be at least 2, so that an item has a negative; got {num_items}")
        _require_weights(cross_weight=cross_weight, within_weight=within_weight)
        super().__init__(num_items, dim, negatives, temperature, bank_momentum, estimator, seed)
        self.cross_weight = cross_weight
        self.within_weight = within_weight

    def _excluded(self, index: Tensor, positives: Tensor) -> Tensor:
        return index[:, None]

    def _terms(self, cross: Tensor, within: Tensor, contrast: Contrast) -> dict[str, Tensor]:
        own, negatives = slice(0, 1), slice(1, None)
        terms = {}
        if self.cross_weight:
            terms["cross"] = contrast(cross[..., own], cross[..., negatives])
        if self.within_weight:
            terms["within"] = contrast(within[..., own], within[..., negatives])
        return terms

    def _weights(self) -> dict[str, float]:
        return {"cross": self.cross_weight, "within": self.within_weight}

    def _names(self, term: str) -> tuple[str, str]:
        return {"cross": ("v2a", "a2v"), "within": ("v2v", "a2a")}[term]


class CrossModalAgreement(BankObjective):
    """CMA: instance discrimination plus positives that agree with the anchor in both modalities.

        instance_cross  (NCE(v against A, own row, K) + NCE(a against V, own row, K)) / 2
        instance_within (NCE(v against V, own row, Kw) + NCE(a against A, own row, Kw)) / 2
        positive_cross  (NCE(v against A, positives, K) + NCE(a against V, positives, K)) / 2
        positive_within (NCE(v against V, positives, Kw) + NCE(a against A, positives, Kw)) / 2
        loss = weighted mean of the four

    The paper uses instance_cross and positive_within. Load the banks of a trained AVID (`load_from_avid`) and call
    `mine` before the first step.

    Args:
        num_items: items of the data set listing.
        dim: width of an embedding.
        negatives: rows drawn per anchor, K.
        within_negatives: how many of them, from the first, the within-modal terms use, Kw; -1 for all.
        positives: mined positives per item.
        agreement: how the similarities of the two modalities combine; see `mine_positives`.
        instance_cross: weight of the term.
        instance_within: weight of the term.
        positive_cross: weight of the term.
        positive_within: weight of the term.
        temperature: divides every dot product.
        bank_momentum: share of the old row that an update keeps; a pair gives (video, audio).
        estimator: "nce" (the paper) or "info_nce".
        official_quirks: True lets an item be drawn as its own negative, as the released code does.
        seed: seed of the negatives.

    Raises:
        ValueError: when an argument is out of range.

    Source: specification 7.
    """

    positive_set: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int = 128,
        negatives: int = 1024,
        within_negatives: int = 64,
        positives: int = 32,
        agreement: Agreement = "consensus",
        instance_cross: float = 1.0,
        instance_within: float = 0.0,
        positive_cross: float = 0.0,
        positive_within: float = 1.0,
        temperature: float = 0.07,
        bank_momentum: float | tuple[float, float] = 0.5,
        estimator: Estimator = "nce",
        official_quirks: bool = False,
        seed: int = 0,
    ) -> None:
        if positives < 1 or num_items < positives + 2:
            raise ValueError(
                f"num_items={num_items} is too small for positives={positives}: an item needs {positives} positives "
                f"and at least one negative besides itself, so num_items >= {positives + 2}. Lower `positives`."
            )
        if agreement not in get_args(Agreement):
            raise ValueError(f"agreement must be one of {', '.join(get_args(Agreement))}, got {agreement!r}")
        if within_negatives != -1 and not 1 <= within_negatives <= negatives:
            raise ValueError(
                f"within_negatives={within_negatives} must lie in 1..negatives={negatives}, or be -1 for all of them"
            )
        _require_weights(
            instance_cross=instance_cross,
            instance_within=instance_within,
            positive_cross=positive_cross,
            positive_within=positive_within,
        )
        super().__init__(num_items, dim, negatives, temperature, bank_momentum, estimator, seed)
        self.within_negatives = within_negatives
        self.num_positives = positives
        self.agreement: Agreement = agreement
        self.instance_cross = instance_cross
        self.instance_within = instance_within
        self.positive_cross = positive_cross
        self.positive_within = positive_within
        self.official_quirks = official_quirks
        # -1 means that nothing has been mined yet.
        self.register_buffer("positive_set", torch.full((num_items, positives), -1, dtype=torch.int32))
        self._is_mined = False

    def _positives(self, index: Tensor) -> Tensor:
        if not self._is_mined:
            self._is_mined = bool(self.positive_set[0, 0] >= 0)
            if not self._is_mined:
                raise RuntimeError("no positives yet: call load_from_avid(...) and mine() before the first step")
        return self.positive_set.index_select(0, index).long()

    def _excluded(self, index: Tensor, positives: Tensor) -> Tensor:
        if self.official_quirks:
            return positives
        return torch.cat([positives, index[:, None]], dim=1).sort(dim=1).values

    def _terms(self, cross: Tensor, within: Tensor, contrast: Contrast) -> dict[str, Tensor]:
        own, positives = slice(0, 1), slice(1, 1 + self.num_positives)
        negatives = slice(positives.stop, None)
        near = negatives
        if self.within_negatives != -1:
            near = slice(negatives.start, negatives.start + self.within_negatives)
        terms = {}
        if self.instance_cross:
            terms["instance_cross"] = contrast(cross[..., own], cross[..., negatives])
        if self.instance_within:
            terms["instance_within"] = contrast(within[..., own], within[..., near])
        if self.positive_cross:
            terms["positive_cross"] = contrast(cross[..., positives], cross[..., negatives])
        if self.positive_within:
            terms["positive_within"] = contrast(within[..., positives], within[..., near])
        return terms

    def _weights(self) -> dict[str, float]:
        return {
            "instance_cross": self.instance_cross,
            "instance_within": self.instance_within,
            "positive_cross": self.positive_cross,
            "positive_within": self.positive_within,
        }

    def _names(self, term: str) -> tuple[str, str]:
        kind, banks = term.split("_")
        return (f"{kind}_v2a", f"{kind}_a2v") if banks == "cross" else (f"{kind}_v2v", f"{kind}_a2a")

    @torch.no_grad()
    def mine(self, progress: bool | Callable[[int, int], None] = False) -> Tensor:
        """Search the live banks for the positives of every item. All ranks must call it together.

        Args:
            progress: True prints the cost and shows a progress bar on rank 0; a callable gets (done, total) there.

        Returns:
            The new `positive_set`, int32 [N, k].
        """
        search = (self.video_bank.vectors, self.audio_bank.vectors, self.num_positives, self.agreement)
        if progress is True and rank() == 0:
            mined = _mine_with_progress_bar(*search)
        else:
            mined = mine_positives(*search, progress=progress if callable(progress) else None)
        self.positive_set.copy_(mined)
        self._is_mined = True
        return self.positive_set

    def load_from_avid(self, state: dict[str, Any]) -> None:
        super().load_from_avid(state)
        self._is_mined = False
        self.positive_set.fill_(-1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_mined = False  # look again

    def initialise(self) -> None:
        super().initialise()
        broadcast_from_rank_zero(self.positive_set)
        self._is_mined = False


def _cross_and_within(scores: Tensor) -> tuple[Tensor, Tensor]:
    """[b, embedding, bank, C] -> cross-modal [b, 2, C] and within-modal [b, 2, C]; axes ordered video, audio."""
    pairs = scores.flatten(1, 2)  # video-video, video-audio, audio-video, audio-audio
    return pairs[:, 1:3], pairs[:, 0::3]


def skip_rows(raw: Tensor, excluded: Tensor) -> Tensor:
    """Map uniform draws from [0, N - E) to uniform draws from the N rows without the E excluded ones.

    A draw r moves up by the number of excluded rows p_j with p_j - j <= r, p ascending.

    Args:
        raw: draws.
        excluded: distinct rows, ascending.

    Shapes:
        raw [B, K]; excluded [B, E]

    Returns:
        Rows [B, K].

    Source: specification 5.
    """
    thresholds = excluded - torch.arange(excluded.shape[1], device=excluded.device)
    return raw + torch.searchsorted(thresholds, raw, right=True)


def _require_weights(**weights: float) -> None:
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        given = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise ValueError(f"weights must not be negative and one must be positive: {given}")


def _mine_with_progress_bar(video_bank: Tensor, audio_bank: Tensor, k: int, agreement: Agreement) -> Tensor:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    num_items, dim = video_bank.shape
    cost = estimate_cost(num_items, dim, k, agreement=agreement, world_size=world_size(), device=video_bank.device)
    console.print(cost)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("mining positives", total=None)
        return mine_positives(
            video_bank,
            audio_bank,
            k,
            agreement,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
