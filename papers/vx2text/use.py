"""A trained VX2TEXT to use: answers about clips, descriptions of them, and the words that it sees and hears in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.data.items import Sample
from common.data.listing import Clip
from common.data.media import MediaError
from common.encoders.kinetics import KineticsR2Plus1D
from common.encoders.panns import PANNsCNN14
from common.errors import StageError
from common.stages.export import (
    SOURCES,
    Items,
    Modality,
    Trained,
    TrainedModel,
    with_arguments,
    without_sources,
)
from common.stages.finished import FinishedStage
from papers.vx2text import module
from papers.vx2text.clips import AudioInput, ClipReader, VideoInput
from papers.vx2text.data import CaptioningData, QuestionAnsweringData, Scoring, collate, option_targets
from papers.vx2text.evaluation import written
from papers.vx2text.model import (
    LanguageModel,
    ModalityClassifier,
    OptionClassifier,
    SigmoidClassifier,
    category_names,
)
from papers.vx2text.prompt import Prompt, PromptLimits, PromptText, Task, TextTokenizer

#: Parts of the prompt, as messages call them.
_NAMES = {"speech": "speech", "caption": "descriptions", "history": "earlier questions", "option": "options"}


class VX2Text(TrainedModel):
    """Trained classifiers of video and sound, and the language model that reads what they name.

    Args:
        trained: see `common.stages.export.Trained`; `VX2Text.from_export(path)` reads it.

    Attributes:
        model: `papers.vx2text.module.VX2Text`.
        task: what it learned: `question` (one of five options), `dialog` or `caption`.
    """

    paper = "vx2text"
    kinds = ("papers.vx2text.module.VX2Text",)
    classes: ClassVar[tuple[type, ...]] = (
        module.VX2Text, LanguageModel, OptionClassifier, ModalityClassifier, SigmoidClassifier,
        KineticsR2Plus1D, PANNsCNN14,
    )  # fmt: skip
    no_files = SOURCES | {"categories"}
    example = "vx2text/mini/seed0/avsd"
    otherwise = (
        "writes no text about clips: give the checkpoint of a stage that answers or describes, such as avsd, tvqa or "
        "tvc"
    )
    embeds: ClassVar[tuple[Modality, ...]] = ("video", "audio")
    limits = (
        "For research on text about videos: answers to questions and descriptions. What it writes is likely text and "
        "may be wrong; do not act on it unchecked. It inherits the biases of its clips and of its language model, "
        "and is not made to recognise persons or to decide about them. The method is covered by US patents, see the "
        "paper's page."
    )
    usage = 'model.words("clip.mp4")  # what it sees and hears; then model.write("clip.mp4", "what is moving?")'

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = self.build(trained)
        self.task: Task = self.input(trained, "task", Task)
        self.scoring: Scoring = self.input(trained, "scoring", Scoring)
        video: VideoInput | None = self.input(trained, "video", VideoInput | None)
        audio: AudioInput | None = self.input(trained, "audio", AudioInput | None)
        limits: PromptLimits = self.input(trained, "prompt", PromptLimits)
        self.tokenizer = TextTokenizer(None, self.input(trained, "vocabulary_size", int))
        if len(trained.files) != 1:
            raise StageError(f"{trained.where}: files holds {len(trained.files)} vocabularies, not one")
        (name,) = trained.files
        self.tokenizer.read(name, trained.file(name))
        self.prompt = Prompt(
            self.tokenizer,
            limits,
            0 if video is None else video.clips * limits.video_tokens,
            0 if audio is None else limits.audio_tokens,
        )
        self._reader = ClipReader(video, audio, training=False)
        self.fill(trained)
        self.model.prepare(self.tokenizer)

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        model = without_sources(stage.config["model"])
        for name in ("video_classifier", "audio_classifier"):
            own = model["init_args"][name]
            if own is not None:
                # Names may lie in a file, which must not be needed.
                listed = category_names(own["init_args"]["categories"])
                model["init_args"][name] = with_arguments(own, categories=listed)
        kinds = {QuestionAnsweringData: "question", CaptioningData: "caption"}
        inputs = {
            "task": next((task for kind, task in kinds.items() if isinstance(data, kind)), "dialog"),
            "scoring": data.scoring,
            "video": None if data.video is None else asdict(data.video),
            "audio": None if data.audio is None else asdict(data.audio),
            "prompt": asdict(data.prompt.limits),
            "vocabulary_size": data.tokenizer.vocabulary_size,
        }
        name, content = data.tokenizer.content
        weights = {f"model.{name}": value for name, value in stage.state.items()}
        return Trained(model, inputs, weights, {name: content})

    # -- text ----------------------------------------------------------------------------------------------------------

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
        """Text about a clip, as the task wants it.

        Args:
            clip: a video file, or a folder of numbered frames; the sound may be missing, and so may the picture.
            question: what is asked; none for a description.
            speech: what is said in the clip, line by line.
            known: a description of the clip.
            history: earlier questions and answers.
            options: answers to choose from.

        Raises:
            MediaError: the clip cannot be read, or has nothing that the model sees or hears.
            StageError: the model was trained without some of the texts that are given, and would not read them.
        """
        given = {"speech": speech, "caption": known, "history": history, "option": options}
        for part, content in given.items():
            if content and not getattr(self.prompt.limits, part):
                raise StageError(
                    f"this model was trained without {_NAMES[part]} (data.prompt.{part} was 0) and would not read "
                    "what is given: leave it out"
                )
        sample = self._read(clip)
        if self.model.tokens and not any(sample[f"{name}_present"] for name in self.model.tokens):
            raise MediaError.of(
                Path(clip), f"has no {' and no '.join(self.model.tokens)}, and this model reads nothing else"
            )
        text = PromptText(
            self.task,
            question=question,
            speech=tuple(speech),
            caption=known,
            history=tuple(history),
            options=tuple(options),
        )
        sample |= {"input_ids": self.prompt.encode(text)}
        if options:
            sample |= {"options": list(options), **option_targets(self.prompt, options, self.scoring)}
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in collate([sample]).items()
        }
        embeddings, mask, _ = self.model.inputs(batch)
        h = self.model.hparams
        return written(
            batch, self.model.language_model, embeddings, mask, self.tokenizer, h["beams"], h["max_answer_tokens"]
        )[0]

    def answer(
        self,
        clip: str | Path,
        question: str,
        *,
        speech: Sequence[str] = (),
        known: str = "",
        history: Sequence[tuple[str, str]] = (),
        options: Sequence[str] = (),
    ) -> str:
        """The answer to a question about a clip.

        Args:
            clip, question, speech, known, history, options: see `write`.

        Raises:
            StageError: there is no question, or the model cannot answer it.
            MediaError: the clip cannot be read.
        """
        if not question.strip():
            raise StageError(
                "there is no question to answer; to have the clip described: assemble caption vx2text CLIP"
            )
        if self.task == "caption":
            raise StageError("this model learned to describe clips and not to answer: assemble caption vx2text CLIP")
        if self.task == "question" and len(options) != 5:
            raise StageError(
                f"this model learned to choose among five options; {len(options)} are given (--option, five times)"
            )
        if self.task == "dialog" and options:
            raise StageError("this model learned to answer freely; leave the options out (--option)")
        return self.write(clip, question, speech, known, history, options)

    def caption(self, clip: str | Path, *, speech: Sequence[str] = ()) -> str:
        """A description of a clip.

        Args:
            clip, speech: see `write`.

        Raises:
            StageError: the model cannot describe.
            MediaError: the clip cannot be read.
        """
        if self.task != "caption":
            raise StageError(
                "this model learned to answer questions and not to describe; ask it what happens: "
                'assemble answer vx2text CLIP "what happens ?"'
            )
        return self.write(clip, speech=speech)

    # -- categories ----------------------------------------------------------------------------------------------------

    def _read(self, clip: str | Path) -> Sample:
        return dict(self._reader.read(Clip(Path(clip), -1), np.random.default_rng(0)))

    def read_video(self, file: str | Path) -> Tensor:
        """The clips of a video, float32 [S, 3, T, H, W].

        Raises:
            MediaError: it cannot be read, or has no picture.
            StageError: the model reads no video.
        """
        return self._stream("video", file)

    def read_audio(self, file: str | Path) -> Tensor:
        """A window of a file's sound, float32 [1, frames, bands].

        Raises:
            MediaError: it cannot be read, or has no sound.
            StageError: the model reads no sound.
        """
        return self._stream("audio", file)

    def _stream(self, modality: str, file: str | Path) -> Tensor:
        if modality not in self.model.tokens:
            raise StageError(f"this model was trained without {modality}")
        sample = self._read(file)
        if not sample[f"{modality}_present"]:
            raise MediaError.of(Path(file), f"has no {modality} stream")
        return sample[modality]

    @torch.no_grad()
    def embed_video(self, videos: Items) -> Tensor:
        """Probabilities [B, S, C] of the categories of video for each of S clips.

        Args:
            videos: a file, some files, or what `read_video` gives of them.

        Raises:
            MediaError, StageError: see `read_video`.
        """
        return self._shares("video", torch.stack(self.read_all("video", videos)))

    @torch.no_grad()
    def embed_audio(self, sounds: Items) -> Tensor:
        """Probabilities [B, 1, C] of the categories of sound.

        Args:
            sounds: a file, some files, or what `read_audio` gives of them.

        Raises:
            MediaError, StageError: see `read_audio`.
        """
        return self._shares("audio", torch.stack(self.read_all("audio", sounds))[:, None])

    def _shares(self, modality: str, clips: Tensor) -> Tensor:
        return self.model.tokens[modality](clips.to(self.device))[2].float().softmax(-1)

    def captions(self, modality: Modality, embeddings: Tensor) -> list[str]:
        """The tokens that each file brings into the prompt: the most probable categories of each of its clips."""
        tokens = self.model.tokens[modality]
        order = embeddings.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : tokens.tokens].flatten(1)
        return [" ".join(tokens.classifier.names[number] for number in row) for row in chosen.tolist()]

    def words(self, clip: str | Path) -> dict[str, str]:
        """The tokens of each modality that a clip brings into the prompt; a modality that it lacks is left out.

        Raises:
            MediaError: the clip cannot be read.
        """
        sample = self._read(clip)
        found: dict[str, str] = {}
        for name in self.model.tokens:
            if sample[f"{name}_present"]:
                embed: Any = getattr(self, f"embed_{name}")
                found[name] = self.captions(name, embed([sample[name]]))[0]
        return found


MODEL = VX2Text
