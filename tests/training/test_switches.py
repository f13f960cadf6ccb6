"""Check that the switches of every paper change only how numbers are computed, not the numbers or checkpoint keys."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from assemble.reporting.records import config_hash
from assemble.stages.cli import build
from assemble.stages.configuration import resolve, take_switches
from assemble.stages.layers import SWITCHES
from common.encoders.audio import AudioConvNet
from common.encoders.image import ImageResNet
from common.encoders.kinetics import KineticsR2Plus1D
from common.encoders.panns import PANNsCNN14
from common.encoders.text import BertEncoder
from common.encoders.video import R2Plus1D
from common.training.switches import Switches, blocks_of, lay_out_channels_last
from papers.m3p.encoder import M3PEncoder
from papers.vx2text.language_model import LanguageModel
from papers.xmc_gan.networks import Discriminator, Generator
from tests.distributed.small_mct import small_layer
from tests.distributed.stages import train
from tests.m3p.stages import region_network
from tests.stages import request

ONE_UPDATE = ("--model.updates", "per_cycle", "--model.accumulate", "1")
RECIPES = {"avid_cma": "avid", "mct": "mct", "xmc_gan": "xmc_gan", "m3p": "m3p", "vx2text": "avsd"}


class Trained:
    """Train a recipe at the smoke scale, one step per epoch. Keep losses and the final weights, banks and queues."""

    def __init__(self, paper: str, *arguments: str, checkpoint: Path | None = None, epochs: int = 1) -> None:
        folder = _folder()
        given = {
            "xmc_gan": ("--model.image_network.pretrained", "null", "--model.evaluation", "null"),
            "m3p": ("--data.region_network", str(region_network(folder)), *ONE_UPDATE),
            # Batch statistics of few samples amplify bfloat16's rounding.
            "mct": ("--model.batch_norm_group", "16"),
            # Dropout on maps draws random numbers in memory order, so the layout would change the result.
            "vx2text": ("--model.model.audio_classifier.encoder.dropout", "0.0"),
        }
        run = resolve(paper, RECIPES[paper], scale="smoke", arguments=[*given.get(paper, ()), *arguments])
        config = run.with_placeholders(DATA=str(folder), RUN=str(folder))
        # Keep only the callback that sets the seed of each step.
        config["trainer"] |= {
            "callbacks": config["trainer"]["callbacks"][:1], "limit_train_batches": 1, "max_epochs": epochs,
        }  # fmt: skip
        options = {"default_root_dir": str(folder), "logger": False, "enable_checkpointing": False}
        self.cli = build(run, config, options)
        self.losses: list[float] = []
        step = self.cli.model.training_step

        def noted(*inputs: Any, **named: Any) -> Any:
            loss = step(*inputs, **named)
            self.losses.append(loss.item())
            return loss

        self.cli.model.training_step = noted
        updates = _Updates()
        self.cli.trainer.callbacks.append(updates)
        self.start = {name: p.detach().clone() for name, p in self.cli.model.named_parameters()}
        path = checkpoint and str(checkpoint)
        self.cli.trainer.fit(self.cli.model, datamodule=self.cli.datamodule, ckpt_path=path, weights_only=True)
        named = dict(self.cli.model.named_parameters())
        left = {name: p.grad for name, p in named.items() if p.grad is not None}
        self.gradients = left or updates.gradients  # some updates delete the gradients
        for name, gradient in self.gradients.items():
            # Fused optimizers assume that gradients and weights have equal strides.
            assert _steps_of(gradient) == _steps_of(named[name]), name
        self.state = {name: value for name, value in self.cli.model.state_dict().items() if isinstance(value, Tensor)}


class _Updates(pl.Callback):
    """Keep the gradients of the last update."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def _steps_of(tensor: Tensor) -> list[int]:
    """Return the strides of dimensions with more than one entry."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _folder() -> Path:
    return Path(_temporary().name)


@functools.cache
def plain(paper: str) -> Trained:
    """Train without any switch. XMC-GAN's recipe has a switch on, so turn it off."""
    return Trained(paper, *(("--channels_last", "false") if paper == "xmc_gan" else ()))


def assert_close(
    found: Trained, expected: Trained, losses: float = 1e-6, gradients: float = 3e-4, weights: float = 1e-3
) -> None:
    """Compare the keys, the losses, and (relative to their norms) the last gradients and the changes of the weights.

    Leave out weights with a gradient that is only rounding, since Adam turns this gradient into a whole step.
    """
    assert found.state.keys() == expected.state.keys()
    assert found.losses == pytest.approx(expected.losses, rel=losses)
    assert found.gradients.keys() == expected.gradients.keys()
    length = _length(*expected.gradients.values())
    apart = _length(*(found.gradients[name] - gradient for name, gradient in expected.gradients.items()))
    assert apart < gradients * length
    compared = [name for name, gradient in expected.gradients.items() if _length(gradient) > 1e-6 * length]
    assert len(compared) > 0.8 * len(expected.gradients)
    for name in compared:
        moved = _length(expected.state[name] - expected.start[name])
        assert _length(found.state[name] - expected.state[name]) < weights * moved, name


def _length(*parts: Tensor) -> float:
    return torch.stack([part.norm() for part in parts]).norm().item()


@pytest.mark.parametrize("paper", RECIPES)
def test_gradient_checkpointing_changes_no_bit(paper: str) -> None:
    other = ("--channels_last", "false") if paper == "xmc_gan" else ()
    found = Trained(paper, "--gradient_checkpointing", "true", *other)
    assert found.losses == plain(paper).losses
    for name, value in plain(paper).state.items():
        assert torch.equal(found.state[name], value), name


@pytest.mark.parametrize("paper", ["avid_cma", "mct", "xmc_gan", "vx2text"])  # M3P has no convolutions
def test_channels_last(paper: str) -> None:
    eight = ("--model.image_encoder.channels", "[8, 8, 8, 8]", "--model.image_encoder.stem_channels", "8")
    wide = eight if paper == "mct" else ()
    found = Trained(paper, "--channels_last", "true", *wide)
    assert_close(found, Trained(paper, *wide) if wide else plain(paper))
    layouts = [
        value.is_contiguous(memory_format=torch.channels_last if value.ndim == 4 else torch.channels_last_3d)
        for name, value in found.state.items()
        if value.ndim in (4, 5)
    ]
    assert len(layouts) > 3
    assert all(layouts)


def test_channels_last_is_refused_where_it_would_corrupt_memory() -> None:
    conv, sequence = torch.nn.Conv2d, torch.nn.Sequential
    lay_out_channels_last(sequence(conv(8, 4, 1, stride=2), conv(4, 4, 1), conv(4, 4, 3, stride=2)))
    with pytest.raises(ValueError, match="channels_last: 1 "):
        lay_out_channels_last(sequence(torch.nn.ReLU(), conv(4, 8, 1, stride=2)))


@pytest.mark.parametrize("paper", RECIPES)
def test_bfloat16_stays_close_and_criteria_compute_in_float32(paper: str) -> None:
    # On a CPU, oneDNN's bfloat16 gradient of a 3D convolution is sometimes NaN.
    with torch.backends.mkldnn.flags(enabled=False):
        found = Trained(paper, "--trainer.precision", "bf16-mixed")
    # Don't compare weights: if bfloat16 flips the sign of a gradient, Adam makes a whole step the other way.
    assert_close(found, plain(paper), losses=0.05, gradients=0.5, weights=math.inf)
    assert found.losses != plain(paper).losses
    assert {value.dtype for value in found.state.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("paper", RECIPES)
def test_compiled(paper: str) -> None:
    """Test all of torch.compile except its last part, which needs a C++ compiler."""
    found = Trained(paper, "--compiled", "aot_eager")
    assert_close(found, plain(paper))


@pytest.mark.parametrize(
    ("paper", "switch", "off"),
    [
        ("avid_cma", "--compiled=aot_eager", "--compiled=false"),
        ("xmc_gan", "--channels_last=true", "--channels_last=false"),
    ],
)
def test_with_a_switch_and_without_go_on_with_each_others_checkpoint(paper: str, switch: str, off: str) -> None:
    whole = Trained(paper, off, epochs=2)
    for first, second in ((switch, off), (off, switch)):
        begun = Trained(paper, first)
        path = _folder() / f"{paper}{first}.ckpt"
        begun.cli.trainer.save_checkpoint(path)
        assert not [name for name in begun.state if "_orig_mod" in name]
        resumed = Trained(paper, second, checkpoint=path, epochs=2)
        resumed.losses = begun.losses + resumed.losses
        assert_close(resumed, whole)


# -- accumulation ------------------------------------------------------------------------------------------------------


def test_accumulated_batches_of_mct_equal_one(tmp_path: Path) -> None:
    """Queues, momentum and schedules advance once per step, so the results are equal without batch statistics."""

    def layer(parts: int) -> dict[str, Any]:
        built = small_layer({"queue_size": 64})
        built["trainer"] |= {"accumulate_grad_batches": parts, "limit_train_batches": 3 * parts}
        return {**built, "data": {"init_args": {"batch_size": 16 // parts}}}

    one, parts = (train(request("mct/mct_tag", tmp_path / str(k), layer=layer(k))) for k in (1, 2))
    for name, expected in one["state"].items():
        if isinstance(expected, Tensor):
            found = parts["state"][name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# -- the parts ---------------------------------------------------------------------------------------------------------


NETWORKS: dict[str, tuple[nn.Module, int]] = {
    "video": (R2Plus1D(depth=18, width=4), 8),
    "audio": (AudioConvNet(width=4), 4),
    "image": (ImageResNet(layers=(1, 2, 1, 1), channels=(4, 4, 4, 4), stem_channels=4), 5),
    "kinetics": (KineticsR2Plus1D((1, 2), (4, 8), 4), 3),
    "panns": (PANNsCNN14((4, 8, 8), 16), 3),
    "bert": (BertEncoder(None, 32, 8, 3, 2, 16, 8), 3),
    "of a dictionary": (nn.Sequential(nn.ModuleList([nn.ModuleDict({"t": BertEncoder(None, 32, 8, 3, 2, 16, 8)})])), 3),
    "m3p": (M3PEncoder(32, 8, 2, 2, 16, 16, 2, 4), 2),
    "t5": (LanguageModel(32, 8, 2, 2, 4, 16), 4),
    "generator": (Generator(2, (4, 4, 2, 1), 8, 4, 8), 3),
    "discriminator": (Discriminator(2, (1, 2, 4, 4), 8, 8), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_residual_blocks_and_transformer_layers(name: str) -> None:
    network, count = NETWORKS[name]
    blocks = list(blocks_of(network))
    assert len(blocks) == count
    assert not [block for block in blocks if isinstance(block, nn.ModuleList | nn.Sequential)]
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    outside = sum(p.numel() for name, p in network.named_parameters() if "embed" not in name and "shared" not in name)
    assert inside > 0.3 * outside


def test_switches_of_a_layer_and_of_the_command_line(tmp_path: Path) -> None:
    layer = tmp_path / "fast.yaml"
    layer.write_text("compiled: true\nchannels_last: true\n", encoding="utf-8")
    run = resolve("mct", "mct", scale="smoke", arguments=["--config", str(layer), "--compiled", "aot_eager"])
    switches, config = take_switches(run.config)
    small = {"batch_norm_group": 8, "checkpoint_minutes": 0}
    assert switches == {**small, "compiled": "aot_eager", "channels_last": True}
    assert Switches._fields == SWITCHES
    assert not set(config["model"]["init_args"]) & {"compiled", "channels_last"}
    plain = resolve("mct", "mct", scale="smoke").config
    own, without = take_switches(plain)
    assert own == small
    assert config == without  # the rest must be unchanged
    assert config_hash(run.config) != config_hash(plain)
    # Saving less often must not change a result, so the hash stays the same.
    rare = resolve("mct", "mct", scale="smoke", arguments=["--checkpoint_minutes", "30"]).config
    assert (take_switches(rare)[0]["checkpoint_minutes"], config_hash(rare)) == (30, config_hash(plain))
    for scale in ("single", "paper"):
        assert take_switches(resolve("mct", "mct", scale=scale).config)[0]["checkpoint_minutes"] == 10
