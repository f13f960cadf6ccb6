"""Weights of XMC-GAN out of a checkpoint, and in from the official code's arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.encoders.checkpoint_files import CheckpointError
from papers.xmc_gan.weights import export, from_official
from tests.xmc_gan.golden import below, networks
from tests.xmc_gan.stub import tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    module = tiny(average_momentum=0.5)
    with torch.no_grad():
        module.average.image.bias += 1.0  # so that the average is not the trained one
    torch.save({"state_dict": module.state_dict()}, path)
    return path


def test_the_averaged_generator_is_exported_in_both_layouts(checkpoint: Path, tmp_path: Path) -> None:
    module = tiny()
    own = torch.load(export(checkpoint, tmp_path / "own.pt"), weights_only=True)
    module.generator.load_state_dict(own)
    assert torch.equal(module.generator.image.bias, torch.ones(3))
    with np.load(export(checkpoint, tmp_path / "official.npz", "official")) as arrays:
        assert arrays["params/Conv_1/bias"].tolist() == [1.0, 1.0, 1.0]
        back = from_official(module.generator, arrays)
    assert all(torch.equal(value, own[name]) for name, value in back.items())


def test_the_discriminator_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    module = tiny()
    module.discriminator.load_state_dict(
        torch.load(export(checkpoint, tmp_path / "d.pt", "discriminator"), weights_only=True)
    )


def test_what_holds_no_such_network_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"network.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"holds no generator: is it of a stage that trains XMC-GAN"):
        export(tmp_path / "other.ckpt", tmp_path / "out.pt")
    generator, _ = networks()
    arrays = below("net128", "G/")
    del arrays["params/Conv_0/bias"]
    with pytest.raises(CheckpointError, match=r"no params/Conv_0/bias; is it a network of the same kind and size"):
        from_official(generator, arrays)
    arrays = {**below("net128", "G/"), "params/Conv_0/bias": np.zeros(5)}
    with pytest.raises(CheckpointError, match=r"query.bias would be \[5\] instead of \[12\]"):
        from_official(generator, arrays)
