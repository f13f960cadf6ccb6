"""XMC-GAN as a LightningModule: the paper's algorithm, readable from top to bottom.

An iteration has one or more minibatches. All but the last train only the discriminator. On the last, one pass through
generator and discriminator computes both losses, and both networks take a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from common.memory.collective import OverlappedAverage
from common.memory.groups import require_groups
from common.memory.momentum import MomentumPair
from common.metrics.gathering import OncePerSample
from common.monitoring.figures import draw_row
from common.protocols.captions import check_vocabulary
from common.protocols.generation import ImageEvaluation
from common.training.callbacks import batch_generator, own_rows
from common.training.optimizers import fused, refuse_half_weights
from common.training.selection import CheckpointChoice
from common.types import Fraction, Momentum, NonNegativeInt, PositiveFloat
from papers.xmc_gan.data import TextToImageData
from papers.xmc_gan.layers import keeping_statistics
from papers.xmc_gan.loss import XMCGANLoss, contrast, pair_loss, word_similarity
from papers.xmc_gan.networks import Captions, Discriminator, Generator, noise_of

Batch = dict[str, Any]


class XMCGANModule(pl.LightningModule):
    """Trains and tests text-to-image generation with contrastive losses ([1] to [6]).

    Args:
        discriminator: the discriminator; the region head is removed if no loss uses it.
        text_encoder: frozen; maps tokens and lengths to word and sentence vectors. Null if the data contain vectors.
        image_network: frozen network of the loss between generated and real images; null if `loss.weight_image_net` is
            0.
        evaluation: metrics of generated images in the test; null for none.
        average_momentum: weight of the old average in an update of the averaged generator.
        evaluated: generator to test: `average`, or `trained` for the weights of the last step.
        choice: selects the checkpoint to test in a stage without training; null keeps the weights.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        loss: XMCGANLoss,
        text_encoder: nn.Module | None = None,
        image_network: nn.Module | None = None,
        evaluation: ImageEvaluation | None = None,
        generator_learning_rate: PositiveFloat = 1e-4,
        discriminator_learning_rate: PositiveFloat = 4e-4,
        betas: tuple[Momentum, Momentum] = (0.5, 0.999),
        average_momentum: Fraction = 0.999,
        evaluated: Literal["average", "trained"] = "average",
        seed: NonNegativeInt = 0,
        choice: CheckpointChoice | None = None,
    ) -> None:
        super().__init__()
        parts = ["generator", "discriminator", "loss", "text_encoder", "image_network", "evaluation", "choice"]
        self.save_hyperparameters(ignore=parts, logger=False)
        self.automatic_optimization = False
        if loss.weights["image_net"] > 0 and image_network is None:
            raise ValueError(
                "model.image_network is null, but model.loss.weight_image_net is not 0: set it, or the weight to 0"
            )
        if loss.weights["real_word"] == 0:
            discriminator.regions = None
        self.generators = MomentumPair(generator)
        self.discriminator = discriminator
        self.loss = loss
        self.averages = OverlappedAverage()
        self.text_encoder = text_encoder
        self.image_network = image_network if loss.weights["image_net"] > 0 else None
        self.evaluation = evaluation
        self.choice = choice
        self.selected_by = "last" if choice is None else "best on test"  # like published numbers of the field [9.1]

    # -- networks ------------------------------------------------------------------------------------------------------

    @property
    def generator(self) -> Generator:
        return self.generators.query  # type: ignore[return-value]

    @property
    def average(self) -> Generator:
        """The moving average of the generator's weights, with the trained generator's running statistics."""
        return self.generators.key  # type: ignore[return-value]

    @property
    def measured(self) -> Generator:
        return self.generator if self.hparams["evaluated"] == "trained" else self.average

    def captions(self, batch: Batch) -> Captions:
        if self.text_encoder is None:
            return Captions(batch["words"], batch["sentence"], batch["length"])
        words, sentence = self.text_encoder(batch["tokens"], batch["length"])
        return Captions(words, sentence, batch["length"])

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        minibatches = self.minibatches(batch)
        losses = [self.discriminator_step(*minibatch) for minibatch in minibatches[:-1]]
        losses.append(self.joint_step(*minibatches[-1]))
        self.generators.update(self.hparams["average_momentum"])
        total = torch.stack(losses).sum()
        self.log("train/loss", total, batch_size=len(minibatches[0][1]))
        return total

    def discriminator_step(self, batch: Batch, z: Tensor) -> Tensor:
        """Train only the discriminator, without changing the generator's running statistics."""
        captions, real = self.captions(batch), batch["image"]
        with torch.no_grad(), keeping_statistics(self.generator):
            fake = self.generator(z, *captions)
        output = self.discriminator(torch.cat([real, fake]), captions.sentence)
        loss = self.loss.discriminator(output, captions).total
        self.set_gradients(loss, self.discriminator)
        _, optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        optimizer.step()
        return loss.detach()

    def joint_step(self, batch: Batch, z: Tensor) -> Tensor:
        """Train both networks from one graph. Compute both gradients before either network takes its step."""
        captions, real = self.captions(batch), batch["image"]
        fake = self.generator(z, *captions)
        output = self.discriminator(torch.cat([real, fake]), captions.sentence)
        of_discriminator = self.loss.discriminator(output, captions)
        features = [] if self.image_network is None else [self.image_network(images) for images in (real, fake)]
        of_generator = self.loss.generator(output, captions, features)
        self.set_gradients(of_discriminator.total, self.discriminator, retain_graph=True)
        self.set_gradients(of_generator.total, self.generator)
        # Lightning counts steps of wrapped optimizers, so only the generator's is wrapped: one step per iteration.
        generator_optimizer, _ = self.optimizers()  # type: ignore[attr-defined]
        _, discriminator_optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        discriminator_optimizer.step()
        generator_optimizer.step()
        logs = {**of_discriminator.logs, **of_generator.logs}
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(real))
        return (of_discriminator.total + of_generator.total).detach()

    def set_gradients(self, loss: Tensor, network: nn.Module, retain_graph: bool = False) -> None:
        """Set the gradients of `network`, averaged over processes. Leave other gradients as they are."""
        parameters = list(network.parameters())
        network.zero_grad()
        # Run the backward pass of the losses in float32. Average here, because DDP doesn't with manual optimization.
        with torch.autocast(self.device.type, enabled=False), self.averages.of(parameters, type(network).__name__):
            loss.backward(inputs=parameters, retain_graph=retain_graph)

    def minibatches(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        samples = len(batch["length"]) * self.trainer.world_size
        generator = batch_generator(self, self.hparams["seed"])
        z = own_rows(self, torch.randn(samples, self.generator.z_dim, generator=generator))
        parts = self.data.minibatches
        split = {name: value.chunk(parts) for name, value in batch.items() if isinstance(value, Tensor)}
        return [
            ({name: chunks[part] for name, chunks in split.items()}, noise) for part, noise in enumerate(z.chunk(parts))
        ]

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        return [
            torch.optim.Adam(self.generator.parameters(), h.generator_learning_rate, h.betas, **fused(self)),
            torch.optim.Adam(self.discriminator.parameters(), h.discriminator_learning_rate, h.betas, **fused(self)),
        ]

    # -- start ---------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> TextToImageData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        self._check_data()
        if self.evaluation is not None:
            self.evaluation.load_pretrained()
        if self.choice is not None:
            self.choice.require()
        if stage == "fit":
            self._check_training()
            if self.image_network is not None:
                self.image_network.load_pretrained()  # type: ignore[operator]

    def _check_data(self) -> None:
        data = self.data
        sizes = data.image_size, self.generator.image_size, self.discriminator.image_size
        if len(set(sizes)) > 1:
            raise ValueError(
                f"data.image_size, generator and discriminator have images of {sizes} pixels: set the same size; "
                "a list of n channels means 4 * 2^(n - 1) pixels"
            )
        if (self.text_encoder is None) == (data.text_features is None):
            raise ValueError("set either model.text_encoder or data.text_features, and the other to null")
        check_vocabulary(self, self.text_encoder)

    def _check_training(self) -> None:
        for field, size in (
            ("model.loss.negatives_group", self.loss.negatives_group),
            ("model.generator.batch_norm_group", self.generator.batch_norm_group),
        ):
            require_groups(field, size, self.data.batch_size, self.trainer.world_size)
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16 needs scaled losses, which XMC-GAN's joint step does not have: use bf16-mixed"
            )
        refuse_half_weights(self, "the small steps of the averaged generator to nothing")

    # -- test ----------------------------------------------------------------------------------------------------------

    def images_of(self, batch: Batch, seed: int) -> Tensor:
        """Generate images of a batch's captions with the generator under test. Noise depends on seed and sample."""
        z = noise_of(batch["index"], self.generator.z_dim, seed).to(self.device)
        return self.measured(z, *self.captions(batch))

    def on_test_start(self) -> None:
        self._matched = OncePerSample(*(["sentence"] if self.discriminator.regions is None else ["sentence", "word"]))
        self._chosen = {} if self.choice is None else self.choice.take(self)
        if self.evaluation is not None:
            self.evaluation.begin(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        if self.evaluation is not None:
            for repeat in range(self.evaluation.repeats):
                generated = self.images_of(batch, self.hparams["seed"] + (repeat << 32))
                self.evaluation.update(generated, batch, repeat)
        self.match_real_images(batch)

    def match_real_images(self, batch: Batch) -> None:
        """Measure how well the discriminator matches held-out images and texts, in groups of this process's batch.

        A group is as large as in training, or as the test batch if that is smaller.
        """
        captions = self.captions(batch)
        output = self.discriminator(batch["image"], captions.sentence)
        size = min(self.loss.negatives_group or self.data.batch_size, self.data.test_batch_size)
        for start in range(0, len(captions.length) - size + 1, size) if size > 1 else ():
            rows = slice(start, start + size)
            accuracy = {"sentence": pair_loss(output.pooled[rows], output.sentence[rows]).accuracy}
            if output.regions is not None:
                words = captions.words[rows], captions.length[rows], self.loss.word_gammas
                accuracy["word"] = contrast(word_similarity(output.regions[rows], *words)).accuracy
            self._matched.update(batch["index"][rows], **{name: x.expand(size) for name, x in accuracy.items()})

    def on_test_epoch_end(self) -> None:
        matched = self._matched.compute(self.device)
        if matched.pop("count") > 0:
            self.log_dict({f"test/real_{name}_accuracy": value.float() for name, value in matched.items()})
        if self.evaluation is not None:
            values = {**self._chosen, **self.evaluation.compute()}
            self.log_dict({f"test/{name}": value for name, value in values.items()})
        draw_row(self, partial(self.images_of, seed=0))
