"""Test FID, inception score, R-precision and object accuracy of generated images, with networks of a few lines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from common.data.datasets.coco import CLASSES
from common.metrics.generation import Moments, frechet_distance, r_precision
from common.protocols import generation
from common.protocols.generation import GenerationEvaluation, RealImages
from tests.protocols.parts import loader, pictures, results_of, trainer


def module(data: Any, samples: int, **more: Any) -> Any:
    trainer = SimpleNamespace(
        datamodule=data,
        is_global_zero=True,
        test_dataloaders=SimpleNamespace(dataset=range(samples)),
        precision_plugin=Precision(),
    )
    return SimpleNamespace(device=torch.device("cpu"), trainer=trainer, **more)


class TinyInception(nn.Module):
    """Return the mean color of each quarter of an image as features, and their softmax as class probabilities."""

    def __init__(self, path: str) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ torch.eye(12)  # autocast would round this
        return features, features.softmax(1)


class TinyInceptionTV(TinyInception):
    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images)[0] * 2


class TinyClip(nn.Module):
    """Embed an image as its mean color, and a text as the color that the text names."""

    def __init__(self, path: str) -> None:
        super().__init__()

    def images(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[int(part) / 100 for part in text.split()[-3:]] for text in texts])


class TinyDetector(nn.Module):
    """Detect a dog in light images and a cat in dark images."""

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
    """Replace the released networks by networks of a few lines, and write a file for each."""
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    networks = {name: generation.NETWORKS[name]._replace(build=kind) for name, kind in TINY.items()}
    monkeypatch.setattr(generation, "NETWORKS", networks)
    files = {name: tmp_path / f"{name}.pth" for name in TINY}
    for path in files.values():
        path.write_bytes(b"weights")
    return {name: str(path) for name, path in files.items()}


IMAGES = torch.rand(41, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REAL = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)) ** 2
COLORS = (IMAGES.mean((2, 3)) * 100).round().int().tolist()
TEXTS = [f"a {'dog' if n % 2 else 'cat'} of {' '.join(map(str, color))}" for n, color in enumerate(COLORS)]


class Real:
    listing = MagicMock()

    def __len__(self) -> int:
        return len(REAL)

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": "1234"}


class TinyData:
    """The parts of a data module that the evaluation uses."""

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
                    if part[0] == 0:  # image 20 replaces a broken file, and also comes later
                        image, index = torch.cat([image, REAL[20:21]]), torch.cat([index, torch.tensor([20])])
                    yield {"image": image, "index": index, "skipped": (torch.arange(len(index)) == 16).long()}

        return Loader()

    def caption_loader(self, numbers: list[int]) -> Any:
        for part in torch.arange(len(numbers)).split(10):
            yield {"index": part, "caption": torch.tensor(numbers)[part], "length": torch.ones(len(part))}


def update(evaluation: GenerationEvaluation, images: Tensor, repeat: int = 0) -> None:
    for part in torch.arange(len(images)).split(9):
        evaluation.update(images[part], {"index": part, "caption": part, "skipped": torch.zeros_like(part)}, repeat)
    # This image replaces a broken file. It must only count at its own index.
    broken = {"index": torch.tensor([3]), "caption": torch.tensor([3]), "skipped": torch.tensor([1])}
    evaluation.update(torch.ones(1, 3, 8, 8), broken, repeat)


def test_the_metrics_of_the_paper(tiny: dict[str, str]) -> None:
    evaluation = GenerationEvaluation(**tiny, repeats=2, folds=5, candidates=20, object_copies=0)
    data = TinyData()
    evaluation.begin(module(data, len(IMAGES)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update(evaluation, IMAGES)
        update(evaluation, IMAGES.flip(0), repeat=1)
    found = evaluation.compute()
    names = {"fid", "fid_tv", "inception_score", "r_precision", "soa_c", "soa_i"}
    assert set(found) == names | {f"{name}_spread" for name in names} | {"r_precision_fold_spread"}
    features, probabilities = TinyInception("")(IMAGES)
    expected = frechet_distance(Moments.of(features), Moments.of(TinyInception("")(REAL)[0]))
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert found["fid_spread"] == pytest.approx(0, abs=1e-9)
    assert found["fid_tv"] == pytest.approx(4 * expected, rel=1e-6)
    entropy = torch.special.xlogy(probabilities, probabilities / probabilities.mean(0)).sum(1).mean()
    assert found["inception_score"] == pytest.approx(float(entropy.exp()), rel=1e-6)
    (own, spread), (flipped, flipped_spread) = (
        r_precision(images.mean((2, 3)), TinyClip("").texts(TEXTS), None, 20, 5) for images in (IMAGES, IMAGES.flip(0))
    )
    assert found["r_precision_fold_spread"] == pytest.approx((spread + flipped_spread) / 2)
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
        evaluation = GenerationEvaluation(inception=tiny["inception"], repeats=1)
        evaluation.begin(module(data, len(IMAGES)))
        update(evaluation, IMAGES)
        values.append(evaluation.compute())
    assert data.looked_at == 1
    assert values[0] == values[1]
    assert set(values[0]) == {"fid", "inception_score"}
    Path(tiny["inception"]).write_bytes(b"other weights")
    GenerationEvaluation(inception=tiny["inception"]).begin(module(data, len(IMAGES)))
    assert data.looked_at == 2
    Real.listing.__iter__.return_value = [SimpleNamespace(stamps=lambda: [])]  # the files change, but not their names
    GenerationEvaluation(inception=tiny["inception"]).begin(module(data, len(IMAGES)))
    assert data.looked_at == 3


@pytest.mark.parametrize("first", [True, False])
def test_object_accuracy_generates_images_of_its_own(first: bool, tiny: dict[str, str], capsys: Any) -> None:
    asked = []

    def images_of(batch: dict[str, Tensor], seed: int) -> Tensor:
        asked.append(len(batch["index"]))
        return torch.where(batch["caption"] % 4 == 1, 0.9, 0.1).float()[:, None, None, None].expand(-1, 3, 8, 8)

    maker = module(TinyData(), len(IMAGES), images_of=images_of)
    maker.trainer.is_global_zero = first
    evaluation = GenerationEvaluation(detector=tiny["detector"], repeats=3, object_copies=2)
    evaluation.begin(maker)
    update(evaluation, IMAGES)
    found = evaluation.compute()
    assert sum(asked) == 2 * len(TEXTS)
    assert ("images for object accuracy" in capsys.readouterr().out) == first
    # The detector finds all 21 cats and 10 of 20 dogs.
    assert found == {"soa_c": pytest.approx(75.0), "soa_i": pytest.approx(100 * (21 + 10) / 41)}


@pytest.mark.parametrize("copies", [0, 2])
def test_captions_without_objects_leave_object_accuracy_out(copies: int, tiny: dict[str, str], capsys: Any) -> None:
    class NoObjects(TinyData):
        def texts(self, role: str, captions: list[int]) -> list[str]:
            return ["a red flower"] * len(captions)

        def caption_loader(self, numbers: list[int]) -> Any:
            raise AssertionError("a loader of nothing")

    evaluation = GenerationEvaluation(
        inception=tiny["inception"], detector=tiny["detector"], repeats=2, object_copies=copies
    )
    evaluation.begin(module(NoObjects(), len(IMAGES)))
    for repeat in range(2):
        update(evaluation, IMAGES, repeat)
    assert evaluation.compute().keys() == {"fid", "fid_spread", "inception_score", "inception_score_spread"}
    assert capsys.readouterr().out.count("soa_c and soa_i are left out") == 1


def test_what_is_missing_is_left_out(tiny: dict[str, str], tmp_path: Path) -> None:
    evaluation = GenerationEvaluation(
        inception=str(tmp_path / "absent.pth"), clip=None, detector=str(tmp_path / "also.pth"), object_copies=3
    )
    for metric, reason in (("fid", "absent.pth"), ("r_precision", "evaluation.clip"), ("fids", "unknown")):
        assert reason in evaluation.why_not(metric)
    assert GenerationEvaluation(inception=tiny["inception"]).why_not("inception_score") == ""
    evaluation.begin(module(TinyData(), len(IMAGES)))
    update(evaluation, IMAGES)
    assert evaluation.compute() == {}


@pytest.mark.parametrize("options", [{"repeats": 3, "object_copies": 0}, {"repeats": 1, "object_copies": 3}])
def test_real_images_cannot_be_made_anew(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="evaluation"):
        RealImages(SimpleNamespace(**options))  # type: ignore[arg-type]


def test_real_images_are_measured_as_if_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = MagicMock()
    monkeypatch.setattr(generation, "draw_row", drawn)
    evaluation = MagicMock(repeats=1, object_copies=0)
    evaluation.compute.return_value = {"fid": 3.0}
    images = RealImages(evaluation)
    assert results_of(trainer(tmp_path), images, loader(pictures(6))) == {"test/fid": 3.0}
    called = [call[0] for call in evaluation.method_calls]
    assert called == ["load_pretrained", "begin", "update", "update", "compute"]
    for call in evaluation.update.call_args_list:
        assert call.args[0] is call.args[1]["image"]
    ((drawn_by, shown), _) = drawn.call_args
    assert drawn_by is images
    assert shown({"image": 5}) == 5
