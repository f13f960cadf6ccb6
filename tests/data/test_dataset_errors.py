"""Test that every reader names a damaged file and, where possible, the line or the field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.data.datasets.audioset import AudioSet
from common.data.datasets.avsd import AVSD
from common.data.datasets.base import MediaDataset
from common.data.datasets.coco import COCO
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.dcase import DCASE2014
from common.data.datasets.esc50 import ESC50
from common.data.datasets.hmdb51 import HMDB51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.localized_narratives import LocalizedNarrativesOpenImages
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101
from common.data.datasets.voc import PascalVOC
from common.data.listing import DatasetError
from tests.data.image_layouts import write_coco_cn
from tests.data.text_layouts import ANSWERS, REFERENCES, dialog, moment, question, references
from tests.data.writers import WRITERS

Damage = bytes | str | tuple[str, str] | Callable[[Any], object]

CAPTIONS, INSTANCES = "annotations/captions_train2017.json", "annotations/instances_train2017.json"
SUBTITLES, CHINESE = "tvqa_preprocessed_subtitles.jsonl", "coco-cn-version1805v1.1/imageid.human-written-caption.txt"
BOXES, STATES = "VOCdevkit/VOC2007/Annotations/000011.xml", "VOCdevkit/VOC2007/ImageSets/Main/train_test.txt"
NARRATIVES, ENGLISH = "open_images_validation_localized_narratives.jsonl", "data/task2/raw/train.3.en.gz"
DIALOGS, UCF = "train_set4DSTC7-AVSD.json", "ucfTrainTestlist/trainlist01.txt"

#: The reader that each damaged file is tested with.
READ: dict[str, tuple[type[MediaDataset], Callable[[Any], object]]] = {
    "coco": (COCO, lambda data: data.annotations("train").boxes()),
    "karpathy": (COCOKarpathy, lambda data: data.listing("test")),
    "voc": (PascalVOC, lambda data: (data.labels("test"), data.boxes("test"))),
    "avsd": (AVSD, lambda data: (data.dialogs("train"), data.dialogs("test"))),
    "tvqa": (TVQA, lambda data: (data.questions("train"), data.subtitles())),
    "tvc": (TVC, lambda data: data.moments("train")),
    "narratives": (LocalizedNarrativesOpenImages, lambda data: data.listing("val")),
    "esc50": (ESC50, lambda data: data.listing("all")),
    "audioset": (AudioSet, lambda data: data.listing("train")),
    "kinetics": (Kinetics400, lambda data: data.listing("train")),
    "ucf": (UCF101, lambda data: data.listing("train", 1)),
    "hmdb": (HMDB51, lambda data: data.listing("test", 1)),
    "dcase": (DCASE2014, lambda data: data.listing("train")),
    "imagenet": (ImageNet, lambda data: ImageNet(data.root, data.root / "classes.txt").listing("train")),
    "cc": (ConceptualCaptions, lambda data: data.captions("train")),
    "multi30k": (Multi30K, lambda data: data.captions("train", "en")),
    "coco_cn": (COCOCN, lambda data: data.captions("train")),
}
WRITE: dict[type[MediaDataset], Callable[[Path], object]] = {
    **WRITERS,
    COCOCN: write_coco_cn,
    Kinetics400: lambda root: write_kinetics(root, flat=True),
    LocalizedNarrativesOpenImages: lambda root: (root / "validation").mkdir(parents=True),
}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def dialogs(*found: object) -> str:
    return json.dumps({"dialogs": found})


#: Each case has a data set, a file to damage, the damage, and what the error says besides the file name. The damage is
#: new content, a pair (text, replacement), or a function that changes the parsed JSON.
CASES: list[tuple[str, str, Damage, str]] = [
    *(("coco", CAPTIONS, content, "") for content in ("", '{"images": [', b"\xff\xfe\0", "[" * 100_000, "[]", "null")),
    ("coco", CAPTIONS, lambda d: d.pop("images"), "images"),
    ("coco", CAPTIONS, lambda d: d["images"][0].pop("file_name"), "file_name"),
    ("coco", CAPTIONS, lambda d: d["images"][0].update(file_name=f"{9:012d}.jpg"), "009.jpg' occurs twice"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].update(id=901), "caption id 901 occurs twice"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].update(image_id=8), "caption 3001 is of image 8"),
    ("coco", CAPTIONS, lambda d: d["annotations"][0].pop("caption"), "caption"),  # as in an instances file
    ("coco", INSTANCES, lambda d: d["annotations"][0].update(image_id=8), "image 8"),
    ("coco", INSTANCES, lambda d: d["annotations"][0].update(category_id=9), "9"),
    ("coco", INSTANCES, lambda d: d["annotations"][0].pop("bbox"), "bbox"),
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0].pop("split"), "split"),
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0]["sentences"][0].pop("raw"), "raw"),
    # Image 0 is for testing and image 2 for training. The same picture must not be in both splits.
    ("karpathy", "dataset_coco.json", lambda d: d["images"][0].update(cocoid=878), "image id 878 occurs twice"),
    ("voc", BOXES, ("train", "unicorn"), "unicorn"),
    ("voc", BOXES, ("<ymax>20</ymax>", ""), ""),
    ("voc", BOXES, ("<xmax>24</xmax>", "<xmax>0</xmax>"), "no area"),
    *(("voc", STATES, f"000011  1\n{line}\n", "") for line in ("000010", "000010 2", "000010 1 1")),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, dialog=...)), "dialog"),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, dialog=[{"question": "q"}])), "answer"),
    ("avsd", DIALOGS, dialogs(dialog("AAAA1", 1, dialog=[])), "AAAA1 has no turns"),
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
    ("narratives", NARRATIVES, '{"image_id": "139"}', "line 1: .*caption"),
    ("esc50", "meta/esc50.csv", ("1-100000-A-0.wav,1,", "1-100000-A-0.wav,6,"), "line 2: fold must be 1 to 5"),
    ("audioset", "class_labels_indices.csv", "index,mid,display_name\n", "lists no classes"),
    ("audioset", "unbalanced_train_segments.csv", "# \nx, 0.0\n", "line 2"),
    ("kinetics", "annotations/train.csv", "label,youtube_id,time_start,time_end\nx,y,soon,1\n", "line 2: .*soon"),
    ("ucf", UCF, "Juggling/v_Juggling_g02_c01.avi 1\n", "'Juggling'"),
    ("ucf", "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n3 YoYo\n", ""),
    ("hmdb", "testTrainMulti_7030_splits/wave_test_split1.txt", "a.avi 3\n", "'a.avi 3'"),
    ("dcase", "scenes_stereo/notes.wav", "", "bus01.wav"),
    ("imagenet", "classes.txt", "\n \n", "is empty"),
    ("imagenet", "classes.txt", "n01440764\nn00000000\n", "such as n00000000"),
    ("cc", "Train_GCC-training.tsv", "a\thttp\nno address\n", "line 2: 1 columns"),
    ("cc", "Train_GCC-training.tsv", "\t\n \t \n", "has no captions; download"),
    ("cc", "Train_GCC-training.tsv", 'caption\turl\n" a cat\ta\na town\tb\nhe said "\tc\n', "a quote is not closed"),
    ("cc", "groups.json", '{"train": {"0": 4}}', "'1'"),
    ("multi30k", ENGLISH, gzip.compress(b"only one\n", mtime=0), "1 captions for the 2 images"),
    ("multi30k", "data/task1/image_splits/train.txt", "1.jpg\n1.jpg\n", "an image occurs twice"),
    *(("coco_cn", CHINESE, line, repr(line)) for line in ("no tab", "no number\t.", "#0\tno image")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "damage", "word"), CASES)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, name: str, damage: Damage, word: str) -> None:
    root, path = tmp_path / "set", tmp_path / "set" / name
    dataset, read = READ[kind]
    WRITE[dataset](root)
    if isinstance(damage, tuple):
        assert damage[0] in path.read_text()
        damage = path.read_text().replace(*damage, 1)
    elif callable(damage):
        found = json.loads(path.read_text())
        damage(found)
        damage = json.dumps(found)
    path.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    with pytest.raises(DatasetError, match=word.replace("\\", r"\\") or None) as caught:
        read(dataset(root))
    assert str(path) in str(caught.value)
