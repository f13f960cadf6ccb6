"""The two-tower network."""

import torch

from common.encoders.audio import AudioConvNet
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from papers.avid_cma.use import AVID


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
