"""Run the commands that use trained models as a user does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from assemble.commands.main import main
from papers.vx2text import VX2Text
from tests.data.media_factory import tone, write_video, write_wav
from tests.trained import checkpoint

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command and returns its output, or, with `fails`, the error message."""

    def call(*arguments: object, fails: bool = False) -> str:
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == (2 if fails else 0), printed.err
        assert "Traceback" not in printed.err
        return printed.err if fails else printed.out

    return call


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two clips with sound, a sound file, and a broken file."""
    folder = tmp_path_factory.mktemp("clips")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        frames = draw.integers(0, 256, (16, 32, 40, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", frames=frames, fps=8.0, audio=tone(2.0, 8_000), audio_rate=8_000)
    write_wav(folder / "c.wav", rate=8_000)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with three pictures (one in a subfolder) and a CSV file, and a text file next to the folder."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(1)
    (folder / "below").mkdir()
    for name in ("1.png", "2.jpg", "below/3.png"):
        Image.fromarray(draw.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.csv").write_text("no picture", encoding="utf-8")
    (folder.parent / "texts.txt").write_text("a red circle\n\nein roter Apfel\n", encoding="utf-8")
    return folder


def last(paper: str) -> tuple[str, Path]:
    return "--checkpoint", checkpoint(paper)


def test_embed_clips(run: Run, clips: Path, tmp_path: Path) -> None:
    told = run("embed", "avid", *last("avid_cma"), clips, "--output", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
        assert sorted(content.files) == ["audio", "audio_names", "model", "video", "video_names"]
        assert [Path(name).name for name in content["video_names"]] == ["a.mp4", "b.mp4"]
        assert [Path(name).name for name in content["audio_names"]] == ["a.mp4", "b.mp4", "c.wav"]
        assert content["video"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(content["video"], axis=1), 1, rtol=1e-5)
    assert "2 of 4 files not fully read" in told
    assert "broken.mp4: Invalid data found" in told
    assert "c.wav: has no video stream" in told
    assert f"written to {tmp_path / 'x.npz'}: video [2, 8], audio [3, 8]" in told


def test_retrieve_sounds_for_clips_and_the_other_way_round(run: Run, clips: Path, tmp_path: Path) -> None:
    common = ("retrieve", "avid", *last("avid_cma"), "--query")
    told = run(*common, clips / "a.mp4", "--among", clips, "--top", "2")
    assert "audio for" in told
    ranked = [line.split() for line in told.splitlines()[1:3]]
    assert [line[0] for line in ranked] == ["1", "2"]
    scores = [float(line[1]) for line in ranked]
    assert scores == sorted(scores, reverse=True)
    assert "1 of 4 files not fully read" in told
    # A search in stored vectors gives the same result.
    run("embed", "avid", *last("avid_cma"), clips, "--output", tmp_path / "x.npz")
    again = run(*common, clips / "a.mp4", "--among", tmp_path / "x.npz", "--top", "2")
    assert again.splitlines()[1:3] == told.splitlines()[1:3]
    assert "video for" in run(*common, clips / "c.wav", "--among", clips)


def test_linked_folders_count_and_a_file_that_is_missing_is_no_text(run: Run, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(clips)
    told = run("embed", "avid", *last("avid_cma"), tmp_path / "all", "--output", tmp_path / "x.npz")
    assert "video [2, 8], audio [3, 8]" in told
    for paper, package, query in (("avid", "avid_cma", "d.mp4"), ("mct", "mct", "d.jpg")):
        common = ("retrieve", paper, *last(package), "--query", tmp_path / query, "--among", tmp_path / "all")
        assert f"{tmp_path / query}: there is no such file" in run(*common, fails=True)


def test_texts_and_pictures(run: Run, pictures: Path, tmp_path: Path) -> None:
    texts = pictures.parent / "texts.txt"
    for paper, package in (("mct", "mct"), ("m3p", "m3p"), ("xmcgan", "xmc_gan")):
        common = (paper, *last(package))
        cat = "a cat" * 60
        told = run("embed", *common, pictures, texts, "--text", cat, "--output", tmp_path / "x.npz")
        with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
            assert content["text_names"].tolist() == [cat, "a red circle", "ein roter Apfel"]
            assert len(content["image"]) == 3
        assert "notes.csv" not in told
        assert "1 of 3 texts are cut to" in told
        found = run("retrieve", *common, "--query", "a red circle", "--among", pictures, "--top", "9")
        assert "image for a red circle (text)" in found
        assert "(text)" in run("retrieve", *common, "--query", "a red circle " * 30, "--among", pictures)
        assert len(found.splitlines()) == 4
        if paper != "m3p":  # a search can use stored vectors in place of the folder
            run("embed", *common, pictures, "--output", tmp_path / "pictures.npz")
            found = run("retrieve", *common, "--query", pictures / "1.png", "--among", tmp_path / "pictures.npz")
            assert found == run("retrieve", *common, "--query", pictures / "1.png", "--among", pictures)
        found = run("retrieve", *common, "--query", pictures / "1.png", "--among", texts)
        assert "ein roter Apfel" in found
        if paper == "m3p":
            said = run("retrieve", *common, "--query", "x", "--among", tmp_path / "x.npz", fails=True)
            assert "m3p compares files, not vectors" in said
        else:
            assert "1.png" in run("retrieve", *common, "--query", "a", "--among", tmp_path / "x.npz")


def test_what_is_seen_and_heard_in_words(run: Run, clips: Path, tmp_path: Path) -> None:
    told = run("embed", "vx2text", *last("vx2text"), clips / "a.mp4", "--output", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
        assert content["video"].shape == (1, 2, 11)
        np.testing.assert_allclose(content["video"].sum(-1), 1, rtol=1e-5)
        (words,) = content["video_words"].tolist()
        assert len(words.split()) == 2 * 3
    assert f"a.mp4, video: {words}\n" in told


def test_exports_serve_wherever_a_checkpoint_does(run: Run, clips: Path, tmp_path: Path) -> None:
    told = run("export", "vx2text", *last("vx2text"), "--output", tmp_path / "vx2text")
    assert told == f"written to {tmp_path / 'vx2text'}\n"
    assert "exists: give a new" in run(
        "export", "vx2text", *last("vx2text"), "--output", tmp_path / "vx2text", fails=True
    )
    question = ("answer", "vx2text", clips / "a.mp4", "what is moving ?", "--checkpoint")
    assert run(*question, tmp_path / "vx2text") == run(*question, checkpoint("vx2text"))
    more = ("--speech", "hello i am anna", "--speech", "hello", "--turn", "who speaks ?", "it is anna")
    model = VX2Text.from_export(tmp_path / "vx2text")
    expected = model.answer(
        clips / "a.mp4",
        "what is moving ?",
        speech=["hello i am anna", "hello"],
        history=[("who speaks ?", "it is anna")],
    )
    assert run(*question, tmp_path / "vx2text", *more) == f"{expected}\n"


def test_what_cannot_be_done_is_said_with_who_can(run: Run, clips: Path, pictures: Path, tmp_path: Path) -> None:
    x = tmp_path / "x.npz"
    avid, vx2text, mct = last("avid_cma"), last("vx2text"), last("mct")
    image = pictures / "1.png"
    other = tmp_path / "other.npz"
    np.savez(other, image=np.ones((1, 16), np.float32), image_names=np.array(["a"]), model=np.array("another"))
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[tuple[object, ...], str]] = [
        (("embed", "avid", *avid, clips, "--text", "a dog", "--output", x), "avid cannot embed text; xmcgan, m3p, mct"),
        (("embed", "mct", *mct, "--output", x), "nothing to embed: give files or --text"),
        (("embed", "mct", *mct, tmp_path / "empty", "--output", x), "empty has no file that can be read as image"),
        (("retrieve", "vx2text", *vx2text, "--query", "a", "--among", clips), "vx2text cannot retrieve; avid,"),
        (("retrieve", "avid", *avid, "--query", "a dog", "--among", clips), "by the text 'a dog'. It finds"),
        (("retrieve", "mct", *mct, "--query", "a", "--among", other), "was embedded by another model"),
        (("answer", "mct", image, "what?", *mct), "mct cannot answer; vx2text can"),
        (("caption", "vx2text", clips / "a.mp4", *vx2text), "only answers questions; ask it what happens"),
    ]
    for arguments, message in wrong:
        assert message in run(*arguments, fails=True)
    assert not x.exists()
