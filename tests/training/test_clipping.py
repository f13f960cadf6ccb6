"""Clipping of gradients where Lightning refuses: fused optimizers under bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.stages.configuration import resolve
from common.stages.synthetic import StopAfter, synthetic_training
from common.training.examples import Draw


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_m3p_clips_in_every_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters: Any, largest: float, **options: Any) -> torch.Tensor:
        parameters = list(parameters)
        before = clip(parameters, largest, **options)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    run = resolve("m3p", "fine_tune", scale="smoke", arguments=("--model.clip_norm", "0.01"))
    arguments = {"accelerator": "cpu", "precision": precision, "callbacks": [StopAfter(2)]}
    training = synthetic_training(run, arguments, Draw(), 4)
    training.run()
    assert all(group["fused"] for group in training.trainer.optimizers[0].param_groups)
    # Two groups in the first of two iterations that are accumulated.
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
