"""The model of MCT: image and text encoder with projection heads, and the encoding of keys in training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.image_transforms import ImageTransform
from common.data.images import read_image
from common.data.text import (
    CaptionTokenizer,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    WordVocabulary,
    normalize_caption,
    pad_tokens,
)
from common.encoders.heads import ProjectionHead
from common.encoders.image import ImageResNet
from common.encoders.text import BertEncoder, GRUEncoder
from common.errors import StageError
from common.losses.info_nce import at_least_float32
from common.memory.collective import all_gather_concat, broadcast_from_rank_zero, is_distributed, rank, world_size
from common.stages.allowed import Builder, path_of
from common.stages.export import (
    Encoder,
    Items,
    Modality,
    Trained,
    TrainedModel,
    noise_like,
    renamed,
    with_arguments,
    without_sources,
)
from common.stages.finished import FinishedStage, instantiate
from common.training.batch_norm import GroupedBatchNorm
from papers.mct.loss import MultimodalContrast


@dataclass(frozen=True)
class Heads:
    """How the projection heads of a tower are built.

    Separate heads (the method) are two-layer perceptrons on the backbone's feature. Shared heads (the ablation) have
    the hidden layer in common. With equal widths the output layer is common too, and one embedding serves both kinds
    of contrast; with different widths each has its own output layer on the common hidden one. That reading of "shared"
    is ours: the paper's text, which we could not read, may define it otherwise.

    Args:
        shared: share the hidden layer between both heads.
        hidden_dim: units of the hidden layer; `feature_dim` of the backbone by default.
        batch_norm: normalize the hidden layer over the batch; the method does not.

    Source: [2]; two layers without batch normalization as in MoCo v2.
    """

    shared: bool = False
    hidden_dim: int | None = None
    batch_norm: bool = False


SEPARATE = Heads()


class Tower(nn.Module):
    """Backbone of one modality, with a projection head for each kind of contrast.

    A head that no loss uses is left out, not left idle: distributed training refuses parameters without gradient.

    Args:
        backbone: from inputs to features [B, feature_dim].
        intra_dim: width of the embedding for contrast within the modality; None for no such head.
        inter_dim: width of the embedding for contrast across modalities; None for no such head.
        heads: how they are built.

    Raises:
        ValueError: when there is no head at all.

    Source: [2].
    """

    def __init__(
        self,
        backbone: nn.Module,
        intra_dim: int | None = 128,
        inter_dim: int | None = 1024,
        heads: Heads = SEPARATE,
    ) -> None:
        super().__init__()
        widths = {name: dim for name, dim in (("intra", intra_dim), ("inter", inter_dim)) if dim is not None}
        if not widths or min(widths.values()) < 1:
            raise ValueError(
                "a tower needs a head: give intra_dim or inter_dim a positive width, got "
                f"intra_dim={intra_dim}, inter_dim={inter_dim}"
            )
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        hidden = self.feature_dim if heads.hidden_dim is None else heads.hidden_dim
        self.embeds = tuple(widths)
        self.trunk = nn.Sequential()
        self.heads = nn.ModuleDict()
        shared = heads.shared and len(widths) == 2
        if shared and intra_dim == inter_dim:
            self.heads["both"] = ProjectionHead(self.feature_dim, hidden, widths["intra"], 2, heads.batch_norm)
        elif shared:
            norm = [nn.BatchNorm1d(hidden)] if heads.batch_norm else []
            self.trunk.extend([nn.Linear(self.feature_dim, hidden), *norm, nn.ReLU()])
            for name, dim in widths.items():
                self.heads[name] = nn.Linear(hidden, dim)
        else:
            for name, dim in widths.items():
                self.heads[name] = ProjectionHead(self.feature_dim, hidden, dim, 2, heads.batch_norm)

    def features(self, *inputs: Tensor) -> Tensor:
        """Features for transfer, [B, feature_dim]."""
        return self.backbone(*inputs)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        """Embeddings of features [B, feature_dim]; as `forward`."""
        hidden = self.trunk(features)
        embeddings = {name: _unit(head(hidden)) for name, head in self.heads.items()}
        if "both" in embeddings:
            return {"intra": embeddings["both"], "inter": embeddings["both"]}
        return embeddings

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Embeddings of a batch.

        Returns:
            `intra` [B, intra_dim] and `inter` [B, inter_dim], those that have a head; unit vectors in float32 or more.
        """
        return self.project(self.features(*inputs))


class MCT(TrainedModel):
    """An image encoder and a caption encoder with their heads; `MCT.from_export(path)` reads trained ones.

    Args:
        image, text: the towers; no text where the stage read no captions.

    Attributes:
        embedding: which head's embeddings are given: `inter`, those that compare images with captions, or `intra`,
            those that compare images with images. One vector of an image then serves every search; between images
            alone, `intra` is what J_ii and J_tag trained ([3]).
        pixels, tokenizer: read images and captions for a trained model; None in training.
    """

    paper = "mct"
    kinds = ("papers.mct.module.MCTModule",)
    classes: ClassVar[tuple[type, ...]] = (
        Tower, ImageResNet, BertEncoder, GRUEncoder, WordPieceTokenizer, SentencePieceTokenizer, WordVocabulary,
    )  # fmt: skip
    example = "mct/mini/seed0/mct"
    otherwise = "has no embeddings of images and captions: give the checkpoint of a pre-training, such as mct"
    embeds: ClassVar[tuple[Modality, ...]] = ("image", "text")
    retrieves: ClassVar[tuple[tuple[Modality, Modality], ...]] = (
        ("text", "image"), ("image", "text"), ("image", "image"), ("text", "text"),
    )  # fmt: skip
    limits = (
        "For research on learning from images and their captions: features of images, and search of images by images "
        "and, where it was trained across them (weight_cross above 0), of images and captions by each other. What it "
        "knows of the world is what its images and captions showed and said, with their errors and biases. "
        "It is not made to recognize persons or to decide about them. The method is covered by US patent 12,223,439."
    )
    usage = 'model.embed_image("picture.jpg") @ model.embed_text("a dog on a sofa").T'

    def __init__(self, image: Tower, text: Tower | None = None) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.embedding = "inter" if "inter" in image.embeds else "intra"
        self.pixels: ImageTransform | None = None
        self.tokenizer: CaptionTokenizer | None = None

    @classmethod
    def of(cls, trained: Trained) -> Self:
        model: Self = Builder(trained.where, (cls, *cls.classes), cls.no_files).value(trained.model, cls, "model")
        model.pixels = cls.input(trained, "image", ImageTransform).with_training(False)
        if model.text is not None:
            model.tokenizer = cls.input(trained, "tokenizer", CaptionTokenizer)
            model.tokenizer.read(trained.file(model.tokenizer.file_name))
        model.fill(trained)
        return model

    @classmethod
    def usage_of(cls, trained: Trained) -> str:
        if trained.model["init_args"]["image"]["init_args"]["inter_dim"] is None:
            # No loss made images and captions comparable.
            return 'model.embed_image("picture.jpg") @ model.embed_image("another.jpg").T'
        return cls.usage

    @classmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        data = stage.data()
        arguments = without_sources(stage.config["model"])["init_args"]
        # For its widths alone; the queues of the configuration may take gigabytes.
        loss = instantiate(with_arguments(arguments["loss"], queue_size=1), MultimodalContrast)

        def tower(modality: Literal["image", "text"]) -> dict[str, Any]:
            built = {"backbone": arguments[f"{modality}_encoder"], **loss.widths(modality), "heads": arguments["heads"]}
            return {"class_path": path_of(Tower), "init_args": built}

        weights = renamed(stage.state, image="model.image", text="model.text")
        reads_captions = any(name.startswith("text.") for name in weights)
        towers = {"image": tower("image"), "text": tower("text") if reads_captions else None}
        inputs: dict[str, Any] = {"image": asdict(data.image), "tokenizer": None}
        files: dict[str, bytes | Path] = {}
        if data.tokenizer is not None and reads_captions:
            data.prepare_data()
            field = data.tokenizer.field
            inputs["tokenizer"] = with_arguments(stage.config["data"]["init_args"]["tokenizer"], **{field: None})
            files[data.tokenizer.file_name] = data.tokenizer.content
        return Trained({"class_path": path_of(cls), "init_args": towers}, inputs, weights, files)

    def read_image(self, file: str | Path) -> Tensor:
        """An image as the encoder reads it, float32 [3, S, S].

        Raises:
            ImageError: it cannot be read.
            StageError: the model was not loaded by `from_export`.
        """
        if self.pixels is None:
            raise StageError("this model does not know how its images are read: load it by MCT.from_export")
        return self.pixels(read_image(file))[0]

    @torch.no_grad()
    def features(self, images: Items) -> Tensor:
        """Features of images before the heads, which transfer to other tasks, [B, D].

        Args:
            images: a file, some files, or what `read_image` gives of them.

        Raises:
            ImageError: a file cannot be read.
        """
        return self.image.features(torch.stack(self.read_all("image", images)).to(self.device)).float()

    @torch.no_grad()
    def embed_image(self, images: Items) -> Tensor:
        """Unit vectors [B, d] of images.

        Args:
            images: a file, some files, or what `read_image` gives of them.

        Raises:
            ImageError: a file cannot be read.
        """
        return self._of(self.image(torch.stack(self.read_all("image", images)).to(self.device)))

    @torch.no_grad()
    def embed_text(self, texts: Items) -> Tensor:
        """Unit vectors [B, d] of captions; they can be compared with those of images when `embedding` is `inter`.

        Args:
            texts: one caption or several.

        Raises:
            StageError: the stage read no captions.
        """
        if self.text is None or self.tokenizer is None:
            raise StageError("this model was trained without captions and embeds images alone")
        rows = [self.tokenizer.encode(normalize_caption(text)) for text in self.read_all("text", texts)]
        return self._of(self.text(pad_tokens(rows, self.tokenizer.pad_id).to(self.device)))

    def encoders(self) -> dict[str, Encoder]:
        if self.pixels is None:
            return {}

        def embed(tower: Tower, inputs: Tensor) -> Tensor:
            head = tower.heads["both" if "both" in tower.heads else self.embedding]
            return F.normalize(head(tower.trunk(tower.features(inputs))).float(), dim=1)

        picture = self.pixels(Image.new("RGB", (64, 64)))[0]
        found = {"image": Encoder(self.image, embed, noise_like(picture))}
        if self.text is not None and self.tokenizer is not None:
            rows = [self.tokenizer.encode(text) for text in ("a dog on a sofa", "a cat")]
            found["text"] = Encoder(self.text, embed, pad_tokens(rows, self.tokenizer.pad_id))
        return found

    def compare(self, query_modality: Modality, query: Any, modality: Modality, searched: Any) -> Tensor:
        """Scores [N] of a query with everything that is searched, the cosine of the embeddings.

        Raises:
            StageError: an image and a caption are to be compared by embeddings that no loss made comparable.
        """
        if query_modality != modality and self.embedding != "inter":
            raise StageError(
                f"this model cannot compare {query_modality} with {modality}: its `{self.embedding}` embeddings were "
                "trained inside each modality alone; give the checkpoint of a stage with weight_cross, such as mct"
            )
        return super().compare(query_modality, query, modality, searched)

    def _of(self, embeddings: dict[str, Tensor]) -> Tensor:
        if self.embedding not in embeddings:
            raise StageError(f"embedding: {self.embedding!r} is not there, but {', '.join(embeddings)}")
        return embeddings[self.embedding].float()


@torch.no_grad()
def encode_keys(
    encoder: nn.Module, *inputs: Tensor, shuffle: bool = True, permutation: Tensor | None = None
) -> dict[str, Tensor]:
    """Keys of a batch, without gradient.

    The batch normalization of a query and of its key should not see the same samples, or the network recognizes the
    positive by its batch. So the rows of all processes change places at random before they are encoded, and back
    afterwards; which rows are then normalized together is a matter of `common.memory.groups`.

    Args:
        encoder: the moving average of a tower.
        *inputs: of the encoder; all have the same number of rows.
        shuffle: encode the rows in random order, over all ranks. One process whose batch is one group keeps its order,
            which makes no difference to it.
        permutation: order to use instead of a random one, int64, over the gathered rows of all ranks, [W * B]; the same
            on each.

    Returns:
        As `Tower.forward`, in the order of the inputs.

    Source: [6].
    """
    grouped = any(isinstance(layer, GroupedBatchNorm) for layer in encoder.modules())
    if not shuffle or not (grouped or is_distributed()):
        return encoder(*inputs)
    if permutation is None:
        permutation = _drawn_order(inputs[0])
    keys = encoder(*(batch_shuffle(rows, permutation)[0] for rows in inputs))
    return {name: batch_unshuffle(rows, permutation) for name, rows in keys.items()}


def _drawn_order(rows: Tensor) -> Tensor:
    """A random order of the rows of all ranks, which gives the same groups on any number of devices.

    It is drawn over the joint batch. Rank r of W encodes what is at the places r, r + W, ... of the order, as it holds
    the samples r, r + W, ... of the batch.
    """
    ranks, own = world_size(), len(rows)
    order = torch.randperm(ranks * own, device=rows.device)
    broadcast_from_rank_zero(order)
    # Sample i is row i // W of rank i % W, and gathered rows stand rank by rank.
    gathered = order % ranks * own + order // ranks
    return gathered.view(own, ranks).T.flatten()


@torch.no_grad()
def batch_shuffle(rows: Tensor, permutation: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exchange the rows of all ranks in a random order.

    Args:
        rows: this rank's batch; every rank must pass the same shape.
        permutation: the order; by default rank 0 draws one from the global generator and sends it to all.

    Shapes:
        rows [N, ...]; permutation [W * N]

    Returns:
        (this rank's part of the permuted joint batch [N, ...], the permutation).

    Raises:
        ValueError: when the permutation has another length than the joint batch.

    Source: [6].
    """
    joint = all_gather_concat(rows)
    if permutation is None:
        permutation = torch.randperm(len(joint), device=rows.device)
        broadcast_from_rank_zero(permutation)
    elif permutation.shape != (len(joint),):
        raise ValueError(
            f"the permutation must have one entry for each of the {len(joint)} rows of all ranks, got "
            f"{tuple(permutation.shape)}"
        )
    shuffled = joint.index_select(0, _own_part(permutation))
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        shuffled = shuffled.contiguous(memory_format=torch.channels_last)  # gathering loses the layout
    return shuffled, permutation


@torch.no_grad()
def batch_unshuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Give every rank its own rows back, in their order before `batch_shuffle`.

    Args:
        rows: what was computed from this rank's shuffled rows.
        permutation: as `batch_shuffle` returned it.

    Shapes:
        rows [N, ...]; permutation [W * N] -> [N, ...]
    """
    return all_gather_concat(rows).index_select(0, _own_part(permutation.argsort()))


def _own_part(order: Tensor) -> Tensor:
    return order.view(world_size(), -1)[rank()]


def _unit(embeddings: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(at_least_float32(embeddings), dim=1)


MODEL = MCT
