"""Training of AVID and CMA. The loss decides which one of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.encoders.heads import ProjectionHead
from common.metrics.gathering import RowsOncePerSample
from common.training.optimizers import clip_by_norm, fused, refuse_half_weights
from common.types import Momentum, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from papers.avid_cma import monitoring
from papers.avid_cma.data import PretrainingData
from papers.avid_cma.loss import BankLoss
from papers.avid_cma.networks import AVID
from papers.avid_cma.weights import load_pretraining


class AVIDModule(pl.LightningModule):
    """Trains AVID (instance discrimination), or CMA (cross-modal agreement) if the loss has mined positives.

    Args:
        video_encoder, audio_encoder: backbones with a `feature_dim`.
        hidden_dim, out_dim, head_layers, head_batch_norm, head_output_batch_norm: projection heads ([3.3]).
        learning_rate, betas, weight_decay: Adam; the weight decay is L2 in the gradient ([8]).
        lr_milestones: epochs that divide the rate by 10 ([11]).
        warm_start: AVID checkpoint that CMA starts from. Loads model, banks and normalizer, but not optimizer or epoch.
        refresh_every: epochs between two searches for positives; 0 mines only at the start.
        mined: positives per instance that the test mines to measure agreement, if training mines none; 0 skips this.
    """

    def __init__(
        self,
        video_encoder: nn.Module,
        audio_encoder: nn.Module,
        loss: BankLoss,
        hidden_dim: PositiveInt = 512,
        out_dim: PositiveInt = 128,
        head_layers: PositiveInt = 3,
        head_batch_norm: bool = False,
        head_output_batch_norm: bool = False,
        learning_rate: PositiveFloat = 2e-4,
        betas: tuple[Momentum, Momentum] = (0.9, 0.999),
        weight_decay: NonNegativeFloat = 1e-5,
        lr_milestones: Sequence[NonNegativeInt] = (),
        warm_start: str | None = None,
        refresh_every: NonNegativeInt = 5,
        mined: NonNegativeInt = 32,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["video_encoder", "audio_encoder", "loss"], logger=False)

        def head(encoder: nn.Module) -> ProjectionHead:
            width: Any = encoder.feature_dim
            return ProjectionHead(width, hidden_dim, out_dim, head_layers, head_batch_norm, head_output_batch_norm)

        self.model = AVID(video_encoder, audio_encoder, head(video_encoder), head(audio_encoder))
        self.loss = loss
        self.progress = monitoring.LossProgress()
        self._without_files = False

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        video, audio = self.model(batch["video"], batch["audio"])
        terms = self.loss(video, audio, batch["index"])
        self.progress.update(terms["loss"].detach(), self.loss.normalizer)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(video))
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        video, audio = self.model(batch["video"], batch["audio"])
        terms = self.loss(video, audio, batch["index"], update=False)
        # An integer count would be divided by the number of processes and truncated.
        count: Any = float(len(video))
        self.log_dict({f"val/{name}": v for name, v in terms.items()}, batch_size=count, sync_dist=True)

    configure_gradient_clipping = clip_by_norm

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=h.learning_rate, betas=tuple(h.betas), weight_decay=h.weight_decay,
            **fused(self, on_cpu=False),
        )  # fmt: skip
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(h.lr_milestones), gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": steps}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Mine at the first batch of an epoch. A run that resumes mid-epoch has its positives in the checkpoint.
        every, epoch = self.hparams["refresh_every"], self.current_epoch
        if batch_idx == 0 and every and epoch and epoch % every == 0:
            self.loss.mine()

    # -- start and resume ----------------------------------------------------------------------------------------------

    @property
    def data(self) -> PretrainingData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            refuse_half_weights(self, "the memory banks, whose rows move in small steps")
        if not self.loss.num_items:
            self.loss.allocate(len(self.data.listing), self.hparams["out_dim"]).to(self.device)
            if stage == "fit" and self.trainer.ckpt_path is None:
                self._start()
        # DDP would broadcast the banks, 0.24 to 1.8 GB and already equal, at every step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers() if not name.startswith("model.")]
        )

    def _start(self) -> None:
        path = self.hparams["warm_start"]
        if self._without_files:
            self.loss.step = 1
            self.loss.normalizer.fill_(1000.0)
            self.loss.positive_set.copy_(torch.arange(self.loss.positives, device=self.device))
        elif path is not None:
            start = load_pretraining(path, self.model)
            self._require_listing(
                f"model.warm_start={path}", start.listing_fingerprint, "pre-train AVID on these files first"
            )
            self.model.load_state_dict(start.model)
            self.loss.load_banks(start.memory)
        elif self.loss.positives:
            raise ValueError(
                "CMA starts from a trained AVID: set --model.warm_start to its .../checkpoints/last.ckpt. "
                "`assemble reproduce avid` sets it for the stages of the tables"
            )

    def _require_listing(self, what: str, theirs: str | None, otherwise: str) -> None:
        ours = self.data.listing.fingerprint()
        if theirs and theirs != ours:
            raise ValueError(
                f"{what} was trained on another data set listing (fingerprint {theirs[:12]}, this one is {ours[:12]}): "
                "memory banks have one row per clip and need the same files in the same order. Restore the files, "
                f"or {otherwise}"
            )

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:
            self.loss.synchronize()
            if not self._without_files:
                self.loss.mine()

    def start_without_files(self) -> None:
        """Skip warm start and mining when training starts, to measure the cost of a step without files."""
        self._without_files = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["listing_fingerprint"] = self.data.listing.fingerprint()
        # Users of the audio encoder must normalize its input the same way.
        checkpoint["audio_statistics"] = {
            name: torch.from_numpy(values) for name, values in self.data.statistics_of_bins.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        again = f"move {self.trainer.default_root_dir} away to start again"
        self._require_listing("this checkpoint", checkpoint["listing_fingerprint"], again)

    # -- evaluation after training -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._held_out = RowsOncePerSample("video", "audio")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        video, audio = self.model(batch["video"], batch["audio"])
        unit = {"video": F.normalize(video.float(), dim=1), "audio": F.normalize(audio.float(), dim=1)}
        self._held_out.update(batch["index"], **unit)

    def on_test_epoch_end(self) -> None:
        index, rows = self._held_out.compute(self.device)
        video, audio = rows["video"], rows["audio"]
        banks = self.loss.video_bank.vectors, self.loss.audio_bank.vectors
        metrics = monitoring.cross_modal_retrieval(video, audio)
        metrics |= monitoring.bank_agreement(
            *banks, self.data.listing.labels, self.loss.positives or self.hparams["mined"]
        )
        metrics |= self.progress.compute(self.loss.normalizer)
        metrics["bank_norm_error"] = torch.stack([(bank.norm(dim=1) - 1.0).abs().max() for bank in banks]).max()
        self.log_dict({f"test/{name}": torch.as_tensor(value) for name, value in metrics.items()})
        if self.trainer.is_global_zero:
            monitoring.draw_neighbors(self, self.data.held_out_clips, video, audio, index)
