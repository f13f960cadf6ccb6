"""Images of captions of one's own, by the averaged generator of a finished stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import StageError

#: Letters and digits of a caption in the name of its files, at most.
NAME_LENGTH = 60


def generate(
    checkpoint: str | Path,
    captions: Sequence[str],
    output: str | Path,
    number: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> list[Path]:
    """Write images of captions as PNG files, and a grid of all where there are several.

    Args:
        checkpoint: of a stage of XMC-GAN, or an export.
        captions: what is to be seen.
        output: folder; made where it is missing. Files of the same name are replaced.
        number: images of each caption.
        seed: of the noise.
        device: where it runs.

    Returns:
        The files: one for each image, named by place, caption, number and seed; then `grid.png`, a line for each
        caption.

    Raises:
        StageError: see `XMCGAN.from_export`; a caption has no word that the model knows; `number` is below 1.
    """
    if number < 1:
        raise StageError(f"--number {number}: at least one image of a caption is needed")
    if seed < 0:
        raise StageError(f"--seed {seed}: must not be below 0")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise StageError(f"--output {output} is a file: give a folder")
    from papers.xmc_gan.model import XMCGAN

    model = XMCGAN.from_export(checkpoint, device)
    for caption in captions:
        for note in model.notes(caption):
            print(f"{caption!r}: {note}")
    images = model.generate(captions, number, seed)

    from torchvision.utils import make_grid, save_image

    output.mkdir(parents=True, exist_ok=True)
    files = []
    for place, (caption, own) in enumerate(zip(captions, images), start=1):
        for copy, image in enumerate(own, start=1):
            files.append(output / f"{place:02d}-{_name(caption)}-{copy}-seed{seed}.png")
            save_image(image, files[-1])
    if len(files) > 1:
        files.append(output / "grid.png")
        save_image(make_grid(images.flatten(0, 1), nrow=number, pad_value=1.0), files[-1])
    return files


def _name(caption: str) -> str:
    return re.sub(r"\W+", "-", caption.lower()).strip("-")[:NAME_LENGTH].strip("-")
