"""What the tokens mean: categories chosen before and after end-to-end training, and pictures of samples for people.

The paper shows such a figure for video tokens; its details are not known, so these are ours.
"""

from __future__ import annotations

import copy
import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.metrics.gathering import gather_objects
from papers.vx2text.tokens import ModalityClassifier
from papers.vx2text.weights import load_classifier

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.protocols.text import GeneratedText, TextTest

#: Samples shown to people: 16 as pictures and in tables.
SHOWN = 16
#: Categories listed: the most frequent ones, and those whose frequency changed most.
LISTED = 10
#: Clips kept with the run, and the largest that is kept [bytes]: the miniature's take kilobytes, films take gigabytes.
KEPT_CLIPS, LARGEST_CLIP = 3, 2**20


class TokenShift:
    """Counts the categories that a test set is given before and after end-to-end training.

    Before are the weights that training started from, read again from their files; without a file, or where the
    classifier did not learn, there is no before.

    Args:
        module: a `VX2TextModule`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.names: dict[str, list[str]] = {}
        self.tokens: dict[str, int] = {}
        self.before: dict[str, ModalityClassifier] = {}
        # Category of every token by sample: before (empty without) and after.
        self.chosen: dict[str, dict[int, tuple[list[int], list[int]]]] = {}
        for name, tokens in module.model.tokens.items():
            self.names[name], self.tokens[name], self.chosen[name] = tokens.classifier.names, tokens.tokens, {}
            path = module.hparams[f"{name}_pretrained"]
            if tokens.projection is None and tokens.learns and path is not None and Path(path).is_file():
                earlier = copy.deepcopy(tokens.classifier)
                load_classifier(earlier, path, name, f"model.{name}_pretrained")
                self.before[name] = earlier.eval()

    @torch.no_grad()
    def update(self, batch: dict[str, Any], found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch whose categories after training are `found`."""
        for name, (chosen, _) in found.items():
            if chosen.shape[1] == 0:
                continue
            earlier = chosen[:, :0]
            if name in self.before:
                clips = batch[name].flatten(0, 1) if name == "video" else batch[name]
                scores = self.before[name](clips)
                best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.tokens[name]]
                earlier = best.reshape(len(chosen), -1)
            present = batch[f"{name}_present"].tolist()
            rows = zip(batch["index"].tolist(), present, earlier.tolist(), chosen.tolist())
            self.chosen[name].update({item: (before, after) for item, there, before, after in rows if there})

    def draw(self, test: TextTest) -> None:
        """Write figures and tables into the folder `media` of the run; all processes must call."""
        gathered = {name: dict(gather_objects(sorted(chosen.items()))) for name, chosen in self.chosen.items()}
        if not self.module.trainer.is_global_zero:
            return
        folder = Path(self.module.trainer.default_root_dir) / "media"
        shifts = {
            name: (self.names[name], *_counts(rows, len(self.names[name]))) for name, rows in gathered.items() if rows
        }
        if shifts:
            draw_shift(self.module, shifts, folder)
        named = {
            name: {item: tuple([self.names[name][c] for c in tokens] for tokens in both) for item, both in rows.items()}
            for name, rows in gathered.items()
        }
        items = sorted(test.texts)
        # Always the same ones, and not at equal steps: kinds of questions may come in turns.
        shown = [items[place] for place in sorted(np.random.default_rng(0).permutation(len(items))[:SHOWN].tolist())]
        if shown:
            dataset = self.module.trainer.test_dataloaders.dataset
            written = {item: test.texts[item] for item in shown}
            draw_samples(self.module, dataset, written, named, folder)
            keep_clips(self.module, dataset, written, folder)


def _counts(rows: dict[int, tuple[list[int], list[int]]], categories: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each category was chosen before and after."""
    before, after = (
        np.bincount(np.array([c for both in rows.values() for c in both[side]], dtype=np.int64), minlength=categories)
        for side in (0, 1)
    )
    return before, after


def listed_categories(before: np.ndarray, after: np.ndarray, count: int = LISTED) -> list[int]:
    """The most frequent categories after training, then those whose number changed most; each once.

    Args:
        before, after: how often each category was chosen [C].
        count: how many of either.
    """
    frequent = np.argsort(-after, kind="stable")[:count]
    changed = np.argsort(-np.abs(after - before), kind="stable")[:count]
    return [int(c) for c in dict.fromkeys([*frequent.tolist(), *changed.tolist()]) if before[c] or after[c]]


def draw_shift(
    module: pl.LightningModule, shifts: Mapping[str, tuple[Sequence[str], np.ndarray, np.ndarray]], folder: Path
) -> None:
    """Write `token_shift.csv` with every category that was chosen, and `token_shift.png` with the telling ones.

    Args:
        module: only its loggers are used: a W&B logger gets the picture and the table.
        shifts: modality -> names of its categories, and how often each was chosen before and after training.
        folder: where the files go.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        [modality, names[c], int(before[c]), int(after[c])]
        for modality, (names, before, after) in shifts.items()
        for c in np.argsort(-after, kind="stable").tolist()
        if before[c] or after[c]
    ]
    columns = ["modality", "category", "before", "after"]
    with (folder / "token_shift.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    figure, axes = plt.subplots(1, len(shifts), figsize=(4.5 * len(shifts), 4), squeeze=False, layout="constrained")
    for axis, (modality, (names, before, after)) in zip(axes[0], shifts.items()):
        chosen = listed_categories(before, after)[::-1]
        places = np.arange(len(chosen))
        if before.any():
            axis.barh(places + 0.2, before[chosen], 0.4, label="before end-to-end training", color="tab:gray")
        axis.barh(places - 0.2, after[chosen], 0.4, label="after", color="tab:blue")
        axis.set_yticks(places, [names[c] for c in chosen], fontsize=7)
        axis.set_title(f"{modality}: how often a category is chosen", fontsize=8)
        axis.legend(fontsize=7)
    path = folder / "token_shift.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    _log(module, "token_shift", path, columns, rows)


def draw_samples(
    module: pl.LightningModule,
    dataset: Any,
    written: dict[int, GeneratedText],
    tokens: dict[str, dict[int, tuple[list[str], ...]]],
    folder: Path,
) -> None:
    """Write `samples.png` and `samples.csv`: frame, tokens before and after, question, generated text, original.

    Args:
        module: only its loggers are used: a W&B logger gets the picture and the table.
        dataset: has `preview(item)` and `name(item)`.
        written: what the model wrote, by item.
        tokens: modality -> item -> names of the categories before and after.
        folder: where the files go.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["clip", "question", "written", "original"]
    columns += [f"{name} tokens {when}" for name in tokens for when in ("before", "after")]
    table: list[list[str]] = []
    lines = -(-len(written) // 2)
    figure, axes = plt.subplots(
        lines, 4, figsize=(11, 1.3 * lines), squeeze=False, width_ratios=(1, 3.5, 1, 3.5), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, (item, own) in enumerate(written.items()):
        picture, text = axes[number // 2, 2 * (number % 2) : 2 * (number % 2) + 2]
        picture.imshow(dataset.preview(item))
        found = {name: rows.get(item, ([], [])) for name, rows in tokens.items()}
        described = [
            f"{name}: " + " -> ".join(", ".join(words) for words in both if words) for name, both in found.items()
        ]
        content = [own.question, f"written: {own.text}", f"original: {own.answer}", *described]
        right = own.matches or not own.answer
        # Texts may hold the sign with which matplotlib begins a formula.
        shown = "\n".join(line[:70].replace("$", r"\$") for line in content if line)
        text.text(0, 1, shown, fontsize=6.5, va="top", color="black" if right else "tab:red")
        table.append(
            [dataset.name(item), own.question, own.text, own.answer]
            + [", ".join(words) for both in found.values() for words in both]
        )
    figure.suptitle(
        "Categories before -> after end-to-end training, and what was written; red: not the original", fontsize=8
    )
    path = folder / "samples.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *table])
    _log(module, "samples", path, columns, table)


def keep_clips(
    module: pl.LightningModule, dataset: Any, written: Mapping[int, GeneratedText], folder: Path
) -> list[Path]:
    """Copy the files of some samples as `clip_<number>`, to be seen and heard beside what was written about them.

    Args:
        module: only its loggers are used: a W&B logger gets the clips, too.
        dataset: has a `listing` of clips.
        written: what the model wrote, by item.
        folder: where the files go.

    Returns:
        The copies: of the first `KEPT_CLIPS` files that a browser plays and that are not larger than `LARGEST_CLIP`.
    """
    kept: dict[Path, tuple[Path, str]] = {}
    for item, own in written.items():
        source = Path(dataset.listing[item].path)
        playable = source.suffix.lower() in (".mp4", ".webm") and source.is_file()
        if len(kept) < KEPT_CLIPS and source not in kept and playable and source.stat().st_size <= LARGEST_CLIP:
            copied = folder / f"clip_{len(kept) + 1}{source.suffix.lower()}"
            shutil.copyfile(source, copied)
            kept[source] = copied, f"{own.question} {own.text}".strip()
    from lightning.pytorch.loggers import WandbLogger

    for logger in module.loggers if kept else ():
        if isinstance(logger, WandbLogger):
            paths, captions = zip(*kept.values())
            logger.log_video("clip", [str(path) for path in paths], caption=list(captions))
    return [path for path, _ in kept.values()]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _log(module: pl.LightningModule, name: str, path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    from lightning.pytorch.loggers import WandbLogger

    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)])
            logger.log_table(f"{name}_table", columns=columns, data=rows)
