"""Our figures: categories chosen before and after end-to-end training, and samples with generated text."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.metrics.gathering import OncePerSample, gather_objects
from common.monitoring.figures import WRONG, Described, chart, described_images, plain, preview_of, save_figure
from common.monitoring.media import keep_clips, media_folder, write_table
from papers.vx2text.gumbel import largest
from papers.vx2text.prompt import MODALITIES
from papers.vx2text.tokens import ModalityClassifier
from papers.vx2text.weights import load_classifier

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.protocols.text import GeneratedText, TextTest

#: Samples to show in figures and tables.
SHOWN = 16
#: Number of categories to list: the most frequent ones, and the most changed ones.
LISTED = 10
#: How often a category is chosen before and after end-to-end training, in the classifier's order.
Counts = Mapping[str, tuple[int, int]]


class TrueTokens:
    """Counts the tokens that are true words of their clip, where the data set of a `VX2TextModule` lists those.

    Only the miniature's data sets do. Tokens of absent modalities and clips without true words don't count.
    """

    def __init__(self, module: Any) -> None:
        self.words: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = module.data.dataset.words()
        self.categories = {name: module.data.categories[name] for name in module.model.tokens}
        self.meters = {name: OncePerSample("precision") for name in self.categories}

    def update(self, batch: dict[str, Any], named: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (chosen, _) in named.items():
            categories, side = self.categories[name], MODALITIES.index(name)
            if categories is None or not chosen.shape[1]:
                continue
            rows, hits = [], []
            for row, (clip, present) in enumerate(zip(batch["clip"], batch[f"{name}_present"].tolist())):
                true = self.words.get(clip, ((), ()))[side]
                if present and true:
                    rows.append(row)
                    hits.append([categories[number] in true for number in chosen[row].tolist()])
            if rows:
                precision = torch.tensor(hits, dtype=torch.float32, device=chosen.device).mean(1)
                self.meters[name].update(batch["index"][rows], precision=precision)

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        means = {name: meter.compute(device) for name, meter in self.meters.items()}
        return {f"{name}_token_precision": mean["precision"] for name, mean in means.items() if mean["count"] > 0}


class TokenShift:
    """Counts the categories of a test set's tokens before and after the end-to-end training of a `VX2TextModule`.

    "Before" uses the initial weights, reloaded from their files; it doesn't exist without a file, or for a frozen
    classifier.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.before: dict[str, ModalityClassifier] = {}
        # By modality and sample, the categories of its tokens: before (may be empty) and after.
        self.words: dict[str, dict[int, tuple[list[str], list[str]]]] = {name: {} for name in module.model.tokens}
        for name, tokens in module.model.tokens.items():
            path = module.hparams[f"{name}_pretrained"]
            if tokens.projection is None and tokens.learns and path is not None and Path(path).is_file():
                earlier = copy.deepcopy(tokens.classifier)
                load_classifier(earlier, path, name, f"model.{name}_pretrained")
                self.before[name] = earlier.eval()

    @torch.no_grad()
    def update(self, batch: dict[str, Any], named: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (chosen, _) in named.items():
            tokens = self.module.model.tokens[name]
            earlier = chosen[:, :0]
            if name in self.before:
                clips = batch[name].flatten(0, 1) if name == "video" else batch[name]
                earlier = largest(self.before[name](clips), tokens.tokens).reshape(len(chosen), -1)
            present = batch[f"{name}_present"].tolist()
            for item, there, *both in zip(batch["index"].tolist(), present, earlier.tolist(), chosen.tolist()):
                if there:
                    before, after = ([tokens.classifier.names[number] for number in row] for row in both)
                    self.words[name][item] = before, after

    def draw(self, test: TextTest) -> None:
        """Write figures and tables to the run's `media` folder; all processes must call this."""
        words = {name: dict(gather_objects(sorted(rows.items()))) for name, rows in self.words.items()}
        if not self.module.trainer.is_global_zero:
            return
        folder = media_folder(self.module)
        shifts = {}
        for name, rows in words.items():
            before, after = (Counter(word for both in rows.values() for word in both[side]) for side in (0, 1))
            if after:
                names = self.module.model.tokens[name].classifier.names
                shifts[name] = {word: (before[word], after[word]) for word in names if before[word] or after[word]}
        if shifts:
            draw_shift(self.module, shifts, folder)
        items = sorted(test.texts)
        # A fixed random choice; equal steps could hit only one kind of question.
        shown = [items[place] for place in sorted(np.random.default_rng(0).permutation(len(items))[:SHOWN].tolist())]
        if shown:
            dataset = self.module.trainer.test_dataloaders.dataset
            written = {item: test.texts[item] for item in shown}
            draw_samples(self.module, dataset, written, {name: rows for name, rows in words.items() if rows}, folder)
            said = ((Path(dataset.listing[i].path), f"{w.question} {w.text}".strip()) for i, w in written.items())
            keep_clips(self.module, said, folder)


def listed_categories(counts: Counts, number: int = LISTED) -> list[str]:
    """The `number` most frequent categories after training, then the `number` most changed ones."""
    frequent = sorted(counts, key=lambda word: -counts[word][1])[:number]
    changed = sorted(counts, key=lambda word: -abs(counts[word][1] - counts[word][0]))[:number]
    return list(dict.fromkeys([*frequent, *changed]))


def draw_shift(module: pl.LightningModule, shifts: Mapping[str, Counts], folder: Path) -> None:
    """Write `token_shift.csv` and `token_shift.png`."""
    has_before = {modality: any(before for before, _ in counts.values()) for modality, counts in shifts.items()}
    rows = [
        [modality, word, before if has_before[modality] else "", after]
        for modality, counts in shifts.items()
        for word, (before, after) in sorted(counts.items(), key=lambda item: -item[1][1])
    ]
    write_table(module, folder / "token_shift.csv", ["modality", "category", "before", "after"], rows)
    figure, axes = chart(1, len(shifts), size=(4.5 * len(shifts), 4))
    for axis, (modality, counts) in zip(axes[0], shifts.items()):
        chosen = listed_categories(counts)[::-1]
        before, after = zip(*(counts[word] for word in chosen))
        places = np.arange(len(chosen))
        if has_before[modality]:
            axis.barh(places + 0.2, before, 0.4, label="before end-to-end training", color="tab:gray")
        axis.barh(places - 0.2, after, 0.4, label="after", color="tab:blue")
        axis.set_yticks(places, [plain(word) for word in chosen], fontsize=7)
        axis.set_title(f"{modality}: how often a category is chosen", fontsize=8)
        axis.legend(fontsize=7)
    save_figure(module, figure, folder / "token_shift.png")


def draw_samples(
    module: pl.LightningModule,
    dataset: Any,
    written: dict[int, GeneratedText],
    tokens: dict[str, dict[int, tuple[list[str], list[str]]]],
    folder: Path,
) -> None:
    """Write `samples.png` and `samples.csv`: frame, tokens before and after, question, generated text, original."""
    columns = ["clip", "question", "written", "original"]
    columns += [f"{name} tokens {when}" for name in tokens for when in ("before", "after")]
    table: list[list[str]] = []
    items: list[Described] = []
    for item, text in written.items():
        words = {name: [", ".join(names) for names in rows.get(item, ([], []))] for name, rows in tokens.items()}
        table.append(
            [dataset.name(item), text.question, text.text, text.answer, *(w for both in words.values() for w in both)]
        )
        content = [text.question, f"written: {text.text}", f"original: {text.answer}"]
        content += [f"{name}: " + " -> ".join(filter(None, both)) for name, both in words.items()]
        color = "black" if text.matches or not text.answer else WRONG
        items.append(Described(preview_of(dataset, item), [(line, color) for line in content if line]))
    title = "Categories before -> after end-to-end training, and what was written; red: not the original"
    save_figure(module, described_images(items, title, columns=2), folder / "samples.png")
    write_table(module, folder / "samples.csv", columns, table)
