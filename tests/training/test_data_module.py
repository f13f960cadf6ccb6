"""The loaders that all data modules share, and what a record says about the data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from common.data.image_transforms import ImageTransform
from common.data.images import ImageItems
from common.data.listing import Clip, Listing
from common.data.media import FileCache
from common.data.samplers import EpochSampler
from common.stages import recipe_data
from common.training.data_module import ShardedDataModule
from tests.data.image_layouts import write_image


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageItems:
    monkeypatch.setattr(FileCache, "_shared", None)
    for number in range(5):
        write_image(tmp_path / f"{number}.jpg", number)
    (tmp_path / "3.jpg").write_bytes(b"")
    listing = Listing.of("test", "1", [Clip(tmp_path / f"{n}.jpg", 0) for n in range(5)], ("a",), tmp_path)
    transform = ImageTransform(crop=8, resize=8)
    return ImageItems(listing, transform, training=True, cache_bytes=2**20, max_skipped_fraction=0.5)


@pytest.fixture
def module() -> ShardedDataModule:
    module = ShardedDataModule(batch_size=2, num_workers=0, seed=0)
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    trainer: Any = SimpleNamespace(
        global_rank=0,
        world_size=1,
        limit_train_batches=1.0,
        current_epoch=0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), epoch_progress=progress),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module.trainer = trainer
    return module


def ragged(samples: list[Any]) -> Any:
    """A batch that cannot be stacked."""
    return [tuple(sample["image"].shape) for sample in samples], [int(sample["index"]) for sample in samples]


def test_a_batch_is_made_as_asked(module: ShardedDataModule, items: ImageItems) -> None:
    order = [item for _, item in EpochSampler(5, 2, 0)]
    shown = [4 if item == 3 else item for item in order]
    batches = list(module.training_loader(items, collate_fn=ragged))
    assert batches == [([(3, 8, 8)] * 2, shown[:2]), ([(3, 8, 8)] * 2, shown[2:4])]
    assert [batch["image"].shape for batch in module.training_loader(items)] == [(2, 3, 8, 8)] * 2
    evaluated = list(module.evaluation_loader(items, 3, collate_fn=ragged))
    assert [indices for _, indices in evaluated] == [[0, 1, 2], [4, 4]]


def test_several_batches_at_once_stay_whole_batches(module: ShardedDataModule, items: ImageItems) -> None:
    order = [item for _, item in EpochSampler(5, 4, 0)]
    assert order == [item for _, item in EpochSampler(5, 2, 0)]
    shown = [4 if item == 3 else item for item in order]
    trainer: Any = module.trainer
    module.batch_size = 1
    for done in (0, 1):
        # A restart counts batches of the loader, not those in them.
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = done
        loader = module.training_loader(items, collate_fn=ragged, batches_at_once=2)
        assert [indices for _, indices in loader] == [shown[:2], shown[2:4]][done:]
    trainer.world_size = 2
    with pytest.raises(ValueError, match=r"data\.batch_size \(1\) is the global batch and must be divisible"):
        module.training_loader(items, batches_at_once=2)


class Steps(Dataset[Any]):
    """Five steps that say which they are."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: Any) -> Any:
        return {"key": list(key), "ragged": [torch.zeros(key[1])]}


def test_steps_that_are_put_together_by_the_data_set(module: ShardedDataModule) -> None:
    """In order, whole, the same on every rank, and from the place where a run stopped."""
    assert [step["key"] for step in module.step_loader(Steps())] == [[0, number] for number in range(5)]
    assert len(module.step_loader(Steps())) == 5
    trainer: Any = module.trainer
    trainer.world_size, trainer.global_rank = 2, 1
    trainer.fit_loop.epoch_loop.batch_progress.current.ready = 3
    trainer.current_epoch = 2
    loader = module.step_loader(Steps())
    assert [step["key"] for step in loader] == [[2, 3], [2, 4]]
    loader.sampler.set_epoch(3)
    rest = list(loader)
    assert [step["key"] for step in rest] == [[3, number] for number in range(5)]
    assert rest[4]["ragged"][0].shape == (4,)
    trainer.limit_train_batches = 3
    assert next(iter(module.step_loader(Steps())))["key"] == [3, 0]


def test_the_record_names_what_was_skipped(module: ShardedDataModule, items: ImageItems) -> None:
    list(module.training_loader(items))
    list(module.evaluation_loader(items, 2))
    list(module.evaluation_loader(TensorDataset(torch.zeros(3)), 2, "captions"))
    part: Dataset[Any] = Subset(items, [0, 2])
    list(module.evaluation_loader(Subset(part, [1]), 2, "part"))
    described = module.describe()
    assert described.keys() == {"training (test)", "test (test)", "part (test)"}
    assert described["training (test)"] == {
        "version": "1",
        "fingerprint": items.listing.fingerprint()[:16],
        "samples": 5,
        "skipped": 1,
        "skipped_names": ["3.jpg"],
    }
    assert described["part (test)"]["samples"] == 1


def test_workers_find_the_cache_filled(
    module: ShardedDataModule, items: ImageItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.num_workers = 1
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    loader = module.evaluation_loader(Subset(items, [0, 1]), 2)
    assert loader.num_workers == 1
    assert items.cache is not None
    assert len(items.cache) == 4
    (batch,) = loader
    assert batch["index"].tolist() == [0, 1]


def test_a_recipe_may_name_data_sets_anywhere_in_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def entry(kind: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"common.data.datasets.{kind}", "init_args": {"root": str(tmp_path), **arguments}}

    configs: dict[str, dict[str, Any]] = {
        "one": {"data": {"init_args": {"dataset": entry("coco.COCO"), "world": None, "seeds": [1, 2]}}},
        "two": {
            "data": {
                "class_path": "papers.mct.data.Mixed",
                "init_args": {
                    "dataset": entry("coco.COCO"),
                    "probe": {"init_args": {"dataset": entry("voc.PascalVOC", years=["2007"])}},
                    "others": [entry("voc.PascalVOC", years=["2007", "2012"]), entry("imagenet.ImageNet")],
                },
            },
            "model": {"init_args": {"dataset": entry("coco_karpathy.COCOKarpathy")}},
        },
        "none": {"model": {}},
    }
    monkeypatch.setattr(recipe_data, "recipes_of", lambda paper: list(configs))

    def resolved(paper: str, recipe: str, scale: str) -> Any:
        return SimpleNamespace(with_placeholders=lambda **names: configs[recipe])

    monkeypatch.setattr(recipe_data, "resolve", resolved)
    # A recipe that only serves the miniature needs no real data; a set that no recipe reads may be wished for.
    stages = {
        "stage": SimpleNamespace(recipe="mini", scales=("mini",)),
        "one": SimpleNamespace(recipe="one", scales=()),
    }
    stages["again"] = SimpleNamespace(recipe="one", scales=("paper",))
    monkeypatch.setattr(recipe_data, "load", lambda paper: SimpleNamespace(stages=stages))
    configs["mini"] = {"data": {"init_args": {"dataset": entry("esc50.ESC50")}}}
    package = import_module("papers.mct")
    monkeypatch.setattr(package, "OPTIONAL_DATASETS", ("common.data.datasets.sbu.SBU",), raising=False)
    *found, wished = recipe_data.datasets_of("mct", tmp_path)
    assert (type(wished).__name__, wished.root) == ("SBU", tmp_path / "sbu")
    assert [type(dataset).__name__ for dataset in found] == ["COCO", "PascalVOC", "PascalVOC", "ImageNet"]
    assert [dataset.years for dataset in found[1:3]] == [("2007",), ("2007", "2012")]  # type: ignore[attr-defined]
    assert all(dataset.root == tmp_path for dataset in found)
