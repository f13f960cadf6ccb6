"""Select the checkpoint to measure: the best score with trained or averaged weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from common.encoders.checkpoint_files import read_checkpoint
from common.monitoring.media import media_folder, write_table
from common.protocols.generation import ImageEvaluation


class CheckpointChoice:
    """Scores every checkpoint of a finished stage by metric `key` and takes the best.

    As in the official job, the score uses the test images. A table with its results must say so. `checkpoint` is the
    last one of the stage, in the folder of the others (`step*.ckpt`).

    Source: [9.1].
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
        self.evaluation.load_pretrained()
        reason = self.evaluation.why_not(self.key)
        if reason:
            raise ValueError(f"model.choice.key is {self.key}, which decides and cannot be measured: {reason}")

    def files(self) -> list[Path]:
        if self.checkpoint is None:
            raise ValueError("model.choice.checkpoint is null: give the last checkpoint of a finished stage")
        last = Path(self.checkpoint)
        return [*sorted(last.parent.glob("step*.ckpt")), last]

    def take(self, module: Any) -> dict[str, float]:
        """Load the best weights into a module; returns the score, the step, and 1 if averaged weights were taken."""
        rows, files = [], self.files()
        # Use a new loader: with persistent workers a loader has a single iterator, which the test already uses.
        of_test = module.trainer.test_dataloaders
        batches = DataLoader(
            of_test.dataset, of_test.batch_size, sampler=of_test.sampler, collate_fn=of_test.collate_fn,
            num_workers=of_test.num_workers, pin_memory=of_test.pin_memory, prefetch_factor=of_test.prefetch_factor,
        )  # fmt: skip
        if module.trainer.is_global_zero:
            print(f"  {len(files)} checkpoints in {files[-1].parent} are scored, averaged and raw weights of each")
        for path in files:
            content = read_checkpoint(path)
            module.load_state_dict(content["state_dict"])
            for weights in ("average", "trained"):
                module.hparams["evaluated"] = weights
                rows.append((self.score(module, batches), int(content["global_step"]), weights, path))
        score, step, weights, path = (min if self.better == "down" else max)(rows, key=lambda row: row[0])
        module.load_state_dict(read_checkpoint(path)["state_dict"])
        module.hparams["evaluated"] = weights
        if module.trainer.is_global_zero:
            path = media_folder(module) / "checkpoints.csv"
            write_table(module, path, [self.key, "step", "weights"], [row[:3] for row in rows])
        return {f"chosen_{self.key}": score, "chosen_step": float(step), "chosen_average": float(weights == "average")}

    def score(self, module: Any, batches: Iterable[dict[str, Any]]) -> float:
        self.evaluation.begin(module)
        for batch in batches:
            batch = {name: value.to(module.device) for name, value in batch.items() if isinstance(value, Tensor)}
            with module.trainer.precision_plugin.forward_context():
                generated = module.images_of(batch, module.hparams["seed"])
            self.evaluation.update(generated, batch)
        return self.evaluation.compute()[self.key]
