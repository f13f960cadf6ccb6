"""Test the training step (noise, gradients, absent modalities, optimizer), and options that conflict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vx2text.stages import batch_of, gradients, started


@pytest.mark.parametrize("name", ["video", "audio"])
def test_a_clip_without_a_modality_has_no_tokens_of_it(name: str, tmp_path: Path) -> None:
    cli = started("avsd", tmp_path)
    module = cli.model.eval()
    batch = batch_of(cli)
    batch[f"{name}_present"] = torch.tensor([True, False, True, False])
    other = {**batch, name: torch.randn_like(batch[name])}
    scores = []
    for content in (batch, other):
        embeddings, mask, _ = module.model(content)
        places = (batch["input_ids"] <= (-1 if name == "video" else -101)) & (
            batch["input_ids"] > (-101 if name == "video" else -999)
        )
        assert places[1].sum() == (6 if name == "video" else 3)
        assert not mask[1][places[1]].any()
        assert mask[0][places[0]].all()
        scores.append(module.model.language_model(embeddings, mask, batch["labels"]))
    torch.testing.assert_close(scores[0][1::2], scores[1][1::2])
    assert not torch.allclose(scores[0][0::2], scores[1][0::2])


def test_where_all_clips_are_silent_training_goes_on(tmp_path: Path) -> None:
    cli = started("avsd", tmp_path)
    batch = batch_of(cli)
    batch["audio_present"] = torch.zeros(4, dtype=torch.bool)
    loss = cli.model.train().training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert gradients(cli.model, "model.tokens.audio") == set()
    assert all(p.grad is not None for p in cli.model.model.tokens["audio"].parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("recipe", "overrides", "field"),
    [
        ("avsd", {"data__modalities": "[video]"}, "modalities"),
        ("avsd", {"model__model__video_tokens": 2}, "video_tokens"),
        ("avsd", {"model__model__video_classifier": "null"}, "video_classifier"),
        ("tvqa_no_decoder", {"data__scoring": "label"}, "data.scoring"),
    ],
)
def test_model_and_data_must_agree(recipe: str, overrides: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        started(recipe, tmp_path, **overrides)
