"""Test the bridge between frozen encoders, and its fair comparison of jointly and separately trained encoders."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from assemble.stages.loggers import MetricsFile
from common.data.datasets.coco import COCO
from common.data.text import WordVocabulary
from common.encoders.checkpoint_files import CheckpointError
from common.protocols.bridge import BridgeData, BridgedRetrieval, convergence, searched
from common.training.data_module import ShardedDataModule
from tests.protocols.parts import attached, results_of, trainer
from tests.protocols.test_captions import coco
from tests.protocols.test_data import SMALL
from tests.stages import read_metrics

WIDTH, HIDDEN_WIDTH = 6, 8


class Keyed(list[dict[str, Tensor]]):
    """A list of samples that also accepts the key (epoch, item)."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key[1] if isinstance(key, tuple) else key)


def rows(points: Tensor, images: bool, captions: bool) -> Any:
    """Use points as images, and the same points as tokens of captions."""

    def sample(item: int, point: Tensor) -> dict[str, Tensor]:
        number = torch.tensor(item)
        caption = {"tokens": point, "lengths": torch.tensor(WIDTH), "image_index": number}
        return {"index": number, **({"image": point} if images else {}), **(caption if captions else {})}

    return Keyed(sample(item, point) for item, point in enumerate(points))


class PointData(ShardedDataModule):
    """64 pairs to train on, 24 for selection and 40 to test on. Tokens are integers, as in captions."""

    def __init__(self) -> None:
        super().__init__(batch_size=16, num_workers=0, seed=0)
        drawn = torch.randint(0, 1000, (128, WIDTH), generator=torch.Generator().manual_seed(0))
        self.points = drawn.split([64, 24, 40])

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(rows(self.points[0], True, True))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        parts = [rows(points, not captions, captions) for points in self.points[1:] for captions in (False, True)]
        return [self.evaluation_loader(part, 7, str(number)) for number, part in enumerate(parts)]


def encoder(seed: int) -> nn.Module:
    """Make a linear encoder with fixed random weights."""
    drawn = torch.randn(WIDTH, HIDDEN_WIDTH, generator=torch.Generator().manual_seed(seed))
    module = nn.Linear(WIDTH, HIDDEN_WIDTH, bias=False)
    module.weight = nn.Parameter(drawn.T.contiguous())
    module.feature_dim = HIDDEN_WIDTH  # type: ignore[assignment]
    module.register_forward_pre_hook(lambda module, points: (points[0].float() - 500) / 300)
    return module


def bridged(**options: Any) -> BridgedRetrieval:
    image, text = encoder(1), encoder(2)
    torch.manual_seed(0)
    arguments = {"embedding_dim": 8, "lengths": [1, 4, 40], "learning_rates": [1e-6, 1e-2], **options}
    return BridgedRetrieval(image, text, **arguments)


def trained(tmp_path: Path, module: BridgedRetrieval, **options: Any) -> dict[str, float]:
    steps = module.hparams["lengths"][-1]
    run = trainer(tmp_path, max_steps=steps, max_epochs=-1, use_distributed_sampler=False, **options)
    run.fit(module, datamodule=PointData())
    return results_of(run, module, PointData())


@pytest.mark.parametrize("hidden_dim", [None, 12])
def test_a_bridge_joins_two_views_of_the_same(tmp_path: Path, hidden_dim: int | None) -> None:
    log = MetricsFile(tmp_path / "metrics.csv")
    module = bridged(hidden_dim=hidden_dim)
    before = [parameter.clone() for encoder in module.frozen().values() for parameter in encoder.parameters()]
    found = trained(tmp_path, module, logger=[log])
    assert found["test/r10"] == (found["test/i2t_r10"] + found["test/t2i_r10"]) / 2 == found["test/r10_after_40"]
    assert found["test/r10"] > found["test/r10_after_1"] + 20
    assert found["test/learning_rate"] == pytest.approx(1e-2)  # nothing is learned at the lower rate
    assert 4 < found["test/steps_to_90"] <= 40
    assert found["test/r10_after_1"] < found["test/area"] < found["test/r10"]
    assert found["test/encoder_parameters"] == 2 * WIDTH * HIDDEN_WIDTH
    linear, deep = 2 * (8 * 8 + 8), 2 * (8 * 12 + 12 + 12 * 8 + 8)
    assert found["test/bridge_parameters"] == (linear if hidden_dim is None else deep)
    after = [parameter for encoder in module.frozen().values() for parameter in encoder.parameters()]
    assert all(torch.equal(left, right) for left, right in zip(before, after))
    learned = {name.split(".")[1] for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert learned == {"projections"}
    # Training took ten whole epochs, so the mean over batches equals the mean over pairs.
    mean = module.text_encoder(PointData().points[0]).mean(0)
    torch.testing.assert_close(module.bridge.norms["text"].running_mean, mean, rtol=1e-3, atol=1e-3)
    curve = read_metrics(tmp_path / "metrics.csv")["bridge/r10"]
    assert [step for step, _ in curve] == [1, 4, 40]


def test_the_bridge_after_some_steps_is_that_of_a_shorter_training(tmp_path: Path) -> None:
    long, short = bridged(lengths=[3, 10]), bridged(lengths=[3])
    for module in (long, short):
        trained(tmp_path, module)
    kept, whole = long.kept["3"].state_dict(), short.bridge.state_dict()
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    assert any(not torch.equal(kept[name], value) for name, value in long.bridge.state_dict().items())


def test_equal_captions_are_no_negatives() -> None:
    module, logged = bridged(), {}
    module.log_dict = logged.update  # type: ignore[method-assign]
    image = torch.randint(0, 1000, (4, WIDTH))
    batch = {"image": image, "tokens": image, "lengths": torch.full((4,), WIDTH), "image_index": torch.arange(4)}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # rounds the features, but not the loss
        features = module.features(image), module.text_features(image)
        loss = module.training_step(batch, 0)
    parts = module.bridge("image", features[0]), module.bridge("text", features[1])
    assert torch.cat(parts).norm(dim=2).flatten().tolist() == pytest.approx([1.0] * 16)
    losses = {}
    for rate, left, right in zip(("1e-06", "0.01"), *parts):
        ways = left @ right.T / 0.1, right @ left.T / 0.1
        each = [nn.functional.cross_entropy(way, torch.arange(4)).item() for way in ways]
        losses[f"train/loss_lr_{rate}"] = sum(each) / 2
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(losses, rel=1e-5)
    assert loss.item() == pytest.approx(sum(losses.values()), rel=1e-5)
    for equal in ({"tokens": image[:1].repeat(4, 1)}, {"image_index": torch.zeros(4)}):
        assert module.training_step({**batch, **equal}, 0).item() == pytest.approx(0.0, abs=1e-6)


def test_both_encoders_are_read_from_one_checkpoint(tmp_path: Path) -> None:
    shape = (HIDDEN_WIDTH, WIDTH)
    state = {"image.weight": torch.ones(shape), "text.weight": torch.zeros(shape)}
    path = tmp_path / "both.ckpt"
    torch.save({"state_dict": state}, path)
    module = bridged(encoder_prefixes=["image."], text_encoder_prefixes=["text."])
    module.load_pretrained(str(path))
    assert torch.equal(module.encoder.weight, state["image.weight"])
    assert torch.equal(module.text_encoder.weight, state["text.weight"])
    torch.save({"state_dict": {"image.weight": torch.ones(shape)}}, path)
    with pytest.raises(CheckpointError, match=r"text\.weight"):
        module.load_pretrained(str(path))


# -- how soon ----------------------------------------------------------------------------------------------------------


def test_convergence_of_a_known_curve() -> None:
    found = convergence({steps: torch.tensor(value) for steps, value in {2: 0.0, 6: 50.0, 24: 100.0}.items()})
    # The last segment, from 6 to 24 steps, is two octaves wide. The curve reaches 90 % at 4/5 of it.
    assert found["area"].item() == pytest.approx((25 * math.log2(3) + 75 * 2) / math.log2(12), rel=1e-10)
    assert found["steps_to_90"].item() == pytest.approx(6 * 2 ** (0.8 * 2))
    assert convergence({5: torch.tensor(7.0)}) == {"area": 7.0, "steps_to_90": pytest.approx(5.0)}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_convergence_stays_on_the_curve(values: list[float]) -> None:
    found = convergence({2**place: torch.tensor(value) for place, value in enumerate(values)})
    area, (steps,) = found.pop("area").item(), found.values()
    assert min(values) - 1e-3 <= area <= max(values) + 1e-3
    assert 1 <= steps <= 2 ** (len(values) - 1)


def test_equal_captions_are_found_for_each_other() -> None:
    number, points = torch.arange(2), torch.eye(2)
    (found,) = searched(lambda _, features: features[None], points, points.flip(0), number, torch.tensor([5, 5]))  # type: ignore[arg-type]
    assert (found["i2t_r1"], found["t2i_r1"], found["r10"]) == (100, 100, 100)


# -- data --------------------------------------------------------------------------------------------------------------


def test_pairs_that_choose_are_never_trained_on(tmp_path: Path) -> None:
    coco(tmp_path, train=8)
    words = WordVocabulary(min_count=1)
    options: dict[str, Any] = {"image": SMALL, "batch_size": 4, "num_workers": 0, "captions_per_image": 2}
    data = attached(BridgeData(COCO(tmp_path), words, held_out_fraction=0.25, **options))
    trained_on = {clip.path for clip in data.listing}
    chosen_by = {clip.path for clip in data.selection_listing}
    assert (len(trained_on), len(chosen_by)) == (6, 2)
    assert not trained_on & chosen_by
    assert len(data.train_dataloader().dataset) == 2 * 6
    assert [loader.dataset.training for loader in data.test_dataloader()[::2]] == [False, False]
    seen = [len(loader.dataset) for loader in data.test_dataloader()]
    assert seen == [2, len(data.annotations.captions[0]) * 2, 3, len(data.held_out_captions)]
    for fraction in (0.0, 0.01):
        with pytest.raises(ValueError, match=r"data\.held_out_fraction"):
            attached(BridgeData(COCO(tmp_path), words, held_out_fraction=fraction, **options))
