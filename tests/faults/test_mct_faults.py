"""Check that MCT's stages stop before training on wrong input, and that they skip and count broken images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from assemble.stages.run import run_stage
from common.data.item_dataset import TooManyBrokenFiles
from common.data.worlds.shapes import ShapesWorld
from papers.mct.module import MCTModule
from tests.stages import request

SMALL = {"train": 32, "val": 6}


@pytest.fixture
def before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the first training step begins, since errors must come earlier."""

    def step(self: MCTModule, batch: Any, batch_idx: int) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(MCTModule, "training_step", step)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Make a folder in COCO's layout that a test can damage."""
    world = ShapesWorld(seed=5, **SMALL)
    world.prepare(["coco"])
    root = tmp_path / "coco"
    shutil.copytree(world.root_of("coco"), root)
    return root


def with_root(root: Path, **data: Any) -> dict[str, Any]:
    return {
        "trainer": {"limit_train_batches": 1.0},
        "data": {"init_args": {"world": None, "dataset": {"init_args": {"root": str(root)}}, **data}},
    }


def test_trains_without_broken_images_which_are_counted_and_named(coco: Path, tmp_path: Path) -> None:
    files = sorted((coco / "train2017").iterdir())
    files[3].write_bytes(b"")
    files[17].write_bytes(files[17].read_bytes()[:200])
    held_out = sorted((coco / "val2017").iterdir())[2]
    held_out.write_bytes(b"no picture")
    record = run_stage(request("mct/mct_tag", tmp_path / "run", layer=with_root(coco, max_skipped_fraction=0.2)))
    training = record.data["training (coco)"]
    assert training["samples"] == 32
    assert training["skipped"] == 2
    assert training["skipped_names"] == [f"train2017/{files[place].name}" for place in (3, 17)]
    tested = record.data["test (coco)"]
    assert (tested["samples"], tested["skipped"]) == (6, 1)
    assert tested["skipped_names"] == [f"val2017/{held_out.name}"]
    # The broken image can't be found, so chance is computed for the other five images.
    assert record.metrics["test/t2i_chance_medr"] == 2.5

    with pytest.raises(TooManyBrokenFiles, match=r"coco: 1 of 32 files.*max_skipped_fraction"):
        run_stage(request("mct/mct", tmp_path / "strict", layer=with_root(coco, max_skipped_fraction=0.01)))


def test_trains_on_coco_without_instances_where_no_loss_reads_tags(coco: Path, tmp_path: Path) -> None:
    for path in (coco / "annotations").glob("instances_*"):
        path.unlink()
    record = run_stage(request("mct/mct", tmp_path / "run", layer=with_root(coco)))
    assert record.metrics["test/neighbours_with_a_tag"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.loss.tag_count", "80"), r"model.loss.tag_count is 80, the data set has 16 tags"),
        (("--model.image_encoder.layers", "[1, 1, 1]"), r"layers and channels need four entries"),
        (
            ("--model.text_encoder.vocabulary_size", "60"),
            r"the tokenizer has \d+ word pieces, but model.text_encoder only 60 ",
        ),
    ],
)
@pytest.mark.usefixtures("before_training")
def test_settings_that_do_not_fit_the_data(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        run_stage(request("mct/mct_tag", tmp_path, *arguments))
