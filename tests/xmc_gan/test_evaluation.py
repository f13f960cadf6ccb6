"""What is measured of generated images: the miniature's networks and metrics, and the paper's metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from common.data.worlds.two_objects import ATTRIBUTE_SIZES, TwoObjectsWorld
from common.encoders.checkpoint_files import CheckpointError
from common.metrics.generation import CLASSES, Moments, frechet_distance, inception_score, r_precision
from papers.xmc_gan import evaluation
from papers.xmc_gan.evaluation import (
    AttributeClassifier,
    GenerationEvaluation,
    MiniatureEvaluation,
    PictureNetwork,
    RealImages,
    noise_of,
)

COUNT = 150


def drawn(count: int = COUNT, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(size, size=count) for size in ATTRIBUTE_SIZES], axis=1))


def painted(attributes: Tensor) -> Tensor:
    """Pictures whose first pixels hold what they show, for a network that reads them there."""
    images = torch.zeros(len(attributes), 3, 8, 8)
    images[:, 0, 0, :5] = attributes / 10
    return images


class Reader(AttributeClassifier):
    """Names what `painted` wrote, and is nearly sure of it."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        attributes = (images[:, 0, 0, :5] * 10).round().long()
        parts = self.one_hot(attributes).mul(8).split(self.sizes, dim=1)
        return images[:, :, :2, :5].flatten(1), torch.cat([part.log_softmax(1) for part in parts], dim=1)


def module(data: Any, samples: int = COUNT, **more: Any) -> Any:
    trainer = SimpleNamespace(
        datamodule=data,
        is_global_zero=True,
        test_dataloaders=SimpleNamespace(dataset=range(samples)),
        precision_plugin=Precision(),
    )
    return SimpleNamespace(device=torch.device("cpu"), trainer=trainer, **more)


def miniature(tmp_path: Path, generated: Callable[[Tensor], Tensor], count: int = COUNT) -> dict[str, float]:
    """The metrics of pictures that are made from what is to be seen."""
    truth, others = drawn(count), drawn(count, seed=1)
    reader = Reader()
    torch.save({"state_dict": {f"network.{k}": v for k, v in reader.state_dict().items()}}, tmp_path / "reader.ckpt")
    reader.pretrained = str(tmp_path / "reader.ckpt")
    parts = [{"image": painted(others[part]), "index": part} for part in torch.arange(count).split(40)]
    data = SimpleNamespace(attributes={"test": truth}.__getitem__, reference_loader=lambda: parts)
    judged = MiniatureEvaluation(reader)
    judged.begin(module(data))
    for part in torch.arange(count).split(32):
        part = torch.cat([part, part[:1]])  # a picture that comes twice
        judged.update(painted(generated(truth[part])), {"image": painted(truth[part]), "index": part})
    return judged.compute()


# -- the miniature's metrics -------------------------------------------------------------------------------------------


def test_pictures_that_show_what_was_said(tmp_path: Path) -> None:
    found = miniature(tmp_path, lambda attributes: attributes)
    perfect = ("mini_r_precision", "mini_soa_i", "mini_soa_c", "mini_background")
    assert [found[name] for name in perfect] == [100] * 4
    assert found["captions"] == COUNT
    assert found["mini_r_precision_shuffled"] < 8
    assert found["mini_soa_i_shuffled"] < 20
    assert found["mini_fd"] == pytest.approx(found["mini_fd_floor"])


def test_pictures_of_the_wrong_sides_colours_and_grounds(tmp_path: Path) -> None:
    def other_ground(attributes: Tensor) -> Tensor:
        return torch.cat([attributes[:, :4], (attributes[:, 4:] + 1) % 3], dim=1)

    found = miniature(tmp_path, other_ground)
    assert (found["mini_background"], found["mini_soa_i"]) == (0, 100)
    assert found["mini_r_precision"] < 100

    def right_colour_gone(attributes: Tensor) -> Tensor:
        changed = attributes.clone()
        changed[:, 3] = (changed[:, 3] + 1) % 4
        return changed

    found = miniature(tmp_path, right_colour_gone)
    assert (found["mini_background"], found["mini_soa_i"]) == (100, 50)

    def no_circle(attributes: Tensor) -> Tensor:
        changed = attributes.clone()
        changed[:, [0, 2]] = changed[:, [0, 2]].clamp(min=1)
        return changed

    found = miniature(tmp_path, no_circle)
    assert found["mini_soa_c"] == pytest.approx(100 * 2 / 3)
    assert found["mini_fd"] > found["mini_fd_floor"]


def test_the_same_picture_for_every_caption_is_at_chance(tmp_path: Path) -> None:
    found = miniature(tmp_path, lambda attributes: torch.zeros_like(attributes))
    assert found["mini_r_precision"] < 8
    assert found["mini_soa_i"] < 20


def test_no_evaluator_leaves_the_metrics_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    judged = MiniatureEvaluation(AttributeClassifier())
    judged.begin(module(None))
    judged.update(torch.rand(2, 3, 8, 8), {})
    assert judged.compute() == {}
    assert "mini_* are left out" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, {"state_dict": {}}, {"state_dict": {"network.head.weight": torch.ones(1)}}])
def test_a_wrong_file_is_refused_before_training(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "evaluator.ckpt"
    if content is not None:
        torch.save(content, path)
    judged = MiniatureEvaluation(AttributeClassifier(pretrained=str(path)))
    with pytest.raises(CheckpointError, match=r"evaluator\.ckpt"):
        judged.load_pretrained()


# -- the miniature's networks ------------------------------------------------------------------------------------------


def test_combinations_have_numbers_of_their_own() -> None:
    every = torch.cartesian_prod(*(torch.arange(size) for size in ATTRIBUTE_SIZES))
    network = AttributeClassifier()
    assert sorted(network.identity(every).tolist()) == list(range(432))
    assert network.one_hot(every).sum(1).eq(5).all()
    assert network.named(network.one_hot(every)).equal(every)


def test_the_loss_of_the_evaluator_is_the_sum_over_attributes() -> None:
    network, images, attributes = AttributeClassifier(4, 8).eval(), torch.rand(6, 3, 32, 32), drawn(6)
    loss, right = network.judge(images, attributes)
    scores = network.head(network.features(images)).split(list(ATTRIBUTE_SIZES), dim=1)
    expected = sum(nn.functional.cross_entropy(s, a, reduction="none") for s, a in zip(scores, attributes.T))
    torch.testing.assert_close(loss, expected)
    named = torch.stack([part.argmax(1) for part in scores], dim=1)
    assert right.tolist() == (named == attributes)[:, :4].all(1).float().tolist()


def test_the_tasks_of_the_image_network() -> None:
    attributes, images = torch.tensor([[0, 1, 2, 3, 2], [1, 0, 1, 0, 1]]), torch.rand(2, 3, 32, 32)
    pairs = PictureNetwork("pairs").eval()
    assert pairs(images).shape == (2, 15)
    # Scores as they should be: the pairs of colour and shape that are there, also where both are the same.
    sure = torch.full((2, 15), -9.0)
    for row, places in enumerate(([1, 11, 14], [4, 13])):
        sure[row, places] = 9.0
    pairs.forward = lambda _: sure  # type: ignore[method-assign]
    loss, right = pairs.judge(images, attributes)
    assert right.tolist() == [1, 1]
    assert loss.max() < 0.01

    crops = PictureNetwork("crops", grid=1).eval()
    assert crops(images).shape == (2, 12)
    halves = crops(images[..., :16]), crops(images[..., 16:])
    loss, _ = crops.judge(images, attributes)
    expected = [
        nn.functional.cross_entropy(half, attributes[:, 2 * side] * 4 + attributes[:, 2 * side + 1], reduction="none")
        for side, half in enumerate(halves)
    ]
    torch.testing.assert_close(loss, expected[0] + expected[1])

    with pytest.raises(ValueError, match="nothing to learn"):
        PictureNetwork("untrained").judge(images, attributes)
    with pytest.raises(ValueError, match="'halves' is not one of pairs, crops, untrained"):
        PictureNetwork("halves")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["pairs", "crops", "untrained"])
def test_a_frozen_image_network_gives_gradients_to_images_alone(task: Any) -> None:
    network = PictureNetwork(task).load_pretrained()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    network(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "least"), [(AttributeClassifier(8, 32), 60), (PictureNetwork("crops", 8, 32, grid=2), 90)]
)
def test_the_networks_learn_the_world(network: Any, least: float) -> None:
    world = TwoObjectsWorld(seed=0)
    pictures, held_out = world.draw("train", range(1200)), world.draw("val", range(200))
    images, attributes = (
        torch.from_numpy(pictures.images).permute(0, 3, 1, 2) / 255,
        torch.from_numpy(pictures.attributes),
    )
    torch.manual_seed(0)
    for layer in network.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for step in range(120):
        rows = torch.arange(step * 64, step * 64 + 64) % len(images)
        loss = network.judge(images[rows], attributes[rows])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        seen = torch.from_numpy(held_out.images).permute(0, 3, 1, 2) / 255
        right = network.judge(seen, torch.from_numpy(held_out.attributes))[1]
    assert 100 * right.mean() >= least


# -- the paper's metrics -----------------------------------------------------------------------------------------------


class TinyInception(nn.Module):
    """Means of the colours of an image's quarters; its classes are their shares."""

    def __init__(self, path: str) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return features, features.softmax(1)


class TinyInceptionTV(TinyInception):
    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images)[0] * 2


class TinyClip(nn.Module):
    """An image's mean colour, and the colour that a text is of."""

    def __init__(self, path: str) -> None:
        super().__init__()

    def images(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[int(part) / 100 for part in text.split()[-3:]] for text in texts])


class TinyDetector(nn.Module):
    """Finds a dog in light images and a cat in dark ones."""

    def __init__(self, path: str) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        found = torch.zeros(len(images), len(CLASSES), dtype=torch.bool)
        light = images.mean((1, 2, 3)) > 0.5
        found[light, CLASSES.index("dog")] = True
        found[~light, CLASSES.index("cat")] = True
        return found


TINY = {"inception": TinyInception, "inception_tv": TinyInceptionTV, "clip": TinyClip, "detector": TinyDetector}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Judges of a few lines in place of released ones, and files for them."""
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    judges = {name: (kind, *evaluation._JUDGES[name][1:]) for name, kind in TINY.items()}
    monkeypatch.setattr(evaluation, "_JUDGES", judges)
    files = {name: tmp_path / f"{name}.pth" for name in TINY}
    for path in files.values():
        path.write_bytes(b"weights")
    return {name: str(path) for name, path in files.items()}


IMAGES = torch.rand(41, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REAL = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)) ** 2
COLOURS = (IMAGES.mean((2, 3)) * 100).round().int().tolist()
TEXTS = [f"a {'dog' if n % 2 else 'cat'} of {' '.join(map(str, colour))}" for n, colour in enumerate(COLOURS)]


class Real:
    """The data set behind the real images."""

    def __len__(self) -> int:
        return len(REAL)

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": "1234"}


class TinyData:
    """What the evaluation asks of a data module."""

    transform = SimpleNamespace(size=8)
    caption_count = len(TEXTS)

    def __init__(self) -> None:
        self.looked_at = 0

    def texts(self, role: str, captions: list[int]) -> list[str]:
        assert role == "test"
        return [TEXTS[number] for number in captions]

    def reference_loader(self) -> Any:
        class Loader:
            dataset = Real()

            def __iter__(inner) -> Any:
                self.looked_at += 1
                for part in torch.arange(len(REAL)).split(16):
                    image, index = REAL[part], part
                    if part[0] == 0:  # the neighbour of a broken file, which comes at its own place, too
                        image, index = torch.cat([image, REAL[20:21]]), torch.cat([index, torch.tensor([20])])
                    yield {"image": image, "index": index, "skipped": (torch.arange(len(index)) == 16).long()}

        return Loader()

    def caption_loader(self, numbers: list[int]) -> Any:
        for part in torch.arange(len(numbers)).split(10):
            yield {"index": part, "caption": torch.tensor(numbers)[part], "length": torch.ones(len(part))}


def update(judged: GenerationEvaluation, images: Tensor, repeat: int = 0) -> None:
    for part in torch.arange(len(images)).split(9):
        judged.update(images[part], {"index": part, "caption": part, "skipped": torch.zeros_like(part)}, repeat)
    # Stands in for a broken file: counted at its own place.
    broken = {"index": torch.tensor([3]), "caption": torch.tensor([3]), "skipped": torch.tensor([1])}
    judged.update(torch.ones(1, 3, 8, 8), broken, repeat)


def test_the_metrics_of_the_paper(tiny: dict[str, str]) -> None:
    judged = GenerationEvaluation(**tiny, repeats=2, folds=5, candidates=20, object_copies=0)
    data = TinyData()
    judged.begin(module(data, len(IMAGES)))
    update(judged, IMAGES)
    update(judged, IMAGES.flip(0), repeat=1)
    found = judged.compute()
    features, probabilities = TinyInception("")(IMAGES)
    expected = frechet_distance(Moments.of(features), Moments.of(TinyInception("")(REAL)[0]))
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert found["fid_spread"] == pytest.approx(0, abs=1e-9)
    assert found["fid_tv"] == pytest.approx(4 * expected, rel=1e-6)
    assert found["inception_score"] == pytest.approx(inception_score(probabilities)[0], rel=1e-6)
    own, flipped = (
        r_precision(images.mean((2, 3)), TinyClip("").texts(TEXTS), None, 20, 5)[0]
        for images in (IMAGES, IMAGES.flip(0))
    )
    assert found["r_precision"] == pytest.approx((own + flipped) / 2)
    assert found["r_precision_spread"] == pytest.approx((own - flipped) / 2)
    assert own > 50 > flipped
    light = IMAGES.mean((1, 2, 3)) > 0.5
    wanted = torch.arange(len(IMAGES)) % 2 == 1
    shares = [100 * (light == wanted)[wanted == kind].double().mean() for kind in (True, False)]
    flipped_shares = [100 * (light.flip(0) == wanted)[wanted == kind].double().mean() for kind in (True, False)]
    assert found["soa_c"] == pytest.approx(float(sum(shares) + sum(flipped_shares)) / 4)


def test_statistics_of_real_images_are_kept(tiny: dict[str, str]) -> None:
    data = TinyData()
    values = []
    for _ in range(2):
        judged = GenerationEvaluation(inception=tiny["inception"], repeats=1)
        judged.begin(module(data, len(IMAGES)))
        update(judged, IMAGES)
        values.append(judged.compute())
    assert data.looked_at == 1
    assert values[0] == values[1]
    assert set(values[0]) == {"fid", "inception_score"}
    Path(tiny["inception"]).write_bytes(b"other weights")
    GenerationEvaluation(inception=tiny["inception"]).begin(module(data, len(IMAGES)))
    assert data.looked_at == 2


def test_object_accuracy_generates_images_of_its_own(tiny: dict[str, str]) -> None:
    asked = []

    def generate(captions: Any, z: Tensor) -> Tensor:
        asked.append(len(z))
        return torch.where(captions % 4 == 1, 0.9, 0.1).float()[:, None, None, None].expand(-1, 3, 8, 8)

    maker = module(
        TinyData(), generate=generate, captions=lambda batch: batch["caption"], generator=SimpleNamespace(z_dim=4)
    )
    judged = GenerationEvaluation(detector=tiny["detector"], repeats=3, object_copies=2)
    judged.begin(maker)
    update(judged, IMAGES)
    found = judged.compute()
    assert sum(asked) == 2 * len(TEXTS)
    # All 21 cats are found, and every second one of 20 dogs.
    assert found == {"soa_c": pytest.approx(75.0), "soa_i": pytest.approx(100 * (21 + 10) / 41)}


def test_what_is_missing_is_left_out_and_said_once(
    tiny: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    judged = GenerationEvaluation(
        inception=str(tmp_path / "absent.pth"), clip=None, detector=str(tmp_path / "also.pth"), object_copies=3
    )
    judged.begin(module(TinyData(), len(IMAGES)))
    update(judged, IMAGES)
    assert judged.compute() == {}
    judged.begin(module(TinyData(), len(IMAGES)))  # the test of a run that trained
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "fid and inception_score will be left out" in lines[0]
    assert "absent.pth does not exist" in lines[0]
    assert "evaluation.clip is null" in lines[2]
    with pytest.raises(ValueError, match="repeats: must be at least 1"):
        GenerationEvaluation(repeats=0)


def test_what_is_missing_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    GenerationEvaluation().load_pretrained()
    assert "fid and inception_score will be left out: evaluation.inception is null" in capsys.readouterr().out


def test_the_message_names_the_file_of_every_released_network(capsys: pytest.CaptureFixture[str]) -> None:
    judged = GenerationEvaluation()
    judged.begin(module(TinyData(), 0))
    output = capsys.readouterr().out
    for file in (
        "inception_v3_google",
        "weights-inception-2015-12-05-6726825d.pth",
        "fasterrcnn_resnet50_fpn_v2_coco",
        "save_pretrained",
    ):
        assert file in output


def test_noise_depends_on_seed_and_sample_alone() -> None:
    noise = noise_of(torch.arange(2000), 8, 5)
    assert noise[[7, 3]].equal(noise_of(torch.tensor([7, 3]), 8, 5))
    assert not noise.equal(noise_of(torch.arange(2000), 8, 6))
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert noise_of(torch.arange(0), 8, 0).shape == (0, 8)


def test_real_images_are_judged_as_if_generated() -> None:
    calls: list[Any] = []
    judge = SimpleNamespace(
        begin=calls.append,
        update=lambda images, batch: calls.append((images, batch)),
        compute=lambda: {"mini_fd": 1.0},
        load_pretrained=lambda: calls.append("loaded"),
    )
    real = RealImages(judge)
    batch = {"image": torch.rand(2, 3, 8, 8)}
    real.setup("test")
    real.on_test_start()
    real.test_step(batch, 0)
    assert calls[0] == "loaded"
    assert calls[2][0] is batch["image"]
