"""Test damaged files, files of other models, paths that are not files, and names with terminal control codes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from assemble.commands import models
from assemble.commands.main import main
from assemble.reporting import progress, records
from assemble.stages.layers import load_yaml
from common.data.datasets.captioned import read_caption_table
from common.data.media import MediaError, MediaFile, read_image
from common.data.text import WordPieceTokenizer
from common.data.text_features import FeaturesError, FeatureStore
from common.encoders.checkpoint_files import CheckpointError, load_encoder, read_checkpoint, require_intact
from common.errors import StageError, printable
from common.training.callbacks import WholeCheckpoints
from tests.data.media_factory import write_video


def saved(path: Path, module: str = "AVIDModule") -> Path:
    content = {"global_step": 3, "state_dict": {"weight": torch.arange(4000.0)}}
    WholeCheckpoints(module).save_checkpoint(content, path)
    return path


def test_a_flipped_byte_is_noticed_before_a_stage_goes_on(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.ckpt")
    assert WholeCheckpoints("AVID").load_checkpoint(path)["global_step"] == 3
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    # Reading maps the tensors into memory without checking their checksums.
    assert read_checkpoint(path)["global_step"] == 3
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged, the checksum of its part .*data/0 does not match"):
        require_intact(path)
    with pytest.raises(StageError, match=r"last\.ckpt is damaged.*: delete it"):
        WholeCheckpoints("AVID").load_checkpoint(path)


def test_a_checkpoint_of_another_module_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "last.ckpt", "SomethingElse")
    arguments = ["test", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path / "runs"), "--checkpoint", str(path)]
    assert main(arguments) == 2
    assert f"{path} is a checkpoint of SomethingElse, but avid needs one of AVID" in capsys.readouterr().err


def test_no_reader_of_a_text_or_an_array_waits_for_a_pipe(tmp_path: Path) -> None:
    """Opening a pipe without a writer would block forever (found by `make fuzz`)."""
    path = tmp_path / "a.yaml"
    os.mkfifo(path)
    readers: tuple[Callable[[Path], object], ...] = (
        MediaFile,
        read_image,
        load_yaml,
        records.read,
        lambda path: list(read_caption_table(path)),
        lambda path: WordPieceTokenizer(str(path)).prepare(),
        models._lines,
    )
    for read in readers:
        with pytest.raises((OSError, ValueError, RuntimeError), match="is not a regular file") as error:
            read(path)
        assert str(tmp_path) in str(error.value)
    os.mkfifo(tmp_path / "store.h5")
    with pytest.raises(FeaturesError, match="is not a regular file"):
        FeatureStore(tmp_path / "store.h5")
    os.mkfifo(tmp_path / progress.FILE)
    assert progress.read(tmp_path, since=0.0) is None


def test_media_lead_to_no_other_file_and_to_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg reads some relative names as addresses, and a playlist names other files and addresses."""
    monkeypatch.chdir(tmp_path)
    write_video(Path("clip.mp4"), seconds=0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for scheme in ("http", "tcp", "rtsp", "ftp"):
            Path(f"{scheme}:{address}.mp4").write_text("nothing")
        list_of = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
        Path("files.m3u8").write_text(list_of.format(tmp_path / "clip.mp4"))
        Path("server.m3u8").write_text(list_of.format(f"http://{address}/x.ts"))
        Path("concat.mp4").write_text("ffconcat version 1.0\nfile 'clip.mp4'\n")
        Path("session.mp4").write_text(f"v=0\no=- 0 0 IN IP4 {address}\ns=x\nm=video 9 RTP/AVP 96\n")
        for path in set(Path().iterdir()) - {Path("clip.mp4")}:
            with pytest.raises(MediaError, match=re.escape(path.name)):
                MediaFile(path)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    for name in ("file:clip.mp4", "concat:clip.mp4", "subfile,,start,0,end,9,,:clip.mp4"):
        Path(name).write_bytes(Path("clip.mp4").read_bytes())
        with MediaFile(Path(name)) as media:
            assert media.video_limits is not None


def test_a_picture_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "dog.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    with pytest.raises(MediaError, match=r"dog\.jpg: damaged, or not one of JPEG, PNG"):
        read_image(tmp_path / "dog.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(1).expand(2**40, 2**20),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, 4).to_sparse_csr(),
        torch.zeros(4, 4, device="meta"),
        torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.qint8),
    ],
    ids=["larger than memory", "sparse", "compressed", "without content", "quantized"],
)
def test_weights_of_another_form_are_refused_before_they_are_copied(tmp_path: Path, weight: torch.Tensor) -> None:
    torch.save({"weight": weight}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt.*1 other shape: weight .* instead of \[4, 4\]"):
        load_encoder(torch.nn.Linear(4, 4, bias=False), tmp_path / "w.pt", [""])


def test_the_name_of_a_file_cannot_steer_a_terminal(tmp_path: Path) -> None:
    assert printable("a\x1b[2J\x07b\r\x9b.mp4\n") == "a\\x1b[2J\\x07b\\r\\x9b.mp4\n"
    command = [sys.executable, "-m", "assemble", "embed", "avid", "a.mp4", "--output", "o.npz"]
    run = subprocess.run([*command, "--checkpoint", "evil\x1b[2J.ckpt"], capture_output=True, check=False)
    assert run.returncode == 2
    assert b"\x1b" not in run.stderr
    assert b"evil\\x1b[2J.ckpt does not exist" in run.stderr
