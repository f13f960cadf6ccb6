"""Writes tiny data sets in the layouts of the real ones, and XLM-R with random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.multi30k import Multi30K
from common.data.regions import Regions, write_regions
from common.data.worlds.emoji_languages import EmojiLanguagesWorld
from common.errors import StageError
from common.files import read_yaml
from papers.m3p.weights import RELEASED

#: Sizes of Visual Genome's detector: width of the features and number of classes.
FEATURES, CLASSES = 2048, 1600
REGIONS = 12
VOCABULARY = 8002


def write_datasets(root: Path) -> None:
    """Write all data sets that recipes read from `$DATA`, with region features and dictionaries."""
    world = EmojiLanguagesWorld(
        size=32,
        concepts=30,
        test=6,
        fine_tune=8,
        pictures_per_drawing=1,
        vocabulary_size=VOCABULARY - 2,
        root=str(root / ".rendered"),
    )
    folders = {
        "conceptual_captions": "conceptual_captions",
        "multi30k": "multi30k",
        "coco_karpathy": "coco",
        "stair_captions": "stair_captions",
        "coco_cn": "coco_cn",
        "wikipedia": "wikipedia",
        "dictionaries": "dictionaries",
        "sentencepiece": "weights/xlm-roberta-base",
    }
    world.prepare(list(folders))
    for name, folder in folders.items():
        shutil.move(world.root_of(name), root / folder)
    # Real data sets don't list which images show the same thing.
    for groups in root.glob("*/groups.json"):
        groups.unlink()
    _write_other_languages(root / "wikipedia")
    for dataset in (
        ConceptualCaptions(root / "conceptual_captions"),
        Multi30K(root / "multi30k"),
        COCOKarpathy(root / "coco", restval=True),
    ):
        for split in sorted({*dataset.splits} - {"restval"}):  # restval is part of `train`
            keys = dataset.captions(split, dataset.languages[0]).keys
            write_regions(dataset.regions_folder / f"{split}.h5", _regions(f"{dataset.name}/{split}", keys))


def _write_other_languages(folder: Path) -> None:
    """Write text files for all languages of the recipes. If the world lacks a language, write English text."""
    recipes = Path(__file__).parents[2] / "configs" / "m3p"
    languages = read_yaml(recipes / "base.yaml", StageError)["data"]["init_args"]["languages"]
    for language in languages:
        for part in ("train", "valid"):
            if not (folder / f"{language}.{part}.txt").exists():
                shutil.copy(folder / f"en.{part}.txt", folder / f"{language}.{part}.txt")


def _regions(part: str, keys: Sequence[str]) -> Iterator[tuple[str, Regions]]:
    for number, key in enumerate(keys):
        rng = np.random.default_rng([number, *part.encode()])
        corners = np.sort(rng.uniform(0, 1, (REGIONS, 2, 2)), axis=1) * (640, 480)
        shares = rng.dirichlet(np.full(CLASSES, 0.01), REGIONS).astype(np.float32)
        features = np.abs(rng.normal(size=(REGIONS, FEATURES))).astype(np.float32)
        boxes = corners.reshape(REGIONS, 4).astype(np.float32)
        yield key, Regions(features, boxes, shares.argmax(1).astype(np.int64), 480, 640, shares)


def write_weights(root: Path) -> None:
    """Write XLM-R with random weights to `$DATA`. Its vocabulary has the pieces of the tiny text."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=514, type_vocab_size=1
    )
    XLMRobertaForMaskedLM(config).save_pretrained(root / "weights" / "xlm-roberta-base")


def write_released(stage: str, module: Any, data: object, path: Path) -> None:
    """Write a model in the released checkpoint's layout: names have a prefix, and generation layers are added."""
    import torch

    state = module.model.state_dict()
    released = {f"module.{theirs}": state[ours] for ours, theirs in RELEASED.items() if ours in state}
    released["module.pred_layer.proj.weight"] = released["module.embeddings.weight"]
    released["module.refine_embeddings.weight"] = torch.zeros(4, 4)
    torch.save({"model": released}, path)
