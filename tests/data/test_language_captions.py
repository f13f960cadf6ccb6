"""Test the data sets of captions in several languages, in their published layouts, intact and damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.annotations import LanguageCaptions
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.stair_captions import STAIRCaptions
from common.data.datasets.wikipedia import TextLines, WikipediaText
from common.data.listing import DatasetMissing
from common.data.sequences import Packed, Rows, Texts
from tests.data.image_layouts import (
    COCO,
    FLICKR,
    write_coco_cn,
    write_coco_karpathy,
    write_conceptual_captions,
    write_features,
    write_multi30k,
    write_stair,
    write_wikipedia,
)
from tests.data.text_layouts import write_json


def rows(captions: LanguageCaptions) -> dict[str, tuple[str, ...]]:
    return dict(zip(captions.keys, captions.captions))


# ---------------------------------------------------------------------------------------------------- columns
@pytest.mark.parametrize(
    ("columns", "plain"),
    [
        (Texts(["a", "", "ü犬", "\udcff"]), ["a", "", "ü犬", "\udcff"]),
        (Rows.texts([("a", "bü"), (), ("", "c", "猫")]), [("a", "bü"), (), ("", "c", "猫")]),
        (Rows.numbers([(2**40, -1), ()]), [(2**40, -1), ()]),
        (Packed([{"a": 1}, None, "ü"]), [{"a": 1}, None, "ü"]),
        (Texts(()), []),
    ],
)
def test_columns_read_like_a_list(columns: Any, plain: list[Any]) -> None:
    assert columns == plain == pickle.loads(pickle.dumps(columns))
    assert columns != [*plain, "more"]
    assert (columns == 3) is False
    assert columns[-2:] == plain[-2:]
    assert [columns[row] for row in range(-len(plain), len(plain))] == plain + plain
    with pytest.raises(IndexError):
        columns[len(plain)]


def test_language_captions_know_their_images() -> None:
    captions = LanguageCaptions("de", Texts(["a", "b"]), Rows.texts([("eins", "zwei"), ("drei",)]), np.arange(2))
    grouped = LanguageCaptions("de", captions.keys, captions.captions, np.array([5, 5]))
    other = LanguageCaptions("fr", captions.keys, captions.captions, captions.groups)
    assert len({captions.fingerprint(), grouped.fingerprint(), other.fingerprint()}) == 3
    assert captions.fingerprint()[:16] == "2b4dbc10707debdc"


# ------------------------------------------------------------------------------------------------ Conceptual Captions
def test_conceptual_captions(tmp_path: Path) -> None:
    dataset = ConceptualCaptions(write_conceptual_captions(tmp_path))
    assert rows(dataset.captions("valid", "en")) == {"0": ("a val",)}
    assert dataset.image_path("1", "train").is_file()
    # img2dataset names the files this way.
    named = tmp_path / "training" / "00000" / "000000003.jpg"
    named.parent.mkdir()
    (tmp_path / "training" / "0.jpg").rename(named)
    assert dataset.image_path("3", "train") == named
    assert dataset.listing("train").names == ["training/00000/000000003.jpg", "training/1.jpg"]
    with pytest.raises(ValueError, match=r"no captions in 'de'; it has en"):
        dataset.captions("train", "de")
    write_json(tmp_path / "groups.json", {"train": {"0": 4, "1": 4, "3": 2}})
    assert dataset.captions("train").groups.tolist() == [4, 4, 2]


def test_region_features_are_found_by_row_and_in_the_order_of_their_shards(tmp_path: Path) -> None:
    dataset = ConceptualCaptions(write_conceptual_captions(tmp_path))
    with pytest.raises(DatasetMissing, match=r"no region features of split 'train'[\s\S]*--extract-regions"):
        dataset.regions("train")
    # The authors put their feature files into the root.
    write_features(tmp_path / "train_10.h5", ["google_0000003"])
    write_features(tmp_path / "train_9.h5", ["google_0000000", "google_0000001"])
    assert [path.name for path in dataset.region_paths("train")] == ["train_9.h5", "train_10.h5"]
    assert list(dataset.regions("train").keys) == ["0", "1", "3"]
    assert dataset.regions("train").missing(dataset.captions("train").keys) == []
    assert dataset.region_notes("train") == []
    broken = tmp_path / "regions" / "val.npz"
    broken.parent.mkdir()
    broken.write_bytes(b"PK")
    assert "val: region features cannot be used: " in dataset.region_notes("val")[0]
    broken.rename(broken.with_name(".all.0a.1.tmp.npz"))
    assert "val: no region features" in dataset.region_notes("val")[0]
    # The folder `regions` takes precedence over the root, and users can name another folder.
    write_features(tmp_path / "regions" / "train.npz", ["7"])
    assert list(dataset.regions("train").keys) == ["7"]
    write_features(tmp_path / "other" / "everything.h5", ["8"])
    assert list(ConceptualCaptions(tmp_path, tmp_path / "other").regions("val").keys) == ["8"]


# ---------------------------------------------------------------------------------------------------- Multi30K
def test_multi30k(tmp_path: Path) -> None:
    dataset = Multi30K(write_multi30k(tmp_path))
    assert list(dataset.captions("test_2016_flickr").keys) == ["5"]
    assert dataset.image_path(FLICKR[0], "train").is_file()


# ---------------------------------------------------------------------------------------------------- COCO and on it
def test_coco_has_captions_by_key(tmp_path: Path) -> None:
    dataset = COCOKarpathy(write_coco_karpathy(tmp_path), restval=True)
    captions = dataset.captions("train")
    assert rows(captions) == {key: tuple(f"caption {n} of {int(key[-12:])}" for n in range(2)) for key in COCO[:2]}
    assert captions.groups.tolist() == [9, 42]
    assert all(dataset.image_path(key, "train").is_file() for key in COCO)
    # The extractor writes one file per image folder. Every split finds its images in these files.
    for folder, keys in (("train2014", COCO[:1]), ("val2014", COCO[1:])):
        write_features(tmp_path / "regions" / f"{folder}.h5", keys)
    assert not dataset.regions("train").missing(captions.keys)
    write_features(tmp_path / "elsewhere" / "coco_test1k.h5", COCO[2:])
    assert list(COCOKarpathy(tmp_path, regions=tmp_path / "elsewhere").regions("test").keys) == [COCO[2]]


def test_captions_of_coco_in_other_languages(tmp_path: Path) -> None:
    coco = write_coco_karpathy(tmp_path / "films/coco2014")
    stair = STAIRCaptions(write_stair(tmp_path / "stair", "stair_captions_v1.2"), coco)
    with pytest.raises(DatasetMissing, match="Karpathy's split is missing"):
        STAIRCaptions(stair.root, tmp_path / "nowhere").captions("train")
    assert rows(stair.captions("test", "ja")) == {COCO[2]: ("キャプション 0 73", "キャプション 1 73")}
    assert len(STAIRCaptions(stair.root, coco, restval=True).captions("train")) == 2
    assert stair.image_path(COCO[2], "test").is_file()
    write_features(coco / "regions" / "train.npz", COCO[:1])
    assert list(stair.regions("train").keys) == [COCO[0]]
    # COCO-CN's splits differ from COCO's, so its features may be in any of COCO's files.
    write_features(coco / "regions" / "test.npz", COCO[1:])
    chinese = COCOCN(write_coco_cn(tmp_path / "coco_cn"), coco)
    assert [chinese.region_notes(split) for split in chinese.splits] == [[], [], []]


def test_coco_cn_without_coco(tmp_path: Path) -> None:
    dataset = COCOCN(write_coco_cn(tmp_path / "coco_cn", "."))
    assert rows(dataset.captions("train")) == {COCO[0]: ("一只 狗", "狗")}
    assert dataset.captions("train").groups.tolist() == [0]


# ---------------------------------------------------------------------------------------------------- text alone
def test_wikipedia(tmp_path: Path) -> None:
    dataset = WikipediaText(write_wikipedia(tmp_path))
    assert (dataset.languages, dataset.unit) == (("en", "zh_yue"), "sentences")
    lines = dataset.sentences("train", "zh_yue")
    assert list(lines) == ["One zh_yue.", "Twö.", "Three"]
    assert (len(lines), lines[-1], lines[:2]) == (3, "Three", ["One zh_yue.", "Twö."])
    assert list(pickle.loads(pickle.dumps(lines))) == list(lines)
    assert lines.path == tmp_path / "zh_yue.train.txt"
    assert dataset.status().counts == {"train en": 3, "valid en": 1, "train zh_yue": 3, "valid zh_yue": 1}
    assert dataset.status().present


def test_a_language_without_text(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing, match="nothing at"):
        WikipediaText(tmp_path / "none").languages  # noqa: B018
    with pytest.raises(DatasetMissing, match="no file of text"):
        WikipediaText(tmp_path).languages  # noqa: B018
    write_wikipedia(tmp_path)
    with pytest.raises(DatasetMissing, match="no text in 'de'"):
        WikipediaText(tmp_path).sentences("train", "de")
    status = WikipediaText(tmp_path, ["en", "de"]).status()
    assert not status.present
    assert status.counts == {"train en": 3, "valid en": 1}
    assert "no text in 'de'" in status.problems[0]
    (tmp_path / "en.train.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"en\.train\.txt: holds no text"):
        TextLines(tmp_path / "en.train.txt")
    (tmp_path / "en.train.txt").write_bytes(b"good\n\nb\xffd")
    lines = WikipediaText(tmp_path).sentences("train", "en")
    assert lines[0] == "good"
    with pytest.raises(ValueError, match=r"en\.train\.txt: not UTF-8 at byte 7"):
        lines[1]
