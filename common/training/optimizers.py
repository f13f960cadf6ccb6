"""Optimizers made of optimizers, and schedules of learning rates as plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def fused(module: pl.LightningModule, on_cpu: bool = True) -> dict[str, Any]:
    """Arguments that have an optimizer of torch step all parameters in one kernel, where that is possible.

    Args:
        module: knows its device and trainer.
        on_cpu: also on the CPU, where the results differ in the last bits from those of the other kernels.

    Returns:
        `{"fused": True}`, or nothing: with float16 a fused step undoes the scale of the loss by itself, after gradients
        have been clipped.
    """
    devices = {"cpu", "cuda"} if on_cpu else {"cuda"}
    return {"fused": True} if module.device.type in devices and not _scales_its_loss(module) else {}


@torch.no_grad()
def lay_out_state(optimizer: Optimizer) -> None:
    """Give what an optimizer keeps of each parameter the parameter's layout in memory.

    A fused step takes for granted that both lie in memory alike, but loading keeps the layout of whoever saved.

    Args:
        optimizer: its state is changed in place.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _scales_its_loss(module: pl.LightningModule) -> bool:
    """Whether the trainer works with float16; a module without a trainer does not."""
    try:
        return str(getattr(module.trainer, "precision", "")).startswith("16")
    except RuntimeError:
        return False


def refuse_half_weights(module: pl.LightningModule, rounded: str) -> None:
    """Stop where the weights themselves would be of half precision; mixed precision keeps them in float32.

    Args:
        module: knows its trainer.
        rounded: what would be rounded, and why that matters.

    Raises:
        ValueError: they would be.
    """
    precision = str(module.trainer.precision)
    if precision in ("bf16-true", "16-true"):
        raise ValueError(f"trainer.precision {precision} rounds {rounded}: use bf16-mixed")


def clip_by_norm(
    module: pl.LightningModule,
    optimizer: Optimizer,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> None:
    """A module's `configure_gradient_clipping`: clips the joint norm of an optimizer's gradients as Lightning does it.

    Lightning itself refuses to clip for fused optimizers under every mixed precision, though with bfloat16 there is no
    scale that they could undo.

    Args:
        module: whose trainer knows the precision.
        optimizer: its gradients are changed.
        gradient_clip_val: largest norm; None or 0 leaves them as they are.
        gradient_clip_algorithm: as Lightning gives it; what is not the norm is left to Lightning.
    """
    others = str(gradient_clip_algorithm or "norm").rpartition(".")[2].lower() != "norm"
    if others or _scales_its_loss(module):
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
    elif gradient_clip_val:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


def adamw(module: pl.LightningModule, rates: dict[str, float], weight_decay: float, warmup_fraction: float) -> Any:
    """A module's `configure_optimizers`: AdamW with a rate for each part, a linear warm-up, then half a cosine.

    Args:
        module: its trained parameters are taken.
        rates: start of a parameter's name to its learning rate; the first that fits counts.
        weight_decay: of matrices; norms and biases have none.
        warmup_fraction: share of the steps that the warm-up takes.
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
    """What optimizers made of other optimizers share: one list of parameter groups and one view of the state.

    The groups are those of the parts, not copies: a scheduler may change them here or there.

    Args:
        parts: optimizers over disjoint parameters.

    Raises:
        ValueError: when there is no part, or two of them hold the same parameter.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        if not parts:
            raise ValueError("at least one optimizer is needed")
        self._parts = list(parts)
        self._complete = False
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._complete = True
        self.state = _JoinedState(self._parts)  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._complete:
            raise RuntimeError(f"{type(self).__name__} takes its parameter groups from its parts; add to them first")
        super().add_param_group(param_group)

    def _load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        if len(states) != len(self._parts):
            raise ValueError(
                f"the saved state holds {len(states)} optimizers, this {type(self).__name__} {len(self._parts)}: were "
                "other losses or modules switched on?"
            )
        for part, state in zip(self._parts, states):
            part.load_state_dict(state)
        # Loading replaces the groups of a part; whoever holds this list must see the new ones.
        self.param_groups[:] = [group for part in self._parts for group in part.param_groups]

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled; save its state_dict()")


class CombinedOptimizer(WrappedOptimizer):
    """Several optimizers as one, for networks whose parts are trained by different rules.

    Lightning's automatic optimization takes a single optimizer; with this one it keeps gradient accumulation, loss
    scaling, checkpoints and the count of steps as they are.

    Args:
        parts: optimizers over disjoint parameters, stepped in this order.

    Raises:
        ValueError: when there is no part, or two of them hold the same parameter.

    Source: docs/papers/mct.md [6]: SGD for the image tower, AdamW for the text tower.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part.

        Args:
            closure: computes loss and gradients; called once, before the first step.

        Returns:
            What the closure returns.
        """
        loss = _evaluate(closure)
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every part.

        Raises:
            ValueError: when the state was saved by something else.
        """
        if "parts" not in state_dict:
            raise ValueError("the saved optimizer is not a CombinedOptimizer: it was written by another recipe")
        self._load_parts(state_dict["parts"])


class Lookahead(WrappedOptimizer):
    """Slow weights that follow an optimizer: every k steps they move to its weights, and these go back to them.

        slow <- slow + alpha * (fast - slow);  fast <- slow

    Args:
        optimizer: makes the fast steps.
        k: fast steps between two slow ones.
        alpha: how far a slow step goes, in (0, 1].

    Raises:
        ValueError: when k or alpha is out of range.

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1; VirTex uses k = 5 and
    alpha = 0.5 (docs/papers/mct.md [11]).
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1 or not 0.0 < alpha <= 1.0:
            raise ValueError(f"Lookahead needs k >= 1 and alpha in (0, 1], got k={k}, alpha={alpha}")
        super().__init__([optimizer])
        self.k = k
        self.alpha = alpha
        self._steps = 0
        # Taken at the first step, not here: weights may still be loaded or moved to another device.
        self._slow: list[Tensor] | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A fast step, and every k of them a slow one.

        Args:
            closure: computes loss and gradients; called once, before the step.

        Returns:
            What the closure returns.
        """
        loss = _evaluate(closure)
        fast = self._parameters()
        if self._slow is None:
            self._slow = [parameter.detach().clone() for parameter in fast]
        self._parts[0].step()
        self._steps += 1
        if self._steps % self.k == 0:
            with torch.no_grad():
                torch._foreach_lerp_(self._slow, fast, self.alpha)
                torch._foreach_copy_(fast, self._slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._parts[0].state_dict(), "slow": self._slow, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the optimizer, the slow weights and the count of steps.

        Raises:
            ValueError: when the state was saved by something else or for other parameters.
        """
        if "slow" not in state_dict:
            raise ValueError("the saved optimizer is not a Lookahead: it was written by another recipe")
        fast, slow = self._parameters(), state_dict["slow"]
        if slow is not None and [s.shape for s in slow] != [f.shape for f in fast]:
            raise ValueError("the saved slow weights do not fit these parameters: it is another model")
        self._load_parts([state_dict["optimizer"]])
        self._steps = int(state_dict["steps"])
        self._slow = None if slow is None else [s.detach().to(f, copy=True) for s, f in zip(slow, fast)]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class _JoinedState(MutableMapping[Tensor, Any]):
    """State of all parts by parameter; reading never creates an entry, and writing goes to the parameter's part."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = parts

    def _state_of(self, parameter: Tensor) -> MutableMapping[Tensor, Any]:
        for part in self._parts:
            if any(parameter is own for group in part.param_groups for own in group["params"]):
                return part.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        for part in self._parts:
            if parameter in part.state:
                return part.state[parameter]
        raise KeyError(parameter)

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._state_of(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._state_of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield from part.state

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# -- schedules: functions from the number of steps (or epochs) so far to a factor of the learning rate -----------------


def cosine_by_epoch(epochs: int, steps_per_epoch: int = 1) -> Callable[[int], float]:
    """Half a cosine from one to zero that is constant within an epoch, as MoCo v2 does it.

    Args:
        epochs: length of the training.
        steps_per_epoch: set it where the schedule is asked at every step; 1 where it is asked once per epoch.

    Returns:
        Factor for `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        ValueError: when an argument is below one.

    Source: docs/papers/mct.md [7].
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(f"epochs and steps_per_epoch must be at least 1, got {epochs} and {steps_per_epoch}")
    return lambda step: _half_cosine(step // steps_per_epoch / epochs)


def warm_up_then_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Linear rise to one, then half a cosine to zero.

    The first step has the factor 1 / warmup_steps and not zero, so no step is lost.

    Args:
        warmup_steps: length of the rise; 0 for none.
        total_steps: length of the training, the rise included.

    Returns:
        Factor for `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        ValueError: when the lengths do not fit.
    """
    if not 0 <= warmup_steps <= total_steps or total_steps < 1:
        raise ValueError(
            "the schedule needs 0 <= warmup_steps <= total_steps and total_steps >= 1, got "
            f"warmup_steps={warmup_steps}, total_steps={total_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return _half_cosine((step - warmup_steps) / max(total_steps - warmup_steps, 1))

    return factor


def warm_up_then_inverse_sqrt(warmup_steps: int, start: float = 0.0) -> Callable[[int], float]:
    """Linear rise from `start` to one, then the inverse square root of the number of steps.

    The first step has the factor `start`, step `warmup_steps` the factor one.

    Args:
        warmup_steps: length of the rise, at least 1.
        start: factor of the first step, from 0 to 1.

    Returns:
        Factor for `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        ValueError: when an argument is out of range.

    Source: fairseq and XLM's `inverse_sqrt`; docs/papers/m3p.md [7].
    """
    if warmup_steps < 1 or not 0.0 <= start <= 1.0:
        raise ValueError(
            "the schedule needs warmup_steps >= 1 and a start from 0 to 1, got "
            f"warmup_steps={warmup_steps}, start={start}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start + (1.0 - start) * step / warmup_steps
        return math.sqrt(warmup_steps / step)

    return factor


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
