"""Test the towers and their keys: heads, precision, shuffled groups, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assemble.stages.configuration import resolve
from assemble.stages.recipes import scales_of
from common.memory.momentum import MomentumPair
from common.training.batch_norm import normalize_in_groups
from papers.mct import networks
from papers.mct.networks import Heads, Tower, encode_keys


class Backbone(nn.Module):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, rows: Tensor) -> Tensor:
        return self.bn(self.linear(rows))


def tower(seed: int = 0, **fields: Any) -> Tower:
    torch.manual_seed(seed)
    dims = {name: fields.pop(name, default) for name, default in (("intra_dim", 3), ("inter_dim", 6))}
    return Tower(Backbone(), **dims, heads=Heads(**fields))


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 2 * (8 * 8 + 8) + (8 * 3 + 3) + (8 * 6 + 6)),
        ({"hidden_dim": 4}, 2 * (8 * 4 + 4) + (4 * 3 + 3) + (4 * 6 + 6)),
        ({"inter_dim": None}, (8 * 8 + 8) + (8 * 3 + 3)),
        ({"intra_dim": None}, (8 * 8 + 8) + (8 * 6 + 6)),
        ({"shared": True}, (8 * 8 + 8) + (8 * 3 + 3) + (8 * 6 + 6)),
        ({"shared": True, "inter_dim": 3}, (8 * 8 + 8) + (8 * 3 + 3)),
        ({"shared": True, "inter_dim": None}, (8 * 8 + 8) + (8 * 3 + 3)),
    ],
)
def test_heads_have_the_right_size_and_every_parameter_learns(fields: dict[str, Any], parameters: int) -> None:
    model = tower(**fields)
    heads = sum(parameter.numel() for name, parameter in model.named_parameters() if "backbone" not in name)
    assert heads == parameters
    rows = torch.randn(4, 5)
    embeddings = model(rows)
    widths = {"intra": fields.get("intra_dim", 3), "inter": fields.get("inter_dim", 6)}
    assert set(embeddings) == {name for name, width in widths.items() if width}
    for name, embedding in embeddings.items():
        assert embedding.shape == (4, widths[name])
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    sum(embedding.sum() for embedding in embeddings.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.features(rows).shape == (4, 8)


def test_embeddings_are_normalized_in_float32_under_autocast() -> None:
    model = tower()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.randn(4, 5))
    for embedding in embeddings.values():
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    assert model.double()(torch.randn(4, 5, dtype=torch.double))["intra"].dtype == torch.float64


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [6, 3, 2])
def test_groups_of_a_random_order_are_normalized_by_themselves_and_put_back(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = MomentumPair(tower())
    plain = copy.deepcopy(pair.key)
    rows, permutation = torch.randn(6, 5), torch.tensor([3, 0, 5, 1, 4, 2])
    monkeypatch.setattr(networks, "order_over_groups", lambda _: permutation)
    normalize_in_groups(pair, group, 6, 1)
    keys = encode_keys(pair.key, rows)
    groups = 6 // group
    for first in range(groups):
        # Position p in the shuffled order belongs to group p mod G.
        together = permutation[first::groups]
        alone = plain(rows[together])
        for name, key in keys.items():
            torch.testing.assert_close(key[together], alone[name])


def test_groups_are_drawn_anew_from_the_global_generator() -> None:
    pair, rows = MomentumPair(tower()), torch.randn(8, 5)
    normalize_in_groups(pair, 4, 8, 1)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(encode_keys(pair.key, rows)["intra"])
    torch.testing.assert_close(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", scales_of("mct"))
def test_rows_differ_in_the_losses_alone(scale: str) -> None:
    joint = resolve("mct", "mct", scale=scale).config
    for recipe in ("intra_only", "inter_only", "intra_only_tag", "mct_tag"):
        other = resolve("mct", recipe, scale=scale).config
        assert other["trainer"] == joint["trainer"]
        assert other["data"] == joint["data"]
        arguments, expected = (dict(one["model"]["init_args"]) for one in (other, joint))
        losses = [one.pop("loss")["init_args"] for one in (arguments, expected)]
        assert arguments == expected
        changed = {name for name in losses[1] if losses[0][name] != losses[1][name]}
        assert changed <= {"weight_ii", "weight_tag", "weight_cc", "weight_cross"}
    # The bridge must use the same encoders, images, captions and vocabulary.
    bridge = resolve("mct", "bridge", scale=scale).config
    for name in ("image_encoder", "text_encoder"):
        assert bridge["model"]["init_args"][name] == joint["model"]["init_args"][name]
    for name in ("dataset", "world", "tokenizer", "split", "held_out_split", "batch_size"):
        assert bridge["data"]["init_args"][name] == joint["data"]["init_args"][name]
