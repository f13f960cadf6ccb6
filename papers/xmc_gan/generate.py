"""Images of captions of one's own, by the averaged generator of a finished stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.training.errors import StageError
from common.training.finished import open_finished

if TYPE_CHECKING:
    from torch import Tensor

#: Letters and digits of a caption in the name of its files, at most.
NAME_LENGTH = 60


class Painter:
    """A finished stage of XMC-GAN, ready to make images.

    Args:
        checkpoint: `checkpoints/last.ckpt` of the stage; `config.yaml` lies in the folder above.
        device: where it runs.

    Raises:
        StageError: the checkpoint, its configuration or a file that this names is missing, or it is another model's.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu") -> None:
        def only_the_generator(config: dict[str, Any]) -> None:
            # Networks that judge or teach are not needed, and their files may lie on another machine.
            config["model"]["init_args"] |= {"evaluation": None, "image_network": None, "weight_image_net": 0.0}

        self.module, self.data, state = open_finished(
            checkpoint,
            kind="papers.xmc_gan.module.XMCGAN",
            otherwise="makes no images: give the checkpoint of a stage that does, such as xmc_gan",
            example="xmc_gan/mini/seed0/xmc_gan",
            change=only_the_generator,
        )
        found = self.module.load_state_dict(state, strict=False)
        if found.missing_keys:
            raise StageError(f"{checkpoint} does not fit its configuration: it lacks {found.missing_keys[0]}")
        if self.data.tokenizer.file is None:
            # The vocabulary was made of the training captions, which the miniature's world writes.
            self.data.prepare_data()
        else:
            self.data.tokenizer.prepare()
        if self.module.text_encoder is None:
            self.module.text_encoder = self._online_text()
        self.module.to(device).eval()

    def _online_text(self) -> Any:
        """BERT, which made the features that the stage was trained with."""
        from papers.xmc_gan.text import BertText

        folder = Path(self.data.text_features.bert)
        if not folder.is_dir():
            raise StageError(
                f"{folder} does not exist: put bert-base-uncased there, as save_pretrained of transformers writes it. "
                "The stage learned from its features, so captions must be read with it"
            )
        return BertText(str(folder), self.data.sentence_pool)

    @cached_property
    def learned_words(self) -> set[str]:
        """Words of the training captions."""
        from common.data.text import WORD, normalise_caption

        captions = self.data.dataset.annotations(self.data.split).captions
        return {word for own in captions for text in own for word in WORD.findall(normalise_caption(text))}

    def notes(self, caption: str) -> list[str]:
        """What a user should know about a caption: words that the model does not know, and what is cut off.

        Args:
            caption: what is to be shown.

        Raises:
            StageError: there is no word, or none that the model knows.
        """
        from common.data.text import WORD, normalise_caption

        tokenizer, notes = self.data.tokenizer, []
        words = WORD.findall(normalise_caption(caption))
        if not words:
            raise StageError("there is no caption: say in quotes what is to be seen")
        if tokenizer.file is None:
            unknown = [word for word in dict.fromkeys(words) if word not in self.learned_words]
        else:
            unknown = [word for word in dict.fromkeys(words) if "[UNK]" in tokenizer.decode(tokenizer.encode(word))]
        if unknown:
            known = sorted(word for word in self.learned_words if word.isalnum()) if tokenizer.file is None else []
            some = f"; it learned from {', '.join(known)}" if 0 < len(known) <= 60 else ""
            line = f"the model does not know {', '.join(unknown)}{some}"
            if len(unknown) == len(set(words)):
                raise StageError(f"{caption!r}: {line}")
            notes.append(line)
        pieces = 2 + sum(len(tokenizer.encode(word)) - 2 for word in words)
        if pieces > tokenizer.max_tokens:
            read = tokenizer.decode(tokenizer.encode(caption))
            notes.append(f"too long by {pieces - tokenizer.max_tokens} tokens; what the model reads is {read!r}")
        return notes

    def paint(self, captions: Sequence[str], number: int = 1, seed: int = 0) -> Tensor:
        """Images [captions, number, 3, S, S] in [0, 1].

        Args:
            captions: what is to be seen.
            number: images of each, with different noise.
            seed: of the noise; the n-th image of every caption has the same.
        """
        import torch

        from papers.xmc_gan.evaluation import noise_of

        tokens, length = self.data.tokens(captions)
        device = self.module.device
        noise = noise_of(torch.arange(number), self.module.generator.z_dim, seed).to(device)
        rows = []
        with torch.no_grad():
            vectors = self.module.captions({"tokens": tokens.to(device), "length": length.to(device)})
            for row in range(len(captions)):
                own = type(vectors)(*(value[row : row + 1].expand(number, *value.shape[1:]) for value in vectors))
                rows.append(self.module.generate(own, noise).float().clamp(0, 1).cpu())
        return torch.stack(rows)


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
        checkpoint: of a stage of XMC-GAN.
        captions: what is to be seen.
        output: folder; made where it is missing. Files of the same name are replaced.
        number: images of each caption.
        seed: of the noise.
        device: where it runs.

    Returns:
        The files: one for each image, named by place, caption, number and seed; then `grid.png`, a line for each
        caption.

    Raises:
        StageError: see `Painter`; a caption has no word that the model knows; `number` is below 1.
    """
    if number < 1:
        raise StageError(f"--number {number}: at least one image of a caption is needed")
    if seed < 0:
        raise StageError(f"--seed {seed}: must not be below 0")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise StageError(f"--output {output} is a file: give a folder")
    painter = Painter(checkpoint, device)
    for caption in captions:
        for note in painter.notes(caption):
            print(f"{caption!r}: {note}")
    images = painter.paint(captions, number, seed)

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
