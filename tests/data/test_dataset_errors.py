"""Damaged files of data sets: every reader names the file, and the line or the field where it knows them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.avsd import AVSD
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
    REFERENCES,
    dialog,
    moment,
    question,
    references,
    write_avsd,
    write_tvc,
    write_tvqa,
)

Damage = bytes | str | tuple[str, str] | Callable[[Any], object]

CAPTIONS, INSTANCES = "annotations/captions_train2017.json", "annotations/instances_train2017.json"
SUBTITLES, CHINESE = "tvqa_preprocessed_subtitles.jsonl", "coco-cn-version1805v1.1/imageid.human-written-caption.txt"
BOXES, STATES = "VOCdevkit/VOC2007/Annotations/000011.xml", "VOCdevkit/VOC2007/ImageSets/Main/train_test.txt"
NARRATIVES, ENGLISH = "open_images_validation_localized_narratives.jsonl", "data/task2/raw/train.3.en.gz"
DIALOGS, UCF = "train_set4DSTC7-AVSD.json", "ucfTrainTestlist/trainlist01.txt"

#: How a set is written, and how the files below are read.
SETS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], object]]] = {
    "coco": (write_coco, lambda root: COCO(root).annotations("train").boxes()),
    "karpathy": (write_karpathy, lambda root: COCOKarpathy(root).listing("test")),
    "voc": (write_voc, lambda root: (PascalVOC(root).labels("test"), PascalVOC(root).boxes("test"))),
    "avsd": (write_avsd, lambda root: (AVSD(root).dialogs("train"), AVSD(root).dialogs("test"))),
    "tvqa": (write_tvqa, lambda root: (TVQA(root).questions("train"), TVQA(root).subtitles())),
    "tvc": (lambda root: write_tvqa(write_tvc(root)), lambda root: TVC(root, root).moments("train")),
    "narratives": (
        lambda root: (root / "validation").mkdir(parents=True),
        lambda root: LocalizedNarrativesOpenImages(root).listing("val"),
    ),
    "esc50": (write_esc50, lambda root: ESC50(root).listing("all")),
    "audioset": (write_audioset, lambda root: AudioSet(root).listing("train")),
    "kinetics": (lambda root: write_kinetics(root, flat=True), lambda root: Kinetics400(root).listing("train")),
    "ucf": (write_ucf101, lambda root: UCF101(root).listing("train", 1)),
    "hmdb": (write_hmdb51, lambda root: HMDB51(root).listing("test", 1)),
    "dcase": (write_dcase, lambda root: DCASE2014(root).listing("train")),
    "imagenet": (write_imagenet, lambda root: ImageNet(root, root / "classes.txt").listing("train")),
    "cc": (write_conceptual_captions, lambda root: ConceptualCaptions(root).captions("train")),
    "multi30k": (write_multi30k, lambda root: Multi30K(root).captions("train", "en")),
    "coco_cn": (write_coco_cn, lambda root: COCOCN(root).captions("train")),
}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def dialogs(*found: object) -> str:
    return json.dumps({"dialogs": found})


#: A set, its damaged file, the damage, and what the message says besides the name of the file. Damage is the whole
#: content, a text and its replacement, or a change of the parsed JSON.
CASES: list[tuple[str, str, Damage, str]] = [
    *(("coco", CAPTIONS, content, "") for content in ("", '{"images": [', b"\xff\xfe\0", "[" * 100_000, "[]", "null")),
    ("coco", CAPTIONS, lambda d: d.pop("images"), "images"),
    ("coco", CAPTIONS, lambda d: d["images"][0].pop("file_name"), "file_name"),
    ("coco", CAPTIONS, lambda d: d["images"][0].update(id=2**63), ""),
    ("coco", CAPTIONS, lambda d: d["images"][0].update(file_name=f"{9:012d}.jpg"), "009.jpg' occurs twice"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].update(id=901), "caption id 901 occurs twice"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].update(image_id=8), "caption 3001 is of image 8"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].update(caption=["a"]), ""),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].pop("caption"), "caption"),  # as a file of instances
    ("coco", INSTANCES, lambda d: d["annotations"][0].update(image_id=8), "image 8"),
    ("coco", INSTANCES, lambda d: d["annotations"][0].update(category_id=9), "9"),
    ("coco", INSTANCES, lambda d: d["annotations"][0].pop("bbox"), "bbox"),
    ("coco", INSTANCES, lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), ""),
    ("karpathy", "dataset_coco.json", b'{"images": [', ""),
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0].pop("split"), "split"),
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0]["sentences"][0].pop("raw"), "raw"),
    # Image 0 is for testing, image 2 for training: the same picture must not be in both.
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0].update(cocoid=878), "image id 878 occurs twice"),
    ("voc", BOXES, "<annotation><object>", ""),
    ("voc", BOXES, ("train", "unicorn"), "unicorn"),
    ("voc", BOXES, ("<ymax>20</ymax>", ""), ""),
    ("voc", BOXES, ("<xmax>24</xmax>", "<xmax>five</xmax>"), "five"),
    ("voc", BOXES, ("<xmax>24</xmax>", "<xmax>0</xmax>"), "no area"),
    *(("voc", STATES, f"000011  1\n{line}\n", "") for line in ("000010", "000010 2", "000010 1 1")),
    ("avsd", DIALOGS, "{", ""),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, dialog=...)), "dialog"),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, dialog=[{"question": "q"}])), "answer"),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, caption=None)), ""),
    ("avsd", ANSWERS, dialogs(dialog("CCCC3", 1, "two"), dialog("ZZZZ9", 3, "one")), "other dialogues"),
    ("avsd", ANSWERS, dialogs(dialog("ZZZZ9", 2, "one"), dialog("CCCC3", 1, "two")), "other dialogues"),
    ("avsd", REFERENCES, json.dumps(references(["CCCC3_1", "ZZZZ9_3"])), "other dialogues"),
    ("avsd", REFERENCES, json.dumps(references(["ZZZZ9_3"])), "other dialogues"),
    ("avsd", REFERENCES, lambda d: d["annotations"][0].update(image_id=7), "7"),
    *(
        ("tvqa", "tvqa_train.jsonl", lines(question(0, "a"), question(1, "a", **changes)), f"line 2: .*{word}")
        for changes, word in (
            ({"a3": ...}, "a3"), ({"a3": None}, ""), ({"answer_idx": ...}, "answer_idx"), ({"answer_idx": 5}, "not 5"),
            ({"qid": "x"}, "x"),
        )
    ),
    *(("tvqa", "tvqa_train.jsonl", content, "line 2") for content in ("\n[1, 2]", '\n{"qid": 1', b"\n\xff\xfe")),
    ("tvqa", SUBTITLES, lines({"vid_name": "a", "sub": [{"text": "x", "start": "soon", "end": 2}]}), "line 1: .*soon"),
    ("tvqa", SUBTITLES, lines({"vid_name": "a"}), "line 1: .*sub"),
    *(
        ("tvc", "tvc_train_release.jsonl", lines(moment(0, "a"), moment(0, "a", **changes)), f"line 2: .*{word}")
        for changes, word in (
            ({"descs": ...}, '"descs" is empty'), ({"descs": [{"desc_id": 3}]}, "desc"), ({"ts": [1.0]}, ""),
            ({"ts": [2.0, 1.0]}, '"ts" must be'), ({"clip_id": ...}, "clip_id"),
        )
    ),
    ("narratives", NARRATIVES, '{"image_id": "139", "capt', "line 1"),
    ("narratives", NARRATIVES, '{"image_id": "139"}', "line 1: .*caption"),
    ("esc50", "meta/esc50.csv", ("fold,", "part,"), "line 2: .*fold"),
    ("esc50", "meta/esc50.csv", ("1-100000-A-0.wav,1,", "1-100000-A-0.wav,6,"), "line 2: fold must be 1 to 5"),
    ("audioset", "unbalanced_train_segments.csv", "# \nx, 0.0\n", "line 2"),
    ("audioset", "unbalanced_train_segments.csv", b"# \nx\xff, 0.0, 1.0\n", "line "),
    ("kinetics", "annotations/train.csv", "label,video\nx,y\n", "line 2: .*youtube_id"),
    ("kinetics", "annotations/train.csv", "label,youtube_id,time_start,time_end\nx,y,soon,1\n", "line 2: .*soon"),
    ("ucf", UCF, "Juggling/v_Juggling_g02_c01.avi 1\n", "'Juggling'"),
    ("ucf", "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n3 YoYo\n", ""),
    ("hmdb", "testTrainMulti_7030_splits/wave_test_split1.txt", "a.avi 3\n", "'a.avi 3'"),
    ("dcase", "scenes_stereo/notes.wav", "", "bus01.wav"),
    ("imagenet", "classes.txt", "\n \n", "is empty"),
    ("imagenet", "classes.txt", "n01440764\nn00000000\n", "such as n00000000"),
    ("imagenet", "classes.txt", b"n01440764\nn0144\xb0\n", "names 1 classes that"),
    ("cc", "Train_GCC-training.tsv", "a\thttp\nno address\n", "line 2: 1 columns"),
    ("cc", "Train_GCC-training.tsv", "url\tcaption\na\n", "line 2: 1 columns"),
    ("cc", "Train_GCC-training.tsv", "\t\n \t \n", "holds no captions"),
    ("cc", "Train_GCC-training.tsv", b"caption\turl\n\xff\xfe\ta\n", "line"),
    ("cc", "Train_GCC-training.tsv", 'caption\turl\n" a cat\ta\na town\tb\nhe said "\tc\n', "a quote is not closed"),
    ("cc", "Train_GCC-training.tsv", 'caption\turl\n"never ends\ta\n', "line 2"),
    ("cc", "groups.json", '{"train": {"0": 4}}', "'1'"),
    ("multi30k", ENGLISH, gzip.compress(b"only one\n", mtime=0), "1 captions for the 2 images"),
    ("multi30k", ENGLISH, gzip.compress(b"one\ntwo\n", mtime=0)[:-9], ""),
    ("multi30k", ENGLISH, gzip.compress(b"\xff\n", mtime=0), ""),
    ("multi30k", "data/task1/image_splits/train.txt", "1.jpg\n1.jpg\n", "an image occurs twice"),
    *(("coco_cn", CHINESE, line, repr(line)) for line in ("no tab", "no number\t.", "#0\tno image")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "damage", "word"), CASES)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, name: str, damage: Damage, word: str) -> None:
    root, path = tmp_path / "set", tmp_path / "set" / name
    write, read = SETS[kind]
    write(root)
    if isinstance(damage, tuple):
        assert damage[0] in path.read_text()
        damage = path.read_text().replace(*damage, 1)
    elif callable(damage):
        found = json.loads(path.read_text())
        damage(found)
        damage = json.dumps(found)
    path.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    with pytest.raises(DatasetError, match=word.replace("\\", r"\\") or None) as caught:
        read(root)
    assert str(path) in str(caught.value)
