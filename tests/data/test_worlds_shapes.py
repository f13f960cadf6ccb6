"""The shapes world on disk: real files in the layouts of COCO, Karpathy's split, Pascal VOC and ImageNet."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO as PycocoCOCO

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.voc import PascalVOC
from common.data.worlds.base import World
from common.data.worlds.glyphs import COLOUR_NAMES, GLYPHS, Attributes, draw, repeated_scene
from common.data.worlds.shapes import GROUP_OF, NOUNS, CaptionWords, ShapesWorld, caption
from tests.data.worlds import media, tiny


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> ShapesWorld:
    return rendered(ShapesWorld)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def captions_of(world: ShapesWorld, split: str = "train2017") -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for entry in load(world.root_of("coco") / "annotations" / f"captions_{split}.json")["annotations"]:
        found.setdefault(entry["image_id"], []).append(entry["caption"])
    return found


# ---------------------------------------------------------------------------------------------------------------- COCO


def test_pycocotools_loads_the_instances(world: ShapesWorld) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = PycocoCOCO(str(world.root_of("coco") / "annotations" / "instances_train2017.json"))
    assert len(coco.getImgIds()) == 32
    for number in coco.getImgIds():
        entries = coco.loadAnns(coco.getAnnIds(imgIds=number))
        assert 2 <= len(entries) <= 4
        assert len({entry["category_id"] for entry in entries}) == 1
        image = np.asarray(Image.open(world.root_of("coco") / "train2017" / coco.loadImgs(number)[0]["file_name"]))
        inside = np.maximum.reduce([coco.annToMask(entry) for entry in entries]).astype(bool)
        # What the masks cover is the bright object, the rest the dark ground.
        assert image[inside].max(axis=-1).mean() > image[~inside].max(axis=-1).mean() + 60
        for entry in entries:
            assert coco.annToMask(entry).sum() == pytest.approx(entry["area"], rel=0.35, abs=6)


def test_coco_is_read_as_the_real_set(world: ShapesWorld) -> None:
    dataset = COCO(world.root_of("coco"))
    for split, count in (("train", 32), ("val", 16)):
        listing, known = dataset.listing(split), dataset.annotations(split)
        assert (len(listing), listing.missing, listing.notes) == (count, 0, ())
        assert known.tag_names == GLYPHS
        assert known.tags.sum(axis=1).tolist() == [1] * count
        assert known.tags.argmax(axis=1).tolist() == [index % 16 for index in range(count)]
        assert {len(captions) for captions in known.captions} == {5}
        assert known.groups.tolist() == known.image_ids.tolist()
        assert {len(boxes["boxes"]) for boxes in known.boxes()} == {2, 3, 4}


def test_annotations_say_what_was_drawn(world: ShapesWorld) -> None:
    root = world.root_of("coco")
    objects = load(root / "annotations" / "instances_train2017.json")
    said = captions_of(world)
    for index, image in enumerate(objects["images"]):
        rng = np.random.default_rng([6, 1, index, 0])
        scene, attributes = repeated_scene(rng, index % 16)
        drawn = draw(scene, rng)
        stored = np.asarray(Image.open(root / "train2017" / image["file_name"])).astype(int)
        assert np.abs(stored - drawn.image).mean() < 6  # JPEG
        own = [entry for entry in objects["annotations"] if entry["image_id"] == image["id"]]
        assert [entry["category_id"] for entry in own] == [attributes.glyph + 1] * attributes.count
        for entry, box in zip(own, drawn.boxes):
            left, top, width, height = entry["bbox"]
            np.testing.assert_allclose([left, top, left + width, top + height], box, atol=0.02)
        for sentence in said[image["id"]]:
            check_caption(sentence, attributes)


def check_caption(sentence: str, attributes: Attributes) -> None:
    glyph = GLYPHS[attributes.glyph]
    nouns = "|".join((*NOUNS[glyph], GROUP_OF[glyph], "thing"))
    count = ("two", "three", "four")[attributes.count - 2]
    size = "large" if attributes.large else "small"
    colour, ground = COLOUR_NAMES[attributes.colour], COLOUR_NAMES[attributes.ground]
    pattern = rf"a( {count})?( {size})?( {colour})? ({nouns})( on {ground})?"
    assert re.fullmatch(pattern, sentence), f"{sentence!r} does not fit {attributes}"


# ------------------------------------------------------------------------------------------------------------ captions
SOME = Attributes(GLYPHS.index("heart"), COLOUR_NAMES.index("red"), COLOUR_NAMES.index("blue"), True, 3)


def test_words_occur_as_often_as_they_should() -> None:
    rng = np.random.default_rng(0)
    said = [caption(rng, SOME, CaptionWords()) for _ in range(4000)]
    for word, probability in ((" three", 0.2), (" large", 0.2), (" red", 0.25), (" on blue", 0.15), (" heart", 0.7)):
        share = np.mean([word in sentence for sentence in said])
        assert share == pytest.approx(probability, abs=0.03), word
    assert np.mean(["round thing" in sentence for sentence in said]) == pytest.approx(0.3, abs=0.03)


def test_captions_can_leave_the_glyph_out(tmp_path: Path) -> None:
    words = CaptionWords(count=1.0, size=0.0, colour=1.0, ground=0.0, glyph=0.0, group=0.0)
    assert caption(np.random.default_rng(0), SOME, words) == "a three red thing"
    other = tiny(ShapesWorld, tmp_path, words=words)
    assert other.key() != tiny(ShapesWorld, tmp_path).key()
    assert tiny(ShapesWorld, tmp_path, words=CaptionWords()).key() == tiny(ShapesWorld, tmp_path).key()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_captions_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, attributes = repeated_scene(rng)
    check_caption(caption(rng, attributes, CaptionWords(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)), attributes)


# ------------------------------------------------------------------------------------------------------------ Karpathy


def test_karpathy_is_read_as_the_real_set(world: ShapesWorld) -> None:
    dataset = COCOKarpathy(world.root_of("coco_karpathy"))
    for split, count in (("train", 20), ("val", 6), ("test", 12)):
        listing, known = dataset.listing(split), dataset.annotations(split)
        assert (len(listing), listing.missing) == (count, 0)
        assert {len(captions) for captions in known.captions} == {5}
    assert dataset.status().present


# ----------------------------------------------------------------------------------------------------------------- VOC
def test_voc_is_read_as_the_real_set(world: ShapesWorld) -> None:
    dataset = PascalVOC(world.root_of("voc"))
    for split, count in (("train", 20), ("val", 20), ("trainval", 40), ("test", 24)):
        listing, labels, boxes = dataset.listing(split), dataset.labels(split), dataset.boxes(split)
        assert (len(listing), listing.missing) == (count, 0)
        assert listing.classes == tuple(sorted(GLYPHS))
        assert labels.shape == (count, 16)
        for row, own in zip(labels, boxes):
            assert sorted(np.flatnonzero(row)) == sorted(own["labels"])
            assert (row[own["labels"]] == np.where(own["difficult"], -1, 1)).all()


def test_few_objects_of_voc_are_difficult(tmp_path: Path) -> None:
    world = tiny(ShapesWorld, tmp_path, voc_train=300, voc_test=1, voc_size=16)
    world.prepare(["voc"])
    flags = [
        entry.findtext("difficult")
        for path in world.root_of("voc").rglob("*.xml")
        for entry in ElementTree.parse(path).getroot().findall("object")
    ]
    assert 0.02 < flags.count("1") / len(flags) < 0.12


def test_a_larger_canvas_shows_the_same_scenes(world: ShapesWorld, tmp_path: Path) -> None:
    large = tiny(ShapesWorld, tmp_path, voc_size=64)
    large.prepare(["voc"])
    assert large.key() != world.key()
    inner = Path("VOCdevkit/VOC2007")
    for stem in ("000001", "000041"):
        picture = Image.open(large.root_of("voc") / inner / "JPEGImages" / f"{stem}.jpg")
        assert picture.size == (64, 64)
        small, big = (
            [
                [int(str(entry.findtext(f"bndbox/{side}"))) for side in ("xmin", "ymin", "xmax", "ymax")]
                for entry in ElementTree.parse(one.root_of("voc") / inner / "Annotations" / f"{stem}.xml").iter(
                    "object"
                )
            ]
            for one in (world, large)
        )
        assert np.abs(2 * np.array(small) - np.array(big)).max() <= 3


# ------------------------------------------------------------------------------------------------------------ ImageNet
@pytest.mark.parametrize(("probe", "classes"), [("glyph", 16), ("colour", 6), ("count", 3)])
def test_imagenet(world: ShapesWorld, probe: Any, classes: int) -> None:
    other = tiny(ShapesWorld, world.folder.parent, probe=probe)
    assert other.folder == world.folder  # the class systems share the rest of the world
    other.prepare(["imagenet"])
    root = other.root_of("imagenet")
    assert root.name == f"imagenet-{probe}"
    names = dict(line.split(" ", 1) for line in (root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert len(names) == classes
    for split, count in (("train", 48), ("val", 32)):
        found = list((root / split).glob("*/*.JPEG"))
        assert len(found) == count
        assert {path.parent.name for path in found} <= set(names)
        assert all(re.fullmatch(r"n\d{8}", path.parent.name) for path in found)
    assert len({path.name for path in (root / "train").iterdir()}) == classes
    dataset = ImageNet(root)
    for split, count in (("train", 48), ("val", 32)):
        listing = dataset.listing(split)
        assert (len(listing), len(listing.classes)) == (count, classes)
    index = 7
    _, attributes = repeated_scene(np.random.default_rng([6, 6, index, 0]), index % 16)
    path = next((root / "train").glob(f"*/*_{index + 1}.JPEG"))
    said = {"glyph": GLYPHS[attributes.glyph], "colour": COLOUR_NAMES[attributes.colour]}
    said["count"] = ("two", "three", "four")[attributes.count - 2]
    assert names[path.parent.name] == said[probe]


# ---------------------------------------------------------------------------------------------------- draws and folders
def test_seeds_redraw_what_is_trained_on_and_nothing_else(world: ShapesWorld, tmp_path: Path) -> None:
    other = tiny(ShapesWorld, tmp_path, seed=6)
    other.prepare()
    for name, trained in (("coco", "train2017/"), ("coco_karpathy", "train2014/"), ("imagenet", "train/")):
        mine, theirs = media(world.root_of(name)), media(other.root_of(name))
        assert not {v for k, v in mine.items() if k.startswith(trained)} & set(theirs.values())
        held = {k: v for k, v in mine.items() if not k.startswith(trained)}
        assert held
        assert held == {k: v for k, v in theirs.items() if not k.startswith(trained)}
    assert captions_of(world, "val2017") == captions_of(other, "val2017")
    mine, theirs = media(world.root_of("voc")), media(other.root_of("voc"))
    same = sorted(int(Path(name).stem) for name in mine if mine[name] == theirs[name])
    assert same == list(range(41, 65))


def test_pictures_keep_their_colours(world: ShapesWorld) -> None:
    path = next((world.root_of("coco") / "train2017").iterdir())
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
