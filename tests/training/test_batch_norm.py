"""Check that batch normalization over groups doesn't depend on the number of devices that share a batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assemble.stages.run import run_stage
from common.training.batch_norm import (
    GroupedBatchNorm,
    devices_of_group,
    normalize_in_groups,
    share_buffers,
)
from tests.distributed.harness import run_distributed
from tests.stages import request


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveMaxPool3d(1)]
    net = nn.Sequential(*parts, nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        net[1].bias.normal_()  # type: ignore[union-attr, operator]
    return net


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # The samples differ in scale, so the result shows which samples are normalized together.
    scale = torch.arange(1, 9, dtype=torch.float64).view(8, 1, 1, 1, 1)
    x = scale * torch.randn(8, 2, 2, 4, 4, generator=generator, dtype=torch.float64) + scale
    return x, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def step(net: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """Run two steps. Return the output, the gradients of the mean loss, and the statistics."""
    for _ in range(2):
        net.zero_grad()
        y = net(x)
        (y.tanh() * weights).sum(1).mean().backward()
    gradients = {f"grad {name}": value.grad for name, value in net.named_parameters()}
    return {"y": y.detach(), **gradients, **net.state_dict()}


def alone(group: int) -> dict[str, Any]:
    net = network()
    normalize_in_groups(net, group, 8, 1)
    return step(net, *batch())


def _rank(rank: int, group: int, devices: int) -> dict[str, Any]:
    net = network()
    normalize_in_groups(net, group, 8, devices)
    own = slice(rank, None, devices)  # the sampler divides a batch like this
    x, weights = batch()
    found = step(net, x[own], weights[own])
    for name, value in found.items():
        if name.startswith("grad"):
            torch.distributed.all_reduce(value)
            value /= devices
    share_buffers(net)
    return {**found, **net.state_dict()}


@pytest.mark.parametrize(("group", "devices"), [(2, 2), (4, 2), (8, 2), (4, 4)])
def test_devices_change_nothing(group: int, devices: int) -> None:
    """Compare outputs, gradients and statistics, with several groups per device, one group, or shared groups."""
    expected = alone(group)
    ranks = run_distributed(_rank, devices, group, devices)
    joined = torch.stack([torch.as_tensor(found["y"]) for found in ranks], dim=1).flatten(0, 1)
    torch.testing.assert_close(joined, expected["y"], rtol=1e-12, atol=1e-12)
    for name in expected.keys() - {"y"}:
        for found in ranks:
            torch.testing.assert_close(torch.as_tensor(found[name]), expected[name], rtol=1e-10, atol=1e-12)


def test_groups_are_normalized_apart() -> None:
    x, weights = batch()
    net = network()
    plain, expected = copy.deepcopy(net), alone(2)
    parts = [copy.deepcopy(net)(x[first::4]) for first in range(4)]
    normalize_in_groups(net, 2, 8, 1)
    expected_output = torch.stack(parts, dim=1).flatten(0, 1)
    torch.testing.assert_close(net(x), expected_output, rtol=1e-12, atol=1e-12)
    plain(x[::4])
    assert net.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        # The statistics must be those of the first group.
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    whole = step(network(), x, weights)
    assert not torch.allclose(whole["y"], expected["y"], atol=0.1)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_group_of_the_whole_batch_is_plain_batch_normalization() -> None:
    net, plain = network(), network()
    for group in (8, 32):
        normalize_in_groups(net, group, 8, 1)
    assert not any(isinstance(layer, GroupedBatchNorm) for layer in net.modules())
    one, other = step(net, *batch()), step(plain, *batch())
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("group", "batch_size", "devices", "expected"),
    [(32, 1024, 32, None), (32, 1024, 8, 1), (32, 1024, 64, 2), (16, 32, 8, 4), (32, 32, 1, None), (32, 8, 2, 2)],
)
def test_devices_of_a_group(group: int, batch_size: int, devices: int, expected: int | None) -> None:
    assert devices_of_group(group, batch_size, devices) == expected


def test_a_layer_that_sees_a_part_of_a_group() -> None:
    net = network()
    normalize_in_groups(net, 4, 8, 1)
    with pytest.raises(ValueError, match="batch_norm_group"):
        net(batch()[0][:6])


def test_groups_and_synchronization_of_lightning_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sync_batchnorm"):
        run_stage(request("avid/avid", tmp_path, "--batch_norm_group", "4", "--trainer.sync_batchnorm", "true"))
