"""Which weights are tested: those that did best on the validation split, as the released code keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from papers.m3p.loss import relation_terms, with_places


class Best:
    """The weights that tell true pairs from false ones best, of those compared so far.

    Every so many iterations, and at the end, the weights are compared by the share of validation items whose true pair
    scores highest among its N candidates, searching images by a caption and captions by an image: their recall at 1.
    The best are kept on the host and in every checkpoint, and whoever goes on from one knows what has been compared.
    This is not Lightning's validation loop, which a run that is resumed at the end of an epoch would skip.

    Args:
        every: iterations between two comparisons.

    Attributes:
        accuracy, iteration: of the best weights; 0 iterations before any was compared.
        compared: iterations up to the last comparison.
        weights: the best; None before any was compared, and when they are in the model.

    Source: [10].
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.accuracy = -1.0
        self.iteration = self.compared = 0
        self.weights: dict[str, Tensor] | None = None

    def compare(self, module: Any, done: int, at_end: bool = False) -> None:
        """Compare the weights of a module, where it is time.

        Args:
            module: whose trainer, data and model are used; all processes call.
            done: iterations so far.
            at_end: compare whatever has not been compared.
        """
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
        """Give the best weights back to the model, which is then tested and saved with them."""
        if self.weights is not None:
            module.model.load_state_dict(self.weights)
        self.weights = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "every"}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self).update(state)

    def metrics(self) -> dict[str, float]:
        """For the record; nothing where weights are tested that were not compared here."""
        if not self.iteration:
            return {}
        return {"selected_iteration": float(self.iteration), "validation_accuracy": self.accuracy}


@torch.no_grad()
def validation_accuracy(module: Any) -> float:
    """Share of groups of the validation split whose true pair scores highest, in percent; the same on all processes."""
    strategy, found = module.trainer.strategy, torch.zeros(2, dtype=torch.float64)
    precision = strategy.precision_plugin
    module.eval()
    # Loaders draw a seed for their workers: training must not depend on whether this happened in between.
    with torch.random.fork_rng(devices=[]), precision.forward_context():
        for batch in module.data.validation_loader():
            for relation in strategy.batch_to_device(precision.convert_input(with_places(batch)))["relations"]:
                for kind, group in relation.items():
                    accuracy = relation_terms(module.model, group, kind, words=False, regions=False)["accuracy"]
                    groups = len(group["true_rows"])
                    found += torch.tensor([float(accuracy) * groups, groups], dtype=torch.float64)
    module.train()
    # Doubles are not there on every accelerator.
    hits, count = strategy.reduce(found.float().to(module.device), reduce_op="sum").tolist()
    return float(100 * hits / count)
