"""Test XMC-GAN's training: steps equal to the official code's, the effect of each loss, and what stays unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from assemble.stages.run import run_stage
from common.training.switches import lay_out_channels_last
from papers.xmc_gan.loss import XMCGANLoss
from papers.xmc_gan.module import XMCGANModule
from papers.xmc_gan.weights import to_official
from tests.stages import request
from tests.xmc_gan.golden import captions, networks, tensor
from tests.xmc_gan.stages import finished
from tests.xmc_gan.stub import steppable, tiny, tiny_batch

WITHOUT_EVALUATOR = ["--model.evaluation.evaluator.pretrained", "null"]


def golden_module() -> tuple[XMCGANModule, dict[str, Tensor], Tensor]:
    """Make the tiny official networks with optimizers, and return them with a batch and its noise."""
    generator, discriminator = networks()
    module = steppable(XMCGANModule(generator, discriminator, XMCGANLoss(weight_image_net=0.0)))
    batch = captions()
    return module, batch, batch.pop("z")


def expect_losses(module: XMCGANModule, name: str) -> None:
    logged: dict[str, Tensor] = module.logged  # type: ignore[assignment]

    def of(*parts: str) -> Tensor:
        return sum(logged[f"train/{part}"] for part in parts)  # type: ignore[return-value]

    for key, found in {
        "d_loss": of("discriminator_loss"),
        "g_loss": of("generator_loss"),
        "c_loss_d": of("real_sentence_loss", "real_word_loss"),
        "c_loss_g": of("fake_sentence_loss", "fake_word_loss", "image_d_loss"),
    }.items():
        torch.testing.assert_close(found, tensor("net128", f"{name}/{key}"), rtol=6e-6, atol=0, msg=f"{name} {key}")


def deltas(network: nn.Module, start: dict[str, Tensor]) -> float:
    return math.sqrt(
        sum((value.detach() - start[name]).square().sum().item() for name, value in network.named_parameters())
    )


def test_losses_gradients_and_steps_equal_the_official_ones() -> None:
    module, batch, z = golden_module()
    module.joint_step(batch, z)
    expect_losses(module, "step1")
    for prefix, network in (("gradG", module.generator), ("gradD", module.discriminator)):
        found = to_official(
            {name: parameter.grad for name, parameter in network.named_parameters()},  # type: ignore[misc]
            network is module.discriminator,
        )
        expected = {name: tensor("net128", f"{prefix}/{name.removeprefix('params/')}") for name in found}
        scale = max(value.abs().max() for value in expected.values())
        error = max((torch.from_numpy(found[name]) - value).abs().max() for name, value in expected.items())
        assert error <= 3e-5 * scale
        norm = math.sqrt(sum(float(np.square(value).sum()) for value in found.values()))
        assert norm == pytest.approx(float(tensor("net128", f"{prefix}_norm")), rel=5e-6)

    module, batch, z = golden_module()
    before = {name: value.clone() for name, value in module.named_parameters()}
    start = {name.removeprefix("generators.query."): value for name, value in before.items()}
    module.discriminator_step(batch, z)
    module.joint_step(batch, z)
    module.generators.update(0.999)
    expect_losses(module, "dstep_then_gdstep")
    module.joint_step(batch, z)
    module.generators.update(0.999)
    expect_losses(module, "dstep_then_2gdstep")
    own = {name.removeprefix("discriminator."): value for name, value in before.items()}
    for key, found, tolerance in (
        # A bias before batch normalization has only rounding as its gradient, and Adam turns it into a whole step. This
        # can change the squared norm by 3e-4, depending on the processor and the memory layout.
        ("G_param_delta_l2", deltas(module.generator, start), 4e-4),
        ("D_param_delta_l2", deltas(module.discriminator, own), 5e-5),
        ("EMA_delta_l2", deltas(module.average, start), 1e-2),  # the average changes by 1e-7, near float32's precision
    ):
        assert found == pytest.approx(float(tensor("net128", f"dstep_then_2gdstep/{key}")), rel=tolerance), key
    mean = module.generator.blocks[0].norm1.norm.running_mean  # type: ignore[union-attr]
    torch.testing.assert_close(mean, tensor("net128", "dstep_then_2gdstep/bn_mean_first"), rtol=0, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_move_as_by_plain_adam_in_either_layout(channels_last: bool) -> None:
    """Compare fused steps with plain Adam. A fused step doesn't check that weight and gradient layouts are equal."""
    module, batch, z = golden_module()
    if channels_last:
        lay_out_channels_last(module)
    twins: list[tuple[str, nn.Parameter, Tensor, Tensor]] = []
    names = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer in module.optimizers():  # type: ignore[union-attr]
        (group,) = optimizer.param_groups
        assert group["fused"]
        copies = [parameter.detach().clone(memory_format=torch.contiguous_format) for parameter in group["params"]]
        twins += [(names[p], p, copy, copy.clone()) for p, copy in zip(group["params"], copies)]
        plain = torch.optim.Adam(copies, group["lr"], group["betas"], foreach=False)

        def step(_: Any, *arguments: Any, copies: Any = copies, group: Any = group, plain: Any = plain) -> None:
            for copy, parameter in zip(copies, group["params"]):
                copy.grad = parameter.grad.clone(memory_format=torch.contiguous_format)
            plain.step()

        optimizer.register_step_pre_hook(step)
    module.discriminator_step(batch, z)
    for _ in range(3):
        module.joint_step(batch, z)
    for name, parameter, copy, start in twins:
        assert (parameter - copy).norm() < 1e-3 * (copy - start).norm(), name


WEIGHTS = {
    "sentence": ("weight_sentence", "real_sentence", "fake_sentence"),
    "word": ("weight_word", "real_word", "fake_word"),
    "image_d": ("weight_image_d", "image_d"),
}


@pytest.mark.parametrize("off", WEIGHTS)
def test_a_loss_that_is_off_adds_nothing_and_the_projection_stays(off: str) -> None:
    batch, z = tiny_batch()
    whole, less = tiny(), tiny(**{WEIGHTS[off][0]: 0.0})
    whole.joint_step(batch, z)
    less.joint_step(batch, z)
    logs: tuple[dict[str, Any], dict[str, Any]] = (whole.logged, less.logged)  # type: ignore[assignment]
    missing = {f"train/{name}_loss" for name in WEIGHTS[off][1:]}
    assert missing <= logs[0].keys()
    assert not missing & logs[1].keys()
    assert (less.discriminator.regions is None) == (off == "word")
    scores = [
        less.discriminator(batch["image"], sentence).logit for sentence in (batch["sentence"], z @ torch.ones(5, 6))
    ]
    assert not torch.allclose(*scores)


def test_the_weights_without_the_average_are_measured_on_request() -> None:
    batch, z = tiny_batch()
    for evaluated, other in (("average", "trained"), ("trained", "average")):
        module = tiny(evaluated=evaluated).eval()
        networks = {"average": module.average, "trained": module.generator}
        captions = module.captions(batch)
        before = module.measured(z, *captions)
        torch.nn.init.ones_(networks[other].image.weight)
        assert module.measured(z, *captions).equal(before)
        torch.nn.init.ones_(networks[evaluated].image.weight)
        assert not module.measured(z, *captions).equal(before)


def test_the_checkpoint_with_the_best_score_is_measured(tmp_path: Path) -> None:
    last = finished().checkpoint("xmc_gan")
    folder = tmp_path / "kept"
    folder.mkdir()
    state = torch.load(last, weights_only=True)
    for name, scale in (("step000001", 0.0), ("last", 1.0)):  # scale 0 gives images of one color, which are worse
        weights = {key: scale * value if ".image." in key else value for key, value in state["state_dict"].items()}
        torch.save({**state, "state_dict": weights, "global_step": 1 if scale == 0 else 2}, folder / f"{name}.ckpt")
    evaluator = str(finished().checkpoint("mini_evaluator"))
    of_choice = "--model.choice.evaluation.evaluator.pretrained"
    stage = request(
        "xmc_gan/xmc_gan_best", tmp_path, "--model.choice.checkpoint", str(folder / "last.ckpt"),
        "--model.evaluation.evaluator.pretrained", evaluator, of_choice, evaluator,
    )  # fmt: skip
    record = run_stage(stage)
    # With persistent workers, as at paper scale, a loader has a single iterator, which the test must find unused.
    by_workers = dataclasses.replace(
        stage, runs=tmp_path / "workers", arguments=[*stage.arguments, "--data.num_workers", "1"]
    )
    assert run_stage(by_workers).metrics == record.metrics
    found = (stage.directory / "media" / "checkpoints.csv").read_text(encoding="utf-8")
    head, *rows = (line.split(",") for line in found.splitlines())
    assert head == ["mini_fd", "step", "weights"]
    assert [row[1:] for row in rows] == [[step, kind] for step in "12" for kind in ("average", "trained")]
    best = min(rows, key=lambda row: float(row[0]))
    assert record.metrics["test/chosen_mini_fd"] == pytest.approx(float(best[0]))
    assert record.metrics["test/chosen_step"] == float(best[1])
    assert record.metrics["test/chosen_average"] == float(best[2] == "average")
    # The test must use the chosen weights.
    assert record.metrics["test/mini_fd"] == pytest.approx(float(best[0]), rel=1e-4)


@pytest.mark.parametrize("key", ["mini_fd", "mini_fid"])
def test_a_choice_whose_score_cannot_be_made_ends_before_images_are_generated(key: str, tmp_path: Path) -> None:
    of_choice = ["--model.choice.key", key, "--model.choice.checkpoint", str(tmp_path / "last.ckpt")]
    of_choice += ["--model.choice.evaluation.evaluator.pretrained", "null"]
    with pytest.raises(ValueError, match=rf"choice.key: {key}"):
        run_stage(request("xmc_gan/xmc_gan_best", tmp_path, *of_choice, *WITHOUT_EVALUATOR))


def test_a_module_without_text_vectors_ends_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.text_encoder or data\.text_features"):
        run_stage(request("xmc_gan/s_w", tmp_path, *WITHOUT_EVALUATOR, "--model.text_encoder", "null"))


@pytest.mark.parametrize(("training", "test", "matched"), [(8, 4, True), (4, 1, False)])
def test_real_images_are_matched_in_groups_of_the_smaller_batch(
    training: int, test: int, matched: bool, tmp_path: Path
) -> None:
    sizes = ["--data.batch_size", str(training), "--data.test_batch_size", str(test)]
    record = run_stage(request("xmc_gan/s_w", tmp_path, *WITHOUT_EVALUATOR, *sizes))
    assert ({"test/real_sentence_accuracy", "test/real_word_accuracy"} <= record.metrics.keys()) == matched


def test_every_stage_shows_the_images_of_the_same_captions() -> None:
    stages = finished()
    shown = []
    for name in ("real_images", "baseline", "xmc_gan"):
        media = stages.folder(name) / "media"
        files = ["captions.row.json", "captions.row.png"]
        assert sorted(path.name for path in media.iterdir()) == files
        assert sorted(Path(path).name for path in stages.records[name].media) == files
        captions = json.loads((media / files[0]).read_text(encoding="utf-8"))
        shown.append((captions, np.asarray(Image.open(media / files[1]))))
    assert len(shown[0][0]) == 8
    assert shown[0][0] == shown[1][0] == shown[2][0]
    assert {picture.shape for _, picture in shown} == {(96, 8 * 96 + 7 * 4, 3)}
    assert not np.array_equal(shown[1][1], shown[2][1])
