"""Compares the words of tokens before and after end-to-end training, and shows samples of generated text."""

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
from common.monitoring.figures import chart, plain, save_figure
from common.monitoring.media import keep_clips, media_folder, write_table
from papers.vx2text.gumbel import largest
from papers.vx2text.prompt import MODALITIES
from papers.vx2text.tokens import ModalityClassifier
from papers.vx2text.weights import load_classifier

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from common.protocols.text import TextTest

#: Number of samples to list.
SHOWN = 16
#: Plot this many of the most frequent categories, and this many of the most changed ones.
LISTED = 10
#: How often each category is chosen, before and after end-to-end training, in the classifier's order.
Counts = Mapping[str, tuple[int, int]]


class TokenWords:
    """Records which words a `VX2TextModule`'s tokens name in the test set, and which words they named before training.

    The words before training come from the initial weights, read from their file. They are missing without such a file,
    or if the classifier is frozen. Precision needs true words, which only the miniature's data sets list.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.true: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = module.data.dataset.words()
        self.before: dict[str, ModalityClassifier] = {}
        # For each modality and sample: the categories of its tokens before training (may be empty) and after.
        self.words: dict[str, dict[int, tuple[list[str], list[str]]]] = {name: {} for name in module.model.tokens}
        self.precision = {name: OncePerSample("precision") for name in module.model.tokens}
        for name, tokens in module.model.tokens.items():
            path = module.hparams[f"{name}_pretrained"]
            if tokens.projection is None and tokens.learns and path is not None and Path(path).is_file():
                earlier = copy.deepcopy(tokens.classifier)
                load_classifier(earlier, path, name, f"model.{name}_pretrained")
                self.before[name] = earlier.eval()

    @torch.no_grad()
    def update(self, batch: dict[str, Any], named: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (chosen, _) in named.items():
            tokens, categories = self.module.model.tokens[name], self.module.data.categories[name]
            earlier = chosen[:, :0]
            if name in self.before:
                scores = self.before[name](batch[name].flatten(0, 1))
                earlier = largest(scores, tokens.tokens).reshape(len(chosen), -1)
            columns = (batch["index"].tolist(), batch["clip"], batch[f"{name}_present"].tolist())
            index, hits = [], []
            for item, clip, present, *numbers in zip(*columns, earlier.tolist(), chosen.tolist()):
                if not present:
                    continue
                before, after = ([tokens.classifier.names[number] for number in row] for row in numbers)
                self.words[name][item] = before, after
                true = self.true.get(clip, ((), ()))[MODALITIES.index(name)]
                if categories is not None and after and true:
                    index.append(item)
                    hits.append([categories[number] in true for number in numbers[1]])
            if index:
                precision = torch.tensor(hits, dtype=torch.float32).mean(1)
                self.precision[name].update(torch.tensor(index), precision=precision)

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        means = {name: meter.compute(device) for name, meter in self.precision.items()}
        return {f"{name}_token_precision": mean["precision"] for name, mean in means.items() if mean["count"] > 0}

    def draw(self, test: TextTest) -> None:
        """Write figures and tables to the run's `media` folder. All processes must call this."""
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
            draw_shift(self.module, shifts, set(self.before), folder)
        items = sorted(test.texts)
        # A fixed random sample, because evenly spaced samples could all have the same kind of question.
        shown = [items[place] for place in sorted(np.random.default_rng(0).permutation(len(items))[:SHOWN].tolist())]
        dataset = self.module.trainer.test_dataloaders.dataset
        columns = ["clip", "question", "written", "original"]
        columns += [f"{name} tokens {when}" for name in words for when in ("before", "after")]
        table = []
        for item in shown:
            text = test.texts[item]
            tokens = [", ".join(names) for rows in words.values() for names in rows.get(item, ([], []))]
            table.append([dataset.name(item), text.question, text.text, text.answer, *tokens])
        write_table(self.module, folder / "samples.csv", columns, table)
        clips = ((dataset.listing[item].path, f"{row[1]} {row[2]}".strip()) for item, row in zip(shown, table))
        keep_clips(self.module, clips, folder)


def listed_categories(counts: Counts, number: int = LISTED) -> list[str]:
    """Return the `number` most frequent categories after training, then the `number` most changed ones."""
    frequent = sorted(counts, key=lambda word: -counts[word][1])[:number]
    changed = sorted(counts, key=lambda word: -abs(counts[word][1] - counts[word][0]))[:number]
    return list(dict.fromkeys([*frequent, *changed]))


def draw_shift(module: pl.LightningModule, shifts: Mapping[str, Counts], earlier: set[str], folder: Path) -> None:
    """Write `token_shift.csv` and `token_shift.png`. Only modalities in `earlier` have counts from before training."""
    rows = [
        [modality, word, before if modality in earlier else "", after]
        for modality, counts in shifts.items()
        for word, (before, after) in sorted(counts.items(), key=lambda item: -item[1][1])
    ]
    write_table(module, folder / "token_shift.csv", ["modality", "category", "before", "after"], rows)
    figure, axes = chart(1, len(shifts), size=(4.5 * len(shifts), 4))
    for axis, (modality, counts) in zip(axes[0], shifts.items()):
        chosen = listed_categories(counts)[::-1]
        before, after = zip(*(counts[word] for word in chosen))
        places = np.arange(len(chosen))
        if modality in earlier:
            axis.barh(places + 0.2, before, 0.4, label="before end-to-end training", color="tab:gray")
        axis.barh(places - 0.2, after, 0.4, label="after", color="tab:blue")
        axis.set_yticks(places, [plain(word) for word in chosen], fontsize=7)
        axis.set_title(f"{modality}: how often a category is chosen", fontsize=8)
        axis.legend(fontsize=7)
    save_figure(module, figure, folder / "token_shift.png")
