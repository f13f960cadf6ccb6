"""`assemble data xmc_gan --text-features`: the stores of BERT features that the recipes read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from common.data.listing import DatasetMissing
from common.data.sequences import Rows
from common.data.text import CaptionTokenizer
from common.data.text_features import StoredFeatures, bert_digest, make_store
from common.errors import StageError
from common.stages.configuration import class_at, recipes_of, resolve
from papers.xmc_gan.text import BertText

PAPER = "xmc_gan"
COMMAND = "assemble data xmc_gan --text-features"


@dataclass(frozen=True)
class WantedStore:
    """A store of text features that a recipe reads; `tokenizer` cuts the captions."""

    dataset: Any
    split: str
    tokenizer: CaptionTokenizer
    features: StoredFeatures

    @property
    def path(self) -> Path:
        return self.features.path(self.dataset.name, self.split, self.tokenizer.max_tokens)

    def captions(self) -> Rows[str]:
        captions = self.dataset.annotations(self.split).captions
        return captions if isinstance(captions, Rows) else Rows.texts(captions)


def wanted_stores(data: Path, bert: Path | None = None) -> list[WantedStore]:
    """Every store that the paper's recipes read at scale `paper`, once each; `bert` overrides the recipes' folder."""
    found: dict[Path, WantedStore] = {}
    for recipe in recipes_of(PAPER):
        section = resolve(PAPER, recipe, scale="paper").with_placeholders(DATA=str(data), RUN="").get("data") or {}
        arguments = section.get("init_args") or {}
        if not arguments.get("text_features"):
            continue
        features = StoredFeatures(**arguments["text_features"])
        tokenizer_section = arguments["tokenizer"]
        if bert is not None:
            features = replace(features, bert=str(bert))
            tokenizer_section = {
                **tokenizer_section,
                "init_args": {**tokenizer_section["init_args"], "vocabulary": str(bert)},
            }
        dataset, tokenizer = _instance(arguments["dataset"]), _instance(tokenizer_section)
        for split in (arguments["split"], arguments["test_split"]):
            store = WantedStore(dataset, split, tokenizer, features)
            found.setdefault(store.path, store)
    return list(found.values())


def _instance(section: dict[str, Any]) -> Any:
    return class_at(section["class_path"])(**(section.get("init_args") or {}))


def report(data: Path, console: Console | None = None) -> None:
    console = Console() if console is None else console
    table = Table(title="Text features (frozen BERT)", title_justify="left", show_lines=True)
    for heading in ("Captions", "State", "Path"):
        table.add_column(heading, overflow="fold")
    states = []
    stores = wanted_stores(data)
    for store in stores:
        states.append(_state(store))
        title = f"{store.dataset.title}, {store.split}, T {store.tokenizer.max_tokens}"
        table.add_row(Text(title), Text(states[-1]), Text(str(store.path)))
    console.print(table)
    if any(state != "present" for state in states):
        console.print(
            Text(f"`{COMMAND}` computes what can be computed, once: about 14 GB for COCO 2014, minutes on a GPU.")
        )
    for folder in dict.fromkeys(store.features.bert for store in stores):
        if not Path(folder).expanduser().is_dir():
            console.print(
                Text(f"BERT is not at {folder}: `hf download google-bert/bert-base-uncased --local-dir {folder}`")
            )


def _state(store: WantedStore) -> str:
    try:
        captions = store.captions()
        if not store.path.is_file() and not Path(store.features.bert).expanduser().is_dir():
            return "missing"
        store.tokenizer.prepare()
        return store.features.state(store.dataset.name, store.split, captions, store.tokenizer)
    except DatasetMissing:
        return "the data set is missing"
    except (OSError, ValueError) as error:
        return str(error)


def text_features(
    data: Path,
    bert: Path | None = None,
    device: str | None = None,
    batch_size: int = 256,
    console: Console | None = None,
) -> list[Path]:
    """Make missing or outdated stores of all available data sets; `bert` overrides the recipes' folder."""
    console = Console(stderr=True) if console is None else console
    made: list[Path] = []
    missing: list[str] = []
    for store in _present(wanted_stores(data, bert), missing):
        store.tokenizer.prepare()
        captions = store.captions()
        title = f"{store.dataset.title}, {store.split}"
        if store.features.state(store.dataset.name, store.split, captions, store.tokenizer) == "present":
            console.print(Text(f"{title}: present, {store.path}"))
            continue
        digest = bert_digest(Path(store.features.bert).expanduser())
        encoder = _encoder(store.features.bert, device)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"BERT reads {title}", total=int(captions.starts[-1]))
            make_store(
                store.path,
                captions,
                store.tokenizer,
                encoder,
                digest,
                batch_size,
                lambda count, progress=progress, task=task: progress.advance(task, count),  # type: ignore[misc]
                {"dataset": store.dataset.name, "split": store.split},
            )
        made.append(store.path)
    for title in dict.fromkeys(missing):
        console.print(Text(f"{title}: the data set is missing, see `assemble data xmc_gan`"))
    if missing and not made:
        raise StageError("no store was made: the data sets of those that are not there are missing")
    return made


def _present(stores: list[WantedStore], missing: list[str]) -> Iterator[WantedStore]:
    for store in stores:
        try:
            store.captions()
        except DatasetMissing:
            missing.append(f"{store.dataset.title}, {store.split}")
        else:
            yield store


def _encoder(bert: str, device: str | None) -> BertText:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = BertText(bert)
    encoder.encoder.require_weights()
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError) as error:
        raise StageError(f"--device {device}: {str(error).splitlines()[0]}") from None
