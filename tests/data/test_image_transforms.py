"""Compare the image transform with torchvision's, and check its random parameters."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision.transforms.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop

from common.data.image_transforms import ImageTransform, SquashTransform, random_area
from common.data.transforms import CROP_TRIES

PLAIN = ImageTransform(
    crop=16, resize=20, jitter=(0.0, 0.0, 0.0, 0.0), grayscale=0.0, blur=0.0, flip=0.0, mean=(0, 0, 0), std=(1, 1, 1)
)
# Index of each random number in the sequence that one view draws.
TRIES = 2 * CROP_TRIES
LEFT, TOP, JITTER, GRAY, BLUR, SIGMA, FLIP = range(TRIES, TRIES + 7)
ORDER, STRENGTH = TRIES + 7, TRIES + 11


def draws(places: dict[int, float] | None = None) -> Any:
    """Make a random generator that returns 0.5, except at the given positions."""
    values = np.full(TRIES + 15, 0.5)
    for place, value in (places or {}).items():
        values[place] = value
    return SimpleNamespace(random={len(values): values}.__getitem__)


def picture(width: int = 30, height: int = 24, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image, transform: ImageTransform) -> torch.Tensor:
    return reference.normalize(reference.to_tensor(image), list(transform.mean), list(transform.std))


def cropped(
    image: Image.Image, transform: ImageTransform = PLAIN, places: dict[int, float] | None = None
) -> Image.Image:
    """Apply only the random crop, with torchvision's functions."""
    values = draws(places).random(TRIES + 15)[: TRIES + 2].tolist()
    left, top, width, height = random_area(*image.size, transform.min_area, transform.max_aspect, values)
    return reference.resized_crop(image, top, left, height, width, [transform.crop, transform.crop])


def test_defaults_are_mocos() -> None:
    """Compare with the augmentation of MoCo v2's `main_moco.py --aug-plus`."""
    view = dataclasses.astuple(ImageTransform())
    assert view[:7] == (224, 256, 0.2, 4 / 3, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert view[7:] == (0.5, (0.1, 2.0), 0.5, False, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
    assert dataclasses.astuple(SquashTransform()) == (256, 0.5, 0.0, True)


@pytest.mark.parametrize("size", [(30, 24), (24, 30), (16, 16), (20, 20), (7, 90), (1, 1), (333, 250)])
@pytest.mark.parametrize("squeeze", [False, True])
def test_evaluation_equals_torchvision(size: tuple[int, int], squeeze: bool) -> None:
    transform = ImageTransform(crop=16, resize=20, squeeze=squeeze, training=False)
    image = picture(*size)
    resized = reference.resize(image, [20, 20] if squeeze else 20)
    result, flipped = transform(image)
    assert not flipped
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert torch.equal(result, as_tensor(reference.center_crop(resized, [16, 16]), transform))


@pytest.mark.parametrize("size", [(30, 24), (24, 30), (16, 16), (5, 200), (1, 1)])
def test_the_random_crop_equals_torchvision(size: tuple[int, int]) -> None:
    image = picture(*size)
    # A random number of 0.5 is not below the probability of 0.5, so no other augmentation is applied.
    halves = dataclasses.replace(
        PLAIN, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.5, grayscale=0.5, blur=0.5, flip=0.5
    )
    for seed in range(20):
        random = np.random.default_rng(seed).random(TRIES + 2)
        places = dict(enumerate(random.tolist()))
        result, _ = halves(image, draws(places))
        assert torch.equal(result, reference.to_tensor(cropped(image, places=places)))


@settings(max_examples=200)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.floats(0.01, 1.0),
    st.floats(1.0, 3.0),
    st.integers(0, 2**32 - 1),
)
def test_the_crop_lies_in_the_picture(width: int, height: int, area: float, aspect: float, seed: int) -> None:
    values = np.random.default_rng(seed).random(TRIES + 2).tolist()
    left, top, crop_width, crop_height = random_area(width, height, area, aspect, values)
    assert 0 <= left <= left + crop_width <= width
    assert 0 <= top <= top + crop_height <= height
    assert crop_width > 0
    assert crop_height > 0


@pytest.mark.parametrize("size", [(10, 100), (100, 10), (40, 50), (50, 40), (7, 7)])
def test_the_fallback_equals_torchvision(size: tuple[int, int]) -> None:
    # A crop can't cover more than the whole picture, so all ten tries fail.
    image = picture(*size)
    top, left, height, width = RandomResizedCrop.get_params(image, [4.0, 4.0], [3 / 4, 4 / 3])
    values = draws().random(TRIES + 15)[: TRIES + 2].tolist()
    assert random_area(*size, 4.0, 4 / 3, values) == (left, top, width, height)


def test_the_first_crop_that_fits_is_taken() -> None:
    # Try 1 is a square of almost the full area, which is taller than the image. Try 2 fits: 2000 pixels with an aspect
    # ratio of 2 / sqrt(3).
    values = [0.99, 0.5, 0.25, 0.75, *[0.0] * 16, 0.5, 0.5]
    assert random_area(100, 50, 0.2, 4 / 3, values) == (26, 4, 48, 42)
    values = [0.25, 0.25, *[0.0] * 18, 0.999, 0.999]
    assert random_area(100, 50, 0.2, 4 / 3, values) == (58, 2, 42, 48)
    assert random_area(2, 2, 0.2, 4 / 3, [0.0] * 22) == (0, 0, 1, 1)


@pytest.mark.parametrize("first", range(4))
def test_jitter_equals_torchvision_in_every_order(first: int) -> None:
    # The lowest brightness factor would be negative with a strength above one, so it is limited to zero.
    transform = dataclasses.replace(PLAIN, jitter=(3.0, 0.3, 0.2, 0.1))
    order = {ORDER + operation: ((operation - first) % 4) / 4 for operation in range(4)}
    strengths = {STRENGTH: 0.2, STRENGTH + 1: 0.1, STRENGTH + 2: 0.75, STRENGTH + 3: 0.01}
    image = picture()
    result, _ = transform(image, draws({**order, **strengths}))
    expected = cropped(image)
    steps = (
        lambda given: reference.adjust_brightness(given, 0.2 * 4.0),
        lambda given: reference.adjust_contrast(given, 0.7 + 0.1 * 0.6),
        lambda given: reference.adjust_saturation(given, 0.8 + 0.75 * 0.4),
        lambda given: reference.adjust_hue(given, (0.02 - 1) * 0.1),
    )
    for step in range(4):
        expected = steps[(first + step) % 4](expected)
    assert torch.equal(result, reference.to_tensor(expected))


def test_grey_and_blur_equal_torchvision_and_pillow() -> None:
    image = picture()
    gray, _ = dataclasses.replace(PLAIN, grayscale=1.0)(image, draws())
    assert torch.equal(gray, reference.to_tensor(reference.to_grayscale(cropped(image), 3)))
    blurred, _ = dataclasses.replace(PLAIN, blur=1.0)(image, draws({SIGMA: 0.25}))
    expected = cropped(image).filter(ImageFilter.GaussianBlur(0.1 + 0.25 * 1.9))
    assert torch.equal(blurred, reference.to_tensor(expected))


def test_the_flip_comes_last_and_is_told() -> None:
    image = picture()
    everything = dataclasses.replace(PLAIN, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3, blur=1.0, flip=0.5)
    straight, flipped = everything(image, draws({FLIP: 0.5}))
    assert flipped is False
    mirrored, flipped = everything(image, draws({FLIP: 0.49}))
    assert flipped is True
    assert torch.equal(mirrored, straight.flip(-1))


def test_pictures_together_equal_those_alone() -> None:
    images = [picture(30 + seed, 24, seed) for seed in range(20)]
    for transform in (ImageTransform(crop=64, resize=64), ImageTransform(crop=16, training=False), SquashTransform(8)):
        together = transform.together(images, [transform.draw(np.random.default_rng(seed)) for seed in range(20)])
        for seed, (image, view) in enumerate(zip(images, together, strict=True)):
            assert torch.equal(view, transform(image, np.random.default_rng(seed))[0])


@pytest.mark.parametrize("name", ["jitter", "hue", "jitter_probability", "grayscale", "blur", "flip"])
def test_switching_one_augmentation_off_leaves_the_draws_of_the_others(name: str) -> None:
    full, image = ImageTransform(crop=16, resize=16), picture()
    jitter: dict[str, Any] = {"hue": {"jitter": (0.4, 0.4, 0.4, 0.0)}, "jitter": {"jitter": (0.0,) * 4}}
    reduced = dataclasses.replace(full, **jitter.get(name, {name: 0.0}))
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(30):
        _, flipped = full(image, one)
        _, also = reduced(image, other)
        assert also == (flipped and name != "flip")
    assert one.random() == other.random()
    # With these random numbers the full transform skips the step too, so both results are equal bit for bit.
    same = {JITTER: 0.9, GRAY: 0.9, BLUR: 0.9, FLIP: 0.9}
    assert torch.equal(full(image, draws(same))[0], reduced(image, draws(same))[0])


# -------------------------------------------------------------------------------------------------------------- squash
@pytest.mark.parametrize(("width", "height", "size"), [(50, 31, 16), (9, 12, 20), (16, 16, 16), (64, 64, 32)])
def test_squash_is_bilinear_without_antialiasing(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found, flipped = SquashTransform(size, flip=0.0)(Image.fromarray(pixels))
    assert not flipped
    # TensorFlow resizes with half-pixel centers, interpolates the four nearest pixels, and repeats the edges.
    scale = (size / height, size / width, 1)
    expected = scipy.ndimage.zoom(pixels / 255, scale, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=2e-6)
    assert 0 <= found.min() <= found.max() <= 1


def test_squash_flips_with_its_probability() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain, _ = SquashTransform(8, flip=0.0)(image)
    transform = SquashTransform(8, flip=0.5, flip_evaluation=0.25)
    for training, share in ((True, 0.5), (False, 0.25)):
        chosen, rng = transform.with_training(training), np.random.default_rng(1)
        found = [chosen(image, rng) for _ in range(400)]
        assert all(torch.equal(view, plain.flip(2) if flipped else plain) for view, flipped in found)
        assert abs(sum(flipped for _, flipped in found) / 400 - share) < 0.08
