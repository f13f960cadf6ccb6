"""Damaged files of data sets: every reader names the file, and the line or the field where it knows them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.avsd import AVSD
from common.data.datasets.base import placeholder
from common.data.datasets.coco import COCO
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.esc50 import ESC50, write_esc50
from common.data.datasets.hmdb51 import HMDB51, write_hmdb51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.localized_narratives import LocalizedNarrativesOpenImages
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.sbu import SBU
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101, write_ucf101
from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetError
from tests.data.image_layouts import (
    write_coco,
    write_coco_cn,
    write_conceptual_captions,
    write_imagenet,
    write_karpathy,
    write_multi30k,
    write_voc,
)
from tests.data.text_layouts import (
    ANSWERS,
    CLIPS,
    REFERENCES,
    dialog,
    moment,
    question,
    references,
    write_avsd,
    write_tvc,
    write_tvqa,
)

Damage = Callable[[Path], object]


def replaced(content: str | bytes) -> Damage:
    def damage(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def appended(content: str | bytes) -> Damage:
    more = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(path.read_bytes() + more + b"\n")


def document(change: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return damage


def edited(old: str, new: str) -> Damage:
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def drop(key: str) -> Damage:
    return document(lambda found: found.pop(key))


NO_JSON = [replaced(content) for content in (b"", b'{"images": [', b"\xff\xfe\x00", b"[" * 100_000, b"[1, 2]", b"null")]

COCO_CAPTIONS = [
    *((damage, "") for damage in NO_JSON),
    (drop("images"), "images"),
    (drop("annotations"), "annotations"),
    (document(lambda d: d["images"][0].pop("id")), "id"),
    (document(lambda d: d["images"][0].update(id=2**63)), ""),
    (document(lambda d: d["images"][0].pop("file_name")), "file_name"),
    (document(lambda d: d["images"][0].update(id=9)), "caption 3001 is of image 30"),
    (document(lambda d: d["images"][0].update(file_name=f"{9:012d}.jpg")), "file name '000000000009.jpg' occurs twice"),
    (document(lambda d: d["annotations"][0].update(id=901)), "caption id 901 occurs twice"),
    (document(lambda d: d["annotations"][0].update(image_id=8)), "caption 3001 is of image 8"),
    (document(lambda d: d["annotations"][0].update(caption=["a"])), ""),
    # As a file of instances has none.
    (document(lambda d: d["annotations"][0].pop("caption")), "caption"),
]
COCO_INSTANCES = [
    (drop("categories"), "categories"),
    (document(lambda d: d["annotations"][0].update(image_id=8)), "image 8"),
    (document(lambda d: d["annotations"][0].update(category_id=9)), "9"),
    (document(lambda d: d["annotations"][0].pop("bbox")), "bbox"),
    (document(lambda d: d["annotations"][0].update(bbox=[1, 2, 3])), ""),
]
KARPATHY = [
    *((damage, "") for damage in NO_JSON),
    *(
        (document(lambda d, key=key: d["images"][0].pop(key)), key)
        for key in ("split", "cocoid", "filename", "filepath", "sentences")
    ),
    (document(lambda d: d["images"][0]["sentences"][0].pop("raw")), "raw"),
    # Image 0 is for testing, image 2 for training: the same picture must not be in both.
    (document(lambda d: d["images"][0].update(cocoid=d["images"][2]["cocoid"])), "image id 878 occurs twice"),
]
VOC_BOXES = [
    replaced("<annotation><object>"),
    replaced(""),
    edited("train", "unicorn"),
    edited("<ymax>20</ymax>", ""),
    edited("<xmax>24</xmax>", "<xmax>five</xmax>"),
    edited("<xmax>24</xmax>", "<xmax>0</xmax>"),
]
AVSD_DIALOGS = [
    (replaced("{"), ""),
    (replaced("[]"), ""),
    (replaced('{"dialog": []}'), "dialogs"),
    *(
        (replaced(json.dumps({"dialogs": [dialog("AAAA1", 1, **{key: value})]})), word)
        for key, value, word in (
            ("dialog", ..., "dialog"),
            ("dialog", [{"question": "q"}], "answer"),
            ("image_id", ..., "image_id"),
            ("caption", None, ""),
        )
    ),
]
OTHER_DIALOGS = [
    (ANSWERS, {"dialogs": [dialog("CCCC3", 1, "two"), dialog("ZZZZ9", 3, "one")]}),
    (ANSWERS, {"dialogs": [dialog("ZZZZ9", 2, "one"), dialog("CCCC3", 1, "two")]}),
    (REFERENCES, references(["CCCC3_1", "ZZZZ9_3"])),
    (REFERENCES, references(["ZZZZ9_3"])),
    (REFERENCES, {**references(["ZZZZ9_3", "CCCC3_1"]), "annotations": [{"image_id": 7, "caption": "x"}]}),
]
QUESTIONS = [
    ({"a3": ...}, "a3"),
    ({"a3": None}, ""),
    ({"answer_idx": ...}, "answer_idx"),
    ({"answer_idx": 5}, '"answer_idx" must be 0 to 4, not 5'),
    ({"q": ...}, "q"),
    ({"ts": "soon"}, '"ts" must be start-end'),
    ({"qid": "x"}, "x"),
]
MOMENTS = [
    ({"descs": ...}, '"descs" is empty'),
    ({"descs": [{"desc_id": 3}]}, "desc"),
    ({"ts": [2.0, 1.0]}, '"ts" must be'),
    ({"ts": [1.0]}, ""),
    ({"clip_id": ...}, "clip_id"),
]
SUBTITLES = [
    ({"vid_name": "a", "sub": [{"text": "x", "start": "soon", "end": 2}]}, "soon"),
    ({"vid_name": "a", "sub": [{"start": 0, "end": 1}]}, "text"),
    ({"vid_name": "a"}, "sub"),
]
CLIP_LISTS: list[tuple[Any, str, Damage, Any, str]] = [
    *(
        (write, name, appended(damage), read, "line ")
        for write, name, read in (
            (write_esc50, "meta/esc50.csv", lambda root: ESC50(root).listing("all")),
            (write_audioset, "unbalanced_train_segments.csv", lambda root: AudioSet(root).listing("train")),
            (
                lambda root: write_kinetics(root, flat=True),
                "annotations/train.csv",
                lambda root: Kinetics400(root).listing("train"),
            ),
        )
        for damage in (b",".join([b"x" * 140_000] * 3), b"x\xff,x\xff,x\xff")
    ),
    (
        lambda root: write_kinetics(root, flat=True), "annotations/train.csv", replaced("label,video\nx,y\n"),
        lambda root: Kinetics400(root).listing("train"), "line 2: KeyError: 'youtube_id'",
    ),
    (
        write_audioset, "unbalanced_train_segments.csv", appended("justoneword"),
        lambda root: AudioSet(root).listing("train"), "line 7",
    ),
    *(
        (write_ucf101, "ucfTrainTestlist/trainlist01.txt", replaced(line),
         lambda root: UCF101(root).listing("train", 1), word)
        for line, word in (
            ("YoYo/v_YoYo_g02_c01.avi 1\n", "label 1, but classInd.txt gives 2"),
            ("Juggling/v_Juggling_g02_c01.avi 1\n", "'Juggling'"),
        )
    ),
    (
        write_hmdb51, "testTrainMulti_7030_splits/wave_test_split1.txt", replaced("a.avi 3\n"),
        lambda root: HMDB51(root).listing("test", 1), "'a.avi 3'",
    ),
    (
        write_esc50, "meta/esc50.csv", edited("fold,", "part,"),
        lambda root: ESC50(root).listing("all"), "line 2: KeyError: 'fold'",
    ),
    (
        write_dcase, "scenes_stereo/notes.wav", placeholder,
        lambda root: DCASE2014(root).listing("train"), "bus01.wav",
    ),
    *(
        (write_imagenet, "classes.txt", replaced(text),
         lambda root: ImageNet(root, class_list=root / "classes.txt").listing("train"), word)
        for text, word in (
            ("\n \n", "is empty"),
            ("n01440764\nn00000000\n", "such as n00000000"),
            (b"n01440764\nn0144\xb0\n", "names 1 classes that"),
        )
    ),
]  # fmt: skip
CAPTION_LISTS: list[tuple[Any, str, Damage, Any, str]] = [
    *(
        (write_conceptual_captions, "Train_GCC-training.tsv", replaced(text),
         lambda root: ConceptualCaptions(root).captions("train"), word)
        for text, word in (
            ("a\thttp\nno address\n", "line 2: 1 columns"),
            ("url\tcaption\na\n", "line 2: 1 columns"),
            ("\t\n \t \n", "holds no captions"),
            ("", "0 columns"),
            (b"caption\turl\n\xff\xfe\ta\n", "line"),
            ('caption\turl\n" a cat said\ta\na town\tb\nhe said "\tc\n', "a quote is not closed"),
            ('caption\turl\n"never ends\ta\n', "line 2"),
        )
    ),
    *(
        (lambda root: root, "sbu-captions-all.json", replaced(text), lambda root: SBU(root).captions("train"), word)
        for text, word in (
            ('{"captions": ["A dog"], "image_urls": ["u", "v"]}', "1 captions, but 2 addresses"),
            ('{"captions": [""], "image_urls": [""]}', "holds no captions"),
            ('{"image_urls": []}', "captions"),
            ("{", ""),
        )
    ),
    *(
        (write_multi30k, "data/task2/raw/train.3.en.gz", replaced(content),
         lambda root: Multi30K(root).captions("train", "en"), word)
        for content, word in (
            (gzip.compress(b"only one\n"), "1 captions for the 2 images"),
            (gzip.compress(b"one\ntwo\n")[:-9], ""),
            (b"no archive", ""),
            (gzip.compress(b"\xff\n"), ""),
        )
    ),
    (
        write_multi30k, "data/task1/image_splits/train.txt", replaced("1.jpg\n1.jpg\n"),
        lambda root: Multi30K(root).captions("train", "de"), "an image occurs twice",
    ),
    *(
        (write_coco_cn, "coco-cn-version1805v1.1/imageid.human-written-caption.txt", appended(line),
         lambda root: COCOCN(root).captions("train"), re.escape(repr(line)))
        for line in ("no tab", "COCO_val2014_000000000042\tno number", "#0\tno image")
    ),
    (
        write_conceptual_captions, "groups.json", replaced('{"train": {"0": 4}}'),
        lambda root: ConceptualCaptions(root).captions("train"), "'1'",
    ),
]  # fmt: skip


def cases() -> Iterator[tuple[Any, str, Damage, Any, str]]:
    """How to write a set, the file to damage, how, how to read it, and what the message must say."""
    for damage, word in COCO_CAPTIONS:
        yield write_coco, "annotations/captions_train2017.json", damage, lambda root: COCO(root).listing("train"), word
    for damage, word in COCO_INSTANCES:
        name = "annotations/instances_train2017.json"
        yield write_coco, name, damage, lambda root: COCO(root).annotations("train"), word
    for damage, word in KARPATHY:
        yield write_karpathy, "dataset_coco.json", damage, lambda root: COCOKarpathy(root).listing("test"), word
    for damage in VOC_BOXES:
        name = "VOCdevkit/VOC2007/Annotations/000011.xml"
        yield write_voc, name, damage, lambda root: PascalVOC(root).boxes("test"), ""
    for line in ("000010", "000010 2", "000010 1 1", "000010 present"):
        name = "VOCdevkit/VOC2007/ImageSets/Main/train_test.txt"
        yield write_voc, name, replaced(f"000011  1\n{line}\n"), lambda root: PascalVOC(root).labels("test"), ""
    for damage, word in AVSD_DIALOGS:
        yield write_avsd, "train_set4DSTC7-AVSD.json", damage, lambda root: AVSD(root).dialogs("train"), word
    for name, content in OTHER_DIALOGS:
        yield write_avsd, name, replaced(json.dumps(content)), lambda root: AVSD(root).dialogs("test"), ""
    for changes, word in QUESTIONS:
        damage = replaced("".join(json.dumps(question(0, CLIPS[0], **own)) + "\n" for own in ({}, changes)))
        yield write_tvqa, "tvqa_train.jsonl", damage, lambda root: TVQA(root).questions("train"), f"line 2: .*{word}"
    for line in ("[1, 2]", '{"qid": 1', b"\xff\xfe"):
        yield write_tvqa, "tvqa_train.jsonl", appended(line), lambda root: TVQA(root).listing("train"), "line "
    for record, word in SUBTITLES:
        name = "tvqa_preprocessed_subtitles.jsonl"
        yield write_tvqa, name, appended(json.dumps(record)), lambda root: TVQA(root).subtitles(), word
    for changes, word in MOMENTS:
        damage = appended(json.dumps(moment(0, CLIPS[0], **changes)))
        yield lambda root: write_tvqa(write_tvc(root)), "tvc_train_release.jsonl", damage, _moments, word
    for line in ('{"image_id": "139", "capt', "[1]", '{"image_id": "139"}'):
        name = "open_images_validation_localized_narratives.jsonl"
        damage = replaced(line)
        yield _write_validation, name, damage, lambda root: LocalizedNarrativesOpenImages(root).listing("val"), "line 1"
    yield from CLIP_LISTS
    yield from CAPTION_LISTS


def _moments(root: Path) -> object:
    return TVC(root).moments("train")


def _write_validation(root: Path) -> Path:
    (root / "validation").mkdir(parents=True)
    return root


@pytest.mark.parametrize(("write", "name", "damage", "read", "word"), cases())
def test_a_damaged_file_is_named(
    tmp_path: Path, write: Callable[[Path], Path], name: str, damage: Damage, read: Callable[[Path], object], word: str
) -> None:
    root = write(tmp_path / "set")
    damage(root / name)
    with pytest.raises(DatasetError, match=word or None) as caught:
        read(root)
    assert str(root / name) in str(caught.value)
