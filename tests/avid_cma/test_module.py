"""AVID as a stage: what its configuration can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.encoders.audio import AudioConvNet
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from common.stages.run import run_stage
from papers.avid_cma.use import AVID
from tests.stages import request


def test_the_ablation_setting_runs_on_the_miniature(tmp_path: Path) -> None:
    # At paper scale it reads a list of real clips, which the miniature has none of.
    cross = request("avid/ablation_cross", tmp_path)
    run_stage(cross)
    start = str(cross.directory / "checkpoints" / "last.ckpt")
    record = run_stage(request("avid/ablation_cma", tmp_path, "--model.warm_start", start))
    assert record.data["training (audioset)"]["samples"] == 60
    assert record.steps == 2


def test_banks_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        run_stage(request("avid/avid", tmp_path, "--trainer.precision", "bf16-true"))


def test_embeddings_come_from_their_own_modality_and_are_not_normalized_in_training() -> None:
    torch.manual_seed(0)
    model = AVID(
        R2Plus1D(depth=10, width=2, stem_pool=False),
        AudioConvNet(width=2),
        ProjectionHead(16, 8, 4),
        ProjectionHead(16, 8, 4),
    ).eval()
    video, audio = torch.randn(3, 3, 8, 24, 24), torch.randn(3, 1, 32, 33)
    with torch.no_grad():
        v, a = model(video, audio)
        other_v, same_a = model(video.flip(0), audio)
    assert v.shape == a.shape == (3, 4)
    assert torch.allclose(other_v, v.flip(0), atol=1e-6)
    assert torch.equal(same_a, a)
    assert not torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-2)
    torch.testing.assert_close(model.embed_video(video[:, None]), torch.nn.functional.normalize(v, dim=1))
    torch.testing.assert_close(model.embed_audio(audio[:, None]), torch.nn.functional.normalize(a, dim=1))
