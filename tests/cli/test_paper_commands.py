"""Test the commands that only some papers have: other export layouts, released checkpoints, generated images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from assemble.commands.main import main
from assemble.stages.run import run_stage
from tests.stages import request
from tests.trained import checkpoint


def test_images_and_captions_are_not_compared_by_encoders_that_never_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = request("mct/intra_only", tmp_path / "runs")
    run_stage(stage)
    found = ["retrieve", "mct", "--checkpoint", str(stage.directory / "checkpoints" / "last.ckpt")]
    (tmp_path / "texts.txt").write_text("a red circle\ntwo stars\n", encoding="utf-8")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 40), "red").save(pictures / "red.png")
    for query, among in (("a circle", pictures), (str(pictures / "red.png"), tmp_path / "texts.txt")):
        assert main([*found, "--query", query, "--among", str(among)]) == 2
        assert "embeddings were trained inside each modality alone; give the checkpoint" in capsys.readouterr().err
    for query, among in (("a circle", tmp_path / "texts.txt"), (str(pictures / "red.png"), pictures)):
        assert main([*found, "--query", query, "--among", str(among)]) == 0
    # The model card of this export must not compare texts with images either.
    assert main(["export", "mct", "--checkpoint", found[3], "--output", str(tmp_path / "given")]) == 0
    card = (tmp_path / "given" / "README.md").read_text(encoding="utf-8")
    assert 'model.embed_image("picture.jpg") @ model.embed_image("another.jpg").T' in card
    assert "embed_text" not in card


def test_generate_writes_png_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = "a red circle left and a blue square right on white", "a purple triangle left of a circle"
    trained = str(checkpoint("xmc_gan"))
    options = ["--number", "2", "--checkpoint", trained, "--output", str(tmp_path)]
    assert main(["generate", "xmc_gan", *captions, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("written to")] == [
        "'a purple triangle left of a circle': the model does not know purple; it learned from a, and, at, black, "
        "blue, circle, gray, green, left, of, on, red, right, square, triangle, white, yellow"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"01-a-red-circle-left-and-a-blue-square-right-on-white-{n}-seed0.png" for n in (1, 2)),
        *(f"02-a-purple-triangle-left-of-a-circle-{n}-seed0.png" for n in (1, 2)),
        "grid.png",
    }
    assert lines[-1] == f"written to {tmp_path / 'grid.png'}"
