"""`assemble data xmc_gan --text-features`: computes the stores of BERT features that recipes read."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.text import Text

from common import files
from common.data.listing import DatasetMissing
from common.data.overview import print_entry
from common.data.sequences import Rows
from common.data.text import CaptionTokenizer
from common.data.text_features import StoredFeatures, bert_digest, make_store
from common.errors import StageError
from common.types import class_at
from papers.xmc_gan.text import BertText

#: Captions per batch.
BATCH_SIZE = 256
COMMAND = "assemble data xmc_gan --text-features"
NO_DATA = "the data set is missing"


@dataclass(frozen=True, eq=False)
class WantedStore:
    """A store of text features that a recipe reads. `tokenizer` tokenizes the captions."""

    dataset: Any
    split: str
    tokenizer: CaptionTokenizer
    features: StoredFeatures

    @property
    def title(self) -> str:
        return f"{self.dataset.title}, {self.split}"

    @property
    def path(self) -> Path:
        return self.features.path(self.dataset.name, self.split, self.tokenizer.max_tokens)

    def captions(self) -> Rows[str]:
        return self.dataset.annotations(self.split).captions

    def state(self) -> str:
        """Return "present", "missing", or what is wrong with the store."""
        try:
            captions = self.captions()
            if not self.path.is_file():
                return "missing"
            self.tokenizer.prepare()
            self.features.open(self.dataset.name, self.split, captions, self.tokenizer)
            return "present"
        except DatasetMissing:
            return NO_DATA
        except (OSError, ValueError) as error:
            return str(error)

    def make(self, console: Console) -> None:
        self.tokenizer.prepare()
        captions, digest = self.captions(), bert_digest(Path(self.features.bert).expanduser())
        encoder = BertText(self.features.bert)
        encoder.encoder.require_weights()
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
        about = {"dataset": self.dataset.name, "split": self.split}
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            task = progress.add_task(f"BERT reads {self.title}", total=int(captions.starts[-1]))
            advance = functools.partial(progress.advance, task)
            make_store(self.path, captions, self.tokenizer, encoder, digest, BATCH_SIZE, advance, about)


#: `class_path` and `init_args` of the data modules of recipes.
Sections = Iterable[Mapping[str, Any]]


def wanted_stores(sections: Sections) -> list[WantedStore]:
    """List the distinct stores that the data modules read."""
    stores: dict[Path, WantedStore] = {}
    for section in sections:
        arguments = section.get("init_args") or {}
        if not arguments.get("text_features"):
            continue
        features = StoredFeatures(**arguments["text_features"])
        dataset, tokenizer = _instance(arguments["dataset"]), _instance(arguments["tokenizer"])
        for split in (arguments["split"], arguments["test_split"]):
            store = WantedStore(dataset, split, tokenizer, features)
            stores.setdefault(store.path, store)
    return list(stores.values())


def _instance(section: dict[str, Any]) -> Any:
    return class_at(section["class_path"])(**(section.get("init_args") or {}))


def report(sections: Sections) -> None:
    console = files.console()
    console.print(Text("Text features (frozen BERT)", style="italic"))
    states = {store: store.state() for store in wanted_stores(sections)}
    for store, state in states.items():
        style = "green" if state == "present" else "red"
        print_entry(
            console, f"{store.title}, T {store.tokenizer.max_tokens}", Text(state, style), [f"Path: {store.path}"]
        )
    if set(states.values()) != {"present"}:
        console.print(Text(f"`{COMMAND}` computes missing stores: about 14 GB for COCO 2014, minutes on a GPU."))


def text_features(sections: Sections) -> list[Path]:
    """Compute the missing or outdated stores of all available data sets."""
    console = Console(stderr=True)
    made, states = [], {store: store.state() for store in wanted_stores(sections)}
    for store, state in states.items():
        if state in ("present", NO_DATA):
            console.print(Text(f"{store.title}: {state}; see `assemble data xmc_gan`"))
        else:
            store.make(console)
            made.append(store.path)
    if set(states.values()) == {NO_DATA}:
        raise StageError("no features were computed: no data set is available")
    return made
