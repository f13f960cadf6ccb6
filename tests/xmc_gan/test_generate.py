"""Test generating images from a user's captions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import StageError
from papers.xmc_gan import XMCGAN
from tests.xmc_gan.stages import finished
from tests.xmc_gan.test_text import write_bert

CAPTION = "a red circle left and a blue square right on white"


@pytest.fixture(scope="module")
def painter() -> XMCGAN:
    return XMCGAN.from_export(finished().checkpoint("xmc_gan"))


def test_images_follow_seed_and_caption(painter: XMCGAN) -> None:
    images = painter.generate([CAPTION, "a green triangle left and a blue square right on white"], number=3, seed=1)
    assert images.shape == (2, 3, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images[:1].equal(painter.generate([CAPTION], number=3, seed=1))
    torch.testing.assert_close(images[0, :2], painter.generate([CAPTION], number=2, seed=1)[0])
    assert not images[0, 0].equal(images[0, 1])
    assert not images[0].equal(images[1])
    assert not images[0].equal(painter.generate([CAPTION], number=3, seed=2)[0])


def test_unknown_words_and_long_captions_are_told(painter: XMCGAN) -> None:
    assert painter.notes(CAPTION) == []
    (unknown,) = painter.notes("a purple circle left and a blue elephant")
    assert "purple, elephant" in unknown
    (long,) = painter.notes(" ".join(["a red circle left"] * 5))
    assert "by 6 tokens" in long
    assert painter.notes("RED!!") == []  # punctuation doesn't count as an unknown word
    for nothing in ("?!", "zebra !"):
        with pytest.raises(StageError, match=r"the caption is empty|does not know zebra;"):
            painter.notes(nothing)


def test_a_stage_that_learned_from_stored_features_reads_captions_with_bert(tmp_path: Path) -> None:
    stages = finished()
    moved, bert = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "bert-base-uncased"
    moved.parent.mkdir(parents=True)
    shutil.copy(stages.checkpoint("xmc_gan"), moved)
    config = yaml.safe_load((stages.folder("xmc_gan") / "config.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["text_encoder"] = None
    data = config["data"]["init_args"]
    data |= {"world": None, "text_features": {"folder": "/gone/features", "bert": str(bert)}}
    data["dataset"]["init_args"]["root"] = "/gone/coco"
    data["tokenizer"]["init_args"]["vocabulary"] = str(tmp_path / "vocab.txt")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "red", "circle", "left", "and", "blue", "square", "on", "white"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="bert-base-uncased"):
        XMCGAN.from_export(moved)
    write_bert(bert, words, 16)
    painter = XMCGAN.from_export(moved)
    assert painter.generate(["a red circle", "a blue square left and a"], 2).shape == (2, 2, 3, 32, 32)
    assert painter.notes("a red zebra") == ["the model does not know zebra"]
