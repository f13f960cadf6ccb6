"""Wrappers of optimizers, gradient clipping, and learning-rate schedules as plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def fused(module: pl.LightningModule, on_cpu: bool = True) -> dict[str, Any]:
    """Return the option `fused=True` for a torch optimizer if the device supports it. On the CPU, require `on_cpu`.

    float16 can't use fused steps, which undo the loss scale only after gradients are clipped. On the CPU, fused kernels
    round differently.
    """
    devices = {"cpu", "cuda"} if on_cpu else {"cuda"}
    return {"fused": True} if module.device.type in devices and not _scales_its_loss(module) else {}


@torch.no_grad()
def lay_out_state(optimizer: Optimizer) -> None:
    """Convert each state tensor to the memory layout of its parameter, in place. Fused steps require equal layouts."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _scales_its_loss(module: pl.LightningModule) -> bool:
    try:
        return str(getattr(module.trainer, "precision", "")).startswith("16")
    except RuntimeError:  # the module has no trainer
        return False


def refuse_half_weights(module: pl.LightningModule, rounded: str) -> None:
    """Raise if weights have half precision. The error says that this rounds `rounded`. Mixed precision is fine."""
    precision = str(module.trainer.precision)
    if precision in ("bf16-true", "16-true"):
        raise ValueError(f"trainer.precision {precision} rounds {rounded}: use bf16-mixed")


def refuse_clip_value(module: pl.LightningModule, field: str) -> None:
    """Raise if the trainer sets clipping, because the module ignores that. `field` names its own setting."""
    if module.trainer.gradient_clip_val:
        raise ValueError(f"trainer.gradient_clip_val has no effect here: {field} clips the gradients")


def clip_by_norm(
    module: pl.LightningModule,
    optimizer: Optimizer,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> None:
    """Clip gradients by norm like Lightning, also for fused optimizers in bf16. Use as `configure_gradient_clipping`.

    Lightning refuses to clip for fused optimizers in any mixed precision, though bfloat16 needs no loss scale. A norm
    of None or 0 turns clipping off. Lightning handles other algorithms.
    """
    others = str(gradient_clip_algorithm or "norm").rpartition(".")[2].lower() != "norm"
    if others or _scales_its_loss(module):
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
    elif gradient_clip_val:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


def adamw(module: pl.LightningModule, rates: dict[str, float], weight_decay: float, warmup_fraction: float) -> Any:
    """Return AdamW with a learning rate per part, linear warm-up and cosine decay, for `configure_optimizers`.

    Args:
        rates: maps prefixes of parameter names to learning rates. The first matching prefix counts.
        weight_decay: weight decay of matrices. Normalization layers and biases have none.
        warmup_fraction: fraction of all steps used for warm-up.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = next(prefix for prefix in rates if name.startswith(prefix))
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        **fused(module, on_cpu=False),
    )
    total = int(module.trainer.estimated_stepping_batches)
    factor = warm_up_then_cosine(round(warmup_fraction * total), total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WrappedOptimizer(Optimizer):
    """Base of optimizers that wrap others with disjoint parameters. Shares the others' parameter groups and state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """Return each parameter's state, shared with the wrapped optimizers. Unlike in torch, reading adds no entry."""
        return {parameter: state for part in self._parts for parameter, state in part.state.items()}

    @state.setter
    def state(self, empty: object) -> None:
        """Ignore the empty state that torch's constructor sets."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure once, then update the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        for part in self._parts:
            part.step()

    def _load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)
        # Loading replaces a part's groups. Update the list in place, for schedulers that hold it.
        self.param_groups[:] = [group for part in self._parts for group in part.param_groups]


class CombinedOptimizer(WrappedOptimizer):
    """Combines several optimizers into one, as Lightning's automatic optimization needs. Steps them in order.

    Source: docs/papers/mct.md [6]: SGD for the image tower, AdamW for the text tower.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load_parts(state_dict["parts"])


class Lookahead(WrappedOptimizer):
    """Keeps slow weights. Every k steps of the wrapped optimizer, slow += alpha * (fast - slow), then fast = slow.

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1; VirTex uses k = 5 and
    alpha = 0.5 (docs/papers/mct.md [11]).
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        super().__init__([optimizer])
        self.k = k
        self.alpha = alpha
        self._steps = 0
        # Copy at the first step: until then weights may be loaded or moved to another device.
        self._slow: list[Tensor] | None = None

    def _update(self) -> None:
        fast = self._parameters()
        if self._slow is None:
            self._slow = [parameter.detach().clone() for parameter in fast]
        super()._update()
        self._steps += 1
        if self._steps % self.k == 0:
            with torch.no_grad():
                torch._foreach_lerp_(self._slow, fast, self.alpha)
                torch._foreach_copy_(fast, self._slow)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._parts[0].state_dict(), "slow": self._slow, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        fast, slow = self._parameters(), state_dict["slow"]
        self._load_parts([state_dict["optimizer"]])
        self._steps = int(state_dict["steps"])
        self._slow = None if slow is None else [s.detach().to(f, copy=True) for s, f in zip(slow, fast)]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


# -- schedules: functions from the number of steps (or epochs) so far to a factor of the learning rate -----------------


def cosine_by_epoch(epochs: int, steps_per_epoch: int = 1) -> Callable[[int], float]:
    """Decay from 1 to 0 as half a cosine, constant within an epoch, as in MoCo v2 (docs/papers/mct.md [7])."""
    return lambda step: _half_cosine(step // steps_per_epoch / epochs)


def warm_up_then_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Rise linearly from 1 / warmup_steps to 1, then decay to 0 as half a cosine."""
    if warmup_steps > total_steps:
        raise ValueError(f"warmup_steps ({warmup_steps}) must be at most the steps of the training ({total_steps})")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return _half_cosine((step - warmup_steps) / max(total_steps - warmup_steps, 1))

    return factor


def warm_up_then_inverse_sqrt(warmup_steps: int, start: float = 0.0) -> Callable[[int], float]:
    """Rise linearly from `start` at step 0 to 1 at step `warmup_steps`, then decay as 1 / sqrt(step).

    Source: fairseq and XLM's `inverse_sqrt`; docs/papers/m3p.md [7].
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start + (1.0 - start) * step / warmup_steps
        return math.sqrt(warmup_steps / step)

    return factor


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
