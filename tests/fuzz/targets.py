"""Define the targets of the fuzzer: good files, and everything that reads them."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import h5py
import numpy as np
import torch
from PIL import Image

from assemble.commands.main import main
from assemble.reporting import records, tables
from assemble.reporting.curves import read_points, thinned
from assemble.reporting.papers import project_root
from assemble.reporting.results import find_promoted
from assemble.stages.export import write_export
from assemble.stages.layers import load_yaml
from assemble.stages.paper_modules import trained_model
from common.data.datasets.base import MediaDataset, write_lines
from common.data.datasets.coco_cn import COCOCN
from common.data.datasets.folder import FolderOfClips, FolderOfImages
from common.data.datasets.stair_captions import STAIRCaptions
from common.data.datasets.wikipedia import WikipediaText
from common.data.listing import DatasetMissing
from common.data.media import MediaFile, read_image
from common.data.regions import RegionFeatures, write_regions
from common.data.text import SentencePieceTokenizer, WordPieceTokenizer, XLMRTokenizer
from common.data.text_features import FeatureStore, SentencePool
from common.encoders.checkpoint_files import read_checkpoint, require_intact
from tests.data import image_layouts
from tests.data.media_factory import tone, write_video, write_wav
from tests.data.writers import WRITERS
from tests.trained import checkpoint


class Target(NamedTuple):
    """A function that writes good files to a folder, and one that reads them. A command returns its exit status."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]


#: Names of the methods of data sets that read files. Their signature says whether to pass a split or a language.
READING = ("labels", "boxes", "annotations", "captions", "moments", "questions", "dialogs", "sentences", "subtitles")


def _read_all(kind: Callable[[Path], MediaDataset]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        dataset = kind(folder / "set")
        errors: list[Exception] = []
        for split, fold in dataset.parts():
            calls: list[Callable[[], object]] = [lambda split=split, fold=fold: dataset.listing(split, fold)]
            for name in READING:
                method = getattr(dataset, name, None)
                if not callable(method):
                    continue
                asked = inspect.signature(method).parameters
                for language in getattr(dataset, "languages", ("en",)) if "language" in asked else (None,):
                    given = {"split": split, "language": language}
                    calls.append(functools.partial(method, **{key: given[key] for key in given if key in asked}))
            for call in calls:
                try:
                    call()
                except DatasetMissing:
                    pass  # the good files have no other splits
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]
        return None

    return read


def _dataset(write: Callable[[Path], object], kind: Callable[[Path], MediaDataset]) -> Target:
    return Target(lambda folder: write(folder / "set"), _read_all(kind))


def _write_media(folder: Path) -> None:
    write_video(folder / "clip.mp4", audio=tone(1.0, 16_000))
    write_wav(folder / "sound.wav", seconds=1.0)


def _read_media(folder: Path) -> None:
    with MediaFile(folder / "clip.mp4") as media:
        media.read_video(0.0, 0.5, 4)
        media.read_audio(0.0, 0.5, 16_000)
    with MediaFile(folder / "sound.wav") as media:
        media.read_audio(0.0, 0.5, 16_000)


def _write_pictures(folder: Path) -> None:
    for suffix in ("jpg", "png", "gif", "webp"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture.{suffix}")


def _read_pictures(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_image(path)


def _write_regions(folder: Path) -> None:
    found = [image_layouts.regions(number) for number in range(3)]
    for name in ("a.npz", "b.h5"):
        write_regions(folder / name, zip("123", found))


def _read_regions(folder: Path) -> None:
    for path in (folder / "a.npz", folder / "b.h5"):
        features = RegionFeatures(path)
        for key in features.keys:
            features[key]


def _write_runs(folder: Path) -> None:
    record = find_promoted("avid_cma")[0]
    document = json.loads(record.to_json())
    document["media"] = ["media/rows.csv", "media/picture.png"]
    place = record.folder(folder / "runs")
    (place / "media").mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(document), encoding="utf-8")
    identity = {"lineage_hash": document["lineage_hash"], "stack": "a", "arguments": ["--model.x", "1"]}
    (place / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    (place / "metrics.csv").write_text("step,name,value\n0,train/loss,3.0\n1,train/loss,2.0\n", encoding="utf-8")
    (place / "media" / "rows.csv").write_text("clip,score\na,1\nb,2\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(place / "media" / "picture.png")


def _report(folder: Path) -> int:
    return main(["report", "--runs", str(folder / "runs"), "--output", str(folder.parent / "page.html")])


def _compare(folder: Path) -> int:
    main(["compare", "avid", "--runs", str(folder / "runs")])
    return 0  # compare skips unreadable files and has other statuses


def _write_words(folder: Path) -> None:
    captions = ["a red circle", "a blue square", "two dogs on a green field", "nobody is there"]
    for kind in (WordPieceTokenizer, SentencePieceTokenizer, XLMRTokenizer):
        tokenizer = kind(vocabulary_size=60)
        tokenizer.prepare(captions)
        (folder / kind.__name__).write_bytes(tokenizer.content)


def _read_words(folder: Path) -> None:
    for kind in (WordPieceTokenizer, SentencePieceTokenizer, XLMRTokenizer):
        tokenizer = kind(str(folder / kind.__name__))
        tokenizer.prepare()
        tokenizer.decode(tokenizer.encode("a red dog"))


def _write_text_features(folder: Path) -> None:
    with h5py.File(folder / "store.h5", "w") as file:
        file.attrs["max_tokens"] = 5
        file["starts"] = np.array([0, 3, 5])
        for name in ("words", *get_args(SentencePool)):
            file[name] = np.ones((5, 4) if name == "words" else (2, 4), np.float16)


def _read_text_features(folder: Path) -> None:
    store = FeatureStore(folder / "store.h5")
    for name in get_args(SentencePool):
        store.read(np.arange(len(store)), name)


def _write_tables(folder: Path) -> None:
    (folder / "tables.yaml").write_bytes((project_root() / "papers" / "mct" / "tables.yaml").read_bytes())


def _write_config(folder: Path) -> None:
    (folder / "mine.yaml").write_text("model: {init_args: {out_dim: 64}}\ndata: {init_args: {batch_size: 8}}\n")


def _print_config(folder: Path) -> int:
    return main(["fit", "avid/avid", "--scale", "smoke", "--print_config", "--config", str(folder / "mine.yaml")])


def _write_checkpoint(folder: Path) -> None:
    weights = {"state_dict": {"a.weight": torch.zeros(4, 4), "b": torch.ones(3)}, "global_step": 3, "epoch": 1}
    torch.save(weights, folder / "last.ckpt")


def _read_checkpoint(folder: Path) -> None:
    require_intact(folder / "last.ckpt")
    read_checkpoint(folder / "last.ckpt")


def _write_export(folder: Path) -> None:
    write_export(trained_model("mct"), checkpoint("mct"), folder / "export")
    (folder / "captions.txt").write_text("a red circle\na blue square\n", encoding="utf-8")


def _embed(folder: Path) -> int:
    captions, output = str(folder / "captions.txt"), str(folder.parent / "rows.npz")
    return main(["embed", "mct", captions, "--checkpoint", str(folder / "export"), "--output", output])


def _write_own_clips(root: Path) -> None:
    for name in ("dog/1.mp4", "dog/1.wav", "cat/2.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    rows = ["file_name,sound,label,split,start,end", "dog/1.mp4,dog/1.wav,dog,train,0,1.5", "cat/2.mp4,,cat,val,,"]
    write_lines(root / "metadata.csv", rows)


def _write_own_images(root: Path) -> None:
    root.mkdir(parents=True)
    rows = ["file_name,caption,caption_de,tags"]
    for number in range(3):
        (root / f"{number}.png").touch()
        rows += [f"{number}.png,number {number},ein Bild,a;b", f"{number}.png,a picture,,"]
    write_lines(root / "metadata.csv", rows)


TARGETS: dict[str, Target] = {
    "own clips": _dataset(_write_own_clips, FolderOfClips),
    "own images": _dataset(_write_own_images, FolderOfImages),
    **{kind.__name__: _dataset(write, kind) for kind, write in WRITERS.items()},
    "STAIR": _dataset(image_layouts.write_stair, STAIRCaptions),
    "COCO-CN": _dataset(image_layouts.write_coco_cn, COCOCN),
    "Wikipedia": _dataset(image_layouts.write_wikipedia, WikipediaText),
    "media": Target(_write_media, _read_media),
    "pictures": Target(_write_pictures, _read_pictures),
    "regions": Target(_write_regions, _read_regions),
    "text features": Target(_write_text_features, _read_text_features),
    "vocabularies": Target(_write_words, _read_words),
    "record": Target(_write_runs, lambda folder: [records.read(path) for path in folder.rglob("record.json")]),
    "curves": Target(_write_runs, lambda folder: [thinned(read_points(path)) for path in folder.rglob("metrics.csv")]),
    "tables": Target(_write_tables, lambda folder: tables._loaded("mct", folder / "tables.yaml", (0,))),
    "YAML": Target(_write_config, lambda folder: load_yaml(folder / "mine.yaml")),
    "checkpoint": Target(_write_checkpoint, _read_checkpoint),
    "assemble report": Target(_write_runs, _report),
    "assemble compare": Target(_write_runs, _compare),
    "assemble fit --config": Target(_write_config, _print_config),
    "assemble embed": Target(_write_export, _embed),
}
