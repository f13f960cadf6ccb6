"""Test when the weights are updated: number of updates, the losses in each update, and resuming inside a cycle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from common.training.optimizers import warm_up_then_inverse_sqrt
from papers.m3p.loss import pair_terms, text_terms
from papers.m3p.module import M3PModule
from tests.m3p.layouts import Layouts, quiet_trainer, small_model
from tests.m3p.tiny import MASKED

#: Loss groups per iteration: fine-tuning has two (t2i and i2t), pre-training adds three blocks of text.
KINDS = {"fine_tuning": 2, "pre_training": 5}
RATE, WARM_UP, CLIP = 0.01, 3, 0.5


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts.write(tmp_path_factory.mktemp("layouts"), images=24)


def module(kind: str, **options: Any) -> M3PModule:
    off = {f"weight_{name}": 0.0 for name in ("xmlm", "mlm", "mrm_class", "mrm_regression")}
    chosen: dict[str, Any] = {"learning_rate": RATE, "warmup_steps": WARM_UP, "clip_norm": CLIP, **options}
    return M3PModule(small_model(), **(off if kind == "fine_tuning" else {}), **chosen)


def data(kind: str, layouts: Layouts) -> Any:
    if kind == "fine_tuning":
        return layouts.retrieval(test_sets=["multi30k_fr"])
    return layouts.pretraining(steps_per_epoch=20, test_sets=["multi30k_fr"])


class Watch(Callback):
    """Record the iteration and the weights of each update. Can save a checkpoint."""

    def __init__(self, save_after: int | None = None, path: Path | None = None) -> None:
        self.updates: list[int] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.save_after, self.path = save_after, path

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        update = pl_module.update

        def watched() -> None:
            self.updates.append(trainer.fit_loop.total_batch_idx)
            update()

        pl_module.update = watched

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})
        if batch_idx == self.save_after:
            trainer.save_checkpoint(self.path)  # type: ignore[arg-type]


def test_a_length_is_counted_in_updates(layouts: Layouts, tmp_path: Path) -> None:
    run = quiet_trainer(tmp_path, max_steps=6)
    run.fit(module("fine_tuning"), datamodule=data("fine_tuning", layouts))
    assert (run.global_step, run.fit_loop.total_batch_idx) == (6, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", ["per_group", "per_cycle"])
def test_updates_are_those_of_a_loop_by_hand(kind: str, updates: str, layouts: Layouts, tmp_path: Path) -> None:
    own = module(kind, updates=updates)
    expected = copy.deepcopy(own.model)
    quiet_trainer(tmp_path, limit_train_batches=10).fit(own, datamodule=data(kind, layouts))
    assert all(p.grad is None for p in own.parameters()), "what came after the last update is dropped"

    optimizer = torch.optim.Adam([p for p in expected.parameters() if p.requires_grad], RATE, (0.9, 0.98), 1e-8)
    rate = warm_up_then_inverse_sqrt(WARM_UP, 1e-7 / RATE)
    made = 0

    def step() -> None:
        nonlocal made
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(made)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # keep zeros, so that Adam still applies momentum
        made += 1

    def read(batch: Any) -> Any:
        """Yield the losses of each group in turn."""
        for block in batch["xmlm"]:
            yield text_terms(expected, block)
        for relation in batch["relations"]:
            for group in relation.values():
                yield pair_terms(expected, group, MASKED if kind == "pre_training" else {})

    for iteration, batch in zip(range(10), data(kind, layouts).train_dataloader()):
        for terms in read(batch):
            loss = sum(value for name, value in terms.items() if name != "accuracy")
            if updates == "per_group":
                loss.backward()
                if iteration % 4 == 0:
                    step()
            else:
                (loss / 4).backward()
        if updates == "per_cycle" and iteration % 4 == 3:
            step()
    assert made == (3 * KINDS[kind] if updates == "per_group" else 2)
    found = own.model.state_dict()
    for name, value in expected.state_dict().items():
        if name.endswith("key.bias"):
            continue  # it has no effect after softmax, so its gradient is only rounding, which Adam scales up
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("updates", ["per_group", "per_cycle"])
@pytest.mark.parametrize("after", [4, 5])
def test_a_cycle_that_is_stopped_goes_on(updates: str, after: int, layouts: Layouts, tmp_path: Path) -> None:
    """Resume bit for bit from a state that was saved between accumulated gradients and their update."""
    path = tmp_path / "stopped.ckpt"
    whole, resumed = module("pre_training", updates=updates), module("pre_training", updates=updates)
    quiet_trainer(tmp_path, Watch(after, path), limit_train_batches=11).fit(
        whole, datamodule=data("pre_training", layouts)
    )
    held = torch.load(path, weights_only=True)["gathered"]
    assert bool(held) == (updates == "per_cycle" or after == 5)
    watch = Watch()
    run = quiet_trainer(tmp_path, watch, limit_train_batches=11)
    run.fit(resumed, datamodule=data("pre_training", layouts), ckpt_path=path, weights_only=True)
    assert set(watch.updates) == ({8} if updates == "per_group" else {7})
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_group_whose_weights_are_zero_makes_no_update(layouts: Layouts, tmp_path: Path) -> None:
    watch = Watch()
    own = module("fine_tuning", weight_t2i=0.0)
    quiet_trainer(tmp_path, watch, limit_train_batches=9).fit(own, datamodule=data("fine_tuning", layouts))
    assert watch.updates == [0, 4, 8]


def test_wrong_settings_are_named(layouts: Layouts, tmp_path: Path) -> None:
    run = quiet_trainer(tmp_path, precision="16-true")
    with pytest.raises(ValueError, match=r"trainer\.precision 16 needs scaled losses"):
        run.fit(module("fine_tuning"), datamodule=data("fine_tuning", layouts))
    with pytest.raises(ValueError, match=r"model\.selection is best: set data\.validation_split"):
        quiet_trainer(tmp_path).fit(module("fine_tuning", selection="best"), datamodule=data("fine_tuning", layouts))


# -- the best weights --------------------------------------------------------------------------------------------------


def validated(layouts: Layouts, **options: Any) -> Any:
    return layouts.retrieval(test_sets=["multi30k_fr"], validation_split="val", **options)


def selecting(**options: Any) -> M3PModule:
    return module("fine_tuning", **{"selection": "best", "select_every": 2, "captions_per_image": None, **options})


@pytest.mark.parametrize(("accuracies", "best"), [((40.0, 60.0, 50.0, 60.0), 4), ((1.0, 2.0, 3.0, 4.0), 7)])
def test_the_best_weights_are_left(
    accuracies: tuple[float, ...], best: int, layouts: Layouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare weights after iterations 2, 4, 6 and 7 (the last). If two are equally good, keep the earlier."""
    given = iter(accuracies)
    monkeypatch.setattr(M3PModule, "validate", lambda module: {"accuracy": next(given)})
    own, seen = selecting(), Watch()
    run = quiet_trainer(tmp_path, seen, limit_train_batches=7)
    run.fit(own, datamodule=validated(layouts))
    assert next(given, None) is None
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, seen.weights[best - 1][name]), name
    run.test(own, datamodule=validated(layouts), verbose=False)
    assert run.callback_metrics["test/selected_iteration"] == best
    assert run.callback_metrics["test/validation_accuracy"] == max(accuracies)


def test_accuracy_is_that_of_every_validation_item_once(layouts: Layouts, tmp_path: Path) -> None:
    own = selecting(select_every=100)
    used = validated(layouts, validation_items=7)
    quiet_trainer(tmp_path, limit_train_batches=3).fit(own, datamodule=used)
    assert own.best is not None
    hits = count = 0.0
    own.eval()
    for item in range(7):
        for group in used.validation.collate([used.validation[item]]).values():
            with torch.no_grad():
                hits += float(pair_terms(own.model, group, {})["accuracy"])
            count += 1
    assert count == 14
    assert own.best.score == pytest.approx(100 * hits / count)
