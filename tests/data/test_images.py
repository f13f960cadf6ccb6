"""Test reading pictures, the cache of decoded pictures, and the data sets of pictures."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.annotations import ImageAnnotations
from common.data.image_transforms import ImageTransform
from common.data.images import ImageItems
from common.data.item_dataset import Sample
from common.data.listing import Clip, Listing
from common.data.media import FileCache, MediaError, read_image
from common.data.sequences import Rows
from tests.data.image_layouts import write_image
from tests.data.media_factory import listing_of

TRANSFORM = ImageTransform(crop=8, resize=8)


@pytest.fixture(autouse=True)
def _own_shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileCache, "_shared", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(6):
        write_image(folder / f"good{number}.jpg", number)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "garbage.jpg").write_bytes(np.random.default_rng(0).bytes(3000))
    whole = (folder / "good0.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def good(folder: Path, count: int = 6) -> Listing:
    return listing_of(folder, [Clip(folder / f"good{number}.jpg", number % 3) for number in range(count)])


def equal(first: Sample, second: Sample) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------- reading
def test_colors_grey_levels_and_alpha(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for name, stored in {"RGB": pixels[..., :3], "RGBA": pixels, "L": pixels[..., 0], "LA": pixels[..., :2]}.items():
        Image.fromarray(stored).save(tmp_path / f"{name}.png")
        image = read_image(tmp_path / f"{name}.png")
        assert (image.mode, image.size) == ("RGB", (7, 5))
        expected = stored[..., :3] if name.startswith("RGB") else np.repeat(stored.reshape(5, 7, -1)[..., :1], 3, 2)
        assert np.array_equal(np.asarray(image), expected)
    Image.fromarray(pixels[..., 0] > 99).save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "bits.png"))).tolist()) == {0, 255}


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 0, 1, 1, 2, 2])
    expected = np.asarray(palette.convert("RGB"))
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "one.png", transparency=1)
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 128]))
    palette.save(tmp_path / "plain.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("plain.png", "one.png", "bytes.png", "plain.gif"):
            assert np.array_equal(np.asarray(read_image(tmp_path / name)), expected), name


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_keep_their_upper_half(tmp_path: Path, kind: str) -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{kind}")
    image = np.asarray(read_image(tmp_path / f"deep.{kind}"))
    assert image.shape == (1, 5, 3)
    assert image[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (image == image[..., :1]).all()


def test_orientation_is_not_applied_and_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (12, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (12, 6)
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["none.jpg", "", "empty.jpg", "garbage.jpg", "truncated.jpg", "deep.tif", "huge.jpg"])
def test_pictures_that_cannot_be_read_are_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(folder / "deep.tif")  # floats have no known range
    if name == "huge.jpg":
        write_image(folder / name)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match=str(folder / name)):
        read_image(folder / name)


# --------------------------------------------------------------------------------------------------------------- cache
def test_the_cache_gives_what_the_file_holds(folder: Path) -> None:
    cache = FileCache(24 * 20 * 4)
    expected = read_image(folder / "good1.jpg").tobytes()
    for _ in range(2):
        assert read_image(folder / "good1.jpg", cache).tobytes() == expected
    assert cache.nbytes == 24 * 20 * 4
    with pytest.raises(MediaError, match="No such file"):
        read_image(folder / "gone.jpg", cache)


def test_the_oldest_makes_room_and_a_large_one_is_not_kept(folder: Path, tmp_path: Path) -> None:
    size = 24 * 20 * 4
    cache = FileCache(2 * size)
    for number in (0, 1, 0, 2):
        read_image(folder / f"good{number}.jpg", cache)
    assert (cache.nbytes, cache.dropped) == (2 * size, 1)
    kept = {Path(key[0]).name for key in cache._entries}
    assert kept == {"good0.jpg", "good2.jpg"}
    write_image(tmp_path / "large.jpg", size=(60, 50))
    assert read_image(tmp_path / "large.jpg", cache).size == (60, 50)
    assert cache.dropped == 1


# --------------------------------------------------------------------------------------------------------------- items
def test_what_a_sample_holds(folder: Path) -> None:
    items = ImageItems(good(folder), TRANSFORM, training=True)
    assert len(items) == 6
    sample = items[4]
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in sample.items()}
    scalar = ((), torch.int64)
    assert shapes == {"image": ((3, 8, 8), torch.float32), "index": scalar, "label": scalar, "skipped": scalar}
    assert (int(sample["index"]), int(sample["label"]), int(sample["skipped"])) == (4, 1, 0)
    assert equal(items[-2], sample)
    with pytest.raises(IndexError):
        items[6]


def test_evaluation_is_not_random(folder: Path) -> None:
    items = ImageItems(good(folder), TRANSFORM, training=False)
    assert equal(items[(0, 2)], items[(7, 2)])
    expected, _ = TRANSFORM.with_training(False)(read_image(folder / "good2.jpg"))
    assert torch.equal(items[2]["image"], expected)


def test_names_previews_and_the_record(folder: Path) -> None:
    items = ImageItems(good(folder), TRANSFORM, training=True)
    assert items.name(2) == "good2.jpg"
    assert np.array_equal(items.preview(2), np.asarray(read_image(folder / "good2.jpg")))
    described = items.describe()
    assert described == {"version": "1", "fingerprint": items.listing.fingerprint()[:16], "samples": 6}
    texts, numbers = Rows.texts([("a", "b")] * 6), Rows.numbers((row,) for row in range(6))
    tags = np.eye(6, 3, dtype=np.bool_)
    items.annotations = ImageAnnotations(np.arange(6), texts, numbers, tags, ("x", "y", "z"), np.arange(6))
    assert items.describe() == {**described, "annotations": "806570d39f24a2f8"}


def test_a_forked_process_finds_the_filled_cache(folder: Path) -> None:
    items = ImageItems(good(folder), TRANSFORM, training=True, cache_bytes=2**20)
    items.fill_cache()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_cached, (items,)) == 6 * 24 * 20 * 4


def _cached(items: ImageItems) -> int:
    # An unpickled data set uses the cache of its process. A forked process inherits the cache that its parent filled.
    assert items.cache is not None
    return items.cache.nbytes
