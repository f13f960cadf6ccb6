"""The image transform against torchvision's, and the draws behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
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
# Places of the draws in the block that a view takes.
TRIES = 2 * CROP_TRIES
LEFT, TOP, JITTER, GRAY, BLUR, SIGMA, FLIP = range(TRIES, TRIES + 7)
ORDER, STRENGTH = TRIES + 7, TRIES + 11


class Draws:
    """Stands in for a generator: gives fixed numbers, half of everything unless told otherwise."""

    def __init__(self, **draws: float) -> None:
        self.values = np.full(TRIES + 15, 0.5)
        for place, value in draws.items():
            self.values[int(place.removeprefix("at"))] = value

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.values)
        return self.values


def draws(places: dict[int, float] | None = None) -> Any:
    return Draws(**{f"at{place}": value for place, value in (places or {}).items()})


def picture(width: int = 30, height: int = 24, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image, transform: ImageTransform) -> torch.Tensor:
    return reference.normalize(reference.to_tensor(image), list(transform.mean), list(transform.std))


def cropped(
    image: Image.Image, transform: ImageTransform = PLAIN, places: dict[int, float] | None = None
) -> Image.Image:
    """The random crop alone, by torchvision."""
    values = draws(places).random(TRIES + 15)[: TRIES + 2].tolist()
    left, top, width, height = random_area(*image.size, transform.min_area, transform.max_aspect, values)
    return reference.resized_crop(image, top, left, height, width, [transform.crop, transform.crop])


def test_defaults_are_mocos() -> None:
    """As in MoCo v2's `main_moco.py` with `--aug-plus`."""
    view = dataclasses.asdict(ImageTransform())
    crop = RandomResizedCrop(224, scale=(0.2, 1.0))
    assert (view["crop"], view["min_area"], view["max_aspect"]) == (crop.size[0], crop.scale[0], crop.ratio[1])
    assert (view["jitter"], view["jitter_probability"], view["grayscale"]) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert (view["blur"], view["blur_sigma"], view["flip"]) == (0.5, (0.1, 2.0), 0.5)
    assert (view["resize"], view["squeeze"], view["training"]) == (256, False, True)
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
    for seed in range(20):
        random = np.random.default_rng(seed).random(TRIES + 2)
        places = dict(enumerate(random.tolist()))
        result, _ = PLAIN(image, draws(places))
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
    # An area above 1 never fits, so all ten tries fail.
    image = picture(*size)
    top, left, height, width = RandomResizedCrop.get_params(image, [4.0, 4.0], [3 / 4, 4 / 3])
    values = draws().random(TRIES + 15)[: TRIES + 2].tolist()
    assert random_area(*size, 4.0, 4 / 3, values) == (left, top, width, height)


def test_area_and_aspect_have_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = Image.new("RGB", (400, 300))
    ours = np.array([random_area(400, 300, 0.2, 4 / 3, rng.random(TRIES + 2).tolist()) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]
    for mine, other in zip(
        (ours[:, 2] * ours[:, 3], np.log(ours[:, 2] / ours[:, 3]), ours[:, 0], ours[:, 1]),
        (theirs[:, 2] * theirs[:, 3], np.log(theirs[:, 2] / theirs[:, 3]), theirs[:, 0], theirs[:, 1]),
    ):
        # Largest distance between the two distribution functions; 0.036 is exceeded by chance once in a hundred.
        grid = np.sort(np.concatenate([mine, other]))
        below = (np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (mine, other))
        assert abs(next(below) - next(below)).max() < 0.045


@pytest.mark.parametrize("first", range(4))
def test_jitter_equals_torchvision_in_every_order(first: int) -> None:
    transform = dataclasses.replace(PLAIN, jitter=(0.4, 0.3, 0.2, 0.1))
    order = {ORDER + operation: ((operation - first) % 4) / 4 for operation in range(4)}
    strengths = {STRENGTH: 0.9, STRENGTH + 1: 0.1, STRENGTH + 2: 0.75, STRENGTH + 3: 0.2}
    image = picture()
    result, _ = transform(image, draws({**order, **strengths}))
    expected = cropped(image)
    steps = (
        lambda given: reference.adjust_brightness(given, 0.6 + 0.9 * 0.8),
        lambda given: reference.adjust_contrast(given, 0.7 + 0.1 * 0.6),
        lambda given: reference.adjust_saturation(given, 0.8 + 0.75 * 0.4),
        lambda given: reference.adjust_hue(given, (0.4 - 1) * 0.1),
    )
    for step in range(4):
        expected = steps[(first + step) % 4](expected)
    assert torch.equal(result, reference.to_tensor(expected))


def test_a_strength_above_one_does_not_go_below_black() -> None:
    transform = dataclasses.replace(PLAIN, jitter=(3.0, 0.0, 0.0, 0.0))
    assert not transform(picture(), draws({STRENGTH: 0.0}))[0].any()


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


@pytest.mark.parametrize(
    "switched_off",
    [
        {"jitter": (0.0, 0.0, 0.0, 0.0)},
        {"jitter": (0.0, 0.4, 0.4, 0.1)},
        {"jitter_probability": 0.0},
        {"grayscale": 0.0},
        {"blur": 0.0},
        {"flip": 0.0},
    ],
)
def test_switching_one_augmentation_off_leaves_the_draws_of_the_others(switched_off: dict[str, Any]) -> None:
    full = ImageTransform(crop=16, resize=16)
    reduced = dataclasses.replace(full, **switched_off)
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    image = picture()
    for _ in range(30):
        _, flipped = full(image, one)
        _, also = reduced(image, other)
        assert also == (flipped and "flip" not in switched_off)
    assert one.random() == other.random()
    # A view that the switched-off step left alone anyway stays the same to the bit.
    same = {JITTER: 0.9, GRAY: 0.9, BLUR: 0.9, FLIP: 0.9}
    assert torch.equal(full(image, draws(same))[0], reduced(image, draws(same))[0])


# -------------------------------------------------------------------------------------------------------------- squash
def squash_reference(pixels: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow's bilinear resizing: half-pixel centers, the four nearest pixels, edges repeated."""

    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        exact = np.maximum((np.arange(size) + 0.5) * length / size - 0.5, 0)
        low = np.floor(exact).astype(int)
        return low, np.minimum(low + 1, length - 1), exact - low

    (top, bottom, down), (left, right, along) = places(pixels.shape[0]), places(pixels.shape[1])
    along, down = along[None, :, None], down[:, None, None]
    rows = [(1 - along) * pixels[row][:, left] + along * pixels[row][:, right] for row in (top, bottom)]
    return (1 - down) * rows[0] + down * rows[1]


@pytest.mark.parametrize(("width", "height", "size"), [(50, 31, 16), (9, 12, 20), (16, 16, 16), (64, 64, 32)])
def test_squash_is_bilinear_without_antialiasing(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found, flipped = SquashTransform(size, flip=0.0)(Image.fromarray(pixels))
    assert not flipped
    assert found.shape == (3, size, size)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), squash_reference(pixels / 255, size), atol=2e-6)
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
