"""The recipes of MCT: rows that are compared differ in what the comparison is about, and in nothing else."""

from __future__ import annotations

import pytest

from common.stages.configuration import resolve, scales_of


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
    # The bridge stands on the very same encoders, reads the same images and captions, and by the same words.
    bridge = resolve("mct", "bridge", scale=scale).config
    for name in ("image_encoder", "text_encoder"):
        assert bridge["model"]["init_args"][name] == joint["model"]["init_args"][name]
    for name in ("dataset", "world", "tokenizer", "split", "held_out_split", "batch_size"):
        assert bridge["data"]["init_args"][name] == joint["data"]["init_args"][name]
