"""What is looked at right after pre-training: retrieval across modalities, mining precision, neighbours as pictures.

None of it is a published number.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common.data.media import MediaError
from common.metrics.retrieval import match_ranks
from papers.avid_cma.mining import Agreement, mine_positives

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.data.clips import AudioVisualClips

# Mining costs the square of this; four kinds of agreement are judged after every pre-training.
LARGEST_BANK = 50_000
AGREEMENTS: tuple[Agreement, ...] = ("consensus", "union", "video", "audio")


class Progress(nn.Module):
    """Where the loss and the normaliser started and where they are: buffers, so that they survive a resume.

    Args:
        steps: the loss at the start is a mean over so many steps; at the end an exponential mean of that memory.
    """

    count: Tensor
    first: Tensor
    recent: Tensor
    first_normaliser: Tensor

    def __init__(self, steps: int = 10) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("recent", torch.zeros(()))
        self.register_buffer("first_normaliser", torch.full((), -1.0))

    @torch.no_grad()
    def update(self, loss: Tensor, normaliser: Tensor) -> None:
        """Take in the loss of a step and the normaliser in force."""
        self.first_normaliser.copy_(torch.where(self.count == 0, normaliser, self.first_normaliser))
        self.first.add_(torch.where(self.count < self.steps, loss / self.steps, 0.0))
        weight = torch.clamp(1.0 / (self.count + 1.0), min=1.0 / self.steps)
        self.recent.lerp_(loss.float(), weight)
        self.count.add_(1.0)

    def compute(self, normaliser: Tensor) -> dict[str, Tensor]:
        """Loss at the start and at the end, the normaliser, and how far it moved since the first step (0: frozen)."""
        if not bool(self.count > 0):
            return {}
        return {
            "loss_first": self.first * self.steps / torch.clamp(self.count, max=float(self.steps)),
            "loss_last": self.recent,
            "normaliser": normaliser,
            "normaliser_drift": (normaliser - self.first_normaliser).abs(),
        }


def bank_norms(*banks: Tensor) -> dict[str, Tensor]:
    """Largest deviation of any row's length from 1."""
    return {"bank_norm_error": torch.stack([(bank.norm(dim=1) - 1.0).abs().max() for bank in banks]).max()}


def cross_modal_retrieval(video: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """How often a held-out clip's own sound is the nearest of all sounds to its picture, in percent.

    Ties are not rewarded: a sound that is as near as the right one counts as nearer, and so does everything when a
    score is NaN. Compared in blocks, since all pairs of a large held-out set would take gigabytes.

    Args:
        video, audio: unit embeddings [N, d], row i of both from the same clip.
    """
    nearer = match_ranks(video, audio)
    return {
        "retrieval_r1": 100.0 * (nearer < 1).float().mean(),
        "retrieval_r5": 100.0 * (nearer < 5).float().mean(),
        "retrieval_chance": torch.tensor(100.0 / len(video), device=video.device),
    }


def bank_agreement(video_bank: Tensor, audio_bank: Tensor, labels: np.ndarray, positives: int) -> dict[str, Tensor]:
    """Share of mined positives of the anchor's class by type of agreement, in percent (specification 15, P2).

    Labels are used here alone, never in training.

    Args:
        video_bank, audio_bank: [N, d].
        labels: class of every row [N]; rows without one (-1) are left out.
        positives: how many are mined per instance. Of a bank with more than `LARGEST_BANK` rows, so many evenly spaced
            rows are judged.
    """
    if len(video_bank) > LARGEST_BANK:
        chosen = torch.linspace(0, len(video_bank) - 1, LARGEST_BANK, device=video_bank.device).long()
        video_bank, audio_bank, labels = video_bank[chosen], audio_bank[chosen], labels[chosen.cpu().numpy()]
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(video_bank.device)
    known = targets >= 0
    metrics: dict[str, Tensor] = {}
    if not bool(known.any()) or len(targets) < positives + 2:
        return metrics
    for agreement in AGREEMENTS:
        mined = mine_positives(video_bank, audio_bank, positives, agreement).long()
        same = (targets[mined] == targets[:, None])[known]
        metrics[f"mining_precision_{agreement}"] = 100.0 * same.float().mean()
    return metrics


@torch.no_grad()
def draw_neighbours(
    module: pl.LightningModule,
    clips: AudioVisualClips,
    video: Tensor,
    audio: Tensor,
    index: Tensor,
    path: Path,
    queries: int = 6,
    neighbours: int = 5,
) -> list[list[str]]:
    """Write a picture of each query's nearest clips: by video, by audio, and across modalities.

    Args:
        module: only its loggers are used: a W&B logger gets the picture and a table.
        clips: the held-out clips that `index` counts.
        video, audio: unit embeddings [N, d].
        index: positions of the rows in `clips` [N]; a clip whose picture cannot be read is shown in grey.
        path: PNG file to write.
        queries, neighbours: size of the picture.

    Returns:
        Rows of the media table: query, kind of neighbourhood, file and class of each neighbour.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    names = clips.listing.classes
    labels = clips.listing.labels
    step = max(len(index) // queries, 1)
    rows = list(range(0, len(index), step))[:queries]
    # Of these rows alone: all pairs of a large held-out set would take gigabytes.
    kinds = {
        "video to video": video[rows] @ video.T,
        "audio to audio": audio[rows] @ audio.T,
        "video to audio": video[rows] @ audio.T,
    }
    figure, axes = plt.subplots(
        len(rows) * len(kinds), neighbours + 1, figsize=(1.5 * (neighbours + 1), 1.55 * len(rows) * len(kinds)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    table: list[list[str]] = []
    frames: dict[int, np.ndarray] = {}

    def frame(position: int) -> np.ndarray:
        item = int(index[position])
        if item not in frames:
            try:
                frames[item] = clips.preview(item)
            except MediaError:
                # Of a damaged file, the clip that was embedded could be read, but the frame in its middle cannot.
                frames[item] = np.full((1, 1, 3), 127, dtype=np.uint8)
        return frames[item]

    for q, row in enumerate(rows):
        for k, (kind, similarity) in enumerate(kinds.items()):
            scores = similarity[q].clone()
            if kind != "video to audio":
                scores[row] = -2.0
            best = scores.topk(min(neighbours, len(scores) - 1)).indices.tolist()
            line = axes[q * len(kinds) + k]
            for axis, position in zip(line, [row, *best]):
                label = int(labels[int(index[position])])
                axis.imshow(frame(position))
                right = label == int(labels[int(index[row])])
                axis.set_title(names[label] if names else str(label), fontsize=6, color="black" if right else "tab:red")
            line[0].set_ylabel(kind, fontsize=6)
            for axis in line:
                axis.set_xticks([])
                axis.set_yticks([])
            table.append([clips.name(int(index[row])), kind, *(clips.name(int(index[position])) for position in best)])
    figure.suptitle(
        "Query (left) and its nearest held-out clips; red: another class. For audio the clip's frame is shown",
        fontsize=7,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)

    from lightning.pytorch.loggers import WandbLogger

    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("neighbours", [str(path)])
            columns = ["query", "kind", *(f"neighbour {i + 1}" for i in range(len(table[0]) - 2))]
            logger.log_table("neighbours_table", columns=columns, data=table)
    return table
