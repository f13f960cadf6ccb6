"""What the recipes read beside data sets: released weights, vocabularies, dictionaries and lists.

Nothing is downloaded: like data sets, they are fetched by their user, who agrees to their terms (common/data/fetch.py).
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.data import checksums

# Files that may stand for each other.
Alternatives = tuple[str, ...]

_WEIGHTS: Alternatives = ("model.safetensors", "pytorch_model.bin")
_HASHED = re.compile(r".*-([0-9a-f]{8,})\.pth")


@dataclass(frozen=True)
class ReleasedFile:
    """A file, or a folder of files, that recipes name.

    Args:
        path: Relative to the folder of the data sets; a pattern where every paper has its own.
        title: What it is.
        size: Approximate size on disk.
        license: Its terms, in a few words.
        source: Where to get it.
        contents: Of a folder: the files it must have; empty = any.
        checksum: As :func:`common.data.checksums.difference` takes it; "" = none is published.
    """

    path: str
    title: str
    size: str = "unknown"
    license: str = "unknown"
    source: str = "the recipe's own file"
    contents: tuple[Alternatives, ...] = ()
    checksum: str = ""


@dataclass(frozen=True)
class FileStatus:
    """What is known about a released file.

    Args:
        file: The facts.
        path: Where it was looked for.
        recipes: Recipes that name it.
        present: Whether it is there, with all that a folder must have.
        missing: What a folder lacks.
        checked: Whether its checksum was looked at.
        problem: What is wrong with it; "" = nothing.
    """

    file: ReleasedFile
    path: Path
    recipes: tuple[str, ...]
    present: bool
    missing: tuple[str, ...] = ()
    checked: bool = False
    problem: str = ""


def _torchvision(name: str, title: str, size: str, license: str = "BSD 3-Clause; made from ImageNet") -> ReleasedFile:
    match = _HASHED.fullmatch(name)
    # Names of this form end in the first digits of the sum, which torch.hub checks.
    checksum = f"sha256:{match[1]}" if match else ""
    source = f"https://download.pytorch.org/models/{name}"
    return ReleasedFile(f"weights/{name}", title, size, license, source, checksum=checksum)


def _transformers(path: str, repository: str, title: str, size: str, license: str, *more: Alternatives) -> ReleasedFile:
    contents = (("config.json",), _WEIGHTS, *more)
    return ReleasedFile(path, title, size, license, f"hf download {repository} --local-dir {{path}}", contents)


def _ig65m(clip: int, digits: str) -> ReleasedFile:
    name = f"r2plus1d_34_clip{clip}_ft_kinetics_from_ig65m"
    return ReleasedFile(
        f"weights/{name}.pth",
        f"R(2+1)D-34, IG-65M then Kinetics-400, {clip} frames",
        "255 MB",
        "MIT, as its repository states",
        f"https://github.com/moabitcoin/ig65m-pytorch/releases/download/v1.0.0/{name}-{digits}.pth "
        "(leave out the digits at the end of the name)",
    )


RELEASED = (
    _transformers(
        "bert-base-uncased",
        "google-bert/bert-base-uncased",
        "BERT base, uncased",
        "440 MB",
        "Apache 2.0",
        ("vocab.txt",),
    ),
    _transformers(
        "weights/xlm-roberta-base",
        "FacebookAI/xlm-roberta-base",
        "XLM-R base",
        "1.1 GB",
        "MIT",
        ("sentencepiece.bpe.model",),
    ),
    _transformers(
        "weights/t5-base", "google-t5/t5-base", "T5 base", "890 MB", "Apache 2.0", ("spiece.model", "tokenizer.json")
    ),
    _transformers(
        "weights/t5-small", "google-t5/t5-small", "T5 small", "240 MB", "Apache 2.0", ("spiece.model", "tokenizer.json")
    ),
    _transformers(
        "weights/clip-vit-base-patch32",
        "openai/clip-vit-base-patch32",
        "CLIP ViT-B/32",
        "600 MB",
        "MIT",
        ("tokenizer.json", "vocab.json"),
    ),
    _torchvision("resnet50-0676ba61.pth", "ResNet-50, ImageNet", "98 MB"),
    _torchvision("vgg19-dcbb9e9d.pth", "VGG-19, ImageNet", "548 MB"),
    _torchvision("inception_v3_google-0cc3c7bd.pth", "Inception v3, ImageNet", "104 MB"),
    _torchvision(
        "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", "Faster R-CNN, COCO", "167 MB", "BSD 3-Clause; made from COCO"
    ),
    ReleasedFile(
        "weights/weights-inception-2015-12-05-6726825d.pth",
        "Inception of 2015, as for the FID of TensorFlow",
        "96 MB",
        "Apache 2.0",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        checksum="sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    _ig65m(8, "0aa0550b"),
    _ig65m(32, "ade133f1"),
    ReleasedFile(
        "weights/Cnn14_16k_mAP=0.438.pth",
        "PANNs CNN14, 16 kHz, AudioSet",
        "330 MB",
        "CC BY 4.0",
        "https://zenodo.org/records/3987831",
        checksum="md5:362fc5ff18f1d6ad2f6d464b45893f2c",
    ),
    ReleasedFile(
        "weights/class_labels_indices.csv",
        "Names of AudioSet's classes",
        "15 kB",
        "CC BY 4.0",
        "https://research.google.com/audioset/download.html",
    ),
    ReleasedFile(
        "dictionaries",
        "Dictionaries from English",
        "10 MB",
        "MUSE: CC BY-NC 4.0; FreeDict: each its own",
        "https://github.com/facebookresearch/MUSE (ground-truth bilingual dictionaries) or https://freedict.org",
        contents=tuple((f"en-{language}.txt",) for language in ("de", "fr", "cs", "ja", "zh")),
    ),
    ReleasedFile(
        "*/text_features",
        "Text features of frozen BERT",
        "14 GB for COCO 2014",
        "that of the captions",
        "`assemble data` with --text-features makes them",
    ),
    ReleasedFile(
        "audioset/unbalanced_train-100k.txt",
        "99,999 clips of AudioSet, one file name a line",
        "2.5 MB",
        "CC BY-NC 4.0, with the official code",
        "https://github.com/facebookresearch/AVID-CMA, datasets/cache/audioset",
    ),
    ReleasedFile(
        "weights/moco_v2_200ep_pretrain.pth.tar",
        "MoCo v2 on ImageNet, 200 epochs",
        "about 0.35 GB",
        "CC BY-NC 4.0",
        "https://github.com/facebookresearch/moco, or --fetch moco_v2_weights",
        checksum="md5:59fd9945",
    ),
    ReleasedFile(
        "imagenet/imagenet100.txt",
        "100 classes of ImageNet, one a line",
        "1 kB",
        "yours",
        "your own list: which classes the paper took is not known",
    ),
)


def look_at(path: str, data: Path, recipes: tuple[str, ...] = (), verify: bool = False) -> FileStatus:
    """Look for a file that recipes name.

    Args:
        path: Relative to `data`.
        data: Folder of the data sets.
        recipes: Recipes that name it.
        verify: Also compare it with its published checksum.
    """
    known = (replace(file, path=path) for file in RELEASED if fnmatch.fnmatchcase(path, file.path))
    file = next(known, ReleasedFile(path, Path(path).name))
    place = data / path
    missing = tuple(
        " or ".join(names) for names in file.contents if not any((place / name).is_file() for name in names)
    )
    present = place.exists() and not missing
    if not (verify and file.checksum and place.is_file()):
        return FileStatus(file, place, recipes, present, missing)
    try:
        problem = checksums.difference(place, file.checksum)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    return FileStatus(file, place, recipes, present, missing, checked=True, problem=problem or "")
