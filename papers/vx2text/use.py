"""Answers questions about clips, describes them, and lists their tokens' categories with a trained VX2TEXT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.data.item_dataset import Sample
from common.data.listing import Clip
from common.data.media import MediaError
from common.encoders.kinetics import KineticsR2Plus1D
from common.encoders.panns import PANNsCNN14
from common.errors import StageError
from common.models.finished_stage import FinishedStage
from common.models.safe_builder import path_of
from common.models.trained import SOURCES, Items, Trained, TrainedModel, with_arguments
from common.models.trained import Modality as AnyModality
from papers.vx2text import fusion
from papers.vx2text.clips import AudioInput, ClipReader, VideoInput
from papers.vx2text.data import CaptioningData, QuestionAnsweringData, Scoring, collate, option_targets
from papers.vx2text.gumbel import largest
from papers.vx2text.language_model import LanguageModel, OptionClassifier
from papers.vx2text.prompt import (
    LETTERS,
    MODALITIES,
    VOCABULARY,
    Modality,
    Prompt,
    PromptLimits,
    Task,
    TextSample,
    TextTokenizer,
)
from papers.vx2text.tokens import ModalityClassifier, SigmoidClassifier, category_names


class VX2Text(fusion.VX2Text, TrainedModel):
    """A trained `fusion.VX2Text` for `task` question, dialog or caption; load it with `VX2Text.from_export(path)`."""

    paper = "vx2text"
    kinds = ("papers.vx2text.module.VX2TextModule",)
    classes: ClassVar[tuple[type, ...]] = (
        LanguageModel, OptionClassifier, ModalityClassifier, SigmoidClassifier, KineticsR2Plus1D, PANNsCNN14,
    )  # fmt: skip
    no_files = SOURCES | {"categories"}
    example = "vx2text/mini/seed0/avsd"
    otherwise = (
        "writes no text about clips: give the checkpoint of a stage that answers questions or describes "
        "clips, such as avsd, tvqa or tvc"
    )
    embeds: ClassVar[tuple[AnyModality, ...]] = ("video", "audio")
    retrieval = None

    task: Task
    scoring: Scoring
    tokenizer: TextTokenizer
    prompt: Prompt
    video: VideoInput | None
    audio: AudioInput | None

    def read_inputs(self, trained: Trained) -> None:
        self.task, self.scoring = self.input(trained, "task", Task), self.input(trained, "scoring", Scoring)
        self.video = self.input(trained, "video", VideoInput | None)
        self.audio = self.input(trained, "audio", AudioInput | None)
        self.tokenizer = TextTokenizer(None, self.input(trained, "vocabulary_size", int))
        self.tokenizer.content = trained.file(VOCABULARY)
        limits, clips = self.input(trained, "prompt", PromptLimits), 0 if self.video is None else self.video.clips
        self.prompt = Prompt(self.tokenizer, limits, clips, int(self.audio is not None))
        self.read_names(self.tokenizer)

    @classmethod
    def card_usage(cls, trained: Trained) -> str:
        return {"question": "usage_with_options", "caption": "usage_caption"}.get(trained.inputs["task"], "usage")

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        model = stage.config["model"]["init_args"]["model"]
        for name in ("video_classifier", "audio_classifier"):
            classifier = model["init_args"][name]
            if classifier is not None:
                # Store the names, so that the export doesn't depend on a file of names.
                names = category_names(classifier["init_args"]["categories"])
                model = with_arguments(model, **{name: with_arguments(classifier, categories=names)})
        tasks = {QuestionAnsweringData: "question", CaptioningData: "caption"}
        inputs = {
            "task": next((task for kind, task in tasks.items() if isinstance(data, kind)), "dialog"),
            "scoring": data.scoring,
            "video": None if data.video is None else asdict(data.video),
            "audio": None if data.audio is None else asdict(data.audio),
            "prompt": asdict(data.prompt.limits),
            "vocabulary_size": data.tokenizer.vocabulary_size,
        }
        weights = {name.removeprefix("model."): value for name, value in stage.state.items()}
        return Trained({**model, "class_path": path_of(cls)}, inputs, weights, {VOCABULARY: data.tokenizer.content})

    def notes(
        self,
        question: str = "",
        speech: Sequence[str] = (),
        known: str = "",
        history: Sequence[tuple[str, str]] = (),
        options: Sequence[str] = (),
    ) -> list[str]:
        """Return warnings about unknown words and about parts that are cut, except the history."""
        tokenizer, limits, notes = self.tokenizer, self.prompt.limits, []
        words = " ".join((question, *speech, known, *chain(*history), *options)).split()
        unknown = [word for word in dict.fromkeys(words) if tokenizer.unknown_id in tokenizer.encode(word)]
        if unknown:
            marks = (
                "" if all(word.isalnum() for word in unknown) else "; try marks apart from words, as in `who speaks ?`"
            )
            notes.append(f"the model does not know {', '.join(unknown)}{marks}")
        parts = [
            ("the question", [question], limits.question, "end"),
            ("the speech", speech, limits.speech, "beginning"),
            ("the description", [known], limits.caption, "end"),
            *((f"the option {option!r}", [option], limits.option, "end") for option in options),
        ]
        for part, texts, limit, cut in parts:
            more = sum(len(tokenizer.encode(text)) for text in texts) - limit
            if limit and more > 0:
                notes.append(f"{part} is too long by {more} tokens; the {cut} is not read")
        return notes

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
        """Answer a question about a clip. `known` describes the clip, and `options` has five answers or none."""
        if not question.strip():
            raise StageError("the question is empty; to describe the clip, run: assemble caption vx2text CLIP")
        if self.task == "caption":
            raise StageError("this model only describes clips, so run: assemble caption vx2text CLIP")
        text = TextSample(self.task, question, tuple(speech), known, tuple(history), tuple(options))
        return self._write(clip, text)

    def caption(self, clip: str | Path, *, speech: Sequence[str] = ()) -> str:
        if self.task != "caption":
            raise StageError(
                'this model only answers questions; ask it what happens: assemble answer vx2text CLIP "what happens ?"'
            )
        return self._write(clip, TextSample("caption", speech=tuple(speech)))

    @torch.no_grad()
    def _write(self, clip: str | Path, text: TextSample) -> str:
        """Generate text about a video file or a folder of numbered frames. Sound or picture may be missing."""
        for part, flag in (("speech", "--speech"), ("caption", "--known"), ("history", "--turn")):
            if getattr(text, part) and not getattr(self.prompt.limits, part):
                raise StageError(f"this model was trained without {part} (data.prompt.{part} was 0): remove {flag}")
        if len(text.options) != (expected := len(LETTERS) if self.task == "question" else 0):
            raise StageError(f"this model needs {expected} options (--option), but got {len(text.options)}")
        sample = self._read(clip, *MODALITIES)
        if self.tokens and not any(sample[f"{name}_present"] for name in self.tokens):
            raise MediaError.of(Path(clip), f"has no {' and no '.join(self.tokens)}, which this model needs")
        sample |= {"input_ids": self.prompt.encode(text)}
        if text.options:
            sample |= {"options": text.options, **option_targets(self.prompt, text.options, -1, self.scoring)}
        batch = tree_map_only(Tensor, lambda value: value.to(self.device), collate([sample]))
        embeddings, mask, _ = self(batch)
        return self.texts(batch, embeddings, mask, self.tokenizer)[0][0]

    def words(self, clip: str | Path) -> dict[str, str]:
        """Return the categories that become a clip's tokens, by modality. Skip missing modalities."""
        sample = self._read(clip, *MODALITIES)
        present = [name for name in self.tokens if sample[f"{name}_present"]]
        texts = {name: self.captions(name, getattr(self, f"embed_{name}")([sample[name]])) for name in present}
        return {name: text[0] for name, text in texts.items() if text is not None}

    def _read(self, clip: str | Path, *modalities: Modality) -> Sample:
        video, audio = self.video if "video" in modalities else None, self.audio if "audio" in modalities else None
        reader = ClipReader(video, audio, training=False)
        return dict(reader.sample(Clip(Path(clip), -1), np.random.default_rng(0)))

    def _read_stream(self, modality: Modality, file: str | Path) -> Tensor:
        if modality not in self.tokens:
            raise StageError(f"this model was trained without {modality}")
        if self.tokens[modality].projection is not None:
            raise StageError("this model uses continuous features, so it has no probabilities of categories")
        sample = self._read(file, modality)
        if not sample[f"{modality}_present"]:
            raise MediaError.of(Path(file), f"has no {modality} stream")
        return sample[modality]

    @property
    def reads(self) -> tuple[AnyModality, ...]:
        return tuple(self.tokens)

    def read_video(self, file: str | Path) -> Tensor:
        """Read the clips of a video, float32 [S, 3, T, H, W]."""
        return self._read_stream("video", file)

    def read_audio(self, file: str | Path) -> Tensor:
        """Read a window of a file's sound, float32 [1, 1, frames, bands]."""
        return self._read_stream("audio", file)

    def embed_video(self, videos: Items) -> Tensor:
        """Return the category probabilities [B, S, C] of each video's S clips."""
        return self._probabilities("video", videos)

    def embed_audio(self, sounds: Items) -> Tensor:
        """Return the category probabilities [B, 1, C] of each sound."""
        return self._probabilities("audio", sounds)

    @torch.no_grad()
    def _probabilities(self, modality: Modality, items: Items) -> Tensor:
        clips = torch.stack(self.read_all(modality, items)).to(self.device)
        return self.tokens[modality].scores(clips).float().softmax(-1)

    def captions(self, modality: AnyModality, embeddings: Tensor) -> list[str] | None:
        """Name each file's tokens: the most probable categories of each clip. None for continuous features."""
        tokens = self.tokens[modality]  # type: ignore[index]
        if tokens.projection is not None:
            return None
        chosen = largest(embeddings, tokens.tokens).flatten(1)
        return [", ".join(tokens.classifier.names[number] for number in row) for row in chosen.tolist()]


MODEL = VX2Text
