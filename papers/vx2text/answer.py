"""A trained model on a clip of one's own: what it answers to a question, and how it describes the clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data.listing import Clip
from common.training.errors import StageError
from common.training.finished import open_finished


class Storyteller:
    """A finished stage of VX2TEXT, ready to read clips.

    Args:
        checkpoint: `checkpoints/last.ckpt` of the stage; `config.yaml` lies in the folder above.
        device: where it runs.

    Raises:
        StageError: the checkpoint, its configuration or a file that this names is missing, or it is another model's.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu") -> None:
        self.module, self.data, state = open_finished(
            checkpoint,
            kind="papers.vx2text.module.VX2Text",
            otherwise="writes no text about clips: give the checkpoint of a stage that answers or describes, such as "
            "avsd, tvqa or tvc",
            example="vx2text/mini/seed0/avsd",
        )
        self.module.load_state_dict(state)
        self.module.prepare(self.data.tokenizer)
        self.module.to(device).eval()

    @property
    def task(self) -> str:
        """What the stage learned: `question` (one of five options), `dialog` or `caption`."""
        from papers.vx2text.data import CaptioningData, QuestionAnsweringData

        if isinstance(self.data, CaptioningData):
            return "caption"
        return "question" if isinstance(self.data, QuestionAnsweringData) else "dialog"

    @torch.no_grad()
    def write(
        self,
        clip: str | Path,
        question: str = "",
        speech: Sequence[str] = (),
        known: str = "",
        history: Sequence[tuple[str, str]] = (),
        options: Sequence[str] = (),
    ) -> str:
        """Text about a clip, as the stage's task wants it.

        Args:
            clip: a video file, or a folder of numbered frames; the sound may be missing, and so may the picture.
            question: what is asked; none for a description.
            speech: what is said in the clip, line by line.
            known: a description of the clip.
            history: earlier questions and answers.
            options: answers to choose from.

        Raises:
            MediaError: the clip cannot be read.
        """
        from papers.vx2text.clips import ClipReader
        from papers.vx2text.data import collate, option_targets
        from papers.vx2text.evaluation import written
        from papers.vx2text.prompt import PromptText

        path = Path(clip)
        reader = ClipReader(self.data.video, self.data.audio, training=False)
        sample: dict[str, Any] = dict(reader.read(Clip(path, -1), np.random.default_rng(0)))
        prompt, tokenizer = self.data.prompt, self.data.tokenizer
        text = PromptText(
            self.task,  # type: ignore[arg-type]
            question=question,
            speech=tuple(speech),
            caption=known,
            history=tuple(history),
            options=tuple(options),
        )
        sample |= {"input_ids": prompt.encode(text)}
        if options:
            sample |= {"options": list(options), **option_targets(prompt, options, self.data.scoring)}
        device = self.module.device
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate([sample]).items()
        }
        embeddings, mask, _ = self.module.inputs(batch)
        h = self.module.hparams
        return written(
            batch, self.module.language_model, embeddings, mask, tokenizer, h["beams"], h["max_answer_tokens"]
        )[0]


def answer(
    checkpoint: str | Path,
    clip: str | Path,
    question: str,
    *,
    speech: Sequence[str] = (),
    known: str = "",
    history: Sequence[tuple[str, str]] = (),
    options: Sequence[str] = (),
    device: str = "cpu",
) -> str:
    """Answer a question about a clip.

    Args:
        checkpoint: of a stage that answers: AVSD, or TVQA together with five options.
        clip, question, speech, known, history, options: see `Storyteller.write`.
        device: where it runs.

    Raises:
        StageError: there is no question, or the checkpoint cannot answer it.
        MediaError: the clip cannot be read.
    """
    if not question.strip():
        raise StageError("there is no question to answer; to have the clip described: assemble caption vx2text CLIP")
    teller = Storyteller(checkpoint, device)
    if teller.task == "caption":
        raise StageError(f"{checkpoint} learned to describe clips and not to answer: assemble caption vx2text CLIP")
    if teller.task == "question" and len(options) != 5:
        raise StageError(f"{checkpoint} learned to choose among five options; {len(options)} are given")
    if teller.task == "dialog" and options:
        raise StageError(f"{checkpoint} learned to answer freely; leave the options out")
    return teller.write(clip, question, speech, known, history, options)


def caption(checkpoint: str | Path, clip: str | Path, *, speech: Sequence[str] = (), device: str = "cpu") -> str:
    """Describe a clip.

    Args:
        checkpoint: of a stage that describes: TVC.
        clip, speech: see `Storyteller.write`.
        device: where it runs.

    Raises:
        StageError: the checkpoint cannot describe.
        MediaError: the clip cannot be read.
    """
    teller = Storyteller(checkpoint, device)
    if teller.task != "caption":
        raise StageError(
            f"{checkpoint} learned to answer questions and not to describe; ask it what happens: "
            'assemble answer vx2text CLIP "what happens ?"'
        )
    return teller.write(clip, speech=speech)
