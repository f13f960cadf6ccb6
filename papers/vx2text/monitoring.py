"""Our figures: categories chosen before and after end-to-end training, and samples with generated text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.metrics.gathering import gather_objects
from common.monitoring.figures import WRONG, Described, chart, described_images, plain, preview_of, save_figure
from common.monitoring.media import keep_clips, media_folder, write_table
from papers.vx2text.tokens import ModalityClassifier
from papers.vx2text.weights import load_classifier

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.protocols.text import GeneratedText, TextTest

#: Samples to show in figures and tables.
SHOWN = 16
#: Number of categories to list: the most frequent ones, and the most changed ones.
LISTED = 10


class TokenShift:
    """Counts the categories of a test set's tokens before and after the end-to-end training of a `VX2TextModule`.

    "Before" uses the initial weights, reloaded from their files; it doesn't exist without a file, or for a frozen
    classifier.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.names: dict[str, list[str]] = {}
        self.tokens: dict[str, int] = {}
        self.before: dict[str, ModalityClassifier] = {}
        # Category of every token by sample: before (may be empty) and after.
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
        """Write figures and tables to the run's `media` folder; all processes must call this."""
        gathered = {name: dict(gather_objects(sorted(chosen.items()))) for name, chosen in self.chosen.items()}
        if not self.module.trainer.is_global_zero:
            return
        folder = media_folder(self.module)
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
        # A fixed random choice; equal steps could hit only one kind of question.
        shown = [items[place] for place in sorted(np.random.default_rng(0).permutation(len(items))[:SHOWN].tolist())]
        if shown:
            dataset = self.module.trainer.test_dataloaders.dataset
            written = {item: test.texts[item] for item in shown}
            draw_samples(self.module, dataset, written, named, folder)
            said = ((Path(dataset.listing[i].path), f"{w.question} {w.text}".strip()) for i, w in written.items())
            keep_clips(self.module, said, folder)


def _counts(rows: dict[int, tuple[list[int], list[int]]], categories: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = (
        np.bincount(np.array([c for both in rows.values() for c in both[side]], dtype=np.int64), minlength=categories)
        for side in (0, 1)
    )
    return before, after


def listed_categories(before: np.ndarray, after: np.ndarray, count: int = LISTED) -> list[int]:
    """The `count` most frequent categories after training, then the `count` most changed ones; counts are [C]."""
    frequent = np.argsort(-after, kind="stable")[:count]
    changed = np.argsort(-np.abs(after - before), kind="stable")[:count]
    return [int(c) for c in dict.fromkeys([*frequent.tolist(), *changed.tolist()]) if before[c] or after[c]]


def draw_shift(
    module: pl.LightningModule, shifts: Mapping[str, tuple[Sequence[str], np.ndarray, np.ndarray]], folder: Path
) -> None:
    """Write `token_shift.csv` and `token_shift.png`; shifts are category names and counts before and after training."""
    rows = [
        [modality, names[c], int(before[c]) if before.any() else "", int(after[c])]
        for modality, (names, before, after) in shifts.items()
        for c in np.argsort(-after, kind="stable").tolist()
        if before[c] or after[c]
    ]
    write_table(module, folder / "token_shift.csv", ["modality", "category", "before", "after"], rows)
    figure, axes = chart(1, len(shifts), size=(4.5 * len(shifts), 4))
    for axis, (modality, (names, before, after)) in zip(axes[0], shifts.items()):
        chosen = listed_categories(before, after)[::-1]
        places = np.arange(len(chosen))
        if before.any():
            axis.barh(places + 0.2, before[chosen], 0.4, label="before end-to-end training", color="tab:gray")
        axis.barh(places - 0.2, after[chosen], 0.4, label="after", color="tab:blue")
        axis.set_yticks(places, [plain(names[c]) for c in chosen], fontsize=7)
        axis.set_title(f"{modality}: how often a category is chosen", fontsize=8)
        axis.legend(fontsize=7)
    save_figure(module, figure, folder / "token_shift.png")


def draw_samples(
    module: pl.LightningModule,
    dataset: Any,
    written: dict[int, GeneratedText],
    tokens: dict[str, dict[int, tuple[list[str], ...]]],
    folder: Path,
) -> None:
    """Write `samples.png` and `samples.csv`: frame, tokens before and after, question, generated text, original."""
    columns = ["clip", "question", "written", "original"]
    columns += [f"{name} tokens {when}" for name in tokens for when in ("before", "after")]
    table: list[list[str]] = []
    items: list[Described] = []
    for item, own in written.items():
        found = {name: rows.get(item, ([], [])) for name, rows in tokens.items()}
        described = [
            f"{name}: " + " -> ".join(", ".join(words) for words in both if words) for name, both in found.items()
        ]
        content = [own.question, f"written: {own.text}", f"original: {own.answer}", *described]
        color = "black" if own.matches or not own.answer else WRONG
        items.append(Described(preview_of(dataset, item), [(line, color) for line in content if line]))
        table.append(
            [dataset.name(item), own.question, own.text, own.answer]
            + [", ".join(words) for both in found.values() for words in both]
        )
    title = "Categories before -> after end-to-end training, and what was written; red: not the original"
    save_figure(module, described_images(items, title, columns=2), folder / "samples.png")
    write_table(module, folder / "samples.csv", columns, table)
