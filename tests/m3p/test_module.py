"""Test the training modules: schedule, trained parameters, logged values, and options that conflict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from assemble.reporting.tables import load
from assemble.stages.configuration import resolve
from common.training.optimizers import warm_up_then_inverse_sqrt
from papers.m3p.data import check_sizes
from papers.m3p.encoder import M3P
from papers.m3p.miniature import WarmStart
from papers.m3p.module import M3PModule, adam
from tests.m3p.layouts import WIDTH, Layouts, quiet_trainer, small_model
from tests.m3p.test_updates import module as module_of
from tests.m3p.tiny import values


def trained(module: pl.LightningModule, data: Any, folder: Path, steps: int = 2) -> dict[str, float]:
    """Train for a few steps and test. Return the metrics of both."""
    trainer = quiet_trainer(folder, limit_train_batches=steps)
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, datamodule=data, verbose=False)
    return metrics | {name: float(value) for name, value in trainer.callback_metrics.items()}


# -- optimizer ---------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_the_released_schedule() -> None:
    golden = values("sampling_and_optim")
    for peak, key in ((5e-5, "lr_finetune_peak_5em5"), (1e-4, "lr_pretrain_peak_1em4")):
        factor = warm_up_then_inverse_sqrt(4000, 1e-7 / peak)
        for step, expected in golden[key].items():
            assert peak * factor(int(step)) == pytest.approx(expected, rel=1e-6)


def test_updates_are_those_of_the_released_optimizer() -> None:
    golden = values("sampling_and_optim")
    config = golden["adam_config"]

    class Weights(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.tensor(config["init"]))

    module = Weights()
    found = adam(module, config["lr"], config["warmup_updates"])
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    for rate, expected in zip(golden["adam_lr_used"], golden["adam_trajectory"]):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        module.weights.grad = 2 * module.weights.detach() * torch.tensor([1.0, 0.5, 3.0])
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(module.weights.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


# -- pre-training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vlm_candidates", ["groups", "in_batch"])
def test_every_task_trains_and_search_follows(vlm_candidates: str, layouts: Layouts, tmp_path: Path) -> None:
    data = layouts.pretraining(
        vlm_candidates=vlm_candidates, code_switching=layouts.switcher(sentence_ratio=1.0), distributions=False
    )
    module = M3PModule(
        small_model(),
        alignment_weight=0.1,
        itm_weight=1.0,
        contrast_weight=float(vlm_candidates == "in_batch"),
        learning_rate=0.01,
        warmup_steps=1,
    )
    before = {name: value.clone() for name, value in module.named_parameters()}
    metrics = trained(module, data, tmp_path)
    tasks = {"xmlm", "mlm", "mrm_class", "mrm_regression", "vlm_ce", "vlm_bce", "alignment", "itm", "accuracy"}
    tasks |= {"contrast"} if vlm_candidates == "in_batch" else set()
    assert {f"train/{name}" for name in tasks | {"loss"}} == {name for name in metrics if name.startswith("train/")}
    unmoved = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    assert unmoved == []
    assert {f"test/multi30k_{one}_mr" for one in ("cs", "de", "en", "fr")} <= metrics.keys()
    others = [metrics[f"test/multi30k_{one}_mr"] for one in ("cs", "de", "fr")]
    assert metrics["test/non_english_mr"] == pytest.approx(sum(others) / 3, rel=1e-5)
    assert (tmp_path / "media" / "retrieved.csv").is_file()


def test_fine_tuning_is_as_long_as_published() -> None:
    """Train for 150 epochs of 3,125 iterations on any data set, with two updates in every fourth iteration."""
    updates = 2 * math.ceil(150 * 3125 / 4)
    found = {}
    for name, stage in load("m3p").stages.items():
        if stage.job == "fine_tune" and "paper" in stage.scales:
            run = resolve("m3p", stage.recipe, scale="paper", stage_overrides=stage.overrides)
            config = run.with_placeholders(DATA="data", RUN="run", SEED="0")
            assert config["model"]["init_args"]["updates"] == "per_group"
            assert config["model"]["init_args"]["accumulate"] == 4
            found[name] = (config["trainer"]["max_epochs"], config["trainer"]["max_steps"])
    assert len(found) == 9
    assert found == dict.fromkeys(found, (-1, updates))


# -- fine-tuning, warm start -------------------------------------------------------------------------------------------


def test_a_warm_start_trains_the_tables_alone_and_hands_over(layouts: Layouts, tmp_path: Path) -> None:
    module = WarmStart(small_model(), learning_rate=0.01, warmup_steps=1)
    before = {name: value.clone() for name, value in module.named_parameters()}
    data = layouts.pretraining(vlm_candidates="in_batch", masking=None, xmlm_steps=0, text=None, languages=None)
    metrics = trained(module, data, tmp_path)
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert {".".join(name.split(".")[1:3]) for name in moved} == {"encoder.token", "encoder.region"}
    assert "test/multi30k_en_mr" in metrics
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    after = module_of("fine_tuning", pretrained=str(path), learning_rate=1e-12)
    trained(after, layouts.retrieval(test_sets=["multi30k_en"]), tmp_path, steps=1)
    torch.testing.assert_close(after.model.encoder.token.weight, module.model.encoder.token.weight)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary_size": 20}, "vocabulary_size is 20"),
        ({"languages": 2}, "languages is 2"),
        ({"positions": 8}, "positions is 8"),
        ({"feature_dim": 9}, f"have {WIDTH} dimensions"),
    ],
)
def test_a_model_too_small_for_the_data_is_named(changes: dict[str, int], words: str, layouts: Layouts) -> None:
    with pytest.raises(ValueError, match=words):
        check_sizes(small_model(**changes).encoder, layouts.retrieval())


def test_a_detector_with_more_classes_than_the_model_is_named(layouts: Layouts, tmp_path: Path) -> None:
    small = M3P(small_model().encoder, region_classes=2)
    with pytest.raises(ValueError, match=r"a region is of class \d+ and model\.model\.region_classes is 2: give it"):
        trained(M3PModule(small), layouts.pretraining(), tmp_path)
