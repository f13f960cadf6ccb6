"""The same encoders at other widths, depths and input sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoders.audio import AudioConvNet
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D


@pytest.mark.parametrize(
    ("encoder", "frames", "side", "expected"),
    [
        (R2Plus1D(width=4), 8, 224, [(8, 56), (8, 56), (4, 28), (2, 14), (1, 7)]),
        (R2Plus1D(width=4), 32, 64, [(32, 16), (32, 16), (16, 8), (8, 4), (4, 2)]),
        (R2Plus1D(depth=10, width=4, stem_pool=False), 8, 112, [(8, 56), (8, 56), (4, 28), (2, 14), (1, 7)]),
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


@pytest.mark.parametrize(
    ("small", "size", "expected"),
    [
        (False, (200, 257), [(100, 129), (50, 65), (25, 33), (13, 17), (13, 17)]),
        (False, (100, 129), [(50, 65), (25, 33), (13, 17), (7, 9), (7, 9)]),
        (True, (100, 129), [(50, 65), (50, 65), (25, 33), (13, 17), (13, 17)]),
    ],
)
def test_audio_stage_shapes(small: bool, size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    encoder = AudioConvNet(width=2, small=small).eval()
    with torch.no_grad():
        stages = encoder.forward_stages(torch.zeros(1, 1, *size))
    names = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x")
    assert [tuple(stages[name].shape[2:]) for name in names] == expected
    assert stages["pool"].shape == (1, 16, 1, 1)


@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 9),
    side=st.integers(8, 33),
    batch=st.integers(2, 3),
    width=st.sampled_from([1, 2, 3]),
    pool=st.booleans(),
)
def test_any_video_size_gives_one_vector(frames: int, side: int, batch: int, width: int, pool: bool) -> None:
    encoder = R2Plus1D(depth=10, width=width, stem_pool=pool).eval()
    with torch.no_grad():
        features = encoder(torch.randn(batch, 3, frames, side, side))
    assert features.shape == (batch, 8 * width)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("encoder", [R2Plus1D(depth=10, width=4, stem_pool=False), AudioConvNet(width=4, small=True)])
def test_every_parameter_gets_a_gradient(encoder: torch.nn.Module) -> None:
    torch.manual_seed(0)
    clip = torch.randn(4, 3, 8, 24, 24) if isinstance(encoder, R2Plus1D) else torch.randn(4, 1, 32, 33)
    encoder(clip).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_projection_head_layers() -> None:
    head = ProjectionHead(8, 16, 4, layers=3, batch_norm=True)
    assert [type(layer).__name__ for layer in head.projection] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    assert head(torch.randn(3, 8)).shape == (3, 4)
    assert list(ProjectionHead().state_dict()) == [f"projection.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")]
