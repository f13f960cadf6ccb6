"""XMC-GAN as a LightningModule: the paper's algorithm, readable top to bottom.

One iteration has one or more minibatches. All but the last train the discriminator alone; on the last, one pass through
generator and discriminator gives both losses, and both networks step at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from common.losses.adversarial import hinge_discriminator, hinge_generator
from common.memory.collective import average_in_place
from common.memory.momentum import MomentumPair
from common.metrics.gathering import OncePerSample
from common.training.optimisers import fused
from papers.xmc_gan import diagnostics
from papers.xmc_gan.data import TextToImageData
from papers.xmc_gan.evaluation import Evaluation, noise_of
from papers.xmc_gan.loss import Matching, Negatives, pair_loss, word_loss
from papers.xmc_gan.model import Captions, Discriminator, Generator, Judgement, keeping_statistics

Batch = dict[str, Any]


class XMCGAN(pl.LightningModule):
    """Text-to-image generation with contrastive losses (specification 1 to 6). A weight of 0 switches a loss off.

    Args:
        generator, discriminator: the networks; the discriminator's region head is dropped when no loss reads it.
        text_encoder: maps tokens and lengths to word and sentence vectors; null when the data brings them. What it has
            to learn it learns with the discriminator.
        image_network: frozen network of the loss between generated and real images; null when `weight_image_net` is 0.
        evaluation: what is measured of generated images in the test; null for none.
        weight_sentence: of the loss between images and sentences.
        weight_word: of the loss between regions and words.
        weight_image_d, weight_image_net: of the loss between generated and real images of the same caption, with
            features of the discriminator and of the frozen network.
        temperature: of all losses but that of words.
        word_gammas: sharpness in the loss of words: of the attention over regions, of the maximum over words, and the
            inverse temperature.
        negatives: `local`, those of the device's batch, or `global`, those of all devices.
        captions_at_once: so many captions are compared at once in the loss of words, for memory; null for all.
        generator_learning_rate, discriminator_learning_rate, betas: of the two Adam optimisers.
        average_momentum: share of the averaged generator that a step keeps.
        evaluated: which generator the test measures: `average`, or `trained`, as the last step left it.
        seed: seed of the noise.

    Raises:
        ValueError: an argument is out of its range, a loss needs a network that is not there, or sizes do not fit.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        text_encoder: nn.Module | None = None,
        image_network: nn.Module | None = None,
        evaluation: Evaluation | None = None,
        weight_sentence: float = 1.0,
        weight_word: float = 1.0,
        weight_image_d: float = 1.0,
        weight_image_net: float = 1.0,
        temperature: float = 0.1,
        word_gammas: Sequence[float] = (5.0, 5.0, 50.0),
        negatives: Negatives = "local",
        captions_at_once: int | None = None,
        generator_learning_rate: float = 1e-4,
        discriminator_learning_rate: float = 4e-4,
        betas: Sequence[float] = (0.5, 0.999),
        average_momentum: float = 0.999,
        evaluated: Literal["average", "trained"] = "average",
        seed: int = 0,
    ) -> None:
        super().__init__()
        networks = ["generator", "discriminator", "text_encoder", "image_network", "evaluation"]
        self.save_hyperparameters(ignore=networks, logger=False)
        self.automatic_optimization = False
        for name in ("weight_sentence", "weight_word", "weight_image_d", "weight_image_net"):
            if self.hparams[name] < 0:
                raise ValueError(f"model.{name} is {self.hparams[name]}: it must not be below 0")
        for name, count in (("word_gammas", 3), ("betas", 2)):
            if len(self.hparams[name]) != count:
                raise ValueError(f"model.{name} is {list(self.hparams[name])}: {count} numbers are needed")
        if min(word_gammas) <= 0:
            raise ValueError(f"model.word_gammas is {list(word_gammas)}: all three must be positive")
        if temperature <= 0:
            raise ValueError(f"model.temperature is {temperature}: it must be positive")
        if captions_at_once is not None and captions_at_once < 1:
            raise ValueError(f"model.captions_at_once is {captions_at_once}: at least 1, or null for all")
        if not 0.0 <= average_momentum <= 1.0:
            raise ValueError(f"model.average_momentum is {average_momentum}: it must lie in [0, 1]")
        if evaluated not in ("average", "trained"):
            raise ValueError(f"model.evaluated is {evaluated!r}: it is average or trained")
        if weight_image_net > 0 and image_network is None:
            raise ValueError(
                "model.image_network is null, but model.weight_image_net is not 0: it compares its features"
            )
        if generator.image_size != discriminator.image_size:
            raise ValueError(
                f"the generator makes images of {generator.image_size} pixels, the discriminator reads "
                f"{discriminator.image_size}: their lists of channels need the same number of entries"
            )
        if weight_word == 0:
            discriminator.drop_region_head()
        self.generators = MomentumPair(generator, copy_buffers=True)
        self.discriminator = discriminator
        self.text_encoder = text_encoder
        self.image_network = image_network if weight_image_net > 0 else None
        self.evaluation = evaluation

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def generator(self) -> Generator:
        """The generator that is trained."""
        return self.generators.query  # type: ignore[return-value]

    @property
    def average(self) -> Generator:
        """The moving average of the generator, with the statistics of the trained one: what is used."""
        return self.generators.key  # type: ignore[return-value]

    @property
    def measured(self) -> Generator:
        """The generator whose images the test measures and shows."""
        return self.generator if self.hparams["evaluated"] == "trained" else self.average

    def captions(self, batch: Batch) -> Captions:
        """Vectors of the captions: from the data, or made here from their tokens."""
        if "words" in batch:
            return Captions(batch["words"], batch["sentence"], batch["length"])
        if self.text_encoder is None:
            raise ValueError("the data brings tokens, but model.text_encoder is null: give it a class")
        words, sentence = self.text_encoder(batch["tokens"], batch["length"])
        return Captions(words, sentence, batch["length"])

    def discriminator_terms(self, seen: Judgement, captions: Captions) -> dict[str, Any]:
        """Losses of the discriminator: real images alone enter the contrastive ones (specification 5.7).

        Args:
            seen: judgement of all real, then of all generated images.
            captions: of the real images.
        """
        n = len(captions.length)
        terms: dict[str, Any] = {"discriminator_hinge": hinge_discriminator(seen.logit[:n], seen.logit[n:])}
        if self.hparams["weight_sentence"] > 0:
            terms["real_sentence"] = self._pairs(seen.pooled[:n], seen.sentence)
        if seen.regions is not None:
            terms["real_word"] = self._words(seen.regions[:n], captions)
        return terms

    def generator_terms(self, seen: Judgement, captions: Captions, real: Tensor, fake: Tensor) -> dict[str, Any]:
        """Losses of the generator, the same judgement given."""
        n = len(captions.length)
        terms: dict[str, Any] = {"generator_hinge": hinge_generator(seen.logit[n:])}
        if self.hparams["weight_sentence"] > 0:
            terms["fake_sentence"] = self._pairs(seen.pooled[n:], seen.sentence)
        if seen.regions is not None:
            terms["fake_word"] = self._words(seen.regions[n:], captions)
        if self.hparams["weight_image_d"] > 0:
            terms["image_d"] = self._pairs(seen.pooled[n:], seen.pooled[:n])
        if self.image_network is not None:
            with torch.no_grad():
                features = self.image_network(real)
            terms["image_net"] = self._pairs(features, self.image_network(fake))
        return terms

    def _pairs(self, left: Tensor, right: Tensor) -> Matching:
        return pair_loss(left, right, self.hparams["temperature"], negatives=self.hparams["negatives"])

    def _words(self, regions: Tensor, captions: Captions, negatives: Negatives | None = None) -> Matching:
        h: Any = self.hparams
        gammas = (h.word_gammas[0], h.word_gammas[1], h.word_gammas[2])
        whose = negatives or h.negatives
        return word_loss(regions, captions.words, captions.length, gammas, whose, h.captions_at_once)

    def total(self, terms: dict[str, Any]) -> Tensor:
        """Weighted sum of the losses."""
        h: Any = self.hparams
        weights = {
            "sentence": h.weight_sentence,
            "word": h.weight_word,
            "d": h.weight_image_d,
            "net": h.weight_image_net,
        }
        return sum(
            weights[name.rpartition("_")[2]] * term.loss if isinstance(term, Matching) else term
            for name, term in terms.items()
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        minibatches = self._minibatches(batch)
        losses = [self.discriminator_step(*minibatch) for minibatch in minibatches[:-1]]
        losses.append(self.joint_step(*minibatches[-1]))
        self.generators.update(self.hparams["average_momentum"])
        total = torch.stack(losses).sum()
        self.log("train/loss", total, batch_size=len(minibatches[0][1]))
        return total

    def discriminator_step(self, batch: Batch, z: Tensor) -> Tensor:
        """Train the discriminator alone, on images that leave no trace in the generator's statistics."""
        captions = self.captions(batch)
        with torch.no_grad(), keeping_statistics(self.generator):
            fake = self.generator(z, *captions)
        seen = self.discriminator(torch.cat([batch["image"], fake]), captions.sentence)
        loss = self.total(self.discriminator_terms(seen, captions))
        self._give_gradients(loss, self.discriminator_parameters())
        _, optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        optimizer.step()
        return loss.detach()

    def joint_step(self, batch: Batch, z: Tensor) -> Tensor:
        """Train both networks: one graph, both gradients by the weights before the step."""
        captions, real = self.captions(batch), batch["image"]
        # A text encoder that learns does so from real and generated images as they are, not by way of the generator.
        fake = self.generator(z, *(value.detach() for value in captions))
        seen = self.discriminator(torch.cat([real, fake]), captions.sentence)
        of_discriminator = self.discriminator_terms(seen, captions)
        of_generator = self.generator_terms(seen, captions, real, fake)
        losses = self.total(of_discriminator), self.total(of_generator)
        self._give_gradients(losses[0], self.discriminator_parameters(), retain_graph=True)
        self._give_gradients(losses[1], list(self.generator.parameters()))
        # Lightning counts the steps of its own wrapper: one for each iteration, that of the generator.
        generator_optimizer, _ = self.optimizers()  # type: ignore[attr-defined]
        _, discriminator_optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        discriminator_optimizer.step()
        generator_optimizer.step()
        self._monitor({**of_discriminator, **of_generator}, losses, len(real))
        return (losses[0] + losses[1]).detach()

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """What the discriminator's optimiser trains: it, and the text encoder where that learns."""
        learning = [] if self.text_encoder is None else [p for p in self.text_encoder.parameters() if p.requires_grad]
        return [*self.discriminator.parameters(), *learning]

    def _give_gradients(self, loss: Tensor, parameters: list[nn.Parameter], retain_graph: bool = False) -> None:
        # DDP averages what `backward` brings; gradients that are asked for by name are averaged here.
        gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph)
        average_in_place(list(gradients))
        for parameter, gradient in zip(parameters, gradients):
            # As `backward` does it: a fused step takes for granted that both lie in memory alike.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)

    def _minibatches(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """The minibatches of one iteration and their noise.

        Rank r of W holds samples r, r + W, ... of the joint batch. Noise depends on the seed and the number of the
        batch alone and is drawn for all ranks, so any number of processes uses the same, and so does a resumed run.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        generator = torch.Generator().manual_seed((self.hparams["seed"] << 32) + self.trainer.fit_loop.total_batch_idx)
        size = len(batch["length"]) * world
        z = torch.randn(size, self.generator.z_dim, generator=generator)[rank::world].to(self.device, non_blocking=True)
        parts = self.data.minibatches
        split = {name: value.chunk(parts) for name, value in batch.items() if isinstance(value, Tensor)}
        return [
            ({name: chunks[part] for name, chunks in split.items()}, noise) for part, noise in enumerate(z.chunk(parts))
        ]

    def _monitor(self, terms: dict[str, Any], losses: tuple[Tensor, Tensor], size: int) -> None:
        logs = {"discriminator_loss": losses[0].detach(), "generator_loss": losses[1].detach()}
        for name, term in terms.items():
            if isinstance(term, Matching):
                logs |= {f"{name}_loss": term.loss.detach(), f"{name}_accuracy": term.accuracy}
                logs[f"{name}_entropy"] = term.entropy
            else:
                logs[name] = term.detach()
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=size)

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        betas = (h.betas[0], h.betas[1])
        return [
            torch.optim.Adam(self.generator.parameters(), h.generator_learning_rate, betas, **fused(self)),
            torch.optim.Adam(self.discriminator_parameters(), h.discriminator_learning_rate, betas, **fused(self)),
        ]

    # -- start, resume, hand-over --------------------------------------------------------------------------------------

    @property
    def data(self) -> TextToImageData:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if self.data.image_size != self.generator.image_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size}, the networks make images of {self.generator.image_size}: "
                "a list of n channels means 4 * 2^(n - 1) pixels"
            )
        size = getattr(self.text_encoder, "vocabulary_size", None)
        if size is not None and self.data.vocabulary_size > size:
            raise ValueError(
                f"the tokenizer has {self.data.vocabulary_size} pieces, model.text_encoder {size} embeddings; raise "
                "model.text_encoder.vocabulary_size"
            )
        if self.evaluation is not None:
            self.evaluation.load_pretrained()
        if stage != "fit":
            return
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16 needs scaled losses, which one graph for two does not have: bf16-mixed"
            )
        if str(self.trainer.precision) == "bf16-true":
            raise ValueError(
                "trainer.precision bf16-true rounds away the small steps of the averaged generator: take bf16-mixed"
            )
        if self.image_network is not None and self.trainer.ckpt_path is None:
            self.image_network.load_pretrained()  # type: ignore[operator]

    # -- what is measured after training -------------------------------------------------------------------------------

    def generate(self, captions: Captions, z: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] of captions by the measured generator, which must be in evaluation mode."""
        return self.measured(z, *captions)

    def on_test_start(self) -> None:
        self._matched = OncePerSample(*(["sentence"] if self.discriminator.regions is None else ["sentence", "word"]))
        if self.evaluation is not None:
            self.evaluation.begin(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        captions = self.captions(batch)
        for repeat in range(0 if self.evaluation is None else self.evaluation.repeats):
            z = noise_of(batch["index"], self.generator.z_dim, self.hparams["seed"] + (repeat << 32)).to(self.device)
            self.evaluation.update(self.generate(captions, z), batch, repeat)  # type: ignore[union-attr]
        self._match(batch, captions)

    def _match(self, batch: Batch, captions: Captions) -> None:
        """How well the discriminator tells held-out pairs apart (5.9), as many as are trained, or tested, together."""
        seen = self.discriminator(batch["image"], captions.sentence)
        size = min(self.data.batch_size, self.data.test_batch_size)
        for part in range(len(captions.length) // size):
            rows = slice(part * size, (part + 1) * size)
            accuracy = {"sentence": pair_loss(seen.pooled[rows], seen.sentence[rows]).accuracy}
            if seen.regions is not None:
                own = Captions(*(value[rows] for value in captions))
                accuracy["word"] = self._words(seen.regions[rows], own, "local").accuracy
            self._matched.update(batch["index"][rows], **{name: one.expand(size) for name, one in accuracy.items()})

    def on_test_epoch_end(self) -> None:
        matched = self._matched.compute(self.device)
        if matched.pop("count") > 0:
            self.log_dict({f"test/real_{name}_accuracy": value.float() for name, value in matched.items()})
        if self.evaluation is not None:
            self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})
        diagnostics.draw(self)
