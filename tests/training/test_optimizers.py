"""Test optimizers that combine optimizers: the same steps as by hand, one closure, and exact restoring."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import Tensor, nn

from common.training import optimizers
from common.training.optimizers import CombinedOptimizer, Lookahead, cosine_by_epoch, warm_up_then_cosine


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def parts(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    last: Any = model[2]
    groups = [{"params": [last.weight], "weight_decay": 0.1}, {"params": [last.bias], "weight_decay": 0.0}]
    return [torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9), torch.optim.AdamW(groups, lr=0.01)]


def combined(model: nn.Sequential) -> CombinedOptimizer:
    return CombinedOptimizer(parts(model))


def lookahead(model: nn.Sequential) -> Lookahead:
    return Lookahead(combined(model), k=3)


BUILDERS: list[Callable[[nn.Sequential], torch.optim.Optimizer]] = [combined, lookahead]


def loss_of(model: nn.Module, step: int) -> Tensor:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (model(rows) - rows[:, :2]).pow(2).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- combined ----------------------------------------------------------------------------------------------------------


def test_combined_steps_equal_those_of_the_parts() -> None:
    ours, reference = network(), network()
    train(ours, combined(ours), range(5))
    separate = parts(reference)
    for step in range(5):
        for part in separate:
            part.zero_grad()
        loss_of(reference, step).backward()
        for part in separate:
            part.step()
    assert same(ours, reference)
    assert not same(ours, network())


@pytest.mark.parametrize("build", BUILDERS)
def test_the_closure_is_called_once_with_gradients_on(build: Any) -> None:
    model = network()
    optimizer, calls = build(model), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    torch.testing.assert_close(loss, loss_of(network(), 0))
    assert optimizer.step() is None


@pytest.mark.parametrize("build", BUILDERS)
def test_groups_are_shared_with_the_parts_also_after_a_restore(build: Any) -> None:
    model = network()
    optimizer = build(model)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.01]
    for _ in range(2):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0, lambda step: 1.0, lambda step: 0.0])
        before = copy.deepcopy(model)
        train(model, optimizer, range(1))
        assert same(model[0], before[0])
        assert not torch.equal(model[2].weight, before[2].weight)  # type: ignore[arg-type]
        assert torch.equal(model[2].bias, before[2].bias)  # type: ignore[arg-type]
        scheduler.step()
        groups = optimizer.param_groups
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups is groups


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("before", [0, 3, 4])
def test_a_restored_optimizer_goes_on_exactly(build: Any, before: int) -> None:
    whole, first, second = network(), network(), network()
    train(whole, build(whole), range(before + 5))
    optimizer = build(first)
    train(first, optimizer, range(before))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    restored = build(second)
    second.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    train(first, optimizer, range(before, before + 1))  # must not change the restored state
    train(second, restored, range(before, before + 5))
    assert same(whole, second)


@pytest.mark.parametrize("build", BUILDERS)
def test_state_is_seen_by_parameter_and_changed_in_its_part(build: Any) -> None:
    model = network()
    optimizer = build(model)
    assert len(optimizer.state) == 0
    assert model[0].weight not in optimizer.state
    train(model, optimizer, range(1))
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}
    assert "momentum_buffer" in optimizer.state[model[0].weight]
    assert "exp_avg" in optimizer.state[model[2].weight]
    train(model, optimizer, range(1, 3))
    reference = network()
    train(reference, build(reference), range(3))
    assert same(model, reference)
    with pytest.raises(KeyError):
        optimizer.state[torch.zeros(1)]
    _optimizer_to_device(optimizer, torch.device("meta"))  # in place, like Lightning
    kept = [state.get("exp_avg", state.get("momentum_buffer")) for state in optimizer.state.values()]
    assert all(one.is_meta for one in kept)


@pytest.mark.parametrize("build", BUILDERS)
def test_gradients_of_a_loss_scaler_are_unscaled_once_and_bad_steps_skipped(build: Any) -> None:
    model, reference = network(), network()
    optimizer = build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss if step != 2 else loss * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
    plain = build(reference)
    for step in (0, 1, 3):
        train(reference, plain, range(step, step + 1))
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)


# -- lookahead ---------------------------------------------------------------------------------------------------------


def test_lookahead_is_the_written_algorithm() -> None:
    ours, fast = network(), network()
    optimizer = Lookahead(torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9), k=3, alpha=0.25)
    inner = torch.optim.SGD(fast.parameters(), 0.1, momentum=0.9)
    slow = [parameter.detach().clone() for parameter in fast.parameters()]
    for step in range(8):
        train(ours, optimizer, range(step, step + 1))
        train(fast, inner, range(step, step + 1))
        if (step + 1) % 3 == 0:
            with torch.no_grad():
                for weight, parameter in zip(slow, fast.parameters()):
                    weight += 0.25 * (parameter - weight)
                    parameter.copy_(weight)
        for mine, parameter in zip(ours.parameters(), fast.parameters()):
            torch.testing.assert_close(mine, parameter)


def test_lookahead_starts_from_the_weights_of_its_first_step() -> None:
    model, reference = network(), network(7)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1), k=1, alpha=0.5)
    model.load_state_dict(reference.state_dict())
    train(model, optimizer, range(1))
    train(reference, Lookahead(torch.optim.SGD(reference.parameters(), 0.1), k=1, alpha=0.5), range(1))
    assert same(model, reference)


def test_gradients_are_clipped_by_lightning_where_it_has_to() -> None:
    for precision, kind, limit, norm in (
        ("bf16-mixed", None, 0.5, 0.5), ("32-true", "Type.NORM", 2.0, 2.0), ("32-true", "norm", None, 3.0),
        ("32-true", "value", 0.5, None), ("16-mixed", "norm", 0.5, None),
    ):  # fmt: skip
        module: Any = nn.Linear(9, 1, bias=False)
        module.trainer, module.device = SimpleNamespace(precision=precision), torch.device("cpu")
        module.weight.grad, asked = torch.ones(1, 9), Mock()
        module.clip_gradients, optimizer = asked, torch.optim.SGD(module.parameters(), 0.1)
        optimizers.clip_by_norm(module, optimizer, limit, kind)
        assert asked.mock_calls == ([] if norm else [call(optimizer, limit, kind)])
        assert float(module.weight.grad.norm()) == pytest.approx(norm or 3.0)
        assert optimizers.fused(module) == ({} if precision == "16-mixed" else {"fused": True})
        assert optimizers.fused(module, on_cpu=False) == {}


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_cosine_is_constant_within_an_epoch() -> None:
    by_epoch, by_step = cosine_by_epoch(10), cosine_by_epoch(10, steps_per_epoch=3)
    for step in range(30):
        expected = 0.5 * (1 + math.cos(math.pi * (step // 3) / 10))
        assert by_step(step) == by_epoch(step // 3) == pytest.approx(expected)
    assert by_epoch(0) == 1
    assert by_step(30) == by_step(300) == pytest.approx(0)


def test_warm_up_then_cosine() -> None:
    factor = warm_up_then_cosine(4, 12)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(8) == pytest.approx(0.5)
    assert factor(12) == factor(100) == pytest.approx(0)
    values = [factor(step) for step in range(4, 13)]
    assert values == sorted(values, reverse=True)
    assert warm_up_then_cosine(0, 5)(0) == 1
    assert [warm_up_then_cosine(3, 3)(step) for step in (0, 2)] == [1 / 3, 1.0]
    with pytest.raises(ValueError, match="warmup_steps"):
        warm_up_then_cosine(5, 4)
