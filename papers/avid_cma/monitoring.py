"""Our diagnostics after pre-training: cross-modal retrieval, precision of mining, and pictures of neighbors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common.metrics.retrieval import match_ranks
from common.monitoring.figures import WRONG, GridCell, GridRow, image_grid, preview_of, save_figure
from common.monitoring.media import log_table, media_folder
from papers.avid_cma.mining import Agreement, mine_positives

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.data.clips import AudioVisualClips

# Mining time grows with the square of this number, for each of four kinds of agreement.
LARGEST_BANK = 50_000
AGREEMENTS: tuple[Agreement, ...] = ("consensus", "union", "video", "audio")


class LossProgress(nn.Module):
    """Records the loss (mean over `steps`) and the NCE constant Z, at the start and now. Survives a resume."""

    count: Tensor
    first: Tensor
    recent: Tensor
    first_normalizer: Tensor

    def __init__(self, steps: int = 10) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("recent", torch.zeros(()))
        self.register_buffer("first_normalizer", torch.full((), -1.0))

    @torch.no_grad()
    def update(self, loss: Tensor, normalizer: Tensor) -> None:
        self.first_normalizer.copy_(torch.where(self.count == 0, normalizer, self.first_normalizer))
        self.first.add_(torch.where(self.count < self.steps, loss / self.steps, 0.0))
        weight = torch.clamp(1.0 / (self.count + 1.0), min=1.0 / self.steps)
        self.recent.lerp_(loss.float(), weight)
        self.count.add_(1.0)

    def compute(self, normalizer: Tensor) -> dict[str, Tensor]:
        """Return the first and last loss, Z, and the change of Z since the first step (0 if Z is frozen)."""
        if not bool(self.count > 0):
            return {}
        return {
            "loss_first": self.first * self.steps / torch.clamp(self.count, max=float(self.steps)),
            "loss_last": self.recent,
            "normalizer": normalizer,
            "normalizer_drift": (normalizer - self.first_normalizer).abs(),
        }


def cross_modal_retrieval(video: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """Compute the percentage of videos whose nearest audio is in the same row. Ties and NaN count as misses."""
    nearer = match_ranks(video, audio)
    return {
        "retrieval_r1": 100.0 * (nearer < 1).float().mean(),
        "retrieval_r5": 100.0 * (nearer < 5).float().mean(),
        "retrieval_chance": torch.tensor(100.0 / len(video), device=video.device),
    }


def bank_agreement(video_bank: Tensor, audio_bank: Tensor, labels: np.ndarray, positives: int) -> dict[str, Tensor]:
    """Compute the percentage of mined positives with the anchor's class, by type of agreement.

    Args:
        video_bank, audio_bank: [N, d]. If N exceeds `LARGEST_BANK`, use only `LARGEST_BANK` evenly spaced rows.
        labels: class of each row [N]; rows with -1 are ignored.
    """
    if len(video_bank) > LARGEST_BANK:
        chosen = torch.linspace(0, len(video_bank) - 1, LARGEST_BANK, device=video_bank.device).long()
        video_bank, audio_bank, labels = video_bank[chosen], audio_bank[chosen], labels[chosen.cpu().numpy()]
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(video_bank.device)
    known = targets >= 0
    metrics: dict[str, Tensor] = {}
    if not positives or not bool(known.any()) or len(targets) < positives + 2:
        return metrics
    for agreement in AGREEMENTS:
        mined = mine_positives(video_bank, audio_bank, positives, agreement).long()
        same = (targets[mined] == targets[:, None])[known]
        metrics[f"mining_precision_{agreement}"] = 100.0 * same.float().mean()
    return metrics


@torch.no_grad()
def draw_neighbors(
    module: pl.LightningModule,
    clips: AudioVisualClips,
    video: Tensor,
    audio: Tensor,
    index: Tensor,
    queries: int = 6,
    neighbors: int = 5,
) -> list[list[str]]:
    """Draw the nearest clips by video, by audio, and across modalities. Return rows (query, kind, neighbors' files).

    The unit rows of video and audio [N, d] belong to the items `index` [N] of `clips`.
    """
    names, labels = clips.listing.classes, clips.listing.labels
    rows = list(range(0, len(index), max(len(index) // queries, 1)))[:queries]
    # Compare only these rows: all pairs of a large held-out set would take gigabytes.
    kinds = {
        "video to video": video[rows] @ video.T,
        "audio to audio": audio[rows] @ audio.T,
        "video to audio": video[rows] @ audio.T,
    }
    lines: list[GridRow] = []
    table: list[list[str]] = []
    for number, row in enumerate(rows):
        for kind, similarity in kinds.items():
            scores = similarity[number].clone()
            if kind != "video to audio":
                scores[row] = -2.0
            best = scores.topk(min(neighbors, len(scores) - 1)).indices.tolist()
            items = [int(index[position]) for position in (row, *best)]
            cells = []
            for item in items:
                name = names[labels[item]] if names and labels[item] >= 0 else ""
                cells.append(
                    GridCell(preview_of(clips, item), name, WRONG if labels[item] != labels[items[0]] else None)
                )
            lines.append(GridRow(kind, cells))
            table.append([clips.name(items[0]), kind, *(clips.name(item) for item in items[1:])])
    title = "Query (left) and its nearest held-out clips; red: another class. For audio the clip's frame is shown"
    save_figure(module, image_grid(lines, title), media_folder(module) / "neighbors.png")
    columns = ["query", "kind", *(f"neighbor {number + 1}" for number in range(len(table[0]) - 2))]
    log_table(module, "neighbors_table", columns, table)
    return table
