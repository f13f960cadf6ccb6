"""The same encoders at other widths, depths and input sizes."""

import pytest
import torch

from common.encoders.audio import AudioConvNet
from common.encoders.video import R2Plus1D


@pytest.mark.parametrize(
    ("encoder", "frames", "side", "expected"),
    [
        (R2Plus1D(depth=10, width=4, stem_pool=False), 8, 24, [(8, 12), (8, 12), (4, 6), (2, 3), (1, 2)]),
        (
            R2Plus1D(depth=10, width=4, stem_pool=False, stem_kernel=3, stem_stride=1, spatial_strides=(2, 2, 2, 1)),
            8,
            24,
            [(8, 24), (8, 12), (4, 6), (2, 3), (1, 3)],
        ),
    ],
)
def test_video_stage_shapes(encoder: R2Plus1D, frames: int, side: int, expected: list[tuple[int, int]]) -> None:
    encoder.eval()
    with torch.no_grad():
        stages = encoder.forward_stages(torch.zeros(1, 3, frames, side, side))
    names = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x")
    assert [(stages[name].shape[2], stages[name].shape[3]) for name in names] == expected
    assert [stages[name].shape[1] for name in names] == [4, 4, 8, 16, 32]
    assert stages["pool"].shape == (1, encoder.feature_dim, 1, 1, 1)


def test_audio_stage_shapes() -> None:
    encoder = AudioConvNet(width=2, small=True).eval()
    with torch.no_grad():
        stages = encoder.forward_stages(torch.zeros(1, 1, 100, 129))
    names = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x")
    assert [tuple(stages[name].shape[2:]) for name in names] == [(50, 65), (50, 65), (25, 33), (13, 17), (13, 17)]
    assert stages["pool"].shape == (1, 16, 1, 1)
