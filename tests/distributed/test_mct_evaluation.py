"""Compare MCT's protocols in two processes with one process: results, gradients, and each sample counted once."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.protocols.parts import SameOnAll, distributed_trainer, results_of, trainer
from tests.protocols.test_bridge import WIDTH, bridged
from tests.protocols.test_search import Captioned, SearchData, search

PROCESSES = 2


def gradients_of_search(batch: dict[str, Tensor], options: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    module = search(**options).train()  # keeps the encoder in evaluation mode
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.space.named_parameters() if p.grad is not None}


def part_of_gradients(rank: int, batch: dict[str, Tensor], options: dict[str, Any]) -> Any:
    part = {name: value[rank::PROCESSES] for name, value in batch.items()}
    loss, gradients = gradients_of_search(part, options)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= PROCESSES  # as in data parallelism
    return loss, gradients


@pytest.mark.parametrize("options", [{"hardest": True}, {"hardest": False}, {"mask_same_image": False}])
def test_search_has_the_gradient_of_the_joined_batch(options: dict[str, Any]) -> None:
    # Images 0 and 1 occur twice with different captions, so that both processes have these images.
    keys = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (0, 5)]
    batch = torch.utils.data.default_collate([Captioned(8)[key] for key in keys])
    loss, gradients = gradients_of_search(batch, options)
    assert loss > 0
    for found, shared in run_distributed(part_of_gradients, PROCESSES, batch, options):
        assert found == pytest.approx(loss, rel=1e-5)
        assert shared.keys() == gradients.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(shared[name], gradient.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


def gradients_of_bridge(batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    module = bridged().train()
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)
    loss.backward()
    found = {name: p.grad for name, p in module.bridge.named_parameters() if p.grad is not None}
    return loss.item(), found | dict(module.bridge.named_buffers())


def test_every_process_trains_the_bridge_on_the_joined_batch() -> None:
    points = torch.randint(0, 1000, (8, WIDTH), generator=torch.Generator().manual_seed(1))
    points[5] = points[2]  # both processes have this caption
    batch = {"image": points, "tokens": points, "lengths": torch.full((8,), WIDTH), "image_index": torch.arange(8)}
    loss, gradients = gradients_of_bridge(batch)
    parts = [{name: value.chunk(PROCESSES)[rank] for name, value in batch.items()} for rank in range(PROCESSES)]
    for found, shared in run_distributed(lambda rank: gradients_of_bridge(parts[rank]), PROCESSES):
        assert found == pytest.approx(loss, rel=1e-6)
        assert shared.keys() == gradients.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(shared[name], gradient.numpy(), rtol=1e-5, atol=1e-7, err_msg=name)


class Saver(pl.Callback):
    """Save the weights at the end of training, because the training processes exit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            checkpoint = dict(pl_module.state_dict())
            pl_module.on_save_checkpoint(checkpoint)
            torch.save(checkpoint, self.path)


def test_search_trains_and_selects_alike(tmp_path: Path) -> None:
    states = []
    for start in (trainer, distributed_trainer):
        path = tmp_path / f"{start.__name__}.ckpt"
        callbacks = [Saver(path), *([SameOnAll()] if start is distributed_trainer else [])]
        run = start(tmp_path, max_epochs=3, callbacks=callbacks, gradient_clip_val=2.0, use_distributed_sampler=False)
        run.fit(search(milestones=[2]), datamodule=SearchData())
        states.append(torch.load(path, weights_only=True))
    one, two = states
    assert one.pop("selection") == two.pop("selection")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_search_is_tested_alike(tmp_path: Path) -> None:
    module = search(fold_size=3)
    one = results_of(trainer(tmp_path, use_distributed_sampler=False), module, SearchData(test=9))
    two = results_of(distributed_trainer(tmp_path, use_distributed_sampler=False), module, SearchData(test=9))
    assert two == pytest.approx(one)
