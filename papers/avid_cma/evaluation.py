"""Downstream protocols: fine-tuning on actions, linear probes on video, linear support vector machines on sound."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor, nn

from common.metrics.classification import hits, mean_clip_probability
from common.metrics.gathering import OncePerSample, first_occurrences, gather_rows
from common.metrics.linear_svm import classify_windowed
from papers.avid_cma.weights import load_into_encoder

Batch = dict[str, Tensor]

PROBE_LAYERS: dict[str, int] = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}
SOUND_LAYERS: dict[str, int] = {"conv5x": 4, "conv4x": 6, "conv3x": 8, "conv2x": 12}


class ActionRecognition(pl.LightningModule):
    """Fine-tuning of a video encoder on labelled actions.

    During the first ``warmup_epochs`` only the classifier learns; the encoder runs in training mode all the same, so
    that its batch normalisation already moves to the new data. Then everything learns. The trainer's ``max_epochs``
    is the sum of both phases, and the weights of the last epoch are tested.

    Test batches hold several clips of every video: ``test/video_top1`` and ``test/video_top5`` judge the mean of
    their class probabilities. A second test loader, if there is one, holds random clips, alone or several to an item,
    and ``test/clip_top1`` is the accuracy of a single one of these. Every video counts once, whatever the number of
    processes.

    Args:
        video_encoder: Encoder with ``feature_dim`` features; its weights are replaced by those of ``pretrained``.
        num_classes: Number of actions.
        pretrained: Checkpoint with the pre-trained encoder; None trains from the initial weights.
        dropout: Share of features dropped in front of the classifier.
        learning_rate: Of Adam, in both phases.
        weight_decay: L2 in the gradient.
        warmup_epochs: Epochs in which only the classifier learns.
        milestones: Epochs after the warm-up at which the learning rate falls.
        gamma: Factor of the learning rate at every milestone.

    Shapes:
        Training batch: ``video`` [B, 3, T, H, W], ``label`` [B]. Test batch: ``video`` [B, clips, 3, T, H, W],
        ``label`` [B], ``index`` [B].

    Source: specification 10.1.
    """

    def __init__(
        self,
        video_encoder: nn.Module,
        num_classes: int,
        pretrained: str | None = None,
        dropout: float = 0.5,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_epochs: int = 5,
        milestones: Sequence[int] = (6, 10, 14),
        gamma: float = 0.3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["video_encoder"])
        self.video_encoder = video_encoder
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(int(video_encoder.feature_dim), num_classes)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.pretrained = pretrained
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.milestones = list(milestones)
        self.gamma = gamma
        self.video_meter = OncePerSample("top1", "top5")
        self.clip_meter = OncePerSample("top1")

    def setup(self, stage: str) -> None:
        """Check the classes and, before training only, load the pre-trained encoder."""
        _check_num_classes(self.trainer, self.num_classes)
        if stage == "fit" and self.pretrained is not None:
            load_into_encoder(self.video_encoder, self.pretrained, "video")

    @property
    def warming_up(self) -> bool:
        """Whether only the classifier learns in the current epoch."""
        return self.current_epoch < self.warmup_epochs

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B, num_classes] of videos [B, 3, T, H, W]."""
        return self._classify(self.video_encoder(video))

    def _classify(self, features: Tensor) -> Tensor:
        # At full precision also under autocast: rounded to bfloat16, the two best classes of a clip often tie.
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(self.dropout(features.to(self.classifier.weight.dtype)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one clip a video."""
        # With one process the encoder needs no gradient in the warm-up. Data parallelism insists on one for every
        # parameter it manages, so there it is computed and dropped before the step.
        with torch.set_grad_enabled(not self.warming_up or self.trainer.world_size > 1):
            features = self.video_encoder(batch["video"])
        logits = self._classify(features)
        loss = F.cross_entropy(logits, batch["label"])
        size = len(batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        top1 = 100 * hits(logits.detach(), batch["label"]).mean()
        self.log("train/clip_top1", top1, batch_size=size)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the encoder as it is during the warm-up, and leave no gradient behind for the first full step."""
        if self.warming_up:
            for parameter in self.video_encoder.parameters():
                parameter.grad = None

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self.video_meter.reset()
        self.clip_meter.reset()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Classify the clips of a few videos."""
        logits = _logits_of_clips(self, batch["video"])
        if dataloader_idx == 0:
            scores = mean_clip_probability(logits)
            top1, top5 = hits(scores, batch["label"]), hits(scores, batch["label"], 5)
            self.video_meter.update(batch["index"], top1=top1, top5=top5)
        else:
            labels = batch["label"][:, None].expand(logits.shape[:2])
            self.clip_meter.update(batch["index"], top1=hits(logits, labels).mean(1))

    def on_test_epoch_end(self) -> None:
        """Log the accuracies in percent."""
        video = self.video_meter.compute(self.device)
        metrics = {"test/video_top1": 100 * video["top1"], "test/video_top5": 100 * video["top5"]}
        if _number_of_test_loaders(self.trainer) > 1:
            metrics["test/clip_top1"] = 100 * self.clip_meter.compute(self.device)["top1"]
        metrics["test/videos"] = video["count"]
        _log_results(self, metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the learning rate falls at the milestones, which count from the end of the warm-up."""
        return _adam_with_steps(
            self.parameters(),
            self.learning_rate,
            self.weight_decay,
            [self.warmup_epochs + epoch for epoch in self.milestones],
            self.gamma,
        )


class Probe(nn.Module):
    """Linear classifier on the maxima of a feature map over a coarse grid, normalised over the batch.

    Args:
        channels: Channels of the feature map.
        size: Side of the grid; time is reduced to one.
        num_classes: Number of classes.

    Shapes:
        [B, channels, T, H, W] -> [B, num_classes]

    Source: specification 10.2.
    """

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveMaxPool3d((1, size, size))
        self.norm = nn.BatchNorm1d(channels * size * size)
        self.linear = nn.Linear(channels * size * size, num_classes)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Logits, at full precision also under autocast."""
        with torch.autocast(feature_map.device.type, enabled=False):
            features = self.pool(feature_map.to(self.linear.weight.dtype)).flatten(1)
            return self.linear(self.norm(features))


class LinearProbes(pl.LightningModule):
    """Linear classifiers on the stages of a frozen video encoder, one for each stage, trained side by side.

    Tested as ``ActionRecognition`` on several clips a video: ``test/<stage>_top1`` for every stage and
    ``test/best_top1``, the best of them.

    Args:
        video_encoder: Encoder with ``forward_stages`` and ``stage_channels``.
        num_classes: Number of classes.
        pretrained: Checkpoint with the pre-trained encoder; None probes the initial weights.
        layers: Stage -> side of the grid of maxima; by default conv2x: 12, conv3x: 8, conv4x: 6, conv5x: 4.
        learning_rate: Of Adam.
        weight_decay: L2 in the gradient.
        milestones: Epochs at which the learning rate falls.
        gamma: Factor of the learning rate at every milestone.
        official_quirks: Run the frozen encoder in training mode, as the released code does by accident: its batch
            normalisation then uses, and drifts to, the statistics of the probed data.

    Shapes:
        As ``ActionRecognition``.

    Source: specification 10.2.
    """

    def __init__(
        self,
        video_encoder: nn.Module,
        num_classes: int,
        pretrained: str | None = None,
        layers: dict[str, int] | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        milestones: Sequence[int] = (6, 9),
        gamma: float = 0.1,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["video_encoder"])
        self.layers = dict(PROBE_LAYERS if layers is None else layers)
        channels = _stage_channels(video_encoder, "video_encoder", self.layers)
        self.video_encoder = video_encoder.requires_grad_(False)
        self.probes = nn.ModuleDict(
            {layer: Probe(channels[layer], size, num_classes) for layer, size in self.layers.items()}
        )
        self.num_classes = num_classes
        self.pretrained = pretrained
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.milestones = list(milestones)
        self.gamma = gamma
        self.official_quirks = official_quirks
        self.meter = OncePerSample(*self.layers)

    def setup(self, stage: str) -> None:
        """Check the classes and, before training only, load the pre-trained encoder."""
        _check_num_classes(self.trainer, self.num_classes)
        if stage == "fit" and self.pretrained is not None:
            load_into_encoder(self.video_encoder, self.pretrained, "video")

    def on_train_start(self) -> None:
        """Freeze the statistics of the encoder, too; also when a run is resumed in the middle of an epoch."""
        self.video_encoder.train(self.official_quirks)

    def on_train_epoch_start(self) -> None:
        """The same, should anything have put the whole module into training mode since."""
        self.video_encoder.train(self.official_quirks)

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Logits [B, num_classes] of every stage for videos [B, 3, T, H, W]."""
        with torch.no_grad():
            stages = self.video_encoder.forward_stages(video)  # type: ignore[operator]
        return {layer: probe(stages[layer]) for layer, probe in self.probes.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the cross-entropies of all probes."""
        logits = self(batch["video"])
        losses = {layer: F.cross_entropy(scores, batch["label"]) for layer, scores in logits.items()}
        loss = torch.stack(list(losses.values())).sum()
        size = len(batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        each = {f"train/{layer}_loss": value.detach() for layer, value in losses.items()}
        self.log_dict(each, batch_size=size)
        return loss

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self.meter.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Classify the clips of a few videos with every probe."""
        logits = _logits_of_clips(self, batch["video"])
        top1 = {layer: hits(mean_clip_probability(scores), batch["label"]) for layer, scores in logits.items()}
        self.meter.update(batch["index"], **top1)

    def on_test_epoch_end(self) -> None:
        """Log the accuracies in percent."""
        means = self.meter.compute(self.device)
        _log_results(self, _by_layer({layer: 100 * means[layer] for layer in self.layers}))
        _log_results(self, {"test/videos": means["count"]})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the probes with a learning rate that falls at the milestones."""
        return _adam_with_steps(
            self.probes.parameters(), self.learning_rate, self.weight_decay, self.milestones, self.gamma
        )


class SoundSVM(pl.LightningModule):
    """Linear support vector machines on the stages of an audio encoder. Only tested, never fitted by a trainer.

    ``trainer.test`` takes two loaders of files seen as several windows each: augmented windows to learn from and
    regular ones to be judged on. With ``folds`` above one both hold all files, and each fold is judged by a machine
    that learnt from the others; the result is the mean over folds. With one fold the loaders hold different files.
    Logged are ``test/<stage>_top1`` for every stage and ``test/best_top1``, the best of them.

    Several processes share the extraction of features and then, stage by stage, the fitting. Every file counts once.
    Memory: the features of one stage are ``files * windows * dims * 4`` bytes a loader (ESC-50 at full size: 2,000 *
    10 * 9,216 * 4 = 737 MB), and all stages of both loaders are held (5.6 GB); while one machine is fitted,
    scikit-learn needs about seven times the size of its training rows beside that (float64 as index-value pairs).

    Args:
        audio_encoder: Encoder with ``forward_stages``.
        pretrained: Checkpoint with the pre-trained encoder; None judges the initial weights.
        layers: Stage -> side of the grid of means; by default conv5x: 4, conv4x: 6, conv3x: 8, conv2x: 12.
        C: Weight of the errors: 10 for ESC-50, 1 for DCASE.
        folds: Number of folds: 5 for ESC-50; 1 for a fixed division into training and test files.
        standardise_epsilon: Added to the standard deviation of every feature.
        loss: ``hinge``, or ``squared_hinge`` as an older version of the protocol.
        tolerance: When the solver stops.
        max_iterations: When the solver stops at the latest; it rarely needs to converge.
        random_state: Seed of the solver.
        jobs: Machines fitted at a time, each in a process with the memory stated above.

    Shapes:
        Batch: ``audio`` [B, windows, 1, T, F], ``label`` [B], ``index`` [B], and ``fold`` [B] when there are folds.

    Source: specification 10.3.
    """

    def __init__(
        self,
        audio_encoder: nn.Module,
        pretrained: str | None = None,
        layers: dict[str, int] | None = None,
        C: float = 10.0,
        folds: int = 5,
        standardise_epsilon: float = 0.01,
        loss: Literal["hinge", "squared_hinge"] = "hinge",
        tolerance: float = 1e-4,
        max_iterations: int = 200,
        random_state: int = 0,
        jobs: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["audio_encoder"])
        if folds < 1:
            raise ValueError(f"folds: expected at least 1, got {folds}")
        self.layers = dict(SOUND_LAYERS if layers is None else layers)
        _stage_channels(audio_encoder, "audio_encoder", self.layers)
        self.audio_encoder = audio_encoder.requires_grad_(False)
        self.pretrained = pretrained
        self.C = C
        self.folds = folds
        self.standardise_epsilon = standardise_epsilon
        self.loss = loss
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.random_state = random_state
        self.jobs = jobs
        self.tables: list[FeatureTable] = []

    def setup(self, stage: str) -> None:
        """Load the pre-trained encoder."""
        if stage == "test" and self.pretrained is not None:
            load_into_encoder(self.audio_encoder, self.pretrained, "audio")

    def configure_optimizers(self) -> None:
        """None: nothing here is learnt by gradients."""
        return None

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        """Features [B, channels * side * side] of every stage for spectrograms [B, 1, T, F]."""
        stages = self.audio_encoder.forward_stages(audio)  # type: ignore[operator]
        return {
            layer: F.adaptive_avg_pool2d(stages[layer].float(), size).flatten(1) for layer, size in self.layers.items()
        }

    def on_test_epoch_start(self) -> None:
        """Prepare one empty table of features for each loader."""
        if _number_of_test_loaders(self.trainer) != 2:
            raise ValueError("test_dataloaders: SoundSVM needs two of them, training windows and test windows")
        self.tables = [FeatureTable(self.layers), FeatureTable(self.layers)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Extract the features of a few files."""
        audio = batch["audio"]
        features = self(audio.flatten(0, 1))
        if not self.tables[dataloader_idx].index:
            loaders: Any = self.trainer.test_dataloaders
            loader = loaders[dataloader_idx]
            self.tables[dataloader_idx].reserve(len(loader) * (loader.batch_size or len(audio)))
        windows = {layer: rows.unflatten(0, audio.shape[:2]).cpu().numpy() for layer, rows in features.items()}
        fold = batch["fold"] if self.folds > 1 else torch.zeros_like(batch["label"])
        self.tables[dataloader_idx].append(windows, batch["index"], batch["label"], fold)

    def on_test_epoch_end(self) -> None:
        """Fit and judge the machines, and log the accuracies in percent."""
        world = self.trainer.world_size
        # Fitting takes longer than a collective usually waits, so the processes meet in a patient group of their own;
        # it also moves the features without the accelerator.
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=2)) if world > 1 else None
        accuracy = torch.zeros(len(self.layers), dtype=torch.float64)
        train, test = (table.gather_labels(group) for table in self.tables)
        own: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for position, layer in enumerate(self.layers):
            train_rows = self.tables[0].take_features(layer, train, group, position % world)
            test_rows = self.tables[1].take_features(layer, test, group, position % world)
            if train_rows is not None and test_rows is not None:
                own[position] = (train_rows, test_rows)
        for position, right in self._judge(own, train, test).items():
            accuracy[position] = right
        if group is not None:
            dist.all_reduce(accuracy, group=group)
            dist.destroy_process_group(group)
        self.tables = []
        _log_results(self, _by_layer(dict(zip(self.layers, accuracy))))
        _log_results(self, {"test/files": torch.tensor(float(len(test.label)))})

    def _judge(
        self, features: Mapping[int, tuple[np.ndarray, np.ndarray]], train: "FileLabels", test: "FileLabels"
    ) -> dict[int, float]:
        """For every stage the mean over folds of the share of test files classified correctly, in percent."""
        folds = np.unique(train.fold)
        if len(folds) != self.folds:
            raise ValueError(f"folds: {self.folds} expected, but the training files belong to folds {folds.tolist()}")
        options = {
            "C": self.C,
            "loss": self.loss,
            "tol": self.tolerance,
            "max_iter": self.max_iterations,
            "random_state": self.random_state,
        }
        tasks = [(position, fold) for position in features for fold in folds]
        guesses = Parallel(n_jobs=self.jobs)(
            delayed(classify_windowed)(
                *features[position],
                train.label,
                learn=train.fold != fold if self.folds > 1 else np.ones(len(train.fold), dtype=bool),
                judge=test.fold == fold,
                standardise_epsilon=self.standardise_epsilon,
                options=options,
            )
            for position, fold in tasks
        )
        shares: dict[int, list[float]] = {position: [] for position in features}
        for (position, fold), guess in zip(tasks, guesses):
            shares[position].append(100 * float(np.mean(guess == test.label[test.fold == fold])))
        return {position: float(np.mean(share)) for position, share in shares.items()}


@dataclass(frozen=True)
class FileLabels:
    """What is known of the files of a loader, one entry a file in ascending order of the index.

    Attributes:
        keep: Row of every file in the joined rows of all processes.
        rows: How many rows each process has.
        label: Class of every file.
        fold: Fold of every file.
    """

    keep: np.ndarray
    rows: tuple[int, ...]
    label: np.ndarray
    fold: np.ndarray


class FeatureTable:
    """Features of the files of one loader that this process has seen, stage by stage in float32 on the host.

    Args:
        layers: The stages.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.index: list[Tensor] = []
        self.label: list[Tensor] = []
        self.fold: list[Tensor] = []
        self.features: dict[str, np.ndarray] = {layer: np.empty((0,), np.float32) for layer in layers}
        self._capacity = 0
        self._filled = 0

    def reserve(self, files: int) -> None:
        """Say how many files are expected, so that the features are never copied to make room."""
        self._capacity = files

    def append(self, features: Mapping[str, np.ndarray], index: Tensor, label: Tensor, fold: Tensor) -> None:
        """Add files: features [B, windows, dims] of every stage, index [B], label [B], fold [B]."""
        end = self._filled + len(index)
        for layer, rows in features.items():
            table = self.features[layer]
            if len(table) < end:
                # Memory is taken when a row is written, so a generous capacity costs nothing.
                grown = np.empty((max(self._capacity, 2 * len(table), end), *rows.shape[1:]), np.float32)
                grown[: self._filled] = table[: self._filled] if self._filled else 0
                table = self.features[layer] = grown
            table[self._filled : end] = rows
        self._filled = end
        self.index.append(index.long().cpu())
        self.label.append(label.long().cpu())
        self.fold.append(fold.long().cpu())

    def gather_labels(self, group: dist.ProcessGroup | None) -> FileLabels:
        """The files of all processes, each once."""
        empty = torch.zeros(0, dtype=torch.int64)
        own = torch.stack([torch.cat([empty, *part]) for part in (self.index, self.label, self.fold)], dim=1)
        index, label, fold = gather_rows(own, group).unbind(1)
        keep = first_occurrences(index)
        counts = gather_rows(torch.tensor([len(own)]), group)
        return FileLabels(keep.numpy(), tuple(counts.tolist()), label[keep].numpy(), fold[keep].numpy())

    def take_features(
        self, layer: str, labels: FileLabels, group: dist.ProcessGroup | None, owner: int
    ) -> np.ndarray | None:
        """Hand the features of a stage over to one process, and forget them here.

        Args:
            layer: The stage.
            labels: From ``gather_labels``.
            group: Processes that take part, with host memory.
            owner: Rank of the process that gets the features.

        Returns:
            [files, windows, dims] in the order of ``labels`` on the owner, None on the others.
        """
        own = self.features.pop(layer)[: self._filled]
        if group is not None:
            rank = dist.get_rank(group)
            shapes: list[Any] = [None] * len(labels.rows)
            dist.all_gather_object(shapes, own.shape[1:], group=group)
            if rank != owner:
                if len(own):
                    dist.send(torch.from_numpy(own), owner, group)
                return None
            starts = np.cumsum((0, *labels.rows))
            # A process without files does not know the shape of one.
            joined = np.empty((starts[-1], *max(shapes, key=len)), np.float32)
            for source, (start, end) in enumerate(pairwise(starts.tolist())):
                if end == start:
                    continue
                if source == rank:
                    joined[start:end] = own
                else:
                    dist.recv(torch.from_numpy(joined[start:end]), source, group)
            own = joined
        in_order = len(labels.keep) == len(own) and np.array_equal(labels.keep, np.arange(len(own)))
        return own if in_order else own[labels.keep]


def _check_num_classes(trainer: pl.Trainer, num_classes: int) -> None:
    """Stop when the data module says that its data have another number of classes."""
    found = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
    if found is not None and found != num_classes:
        raise ValueError(f"num_classes: the model has {num_classes}, but the data have {found}; set it to {found}")


def _stage_channels(encoder: nn.Module, field: str, layers: Mapping[str, int]) -> Mapping[str, int]:
    """Channels of every stage of an encoder, after a check that the wanted stages exist."""
    channels = getattr(encoder, "stage_channels", None)
    if channels is None:
        raise ValueError(f"{field}: {type(encoder).__name__} does not say its stage_channels, so it cannot be probed")
    unknown = sorted(set(layers) - set(channels))
    if unknown or not layers:
        raise ValueError(f"layers: expected some of {', '.join(channels)}, got {', '.join(unknown) or 'none'}")
    return channels


def _logits_of_clips(module: nn.Module, clips: Tensor) -> Any:
    """Apply a module to clips [B, clips, 3, T, H, W] or [B, 3, T, H, W]; every output becomes [B, clips, ...]."""
    if clips.ndim == 5:
        clips = clips.unsqueeze(1)
    shape = clips.shape[:2]
    output = module(clips.flatten(0, 1))
    if isinstance(output, dict):
        return {name: value.unflatten(0, shape) for name, value in output.items()}
    return output.unflatten(0, shape)


def _adam_with_steps(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, milestones: list[int], gamma: float
) -> OptimizerLRScheduler:
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def _number_of_test_loaders(trainer: pl.Trainer) -> int:
    loaders = trainer.test_dataloaders
    return len(loaders) if isinstance(loaders, list | tuple) else 1


def _by_layer(accuracy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the logged accuracies of every stage and of the best one."""
    named = {f"test/{layer}_top1": value for layer, value in accuracy.items()}
    return {**named, "test/best_top1": torch.stack(list(accuracy.values())).max()}


def _log_results(module: pl.LightningModule, metrics: Mapping[str, Tensor]) -> None:
    """Log what all processes have computed alike; averaging over them again could only round it."""
    module.log_dict({name: value.float().to(module.device) for name, value in metrics.items()})
