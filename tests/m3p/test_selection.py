"""Which weights are tested: the best on the validation split, whether or not the run was stopped in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from papers.m3p.loss import MATCH_ALONE, pair_terms
from papers.m3p.module import M3PModule
from papers.m3p.pairs import PairCollator
from tests.m3p.layouts import Layouts
from tests.m3p.test_updates import module, trainer


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts.write(tmp_path_factory.mktemp("layouts"), images=24)


def data(layouts: Layouts, **options: Any) -> Any:
    return layouts.retrieval(test_sets=["multi30k_fr"], validation_split="val", **options)


def selecting(**options: Any) -> M3PModule:
    return module("fine_tuning", **{"selection": "best", "select_every": 2, "captions_per_image": None, **options})


class Snapshots(Callback):
    """The weights after every iteration; may save the state after one of them."""

    def __init__(self, save_after: int | None = None, path: Path | None = None) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.save_after, self.path = save_after, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})
        if batch_idx == self.save_after:
            trainer.save_checkpoint(self.path)  # type: ignore[arg-type]


@pytest.mark.parametrize(("accuracies", "best"), [((40.0, 60.0, 50.0, 60.0), 4), ((1.0, 2.0, 3.0, 4.0), 7)])
def test_the_best_weights_are_left(
    accuracies: tuple[float, ...], best: int, layouts: Layouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After iterations 2, 4, 6 and the last, 7; the earlier one of two that are alike."""
    given = iter(accuracies)
    monkeypatch.setattr(M3PModule, "validate", lambda module: {"accuracy": next(given)})
    own, seen = selecting(), Snapshots()
    run = trainer(tmp_path, seen, limit_train_batches=7)
    run.fit(own, datamodule=data(layouts))
    assert next(given, None) is None
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, seen.weights[best - 1][name]), name
    run.test(own, datamodule=data(layouts), verbose=False)
    assert run.callback_metrics["test/selected_iteration"] == best
    assert run.callback_metrics["test/validation_accuracy"] == max(accuracies)


@pytest.mark.parametrize("after", [3, 4])
def test_a_selection_that_is_stopped_goes_on(
    after: int, layouts: Layouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its second comparison or behind it: each is made once, and the best of all is left."""

    def scripted(*accuracies: float) -> list[float]:
        left = list(accuracies)
        monkeypatch.setattr(M3PModule, "validate", lambda module: {"accuracy": left.pop(0)})
        return left

    path = tmp_path / "stopped.ckpt"
    scripted(10.0, 90.0, 20.0, 30.0)
    whole, resumed = selecting(), selecting()
    trainer(tmp_path, Snapshots(after, path), limit_train_batches=7).fit(whole, datamodule=data(layouts))
    left = scripted(*((90.0,) if after == 3 else ()), 20.0, 30.0)
    trainer(tmp_path, limit_train_batches=7).fit(resumed, datamodule=data(layouts), ckpt_path=path, weights_only=True)
    assert not left
    assert resumed.best is not None
    assert (resumed.best.place, resumed.best.score) == (4, 90.0)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_accuracy_is_that_of_every_validation_item_once(layouts: Layouts, tmp_path: Path) -> None:
    own = selecting(select_every=100)
    used = data(layouts, validation_items=7)
    trainer(tmp_path, limit_train_batches=3).fit(own, datamodule=used)
    assert own.best is not None
    hits = count = 0.0
    own.eval()
    collate = PairCollator(used.tokenizer, None, used.max_regions)
    for item in range(7):
        for group in collate([used.validation[item]]).values():
            with torch.no_grad():
                hits += float(pair_terms(own.model, group, MATCH_ALONE)["accuracy"])
            count += 1
    assert count == 14
    assert own.best.score == pytest.approx(100 * hits / count)


def test_weights_of_half_precision_are_compared(layouts: Layouts, tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="bf16-true", limit_train_batches=2)
    run.fit(selecting(), datamodule=data(layouts))
    own: Any = run.lightning_module
    assert own.best.compared == 2
    assert 0 <= own.best.score <= 100


def test_wrong_settings_are_named(layouts: Layouts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.selection is best: data\.validation_split must name"):
        trainer(tmp_path).fit(selecting(), datamodule=layouts.retrieval())
