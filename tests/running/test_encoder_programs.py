"""Encoders as programs of `torch.export`: they run alone and give what the models give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from common.errors import StageError
from common.stages.encoder_programs import write_programs
from common.stages.export import Encoder, trained_model
from tests.data.media_factory import tone, write_video
from tests.trained import checkpoint

HAVE = {
    "avid_cma": {"video", "audio"},
    "mct": {"image", "text"},
    "xmc_gan": {"image"},
    "m3p": {"text"},
    "vx2text": {"video", "audio"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("programs")

    def folder(paper: str) -> Path:
        path = base / paper
        return path if path.exists() else write_programs(trained_model(paper), checkpoint(paper), path)[0]

    return folder


@pytest.mark.parametrize("paper", HAVE)
def test_each_paper_writes_its_encoders(paper: str, folders: Callable[[str], Path]) -> None:
    folder = folders(paper)
    assert {path.name for path in folder.iterdir()} == {"README.md"} | {f"{name}.pt2" for name in HAVE[paper]}
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"- {name}.pt2: " in page for name in HAVE[paper])
    encoders = trained_model(paper).from_export(checkpoint(paper)).encoders()
    for name, encoder in encoders.items():
        program = torch.export.load(folder / f"{name}.pt2").module()
        inputs = tuple(torch.cat([x, x, x[:1]]) for x in encoder.inputs)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), encoder(*inputs), rtol=1e-4, atol=1e-5)


def test_a_program_gives_what_the_model_says_of_a_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (24, 32, 40, 3), dtype=np.uint8)
    clip, picture = tmp_path / "clip.mp4", tmp_path / "picture.png"
    write_video(clip, frames=frames, fps=8.0, audio=tone(3.0, 8_000), audio_rate=8_000)
    Image.fromarray(frames[0]).save(picture)

    def given(paper: str, name: str, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = torch.export.load(folders(paper) / f"{name}.pt2").module()(inputs)
        return found

    avid: Any = trained_model("avid_cma").from_export(checkpoint("avid_cma"))
    close(given("avid_cma", "video", avid.read_video(clip)), avid.embed_video(clip))
    close(given("avid_cma", "audio", avid.read_audio(clip)), avid.embed_audio(clip))
    for paper in ("mct", "xmc_gan"):
        model: Any = trained_model(paper).from_export(checkpoint(paper))
        close(given(paper, "image", model.read_image(picture)[None]), model.embed_image(picture))
    words: Any = trained_model("vx2text").from_export(checkpoint("vx2text"))
    close(given("vx2text", "video", words.read_video(clip)), words.embed_video(clip)[0])
    close(given("vx2text", "audio", words.read_audio(clip)[None]), words.embed_audio(clip)[0])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(Encoder):
        calls = 0

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            Drifting.calls += 1
            return self.embed(self.network, *inputs) * (1 + 0.01 * Drifting.calls)

    network = torch.nn.Linear(4, 3)
    encoder = Drifting(network, lambda net, x: F.normalize(net(x), dim=1), torch.randn(2, 4))
    model = trained_model("avid_cma")
    monkeypatch.setattr(model, "encoders", lambda self: {"video": encoder})
    with pytest.raises(StageError, match=r"video\.pt2: the program differs from the model by .*, more than 1e-05"):
        write_programs(model, checkpoint("avid_cma"), tmp_path / "programs")
    assert not list(tmp_path.iterdir())
