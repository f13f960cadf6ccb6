"""Writes tiny data sets and random weights in the layouts of the real data sets and the released weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.data.worlds.narrated import NarratedWorld, sentences

AUDIO_CLASSES = 527
#: Fewer channels than the released networks; must equal those in `configs/vx2text/rehearsal.yaml`.
VIDEO_CHANNELS, VIDEO_STEM = (16, 32, 64, 128), 12
AUDIO_CHANNELS = (16, 32, 64, 128, 256, 512)


def write_datasets(root: Path) -> None:
    """Write all data sets that recipes read from `$DATA`."""
    world = NarratedWorld(
        dialogs=3,
        dialogs_validation=1,
        dialogs_test=2,
        turns=2,
        moments=3,
        moments_validation=2,
        moments_test=1,
        source_clips=1,
        source_clips_validation=1,
        source_sounds_per_fold=1,
        seconds=4.0,
        size=48,
        fps=15,
        sample_rate=16000,
        root=str(root / ".rendered"),
    )
    names = ("avsd", "tvqa", "tvc")
    world.prepare(names)
    for name in names:
        shutil.move(world.root_of(name), root / name)
    # Real data sets don't list a clip's true words.
    for path in root.glob("*/words.jsonl"):
        path.unlink()


def write_weights(root: Path) -> None:
    """Write T5, the classifiers of both modalities, and AudioSet's class names to `$DATA`."""
    weights = root / "weights"
    weights.mkdir()
    lines = ["index,mid,display_name", *(f'{n},/m/{n:05d},"Sound, {n}"' for n in range(AUDIO_CLASSES))]
    (weights / "class_labels_indices.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, heads in (("t5-base", 12), ("t5-small", 8)):
        _write_t5(weights / name, heads)
    _write_classifiers(weights)


def _write_t5(folder: Path, heads: int) -> None:
    """Write T5 with two layers and a vocabulary of the tiny texts' words, numbered like T5's pieces."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from papers.vx2text.prompt import LETTERS, word_vocabulary

    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(word_vocabulary([*sentences(), *LETTERS]))
    torch.manual_seed(0)
    width = 64 * heads
    config = T5Config(
        vocab_size=32128, d_model=width, d_ff=4 * width, d_kv=64, num_heads=heads, num_layers=2, num_decoder_layers=2
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _write_classifiers(folder: Path) -> None:
    """Write R(2+1)D of Kinetics with torchvision's names and CNN14 of AudioSet with PANNs' names.

    Training doesn't update their batch normalization, so the files contain statistics measured on noise. Otherwise the
    activations and gradients of a deep random network explode.
    """
    import torch
    from torch import nn

    from common.encoders.kinetics import KineticsR2Plus1D
    from common.encoders.panns import PANNsCNN14

    torch.manual_seed(0)
    video = KineticsR2Plus1D(channels=VIDEO_CHANNELS, stem_channels=VIDEO_STEM)
    for _ in range(3):
        video(torch.randn(2, 3, 8, 56, 56))
    head = {f"fc.{name}": value for name, value in nn.Linear(video.feature_dim, 400).state_dict().items()}
    for frames in (8, 32):
        torch.save({**video.state_dict(), **head}, folder / f"r2plus1d_34_clip{frames}_ft_kinetics_from_ig65m.pth")
    audio = PANNsCNN14(channels=AUDIO_CHANNELS)
    for _ in range(30):
        audio(20 * torch.randn(2, 1, 64, 64) - 30)
    head = {
        f"fc_audioset.{name}": value for name, value in nn.Linear(audio.feature_dim, AUDIO_CLASSES).state_dict().items()
    }
    torch.save({"model": {**audio.state_dict(), **head}}, folder / "Cnn14_16k_mAP=0.438.pth")
