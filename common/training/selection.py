"""Select the weights to test: the best weights of a training run, or the best checkpoint of a finished stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.encoders.checkpoint_files import read_checkpoint
from common.monitoring.media import media_folder, write_table
from common.protocols.generation import ImageEvaluation


class BestWeights:
    """Keeps a network's best weights so far, in host memory and in checkpoints. If scores are equal, keeps the earlier.

    A module calls `compare` before the first step of a new period and at the end of training, then `restore`. We don't
    use Lightning's validation, because a run that resumes at the end of an epoch skips it.

    Args:
        place: unit of the `place` given to `compare`, such as `epoch`, for a metric's name.
    """

    def __init__(self, network: nn.Module, score: str, place: str) -> None:
        self.network = network
        self.names = {"place": f"selected_{place}", "score": f"validation_{score}"}
        self.key = score
        self.score = -math.inf
        self.place = self.compared = 0
        self.weights: dict[str, Tensor] | None = None

    def offer(self, score: float, place: int) -> None:
        if score > self.score:
            self.score, self.place = score, place
            self.weights = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}

    def compare(
        self, module: Any, validate: Callable[[], Mapping[str, float]], done: int, place: int, at_end: bool = False
    ) -> None:
        """Validate after `done` steps, log the result, and keep the weights if best. Every process must call this."""
        if done <= self.compared:
            return
        module.eval()
        # Loaders draw a seed for their workers, so restore the generator: a comparison must not change training.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            metrics = validate()
        module.train()
        self.offer(metrics[self.key], place)
        self.compared = done
        for logger in module.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in metrics.items()}, done - at_end)

    def restore(self) -> None:
        """Load the best weights into the network and drop the copy."""
        if self.weights is not None:
            self.network.load_state_dict(self.weights)
        self.weights = None

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("score", "place", "compared", "weights")}

    def load(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def metrics(self) -> dict[str, float]:
        """Return the metrics to record. Empty before the first comparison."""
        return {name: float(getattr(self, field)) for field, name in self.names.items()} if self.compared else {}


class CheckpointChoice:
    """Scores raw and averaged weights of every checkpoint of a finished stage by metric `key`, and takes the best.

    The score uses the test images, and tables must say so. `checkpoint` is the stage's last checkpoint. The other
    checkpoints (`step*.ckpt`) are in the same folder.
    """

    def __init__(
        self,
        evaluation: ImageEvaluation,
        key: str,
        better: Literal["down", "up"] = "down",
        checkpoint: str | None = None,
    ) -> None:
        self.evaluation = evaluation
        self.key = key
        self.better = better
        self.checkpoint = checkpoint

    def require(self) -> None:
        self.files()
        if self.evaluation.repeats != 1:
            raise ValueError("model.choice.evaluation.repeats: every checkpoint is scored once; set it to 1")
        self.evaluation.load_pretrained(verbose=False)  # without notes about other metrics
        reason = self.evaluation.why_not(self.key)
        if reason:
            raise ValueError(f"model.choice.key: {self.key} cannot be measured: {reason}")

    def files(self) -> list[Path]:
        if self.checkpoint is None:
            raise ValueError("model.choice.checkpoint is null: give the last checkpoint of a finished stage")
        last = Path(self.checkpoint)
        return [*sorted(last.parent.glob("step*.ckpt")), last]

    def take(self, module: Any) -> dict[str, float]:
        """Load the best weights into a module. Return their score and step, and whether they are averaged (1 or 0)."""
        files, sign = self.files(), -1 if self.better == "down" else 1
        rows: list[tuple[float, int, str]] = []
        best = BestWeights(module, self.key, "checkpoint")
        # Make a new loader: the test is iterating this one, and persistent workers allow a single iterator.
        of_test = module.trainer.test_dataloaders
        batches = DataLoader(
            of_test.dataset, of_test.batch_size, sampler=of_test.sampler, collate_fn=of_test.collate_fn,
            num_workers=of_test.num_workers, pin_memory=of_test.pin_memory, prefetch_factor=of_test.prefetch_factor,
            worker_init_fn=of_test.worker_init_fn,
        )  # fmt: skip
        if module.trainer.is_global_zero:
            print(f"  scoring averaged and raw weights of {len(files)} checkpoints in {files[-1].parent}")
        for path in files:
            content = read_checkpoint(path)
            module.load_state_dict(content["state_dict"])
            for weights in ("average", "trained"):
                module.hparams["evaluated"] = weights
                score = self.score(module, batches)
                best.offer(sign * score, len(rows))
                rows.append((score, int(content["global_step"]), weights))
        if best.weights is None:
            raise ValueError(f"model.choice: {self.key} is not a number for any checkpoint in {files[-1].parent}")
        best.restore()
        score, step, weights = rows[best.place]
        module.hparams["evaluated"] = weights
        if module.trainer.is_global_zero:
            write_table(module, media_folder(module) / "checkpoints.csv", [self.key, "step", "weights"], rows)
        return {f"chosen_{self.key}": score, "chosen_step": float(step), "chosen_average": float(weights == "average")}

    def score(self, module: Any, batches: Iterable[dict[str, Any]]) -> float:
        self.evaluation.begin(module)
        for batch in batches:
            batch = {name: value.to(module.device) for name, value in batch.items() if isinstance(value, Tensor)}
            with module.trainer.precision_plugin.forward_context():
                generated = module.images_of(batch, module.hparams["seed"])
            self.evaluation.update(generated, batch)
        return self.evaluation.compute()[self.key]
