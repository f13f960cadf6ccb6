"""Select the weights to test: the best on the validation split, as in the released code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from papers.m3p.loss import relation_terms, with_places


class Best:
    """Keeps the weights with the best validation accuracy so far, on the host and in every checkpoint.

    Validation accuracy is the share of validation items whose true pair scores highest among its N candidates, for both
    search directions. This isn't Lightning's validation loop, which skips a run that resumes at the end of an epoch.
    `weights` are None before the first comparison (iteration 0), and while the model holds them.

    Source: [10].
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.accuracy = -1.0
        self.iteration = self.compared = 0
        self.weights: dict[str, Tensor] | None = None

    def compare(self, module: Any, done: int, at_end: bool = False) -> None:
        """Compare the module's weights if due, or `at_end`; every process must call this."""
        if done <= self.compared or (done % self.every and not at_end):
            return
        accuracy = validation_accuracy(module)
        if accuracy > self.accuracy:
            self.accuracy, self.iteration = accuracy, done
            self.weights = {name: value.cpu().clone() for name, value in module.model.state_dict().items()}
        self.compared = done
        for logger in module.loggers:
            logger.log_metrics({"val/accuracy": accuracy}, done - at_end)

    def restore(self, module: Any) -> None:
        if self.weights is not None:
            module.model.load_state_dict(self.weights)
        self.weights = None

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "every"}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def metrics(self) -> dict[str, float]:
        """Metrics to record; empty if this run compared no weights."""
        if not self.iteration:
            return {}
        return {"selected_iteration": float(self.iteration), "validation_accuracy": self.accuracy}


@torch.no_grad()
def validation_accuracy(module: Any) -> float:
    """Percent of validation groups whose true pair scores highest; equal on all processes."""
    strategy, found = module.trainer.strategy, torch.zeros(2, dtype=torch.float64)
    precision = strategy.precision_plugin
    module.eval()
    # Loaders draw a seed for their workers; training must not depend on whether a comparison ran.
    with torch.random.fork_rng(devices=[]), precision.forward_context():
        for batch in module.data.validation_loader():
            for relation in strategy.batch_to_device(precision.convert_input(with_places(batch)))["relations"]:
                for kind, group in relation.items():
                    accuracy = relation_terms(module.model, group, kind, words=False, regions=False)["accuracy"]
                    groups = len(group["true_rows"])
                    found += torch.tensor([float(accuracy) * groups, groups], dtype=torch.float64)
    module.train()
    # Some accelerators lack doubles.
    hits, count = strategy.reduce(found.float().to(module.device), reduce_op="sum").tolist()
    return float(100 * hits / count)
