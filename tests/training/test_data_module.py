"""Test the data loaders that all data modules share, and what a record says about the data."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from common.data.image_transforms import ImageTransform
from common.data.images import ImageItems
from common.data.item_dataset import TooManyBrokenFiles
from common.data.listing import Clip
from common.data.media import FileCache
from common.data.samplers import EpochSampler
from common.training.data_module import MOST_AHEAD, PartsLoader, ShardedDataModule, bytes_of, loader_plan
from tests.data.image_layouts import FEATURES, regions, write_image
from tests.data.media_factory import listing_of


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageItems:
    monkeypatch.setattr(FileCache, "_shared", None)
    for number in range(5):
        write_image(tmp_path / f"{number}.jpg", number)
    (tmp_path / "3.jpg").write_bytes(b"")
    listing = listing_of(tmp_path, [Clip(tmp_path / f"{n}.jpg", 0) for n in range(5)])
    transform = ImageTransform(crop=8, resize=8)
    return ImageItems(listing, transform, training=True, cache_bytes=2**20, max_skipped_fraction=0.5)


@pytest.fixture
def module() -> ShardedDataModule:
    module = ShardedDataModule(batch_size=2, num_workers=0, seed=0)
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    trainer: Any = SimpleNamespace(
        global_rank=0,
        world_size=1,
        num_devices=1,
        limit_train_batches=1.0,
        current_epoch=0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), epoch_progress=progress),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        default_root_dir="runs/stage",
    )
    module.trainer = trainer
    return module


def ragged(samples: list[Any]) -> Any:
    """Make a batch that can't be stacked into tensors."""
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
        # The progress of a restart counts the loader's batches, not the smaller batches inside them.
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = done
        loader = module.training_loader(items, collate_fn=ragged, batches_at_once=2)
        assert [indices for _, indices in loader] == [shown[:2], shown[2:4]][done:]
    trainer.world_size = 2
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        module.training_loader(items, batches_at_once=2)


class Steps(Dataset[Any]):
    """Five steps. Each sample contains its step number."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: Any) -> Any:
        return {"key": list(key), "ragged": [torch.zeros(key[1])]}


def test_steps_that_are_put_together_by_the_data_set(module: ShardedDataModule) -> None:
    """Check that the steps are complete, ordered, equal on every rank, and continue where a run stopped."""
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


def test_the_record_names_what_was_skipped(
    module: ShardedDataModule, items: ImageItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    items.listing = replace(items.listing, missing=2, missing_names=("8.jpg", "9.jpg"))
    with pytest.warns(UserWarning, match="2 listed items are missing and left out, such as 8.jpg"):
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
        "missing": 2,
        "skipped": 1,
        "skipped_names": ["3.jpg"],
    }
    assert described["part (test)"]["samples"] == 1
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda flags, op: flags[1:].fill_(op is dist.ReduceOp.MAX))
    with pytest.raises(TooManyBrokenFiles, match="4 of 5 files"):
        module.describe()


def test_a_resumed_run_knows_what_was_skipped_before(module: ShardedDataModule, items: ImageItems) -> None:
    list(module.training_loader(items))
    module.load_state_dict(module.state_dict())
    items.skipped.flags.zero_()
    module.training_loader(items)
    assert items.skipped.names() == ["3.jpg"]
    items.listing = items.listing.subset(range(4))
    with pytest.raises(ValueError, match=r"files were added or removed since this run began.*runs/stage"):
        module.training_loader(items)


def test_workers_find_the_cache_filled(
    module: ShardedDataModule, items: ImageItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.num_workers = 1
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    loader = module.evaluation_loader(Subset(items, [0, 1]), 2)
    assert loader.num_workers == 1
    assert items.cache is not None
    assert len(items.cache._entries) == 4
    (batch,) = loader
    assert batch["index"].tolist() == [0, 1]


# -- memory ------------------------------------------------------------------------------------------------------------


@given(
    budget=st.integers(1, 10**12), sample=st.integers(1, 10**9), batch=st.integers(1, 512), wanted=st.integers(1, 64),
    stacked=st.booleans(),
)  # fmt: skip
def test_what_is_in_flight_stays_within_the_budget(
    budget: int, sample: int, batch: int, wanted: int, stacked: bool
) -> None:
    workers, ahead, part, held = loader_plan(budget, sample, batch, wanted, stacked)
    assert 1 <= workers <= wanted
    assert 1 <= ahead <= MOST_AHEAD
    assert batch % part == 0
    assert held >= workers * (ahead + 1) * part * sample
    # The smallest possible plan holds two samples and the batch.
    assert held <= max(budget, (2 + (1 if stacked else 3) * batch) * sample)
    assert workers == wanted or ahead == part == 1


def test_published_sizes_on_eight_devices() -> None:
    device, clip = 2 * 10**9, 5_022_504
    assert loader_plan(device, clip, 32, 8)[:3] == (8, 2, 8)  # AVID on 32 devices, as published
    assert loader_plan(device, clip, 128, 8)[:3] == (8, 2, 8)
    assert loader_plan(device, clip, 320, 8)[:3] == (8, 2, 2)  # on AudioSet
    assert loader_plan(device, 19_300_000, 8, 8, stacked=False)[:3] == (8, 2, 2)  # VX2TEXT
    assert loader_plan(device, 602_112, 32, 8)[:3] == (8, 4, 32)
    assert loader_plan(device, 120_422_400, 4, 8)[:3] == (6, 1, 1)  # 25 clips per video in UCF's test


class Clips(Dataset[Any]):
    """Clips of AVID's size, or of the given number of frames."""

    def __init__(self, frames: int = 8) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, key: Any) -> Any:
        item = key[1] if isinstance(key, tuple) else key
        return {"video": torch.full((3, self.frames, 224, 224), float(item)), "index": torch.tensor(item)}


def _memory() -> int:
    """Return the bytes of this process and its children. Shared pages count once."""
    total = 0
    for number in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        rows = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        total += next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) * 1024
    return total


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists() or shutil.disk_usage("/dev/shm").free < 2**31,
    reason="needs 2 GB of /dev/shm, as Linux counts it",
)
def test_a_loader_at_published_sizes_stays_within_its_memory(
    module: ShardedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load AVID's 128 clips per device (643 MB) with eight processes. A whole batch in each would take 9.6 GB."""
    monkeypatch.setattr("common.training.data_module.usable_cores", lambda: 8)
    trainer: Any = module.trainer
    trainer.num_devices, module.batch_size, module.num_workers = 8, 128, 8
    before, most = _memory(), 0
    loader = module.training_loader(Clips())
    order = [item for _, item in EpochSampler(1000, 128, 0)]
    batches = iter(loader)
    for number in range(2):
        batch = next(batches)
        assert batch["index"].tolist() == order[128 * number : 128 * (number + 1)]
        assert torch.equal(batch["video"][:, 0, 0, 0, 0], batch["index"].float())
        del batch
        highest = -1
        while most > highest or most <= 643_000_000:  # wait until reading ahead stops
            highest = most
            for _ in range(5):
                time.sleep(0.1)
                most = max(most, _memory() - before)
    batches.close()
    assert 643_000_000 < most <= module.in_flight_bytes // 8


@pytest.mark.parametrize("collate", [None, lambda samples: [sample["index"].item() for sample in samples]])
def test_parts_make_the_same_batches(collate: Any) -> None:
    options: dict[str, Any] = {"sampler": range(11), "batch_size": 4, "collate_fn": collate}
    whole, joined = DataLoader(Clips(1), **options), PartsLoader(DataLoader, Clips(1), 2, collate is None, **options)
    assert len(whole) == len(joined) == 3
    for _ in range(2):
        for one, other in zip(whole, joined, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_bytes_of_whatever_a_sample_holds() -> None:
    sample = {"video": torch.zeros(3, 4, dtype=torch.uint8), "boxes": [torch.zeros(2), torch.zeros(3)], "name": "text"}
    assert bytes_of([sample, (torch.zeros(1).numpy(), 3)]) == 12 + 20 + 4
    assert bytes_of(regions(0)) == 3 * 4 * (FEATURES + 4) + 3 * 8


class Growing(Dataset[Any]):
    """Samples with 1,000 bytes at the key that is measured first, and with 100,000 bytes at all other keys."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: Any) -> Tensor:
        first = key in ((0, 0), 0)
        return torch.zeros(1_000 if first else 100_000, dtype=torch.uint8)


def test_processes_are_counted_for_the_batch_of_one_device(
    module: ShardedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.data_module.usable_cores", lambda: 8)
    trainer: Any = module.trainer
    trainer.world_size, trainer.num_devices, module.batch_size, module.num_workers = 2, 2, 20, 8
    module.in_flight_bytes = 2 * 8 * 3 * 10_000  # eight processes, each two batches of ten samples ahead
    for loader in (module.training_loader(Growing()), module.evaluation_loader(Growing(), 10)):
        assert (loader.num_workers, loader.prefetch_factor) == (8, 2)
    module.in_flight_bytes -= 1
    loader = module.training_loader(Growing())
    assert isinstance(loader, PartsLoader)
    assert (loader.num_workers, loader.batch_size, loader.parts.batch_size) == (8, 10, 5)
    assert len(loader) == 3


# -- order -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    samples=st.integers(8, 200),
    per_rank=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 50),
)
def test_ranks_share_the_global_batches_of_one_process(
    samples: int, per_rank: int, world: int, seed: int, epoch: int
) -> None:
    batch = per_rank * world
    if samples < batch:
        return
    single = EpochSampler(samples, batch, seed)
    single.set_epoch(epoch)
    order = list(single)
    assert len(order) == len(single) == samples // batch * batch
    assert len({item for _, item in order}) == len(order)
    parts = []
    for rank in range(world):
        sampler = EpochSampler(samples, batch, seed, rank, world)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
    for step in range(samples // batch):
        joined = {key for part in parts for key in part[step * per_rank : (step + 1) * per_rank]}
        assert joined == set(order[step * batch : (step + 1) * batch])


@settings(max_examples=40)
@given(stop=st.integers(0, 9), epoch=st.integers(0, 5), world=st.sampled_from([1, 2]))
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(stop: int, epoch: int, world: int) -> None:
    whole = EpochSampler(43, 4, seed=3, rank=world - 1, world_size=world)
    whole.set_epoch(epoch)
    rest = EpochSampler(43, 4, seed=3, rank=world - 1, world_size=world)
    rest.set_epoch(epoch)
    rest.begin_at(lambda: (epoch, stop))
    assert list(rest) == list(whole)[stop * 4 // world :]
    # Only the first iteration starts late.
    assert list(rest) == list(whole)


def test_the_order_is_the_same_in_every_release() -> None:
    sampler = EpochSampler(6, 2, seed=1)
    for epoch, order in enumerate(([4, 1, 3, 2, 0, 5], [5, 0, 4, 1, 2, 3])):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler) == [(epoch, item) for item in order]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by the number of processes"):
        EpochSampler(100, 9, 0, 0, 2)
    with pytest.raises(ValueError, match=r"larger than the 5 samples.*clips_per_video"):
        EpochSampler(5, 8, 0)
