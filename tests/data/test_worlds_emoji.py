"""The emoji world: what the pack holds, what is made of it, and that it is passed on with its licenses."""

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO as PycocoCOCO

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.imagenet import ImageNet
from common.data.worlds.base import World
from common.data.worlds.emoji import (
    CREDIT,
    STYLES,
    Concept,
    EmojiByDesigner,
    EmojiWorld,
    captions_of,
    compose,
    pack,
    read_concepts,
    read_drawings,
    tag_vocabulary,
)
from tests.data.worlds import tiny


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> EmojiWorld:
    return rendered(EmojiWorld)


@pytest.fixture(scope="module")
def concepts() -> tuple[Concept, ...]:
    return read_concepts()


@pytest.fixture(scope="module")
def core(concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
    return tuple(concept for concept in concepts if concept.core)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def style_of(number: int) -> str:
    return tuple(STYLES)[number // 10_000 - 1]


# ------------------------------------------------------------------------------------------------------------ the pack


def test_tags_are_words_of_several_concepts(core: tuple[Concept, ...]) -> None:
    counts = Counter(word for concept in core for word in set(concept.keywords["en"]))
    vocabulary = tag_vocabulary(core)
    assert list(vocabulary) == sorted(set(vocabulary))
    fewest = min(counts[word] for word in vocabulary)
    assert fewest > 1
    assert {word for word, count in counts.items() if count >= fewest} == set(vocabulary)
    assert EmojiWorld().concepts == core


def test_every_file_of_the_attribution_is_there() -> None:
    text = (pack() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert {f"{style}.webp" for style in STYLES} | {"emoji.jsonl", "README.md"} <= named
    for name in named:
        assert (pack() / name).is_file(), name
    licenses = {entry.name for entry in (pack() / "licenses").iterdir()}
    assert {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "Unicode-3.0"} <= licenses
    assert {name for name in licenses if name.startswith("MIT")} == {"MIT-emoji-data", "MIT-fluentui-emoji"}
    assert {entry.name for entry in pack().iterdir()} == named | {"licenses"}
    assert CREDIT in text


def test_drawings_lie_where_the_pack_says(concepts: tuple[Concept, ...]) -> None:
    for style in STYLES:
        cells = read_drawings(style, range(len(concepts)))
        assert (cells.shape, cells.dtype) == ((len(concepts), 64, 64, 4), np.uint8)
        filled = (cells[..., 3] > 25).any(axis=(1, 2))
        assert filled.tolist() == [style in concept.styles for concept in concepts]
    with Image.open(io.BytesIO((pack() / "noto.webp").read_bytes())) as sheet:
        cell = np.asarray(sheet.convert("RGBA").crop((64 * (83 % 40), 64 * (83 // 40), 64 * (83 % 40 + 1), 64 * 3)))
    assert (read_drawings("noto", [83])[0] == cell).all()


# --------------------------------------------------------------------------------------------------- captions, pictures
def test_captions_follow_their_template(core: tuple[Concept, ...]) -> None:
    for language, comma in (("en", ", "), ("zh", "、")):
        for concept in core[::20]:
            name, known = concept.name[language], {*concept.keywords[language], concept.name[language]}
            said = captions_of(np.random.default_rng(concept.index), concept, language)
            assert len(said) == 5
            assert said[0] == name
            assert said[1].startswith(name)
            assert said[2].startswith(name)
            for caption, most in zip(said, (1, 2, 3, 2, 3)):
                assert caption
                if comma not in name:
                    assert set(caption.split(comma)) <= known
                    assert len(caption.split(comma)) <= most


def test_a_concept_without_other_keywords_still_has_captions(core: tuple[Concept, ...]) -> None:
    alone = next(concept for concept in core if len(concept.keywords["en"]) == 1)
    said = captions_of(np.random.default_rng(0), alone)
    assert len(said) == 5
    assert all(said)
    rng = np.random.default_rng(1)
    bare = Concept(0, "", "", "", "train", (), {"en": "ink"}, {"en": ("Ink",)})
    assert captions_of(rng, bare) == ("ink",) * 5


def test_compose_shows_the_ground_where_nothing_is_drawn() -> None:
    drawing = np.zeros((64, 64, 4), dtype=np.uint8)
    drawing[16:48, 16:48] = (255, 0, 0, 255)
    ground = np.array([0.8, 0.9, 1.0])
    full = compose(drawing, ground, 64)
    assert full[0, 0].tolist() == [204, 230, 255]
    assert full[32, 32].tolist() == [255, 0, 0]
    for size in (16, 32, 96):
        image = compose(drawing, ground, size)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert image[size // 2, size // 2].tolist() == [255, 0, 0]
    drawing[..., 3] //= 2
    assert compose(drawing, np.ones(3), 64)[32, 32, 0] == 255
    assert 126 <= compose(drawing, np.ones(3), 64)[32, 32, 1] <= 129


# ---------------------------------------------------------------------------------------------------------------- COCO
def test_coco(world: EmojiWorld) -> None:
    root = world.root_of("coco")
    for split, styles in (("train2017", {"noto", "openmoji", "fluent_flat"}), ("val2017", {"twemoji"})):
        document = load(root / "annotations" / f"captions_{split}.json")
        assert CREDIT in document["info"]["description"]
        images = document["images"]
        assert [image["id"] for image in images] == sorted(image["id"] for image in images)
        assert {style_of(image["id"]) for image in images} == styles
        assert len(images) == 40 * len(styles) == len(list((root / split).iterdir()))
        groups = Counter(image["group_id"] for image in images)
        assert groups == {concept.index: len(styles) for concept in world.concepts}
        licenses = {license["id"]: license["name"] for license in document["licenses"]}
        for image in images:
            assert licenses[image["license"]] == STYLES[style_of(image["id"])]
        names = {concept.index: concept.name["en"] for concept in world.concepts}
        group_of = {image["id"]: image["group_id"] for image in images}
        captions: dict[int, list[str]] = {}
        for entry in document["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        for number, own in captions.items():
            assert len(own) == 5
            assert own[0] == names[group_of[number]]


def test_instances_are_the_tags_of_the_concept(world: EmojiWorld) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = PycocoCOCO(str(world.root_of("coco") / "annotations" / "instances_val2017.json"))
    names = {entry["id"]: entry["name"] for entry in coco.loadCats(coco.getCatIds())}
    assert [names[number] for number in sorted(names)] == list(world.tag_names)
    by_index = {concept.index: concept for concept in world.concepts}
    for number in coco.getImgIds():
        image = coco.loadImgs(number)[0]
        own = coco.loadAnns(coco.getAnnIds(imgIds=number))
        tags = [names[entry["category_id"]] for entry in own]
        assert set(tags) == set(by_index[image["group_id"]].keywords["en"]) & set(world.tag_names)
        assert len(set(tags)) == len(tags)
        for entry in own:
            left, top, width, height = entry["bbox"]
            assert min(left, top) >= 0
            assert max(left + width, top + height) <= 32
            assert 0 < entry["area"] <= width * height + 1
            assert coco.annToMask(entry).sum() == pytest.approx(width * height, rel=0.25)


def test_boxes_enclose_the_drawing(world: EmojiWorld) -> None:
    root = world.root_of("coco")
    document = load(root / "annotations" / "instances_val2017.json")
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for entry in document["annotations"]:
        pixels = np.asarray(Image.open(root / "val2017" / names[entry["image_id"]])).astype(int)
        left, top, width, height = entry["bbox"]
        outside = np.ones((32, 32), dtype=bool)
        outside[max(0, int(top) - 1) : int(top + height) + 2, max(0, int(left) - 1) : int(left + width) + 2] = False
        if outside.sum() > 8:
            ground = np.median(pixels[outside], axis=0)
            assert np.abs(pixels[outside] - ground).max() < 40


def test_coco_is_read_as_the_real_set(world: EmojiWorld) -> None:
    dataset = COCO(world.root_of("coco"))
    for split, count in (("train", 120), ("val", 40)):
        listing, known = dataset.listing(split), dataset.annotations(split)
        assert (len(listing), listing.missing, listing.notes) == (count, 0, ())
        assert known.tag_names == world.tag_names
        assert len(set(known.groups.tolist())) == 40
        # Drawings of one thing share their tags.
        for group in set(known.groups.tolist()):
            assert len({row.tobytes() for row in known.tags[known.groups == group]}) == 1
        assert {len(captions) for captions in known.captions} == {5}


# ------------------------------------------------------------------------------------------------------------ Karpathy
def test_karpathy(world: EmojiWorld) -> None:
    images = load(world.root_of("coco_karpathy") / "dataset_coco.json")["images"]
    chosen = [concept.index for concept in world.concepts if concept.split == "val"]
    counts = Counter(image["split"] for image in images)
    assert counts == {"train": 120 - len(chosen), "val": len(chosen), "test": 40}
    shown = {split: {image["cocoid"] for image in images if image["split"] == split} for split in counts}
    assert {style_of(number) for number in shown["test"]} == {"twemoji"}
    assert {style_of(number) for number in shown["val"]} == {"fluent_flat"}
    assert sorted(number % 10_000 for number in shown["val"]) == chosen
    assert not shown["train"] & (shown["val"] | shown["test"])
    # Every concept is seen in training, by other drawings.
    assert {number % 10_000 for number in shown["train"]} == {concept.index for concept in world.concepts}
    dataset = COCOKarpathy(world.root_of("coco_karpathy"))
    for split, count in counts.items():
        assert len(dataset.listing(split)) == count
        groups = dataset.annotations(split).groups
        assert set(groups.tolist()) <= {concept.index for concept in world.concepts}


# ------------------------------------------------------------------------------------------------------------ ImageNet
def test_imagenet(world: EmojiWorld, core: tuple[Concept, ...]) -> None:
    root = world.root_of("imagenet")
    names = dict(line.split(" ", 1) for line in (root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert tuple(names.values()) == world.class_names
    by_index = {concept.index: concept for concept in core}
    shown: dict[str, set[int]] = {}
    for split in ("train", "val"):
        listing = ImageNet(root).listing(split)
        assert listing.classes == tuple(names)
        numbers = [int(Path(name).stem.rpartition("_")[2]) for name in listing.names]
        shown[split] = {number % 10_000 for number in numbers}
        assert Counter(map(style_of, numbers)) == dict.fromkeys(STYLES, len(shown[split]))
        for number, label in zip(numbers, listing.labels.tolist()):
            concept = by_index[number % 10_000]
            assert concept.subgroup == names[listing.classes[label]]
            assert (concept.split == "train") == (split == "train")
    assert not shown["train"] & shown["val"]


def test_imagenet_by_designer(tmp_path: Path) -> None:
    world = tiny(EmojiByDesigner, tmp_path)
    world.prepare(["imagenet"])
    shown: dict[str, list[int]] = {}
    for split in ("train", "val"):
        listing = ImageNet(world.root_of("imagenet")).listing(split)
        shown[split] = [int(Path(name).stem.rpartition("_")[2]) for name in listing.names]
        assert {number // 10_000 for number in shown[split]} == ({1, 2, 3} if split == "train" else {4})
    assert {number % 10_000 for number in shown["train"]} == {number % 10_000 for number in shown["val"]}
    assert world.folder != tiny(EmojiWorld, tmp_path).folder


# ---------------------------------------------------------------------------------------------------- draws and folders
@pytest.mark.parametrize("language", ["cs", "zh"])
def test_other_languages_can_be_rendered(tmp_path: Path, language: str) -> None:
    world = tiny(EmojiWorld, tmp_path, concepts=6, language=language)
    world.prepare(["coco"])
    known = COCO(world.root_of("coco")).annotations("val")
    assert [captions[0] for captions in known.captions] == [concept.name[language] for concept in world.concepts]
    assert len(known.tag_names) > 150
