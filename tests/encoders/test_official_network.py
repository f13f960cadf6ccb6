"""Compare the networks with the released ones (names, shapes, counts and outputs), and test other widths and depths."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.encoders.audio import AudioConvNet
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from papers.avid_cma.networks import AVID

GOLDEN = Path(__file__).parents[1] / "golden" / "avid_cma"


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def paper_model() -> AVID:
    return AVID(R2Plus1D(), AudioConvNet(), ProjectionHead(), ProjectionHead())


def reduced_model() -> AVID:
    heads = ProjectionHead(layers=1), ProjectionHead(layers=1)
    return AVID(R2Plus1D(depth=10, stem_pool=False), AudioConvNet(small=True), *heads)


# Build the networks in the test. Otherwise every process that collects tests would build and keep them.
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(R2Plus1D, depth=34), 28_861_632),
        (reduced_model, 11_872_640),
    ],
)
def test_parameter_count(make: Callable[[], nn.Module], expected: int) -> None:
    assert count(make()) == expected


def test_names_shapes_and_order_are_the_official_ones() -> None:
    official = json.loads((GOLDEN / "official_state_dict.json").read_text())["model"]
    state = paper_model().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == official


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "encoders_r2p1d18.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def weighted_model() -> AVID:
    """Make the model with the seeded weights that the golden outputs were computed with."""
    official = json.loads((GOLDEN / "official_state_dict.json").read_text())["model"]
    state: dict[str, torch.Tensor] = {}
    for position, (key, shape) in enumerate(official.items()):
        draw = np.random.RandomState(1000 + position)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        if key.endswith("running_mean"):
            value = 0.1 * draw.standard_normal(shape)
        elif key.endswith("running_var"):
            value = 1 + 0.5 * draw.random_sample(shape)
        elif len(shape) == 1 and key.endswith("weight"):
            value = 1 + 0.1 * draw.standard_normal(shape)
        elif len(shape) == 1:
            value = 0.1 * draw.standard_normal(shape)
        else:
            value = np.sqrt(2 / np.prod(shape[1:])) * draw.standard_normal(shape)
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    model = paper_model()
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.RandomState(77)
    video = draw.standard_normal((2, 3, 8, 64, 64)).astype(np.float32)
    audio = draw.standard_normal((2, 1, 100, 129)).astype(np.float32)
    return torch.from_numpy(video), torch.from_numpy(audio)


def assert_close(actual: torch.Tensor, expected: np.ndarray, share: float = 1e-5) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=share * scale)


def test_embeddings_and_every_stage(
    weighted_model: AVID, clips: tuple[torch.Tensor, torch.Tensor], golden: dict[str, np.ndarray]
) -> None:
    weighted_model.eval()
    with torch.no_grad():
        video, audio = weighted_model(*clips)
        assert_close(video, golden["video_emb"])
        assert_close(audio, golden["audio_emb"])
        assert_close(weighted_model.video_model(clips[0]), golden["video_pool"])
        assert_close(weighted_model.audio_model(clips[1]), golden["audio_pool"])
        towers = {
            "video": weighted_model.video_model.forward_stages(clips[0]),
            "audio": weighted_model.audio_model.forward_stages(clips[1]),
        }
    checked = 0
    for tower, stages in towers.items():
        assert list(stages) == ["conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool"]
        for stage, x in stages.items():
            if f"{tower}_{stage}_shape" not in golden:
                continue
            assert list(x.shape) == golden[f"{tower}_{stage}_shape"].tolist()
            stats = torch.stack([x.mean(), x.abs().mean(), x.max(), x.square().mean().sqrt()])
            np.testing.assert_allclose(stats.numpy(), golden[f"{tower}_{stage}_stats"], rtol=1e-5)
            checked += 1
    assert checked == 11


def test_embeddings_with_batch_statistics(
    weighted_model: AVID, clips: tuple[torch.Tensor, torch.Tensor], golden: dict[str, np.ndarray]
) -> None:
    before = {key: value.clone() for key, value in weighted_model.state_dict().items()}
    weighted_model.train()
    with torch.no_grad():
        video, audio = weighted_model(*clips)
    weighted_model.load_state_dict(before)
    # Batch statistics of so few values magnify rounding.
    assert_close(video, golden["video_emb_trainmode"], share=3e-4)
    assert_close(audio, golden["audio_emb_trainmode"])


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
