"""Write tiny copies of TVQA, TVC and AVSD, in the file layouts in which they are distributed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.data.datasets.avsd import UNDISCLOSED
from tests.data.media_factory import write_video

#: Two clips from different shows. The clips of the first show, The Big Bang Theory, have no prefix.
CLIPS = ("s01e02_seg02_clip_00", "castle_s01e01_seg02_clip_01")
ANSWERS = "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json"
REFERENCES = "test_set4DSTC7-AVSD_multiref.json"


def write_frames(folder: Path, numbers: Sequence[int], size: tuple[int, int] = (8, 10), suffix: str = "jpg") -> Path:
    """Write gray frames with a level of ten times the frame number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (size[1], size[0]), (number * 10,) * 3).save(folder / f"{number:05d}.{suffix}")
    return folder


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write each record as one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def question(number: int, clip: str, **changes: Any) -> dict[str, Any]:
    """Make a record of TVQA. A change of `...` removes the key."""
    record = {
        "qid": number,
        "q": f"Who  talks in {clip}?",
        **{f"a{place}": f"Answer {place}" for place in range(5)},
        "answer_idx": number % 5,
        "ts": "1.00-2.50",
        "vid_name": clip,
        "show_name": "Castle",
    }
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


def write_tvqa(root: Path, questions: Sequence[dict[str, Any]] | None = None, flat: bool = False) -> Path:
    """Write TVQA with two clips of two shows. The clip of The Big Bang Theory has no prefix."""
    for clip, show in zip(CLIPS, ("bbt_frames", "castle_frames")):
        write_frames(root / "frames_hq" / ("" if flat else show) / clip, range(1, 10))
    if questions is None:
        questions = [question(number, clip) for number, clip in enumerate([*CLIPS, *CLIPS])]
    for part in ("train", "val"):
        write_lines(root / f"tvqa_{part}.jsonl", questions)
    withheld = [{key: value for key, value in record.items() if key != "answer_idx"} for record in questions]
    write_lines(root / "tvqa_test_public.jsonl", withheld)
    # The subtitles are not in order of time.
    lines = [
        {"text": "(Kate:) Späť,\nnow.", "start": 2.0, "end": 3.0},
        {"text": "Hello.", "start": 0.5, "end": 1.2},
    ]
    speech = [{"vid_name": clip, "sub": lines} for clip in CLIPS]
    write_lines(root / "tvqa_preprocessed_subtitles.jsonl", speech)
    return root


def moment(number: int, clip: str, count: int = 2, **changes: Any) -> dict[str, Any]:
    """Make a record of TVC. A change of `...` removes the key."""
    texts = [(10 * number + place, f"Moment  {number}, {place}.") for place in range(count)]
    record = {
        "vid_name": clip,
        "duration": 3.0,
        "ts": [0.5 * number, 0.5 * number + 1.0],
        "clip_id": number,
        "descs": [{"desc": text, "desc_id": own, "type": "vt", "from_retrieval": True} for own, text in texts],
    }
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


def write_tvc(root: Path) -> Path:
    """Write TVC with four moments to train on and four to evaluate; two have no descriptions."""
    for part, count in (("train", 2), ("val", 4)):
        records = [moment(number, clip, count) for number, clip in enumerate([*CLIPS, *CLIPS])]
        write_lines(root / f"tvc_{part}_release.jsonl", records)
    write_lines(root / "tvc_test_public_release.jsonl", [moment(0, CLIPS[0], descs=...), moment(1, CLIPS[1], descs=[])])
    return root


def dialog(video: str, turns: int, last: str = "he  eats .", **changes: Any) -> dict[str, Any]:
    """Make a record of AVSD. A change of `...` removes the key."""
    asked = [{"question": f"what is {turn} ?", "answer": f"it is {turn} ."} for turn in range(turns)]
    asked[-1]["answer"] = last
    record = {"image_id": video, "caption": "a man\nsits .", "summary": "he eats .", "dialog": asked}
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


def write_json(path: Path, content: Any) -> Path:
    """Write one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def references(names: list[str], count: int = 6) -> dict[str, Any]:
    """Make AVSD's references in the format of the challenge."""
    return {
        "images": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        "annotations": [
            {"image_id": number, "id": 100 * number + place, "caption": f"reference {place} of {name}"}
            for number, name in enumerate(names, start=1)
            for place in range(count)
        ],
    }


def write_avsd(root: Path, suffix: str = "_480", answers: bool = True) -> Path:
    """Write AVSD: two dialogues of ten turns for training, one for validation, and two without their last answers."""
    for part, videos in (("train", ["YSKX3", "AAAA1"]), ("valid", ["BBBB2"])):
        dialogs = [dialog(video, 10) for video in videos]
        write_json(root / f"{part}_set4DSTC7-AVSD.json", {"type": part, "version": "1.0", "dialogs": dialogs})
        for video in videos:
            write_video(root / f"Charades_v1{suffix}" / f"{video}.mp4", 0.5, size=(16, 16))
    for video in ("ZZZZ9", "CCCC3"):
        write_video(root / f"Charades_vu17_test{suffix}" / f"{video}.mp4", 0.5, size=(16, 16), with_audio=False)
    tested = [dialog("ZZZZ9", 3, UNDISCLOSED), dialog("CCCC3", 1, UNDISCLOSED)]
    write_json(root / "test_set4DSTC7-AVSD.json", {"type": "test", "dialogs": tested})
    if answers:
        write_json(root / ANSWERS, {"dialogs": [dialog("ZZZZ9", 3, "answer one"), dialog("CCCC3", 1, "answer two")]})
        write_json(root / REFERENCES, references(["ZZZZ9_3", "CCCC3_1"]))
    return root
