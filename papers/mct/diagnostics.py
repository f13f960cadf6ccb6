"""What is looked at right after pre-training: retrieval by the model's own embeddings, neighbours, pictures for people.

None of it is a published number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The neighbour search costs the square of this, the map more.
LARGEST_SEARCH = 20_000
LARGEST_MAP = 2_000


def tagged_neighbours(features: Tensor, tags: Tensor, neighbours: int = 10) -> Tensor:
    """Share of an image's nearest images that share a tag with it, in percent; images without tags are left out.

    Args:
        features: of the images [N, d]; compared by their angle.
        tags: [N, T] booleans.
        neighbours: how many are looked at.

    Returns:
        Scalar; NaN where no image has a tag.
    """
    features, tags = F.normalize(features.float(), dim=1)[:LARGEST_SEARCH], tags[:LARGEST_SEARCH].float()
    similarity = features @ features.T
    similarity.fill_diagonal_(-2.0)
    nearest = similarity.topk(min(neighbours, len(features) - 1)).indices
    shared = torch.einsum("nt,nkt->nk", tags, tags[nearest]) > 0
    return 100 * shared[tags.any(1)].double().mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Log of the mean Gaussian potential between unit embeddings [N, d]: 0 when all are equal, lower is more spread.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity".
    """
    embeddings = embeddings[:LARGEST_MAP].float()
    return torch.pdist(embeddings).pow(2).mul(-2).exp().mean().log()


def draw_retrieval(
    module: pl.LightningModule,
    image: Tensor,
    caption: Tensor,
    caption_image: Tensor,
    picture: Callable[[int], np.ndarray],
    text: Sequence[str],
    folder: Path,
    credit: str = "",
    queries: int = 6,
    found: int = 5,
) -> None:
    """Draw what is found: captions for some images, and images for some captions; right ones in green.

    Args:
        module: only its loggers are used: a W&B logger gets pictures and tables.
        image, caption: unit embeddings [N, d] and [M, d].
        caption_image: row of `image` that each caption describes [M].
        picture: row of `image` -> its pixels.
        text: the captions.
        folder: gets `image_to_captions.png` and `caption_to_images.png`.
        credit: line under pictures whose licence asks for one.
        queries, found: size of the pictures.
    """
    plt = _pyplot()
    similarity = image.float() @ caption.float().T
    rows = np.linspace(0, len(image) - 1, min(queries, len(image))).astype(int).tolist()
    best = similarity[rows].topk(min(found, len(caption))).indices.tolist()
    figure, axes = plt.subplots(len(rows), 2, figsize=(7, 1.25 * len(rows)), squeeze=False, width_ratios=(1, 5))
    table: list[list[Any]] = []
    for line, row, captions in zip(axes, rows, best):
        line[0].imshow(picture(row))
        own = {text[m] for m in (caption_image == row).nonzero().flatten().tolist()}
        for rank, m in enumerate(captions):
            colour = "tab:green" if text[m] in own else "tab:red"
            line[1].text(0, 1 - (rank + 0.5) / found, _plain(text[m][:90]), fontsize=7, color=colour, va="center")
        table.append([row, *(text[m] for m in captions)])
    _finish(figure, axes, "Captions found for an image; green: its own, or the same words", credit)
    _save(module, figure, folder / "image_to_captions.png", table, ["image", *_numbered(best, "caption")])

    asked = np.linspace(0, len(caption) - 1, min(queries, len(caption))).astype(int).tolist()
    best = similarity[:, asked].T.topk(min(found, len(image))).indices.tolist()
    columns = len(best[0]) if best else 1
    figure, axes = plt.subplots(len(asked), columns, figsize=(1.3 * columns, 1.5 * len(asked)), squeeze=False)
    table = []
    for line, m, images in zip(axes, asked, best):
        words = {int(i) for i in caption_image[[k for k, other in enumerate(text) if other == text[m]]].tolist()}
        for axis, row in zip(line, images):
            axis.imshow(picture(row))
            axis.add_patch(
                plt.Rectangle(
                    (0, 0), 1, 1, transform=axis.transAxes, fill=False, linewidth=3,
                    edgecolor="tab:green" if row in words else "tab:red",
                )
            )  # fmt: skip
        line[0].set_title(_plain(text[m][:70]), fontsize=7, loc="left")
        table.append([text[m], *images])
    _finish(figure, axes, "Images found for a caption; green: its own, or one with the same words", credit)
    _save(module, figure, folder / "caption_to_images.png", table, ["caption", *_numbered(best, "image")])


def draw_map(
    module: pl.LightningModule, features: Tensor, labels: Sequence[str], path: Path, seed: int = 0, classes: int = 12
) -> None:
    """Draw features in two dimensions (t-SNE), coloured by class.

    Args:
        module: only its loggers are used.
        features: [N, d].
        labels: class of each row; the most frequent ones get a colour, the others are grey.
        path: PNG file to write; it is left out when there are fewer than 8 rows, or all are equal or not finite.
        seed: of the map.
        classes: how many get a colour.
    """
    from collections import Counter

    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    plt = _pyplot()
    points = F.normalize(features.float(), dim=1)[:LARGEST_MAP].cpu().numpy()
    labels = list(labels)[: len(points)]
    # Too few points, or those of a collapsed encoder, have no map; t-SNE ends the process on some of them.
    if len(points) < 8 or not np.isfinite(points).all() or np.ptp(points, axis=0).max() < 1e-6:
        return
    if points.shape[1] > 50 and len(points) > 50:
        points = PCA(50, random_state=seed).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, max_iter=500).fit_transform(points)
    named = [name for name, _ in Counter(labels).most_common(classes)]
    figure, axis = plt.subplots(figsize=(6.5, 5), layout="constrained")
    others = np.array([label not in named for label in labels])
    axis.scatter(*places[others].T, s=4, color="lightgrey", linewidths=0)
    for number, name in enumerate(named):
        chosen = np.array([label == name for label in labels])
        axis.scatter(*places[chosen].T, s=6, color=plt.get_cmap("tab20")(number % 20), label=_plain(name), linewidths=0)
    axis.legend(fontsize=6, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title("Held-out images by their backbone feature (t-SNE), coloured by class", fontsize=8)
    _save(module, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _plain(text: str) -> str:
    """Text as it is: no formula between dollars, and no label that a legend takes for a hidden one."""
    return f" {text}".replace("$", r"\$")


def _numbered(found: Sequence[Sequence[int]], noun: str) -> list[str]:
    return [f"{noun} {number + 1}" for number in range(len(found[0]) if found else 0)]


def _finish(figure: Any, axes: Any, title: str, credit: str) -> None:
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    figure.suptitle(title, fontsize=8)
    if credit:
        figure.text(0.5, 0.002, credit, fontsize=4, ha="center", wrap=True)
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))


def _save(
    module: pl.LightningModule,
    figure: Any,
    path: Path,
    table: list[list[Any]] | None = None,
    columns: list[str] | None = None,
) -> None:
    """Write a picture, and give it and its table to a W&B logger where there is one."""
    import matplotlib.pyplot as plt
    from lightning.pytorch.loggers import WandbLogger

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(path.stem, [str(path)])
            if table is not None and columns is not None:
                logger.log_table(f"{path.stem}_table", columns=columns, data=table)
