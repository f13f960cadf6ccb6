"""Test how an encoder's weights are read from every kind of file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from common.encoders.checkpoint_files import CheckpointError, load_encoder
from common.encoders.image import ImageResNet

PREFIXES = ["image.query.", "encoder.", ""]


def network(seed: int = 1, **options: Any) -> ImageResNet:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"layers": (1, 1, 1, 1), "bottleneck": False, "channels": (4, 4, 8, 8)}
    return ImageResNet(**{**sizes, "stem_channels": 4, "stem_kernel": 3, "stem_pool": False, **options})


def state_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def require_equal(module: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


CLASSIFIER = {"fc.weight": torch.zeros(5, 8), "fc.bias": torch.zeros(5)}


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"state_dict": state_of(network(), "image.query."), "epoch": 3},
        lambda: {"state_dict": state_of(network(), "encoder.") | {"heads.0.weight": torch.zeros(3)}},
        lambda: {"state_dict": state_of(network(), "module.encoder._orig_mod.")},
        lambda: {"model": state_of(network(), "module.") | CLASSIFIER, "optimizer": {"state": {}}},
        lambda: state_of(network()) | CLASSIFIER,
        lambda: {name: value for name, value in state_of(network()).items() if "num_batches" not in name},
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_wherever_it_lies(tmp_path: Path, content: Any, new_format: bool) -> None:
    path = saved(tmp_path / "file", content(), _use_new_zipfile_serialization=new_format)
    encoder = network(2)
    load_encoder(encoder, path, PREFIXES)
    require_equal(encoder, network())
    # The encoder has a copy of the weights, so the file may change afterwards.
    path.write_bytes(b"\0" * path.stat().st_size)
    require_equal(encoder, network())


def test_the_first_prefix_counts(tmp_path: Path) -> None:
    both = state_of(network(3), "encoder.") | state_of(network(4), "image.query.")
    encoder = network(2)
    load_encoder(encoder, saved(tmp_path / "both.ckpt", {"state_dict": both}), PREFIXES)
    require_equal(encoder, network(4))
    load_encoder(encoder, tmp_path / "both.ckpt", PREFIXES[1:])
    require_equal(encoder, network(3))


def test_a_head_that_belongs_to_the_encoder_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8), "num_classes": 0}
    encoder, other = (timm.create_model("convnext_atto", **options) for _ in range(2))
    assert any(name.startswith("head.") for name in encoder.state_dict())
    nn.init.normal_(other.head.norm.weight)
    load_encoder(encoder, saved(tmp_path / "timm.pth", other.state_dict()), [""])
    require_equal(encoder, other)


def test_another_architecture_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.ckpt", {"state_dict": state_of(network(), "encoder.")})
    encoder = network(2, layers=(2, 1, 1, 1), channels=(4, 4, 8, 16))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, path, PREFIXES)
    for part in ("model.pretrained", str(path), "layer1.1.conv1.weight", "layer4.0.conv1.weight"):
        assert part in str(caught.value)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    # A shallower network would find all its weights in a deeper network's file, but must not load that file.
    deeper = saved(tmp_path / "deep.ckpt", state_of(network(layers=(2, 1, 1, 1))))
    with pytest.raises(CheckpointError, match=r"layer1\.1\.conv1\.weight"):
        load_encoder(network(2), deeper, PREFIXES)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.tensor(1e6).half(), "1 not finite: conv1.weight"),  # too large for half precision
        (torch.tensor(1j), r"conv1.weight \[.*\] complex instead of"),
    ],
)
def test_values_that_no_network_can_have_are_refused(value: Tensor, problem: str, tmp_path: Path) -> None:
    state = {name: entry.half() for name, entry in state_of(network()).items()}
    load_encoder(network(), saved(tmp_path / "half.pth", state), PREFIXES)
    state["conv1.weight"] = value.expand(state["conv1.weight"].shape)
    with pytest.raises(CheckpointError, match=problem):
        load_encoder(network(), saved(tmp_path / "spoiled.pth", state), PREFIXES)


class Malice:
    """An object that runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (exec, ("raise SystemExit('ran')",))


def test_files_of_no_use_are_explained(tmp_path: Path) -> None:
    (tmp_path / "malice.ckpt").write_bytes(pickle.dumps(Malice()))
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 not really")
    saved(tmp_path / "foreign.ckpt", {"state_dict": {"layer.weight": torch.zeros(1)}})
    saved(tmp_path / "empty.ckpt", {"epoch": 3})
    for name in ("absent", "malice", "damaged", "foreign", "empty"):
        with pytest.raises(CheckpointError, match=rf"^model\.pretrained: .*{name}\.ckpt"):
            load_encoder(network(), tmp_path / f"{name}.ckpt", PREFIXES)
