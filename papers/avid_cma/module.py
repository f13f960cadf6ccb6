"""AVID and CMA as LightningModules: the paper's algorithm, readable top to bottom.

AVID (stage 1) trains two encoders to find, in a memory bank, the stored vector of their own instance: across
modalities (Cross, the method), within one (Self) or both (Joint). CMA (stage 2) starts from a trained AVID, mines for
every instance those others that are similar in both modalities, and adds them as positives within each modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.encoders.heads import ProjectionHead
from common.metrics.gathering import RowsOncePerSample
from common.training.optimisers import fused
from papers.avid_cma import monitoring
from papers.avid_cma.data import PretrainingData
from papers.avid_cma.loss import BankObjective, CrossModalAgreement, InstanceDiscrimination
from papers.avid_cma.model import AudioVisualModel
from papers.avid_cma.weights import load_pretraining


class AVID(pl.LightningModule):
    """Audio-visual instance discrimination (specification 4 to 6).

    Args:
        video_encoder, audio_encoder: backbones with a `feature_dim`.
        hidden_dim, out_dim, head_layers, head_batch_norm, head_output_batch_norm: projection heads, one per modality
            (specification 3.3).
        negatives: bank rows drawn per anchor, K.
        temperature: T of the scores.
        bank_momentum: share of the old bank row that an update keeps; a pair gives (video, audio).
        cross_weight, within_weight: Cross (1, 0), Self (0, 1), Joint (1, 1).
        estimator: `nce`, the paper's, or `info_nce`.
        learning_rate, betas, weight_decay: Adam; the weight decay is L2 in the gradient (specification 8).
        lr_warmup_steps: linear warm-up of the learning rate; 0, the paper's, for none.
        lr_final_share: cosine decay to this share of the learning rate; 1, the paper's, for a constant rate.
        lr_milestones: epochs at which the learning rate falls to a tenth, in the authors' ablations (specification 11);
            not together with a warm-up or a decay.
        warm_start: checkpoint of an earlier AVID stage; model, banks and normaliser are taken over, the optimiser and
            the epoch counter start fresh.
        mined: positives per instance in the diagnosis of mining that follows training; AVID trains on none.
        seed: seed of the negatives.

    Raises:
        ValueError: in setup, when a warm start belongs to another data set listing.
    """

    criterion: BankObjective | None

    def __init__(
        self,
        video_encoder: nn.Module,
        audio_encoder: nn.Module,
        hidden_dim: int = 512,
        out_dim: int = 128,
        head_layers: int = 3,
        head_batch_norm: bool = False,
        head_output_batch_norm: bool = False,
        negatives: int = 1024,
        temperature: float = 0.07,
        bank_momentum: float | tuple[float, float] = 0.5,
        cross_weight: float = 1.0,
        within_weight: float = 0.0,
        estimator: Literal["nce", "info_nce"] = "nce",
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-5,
        lr_warmup_steps: int = 0,
        lr_final_share: float = 1.0,
        lr_milestones: Sequence[int] = (),
        warm_start: str | None = None,
        mined: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["video_encoder", "audio_encoder"], logger=False)

        def head(encoder: nn.Module) -> ProjectionHead:
            width: Any = encoder.feature_dim
            return ProjectionHead(width, hidden_dim, out_dim, head_layers, head_batch_norm, head_output_batch_norm)

        self.model = AudioVisualModel(video_encoder, audio_encoder, head(video_encoder), head(audio_encoder))
        # Built in setup, when the number of instances is known; it is one bank row per clip of the listing.
        self.criterion = None
        self._listing_fingerprint = ""
        self.mined = mined
        self.progress = monitoring.Progress()

    # -- training ------------------------------------------------------------------------------------------------------

    def build_criterion(self, num_items: int) -> BankObjective:
        """The criterion with its memory banks for a listing of `num_items` clips."""
        h: Any = self.hparams
        return InstanceDiscrimination(
            num_items, h.out_dim, h.negatives, h.temperature, h.bank_momentum, h.cross_weight, h.within_weight,
            h.estimator, h.seed,
        )  # fmt: skip

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        video, audio = self.model(batch["video"], batch["audio"])
        assert self.criterion is not None
        terms = self.criterion(video, audio, batch["index"])
        self.progress.update(terms["loss"].detach(), self.criterion.normaliser)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(video))
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        video, audio = self.model(batch["video"], batch["audio"])
        assert self.criterion is not None
        terms = self.criterion(video, audio, batch["index"], update=False)
        self.log_dict({f"val/{name}": v for name, v in terms.items()}, batch_size=len(video), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        video, audio = self.model(batch["video"], batch["audio"])
        return {"index": batch["index"], "video": video, "audio": audio}

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=h.learning_rate, betas=tuple(h.betas), weight_decay=h.weight_decay,
            **fused(self, on_cpu=False),
        )  # fmt: skip
        scheduled = h.lr_warmup_steps > 0 or h.lr_final_share != 1.0
        if h.lr_milestones and scheduled:
            raise ValueError(
                "model.lr_milestones does not go with lr_warmup_steps or lr_final_share; choose one schedule"
            )
        if h.lr_milestones:
            steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(h.lr_milestones), gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "epoch"}}
        if not scheduled:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(h.lr_warmup_steps, 1), 1.0, h.lr_warmup_steps)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, max(total - h.lr_warmup_steps, 1), h.learning_rate * h.lr_final_share
        )
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [h.lr_warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    @property
    def data(self) -> PretrainingData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        listing = self.data.listing
        fingerprint = listing.fingerprint()
        if self.criterion is None:
            # Its own generator: the banks must not depend on how many numbers were drawn on the way here, for example
            # by a first run that computed audio statistics which a second one finds.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.hparams["seed"])
                self.criterion = self.build_criterion(len(listing)).to(self.device)
            if stage == "fit" and self.trainer.ckpt_path is None and self.hparams["warm_start"]:
                self.take_over(self.hparams["warm_start"], fingerprint)
        self._require_listing("this checkpoint", self._listing_fingerprint, fingerprint)
        self._listing_fingerprint = fingerprint
        # DDP would broadcast every buffer at every step: 0.24 to 1.8 GB of banks that are equal already.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers() if not name.startswith("model.")]
        )

    def _require_listing(self, what: str, theirs: str | None, ours: str) -> None:
        if theirs and ours and theirs != ours:
            raise ValueError(
                f"{what} was trained on another data set listing (fingerprint {theirs[:12]}, this one is {ours[:12]}): "
                "memory banks hold one row per clip and only fit the very same files in the same order. Use the data "
                "set it was trained on; the encoders alone can go anywhere (model.pretrained of a downstream recipe)."
            )

    def take_over(self, path: str, fingerprint: str) -> None:
        """Load model, banks and normaliser of an AVID stage.

        Raises:
            ValueError: its banks belong to another listing.
        """
        assert self.criterion is not None
        state = load_pretraining(path, self.model)
        self._require_listing(f"model.warm_start={path}", state.listing_fingerprint, fingerprint)
        self.model.load_state_dict(state.model)
        if state.video_bank is None or state.audio_bank is None:
            raise ValueError(f"model.warm_start={path} holds no memory banks; give the checkpoint of an AVID stage")
        self.criterion.load_from_avid(
            {
                "video_bank.vectors": state.video_bank,
                "audio_bank.vectors": state.audio_bank,
                "normaliser": state.normaliser,
            }
        )

    def on_fit_start(self) -> None:
        assert self.criterion is not None
        if self.trainer.ckpt_path is None:
            self.criterion.initialise()

    def check_replicas(self) -> None:
        """Raise when the banks of two ranks differ."""
        assert self.criterion is not None
        self.criterion.check_replicas()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.criterion is not None
        checkpoint["listing_fingerprint"] = self._listing_fingerprint
        checkpoint["num_items"] = self.criterion.num_items
        # Whoever uses the audio encoder must normalise its input in the same way.
        checkpoint["audio_statistics"] = {
            name: torch.from_numpy(values) for name, values in self.data.statistics_of_bins.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.criterion is None:
            self.criterion = self.build_criterion(checkpoint["num_items"])
        elif self.criterion.num_items != checkpoint["num_items"]:
            raise ValueError(
                f"the checkpoint has memory banks of {checkpoint['num_items']} rows, the data set has "
                f"{self.criterion.num_items} clips: it belongs to another listing. Point data.dataset.root at the data "
                "set it was trained on, or start anew."
            )
        theirs = checkpoint.get("listing_fingerprint", "")
        self._require_listing("this checkpoint", theirs, self._listing_fingerprint)
        self._listing_fingerprint = theirs

    # -- what is measured after training -------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._held_out = RowsOncePerSample("video", "audio")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        video, audio = self.model(batch["video"], batch["audio"])
        unit = {"video": F.normalize(video.float(), dim=1), "audio": F.normalize(audio.float(), dim=1)}
        self._held_out.update(batch["index"], **unit)

    def on_test_epoch_end(self) -> None:
        assert self.criterion is not None
        index, rows = self._held_out.compute(self.device)
        video, audio = rows["video"], rows["audio"]
        banks = self.criterion.video_bank.vectors, self.criterion.audio_bank.vectors
        metrics = monitoring.cross_modal_retrieval(video, audio)
        metrics |= monitoring.bank_agreement(*banks, self.data.listing.labels, self.mined)
        metrics |= self.progress.compute(self.criterion.normaliser) | monitoring.bank_norms(*banks)
        self.log_dict({f"test/{name}": torch.as_tensor(value) for name, value in metrics.items()})
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "media" / "neighbours.png"
            monitoring.draw_neighbours(self, self.data.held_out_clips, video, audio, index, path)


class CMA(AVID):
    """Cross-modal agreement on top of AVID (specification 7).

    Args:
        within_negatives: how many of the K negatives the within-modal terms use; -1 for all.
        positives: mined positives per instance.
        agreement: consensus (the method), union, video or audio.
        instance_cross, instance_within, positive_cross, positive_within: weights of the four terms.
        refresh_every: the positives are mined again at the start of every so many epochs; 0 for never.
        official_quirks: lets an instance be its own negative, as in the released code.
        kwargs: see AVID, without its weights and `mined`; CMA needs a `warm_start`.
    """

    def __init__(
        self,
        *,
        within_negatives: int = 64,
        positives: int = 32,
        agreement: Literal["consensus", "union", "video", "audio"] = "consensus",
        instance_cross: float = 1.0,
        instance_within: float = 0.0,
        positive_cross: float = 0.0,
        positive_within: float = 1.0,
        refresh_every: int = 5,
        official_quirks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(cross_weight=1.0, within_weight=0.0, mined=positives, **kwargs)
        self.save_hyperparameters(ignore=["video_encoder", "audio_encoder"], logger=False)

    def build_criterion(self, num_items: int) -> BankObjective:
        h: Any = self.hparams
        return CrossModalAgreement(
            num_items, h.out_dim, h.negatives, h.within_negatives, h.positives, h.agreement, h.instance_cross,
            h.instance_within, h.positive_cross, h.positive_within, h.temperature, h.bank_momentum, h.estimator,
            h.official_quirks, h.seed,
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.hparams["warm_start"]:
            raise ValueError(
                "CMA starts from a trained AVID: set model.warm_start to its checkpoint. `assemble reproduce avid` "
                "trains AVID first for stages of the tables, such as avid_cma. For another recipe train the AVID that "
                "the comment on top of its file names by hand, and give --model.warm_start .../checkpoints/last.ckpt "
                "of that run (for ablation_cma: `assemble fit avid/ablation_cross`, at paper scale its epoch74.ckpt)"
            )
        super().setup(stage)

    def _mine(self) -> None:
        assert isinstance(self.criterion, CrossModalAgreement)
        self.criterion.mine(progress=self.trainer.is_global_zero)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self._mine()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # From the live banks, at the start of an epoch: batch 0 comes once per epoch, also after a resume at its
        # boundary. A run resumed in the middle of one has the set in its checkpoint.
        every, epoch = self.hparams["refresh_every"], self.current_epoch
        if batch_idx == 0 and every and epoch and epoch % every == 0:
            self._mine()
