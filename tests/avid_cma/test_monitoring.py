"""Test the measurements after pre-training: progress, retrieval, mining precision, and the picture of neighbors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.data.media import MediaError
from papers.avid_cma import monitoring


def unit(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


class Clips:
    """Replacement for the held-out clips. The preview of clip 0 fails."""

    listing = SimpleNamespace(classes=("a", "b", "c"), labels=np.arange(12) % 3)

    def preview(self, item: int) -> np.ndarray:
        if item == 0:
            raise MediaError.of(Path("broken.mp4"), "no video frame could be decoded")
        return np.full((4, 6, 3), 20 * item, dtype=np.uint8)

    def name(self, item: int) -> str:
        return f"clip{item}"


def test_neighbors_are_the_nearest_other_clips(tmp_path: Path) -> None:
    index = torch.arange(11, -1, -1)  # the reverse of the listing's order
    video, audio = unit(12), unit(12, seed=1)
    module = SimpleNamespace(loggers=[], trainer=SimpleNamespace(default_root_dir=tmp_path))
    table = monitoring.draw_neighbors(module, Clips(), video, audio, index, queries=3, neighbors=2)  # type: ignore[arg-type]
    assert (tmp_path / "media" / "neighbors.png").stat().st_size > 0
    similarity = {
        "video to video": (video @ video.T).fill_diagonal_(-2),
        "audio to audio": (audio @ audio.T).fill_diagonal_(-2),
        "video to audio": video @ audio.T,
    }
    expected = [
        [f"clip{11 - row}", kind, *(f"clip{11 - place}" for place in scores[row].topk(2).indices.tolist())]
        for row in (0, 4, 8)
        for kind, scores in similarity.items()
    ]
    assert table == expected


def test_retrieval_counts_ties_against_the_model() -> None:
    video = torch.eye(10)
    found = monitoring.cross_modal_retrieval(video, video)
    assert (found["retrieval_r1"].item(), found["retrieval_r5"].item()) == (100.0, 100.0)
    assert found["retrieval_chance"].item() == pytest.approx(10.0)
    # Swap two pairs of sounds. The six other clips keep rank 1.
    swapped = video[[0, 1, 2, 3, 4, 6, 5, 8, 7, 9]]
    assert monitoring.cross_modal_retrieval(video, swapped)["retrieval_r1"].item() == pytest.approx(60.0)
    alike = torch.ones(10, 4) / 2
    assert monitoring.cross_modal_retrieval(alike, alike)["retrieval_r5"].item() == 0.0


def test_mining_precision_is_the_share_of_positives_of_the_same_class() -> None:
    labels = np.repeat([0, 1, -1], 4)
    center = torch.eye(3).repeat_interleave(4, dim=0)
    video = F.normalize(center + 0.1 * unit(12, 3), dim=1)
    sound = F.normalize(torch.eye(3)[torch.arange(12) % 3] + 0.1 * unit(12, 3, seed=1), dim=1)
    found = monitoring.bank_agreement(video, sound, labels, 3)
    assert found["mining_precision_video"].item() == 100.0
    assert found["mining_precision_audio"].item() < 60.0
    assert set(found) == {f"mining_precision_{kind}" for kind in ("consensus", "union", "video", "audio")}
    assert not monitoring.bank_agreement(video, sound, np.full(12, -1), 3)
    assert not monitoring.bank_agreement(video, sound, labels, 11)
    assert not monitoring.bank_agreement(video, sound, labels, 0)


def test_large_banks_are_judged_on_evenly_spaced_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "LARGEST_BANK", 6)
    bank, labels = unit(11), np.arange(11) % 2
    every_second = bank[::2]
    found = monitoring.bank_agreement(bank, bank, labels, 2)
    assert found == monitoring.bank_agreement(every_second, every_second, labels[::2], 2)
    assert found["mining_precision_video"].item() == 100.0  # all even rows have class 0


def test_progress_keeps_the_start_and_the_drift_of_the_normalizer() -> None:
    progress = monitoring.LossProgress(steps=2)
    assert progress.compute(torch.tensor(2.0)) == {}
    for loss, normalizer in ((8.0, 2.0), (6.0, 2.0), (3.0, 2.5)):
        progress.update(torch.tensor(loss), torch.tensor(normalizer))
    values = {name: value.item() for name, value in progress.compute(torch.tensor(2.5)).items()}
    # The first loss is the mean of two steps, (8 + 6) / 2 = 7. The last is a running mean, 0.5 * 7 + 0.5 * 3 = 5.
    assert values == {"loss_first": 7.0, "loss_last": 5.0, "normalizer": 2.5, "normalizer_drift": 0.5}
