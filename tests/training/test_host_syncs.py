"""No training step waits for its device, and none does more operations for a larger batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.stages.synthetic import NOWHERE
from tests.training.host_syncs import Steps, _Made, _Operations, training_on_meta

# What a step may ask of the host all the same, by the line that does it, and why.
ALLOWED: dict[str, str] = {}
# A tokenizer with a file is stood in for, which saves making the miniature's vocabulary.
CASES = {
    "avid_cma/cma": (),
    "mct/mct_tag": (),
    "xmc_gan/xmc_gan": (),
    "m3p/m3p": (),
    "vx2text/avsd": ("--data.tokenizer.pretrained", NOWHERE),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_the_device_for_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper, recipe = case.split("/")
    small, large = (training_on_meta(paper, recipe, size, monkeypatch, tmp_path, *CASES[case]) for size in (2, 4))
    waits = [wait for wait in small.waits + large.waits if not any(place in wait for place in ALLOWED)]
    assert not waits, "\n".join(sorted(set(waits)))
    assert small.operations
    assert large.operations == small.operations, "a loop over the samples of a batch"


def test_the_guard_sees_what_waits() -> None:
    steps = Steps(operations=[0])
    values = torch.zeros(4, device="meta")
    with _Made(steps), _Operations(steps):
        assert float(values.sum()) == 1.0  # some value
        values.cpu()
        values.copy_(torch.zeros(4))
        values.copy_(torch.zeros(4), non_blocking=True)
        torch.tensor([1.0, 2.0], device="meta")
        torch.as_tensor(values, device="meta")
        with pytest.raises(NotImplementedError):
            values.nonzero()
        with pytest.raises(NotImplementedError):
            values[values > 0]
    kinds = [wait.split(" at ")[0] for wait in steps.waits]
    assert kinds[0] == "_local_scalar_dense"
    assert "copy to the host" in kinds
    assert kinds.count("copy from the host that blocks") == 1
    assert kinds.count("tensor made of numbers of the host") == 1
    assert "nonzero" in kinds
    assert "index by a mask" in kinds or kinds.count("nonzero") == 2
