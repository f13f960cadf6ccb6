"""Test starting from released files and from our stages, and exporting single parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.encoders.checkpoint_files import CheckpointError
from common.encoders.kinetics import KineticsR2Plus1D
from common.encoders.panns import PANNsCNN14
from papers.vx2text.language_model import LanguageModel
from papers.vx2text.tokens import ModalityClassifier, ModalityTokens
from papers.vx2text.weights import LAYOUTS, export, load_classifier, load_language_model


def video(categories: int = 4, width: int = 4) -> ModalityClassifier:
    encoder = KineticsR2Plus1D((1, 1), (width, 8), stem_channels=3)
    return ModalityClassifier(encoder, [f"action {n}" for n in range(categories)])


def audio() -> ModalityClassifier:
    return ModalityClassifier(PANNsCNN14((4, 8), mel_bins=8), ["beep", "buzz"])


def language(**sizes: Any) -> LanguageModel:
    small = {"vocabulary_size": 24, "width": 8, "layers": 2, "attention_heads": 2, "key_width": 4}
    return LanguageModel(**{**small, **sizes})


def same(left: nn.Module, right: nn.Module) -> bool:
    other = right.state_dict()
    return all(torch.equal(value, other[name]) for name, value in left.state_dict().items())


def released(source: ModalityClassifier, path: Path, modality: str) -> Path:
    """Write weights as they are released. R(2+1)D has torchvision's names and the head `fc`.

    PANNs has its weights under `model`, with the filters of the spectrogram and the head `fc_audioset`.
    """
    state: dict[str, Any] = {name.removeprefix("encoder."): value for name, value in source.state_dict().items()}
    if modality == "audio":
        state |= {f"fc_audioset.{part}": state.pop(f"fc.{part}") for part in ("weight", "bias")}
        state["spectrogram_extractor.stft.conv_real.weight"] = torch.zeros(5, 1, 8)
        state["logmel_extractor.melW"] = torch.zeros(5, 8)
        state = {"iteration": 600000, "model": state, "sampler": {"order": np.arange(3)}}
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("modality", "make"), [("video", video), ("audio", audio)])
def test_a_released_network(modality: Any, make: Any, tmp_path: Path) -> None:
    source, target = make(), make()
    path = released(source, tmp_path / "released.pth", modality)
    assert not same(source, target)
    load_classifier(target, path, modality, f"model.{modality}_pretrained")
    assert same(source, target)


@pytest.mark.parametrize(
    "prefix",
    ["classifier.", "model.tokens.audio.classifier.", "language_model.", "model.language_model."],
)
def test_our_own_stages(prefix: str, tmp_path: Path) -> None:
    source, target = (language() if "language" in prefix else audio() for _ in range(2))
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    if isinstance(target, LanguageModel):
        load_language_model(target, tmp_path / "last.ckpt")
    else:
        load_classifier(target, tmp_path / "last.ckpt", "audio", "model.audio_pretrained")
    assert same(source, target)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    kinetics, panns = (
        released(source, tmp_path / f"{modality}.pth", modality)
        for modality, source in (("video", video()), ("audio", audio()))
    )
    for target, path, message in (
        (video(5), kinetics, r"other shape: fc.weight \[4, 8\] instead of \[5, 8\]"),
        (video(width=6), kinetics, r"do not fit model.model.video_classifier: .*other shape"),
        (video(), panns, r"do not fit model.model.video_classifier: .*missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_classifier(target, path, "video", "model.video_pretrained")


# -- the language model ------------------------------------------------------------------------------------------------


def test_a_folder_of_t5(tmp_path: Path) -> None:
    source, target = language(), language()
    source.t5.save_pretrained(tmp_path)
    load_language_model(target, tmp_path)
    assert same(source, target)
    assert target.t5.lm_head.weight is target.t5.shared.weight
    # An older file has another name and contains a bias that the model ignores.
    state = load_file(tmp_path / "model.safetensors")
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    target = language()
    load_language_model(target, tmp_path)
    assert same(source, target)


# -- export ------------------------------------------------------------------------------------------------------------


def test_exported_parts_load_again(tmp_path: Path) -> None:
    parts = {"video": video(), "audio": audio()}
    text = language()
    state = {f"model.language_model.{name}": value for name, value in text.state_dict().items()}
    for name, classifier in parts.items():
        tokens = ModalityTokens(classifier, 8, 1)
        state |= {f"model.tokens.{name}.{key}": value for key, value in tokens.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    written = {layout: export(tmp_path / "last.ckpt", tmp_path / "out" / f"{layout}.pth", layout) for layout in LAYOUTS}
    for name, layout, fresh in (("video", "kinetics", video()), ("audio", "panns", audio())):
        load_classifier(fresh, written[layout], name, "field")  # type: ignore[index, arg-type]
        assert same(parts[name], fresh)
    assert "fc_audioset.weight" in torch.load(written["panns"], weights_only=True)["model"]
    folder = tmp_path / "t5"
    folder.mkdir()
    written["t5"].rename(folder / "pytorch_model.bin")
    again = language()
    load_language_model(again, folder)
    assert same(text, again)
