"""Trained models, read from a finished stage or from an export.

An export is a folder that needs nothing else: weights (safetensors), configuration, vocabularies, the record of the
stage, and a model card. It holds only tensors, text and plain data, and each paper lists the classes that its models
are made of, so an untrusted export cannot run anything (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.checkpoint_files import differences
from common.errors import StageError
from common.files import parsing, put_back, whole_folder
from common.reporting.papers import existing_papers
from common.stages.finished_stage import FinishedStage, open_finished
from common.stages.paper_modules import CARD, CONFIGURATION, TRAINED, part
from common.stages.safe_builder import Builder, arguments_of

FORMAT = "representation-assemble/model/1"
WEIGHTS, RECORD = "model.safetensors", "record.json"
#: Arguments of classes that name files which training started from; the weights hold what came of them.
SOURCES = frozenset(
    {"pretrained", "warm_start", "text_pretrained", "video_pretrained", "audio_pretrained", "statistics"}
)

Modality = Literal["video", "audio", "image", "text"]
#: One or several files or texts, or what was read of them.
Items = str | Path | Sequence[Any] | Tensor


@dataclass(frozen=True)
class Trained:
    """A trained model as plain data.

    Attributes:
        model: `class_path` and `init_args` of the module.
        inputs: how files and texts become inputs of the model.
        weights: tensors under the names of the usable model's state dict.
        files: vocabularies and the like by name; their content, or their path.
        record: JSON of the stage's record; None before it is finished.
        origin: checkpoint or folder, for messages.
        step: of the checkpoint; None of an export.
    """

    model: dict[str, Any]
    inputs: dict[str, Any]
    weights: dict[str, Tensor]
    files: dict[str, bytes | Path] = field(default_factory=dict)
    record: str | None = None
    origin: str = ""
    step: int | None = None

    @property
    def where(self) -> str:
        """The file of the configuration, for messages."""
        path = Path(self.origin)
        return str(path / CONFIGURATION if path.is_dir() else path.parent.parent / "config.yaml")

    def file(self, name: str) -> bytes:
        """Content of one of the files."""
        if name not in self.files:
            raise StageError(f"{self.where}: files has no {name}, which the model needs; export the model again")
        found = self.files[name]
        return found.read_bytes() if isinstance(found, Path) else found


class Encoder(nn.Module):
    """From tensors of one modality to vectors [B, D]; see `common.stages.encoder_programs`.

    Args:
        network: what it computes with.
        embed: takes the network and its inputs.
        inputs: an example of two rows; of integers and truth values the second dimension is a length.
    """

    def __init__(self, network: nn.Module, embed: Callable[..., Tensor], *inputs: Tensor) -> None:
        super().__init__()
        self.network = network
        self.embed = embed
        self.inputs = inputs

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.embed(self.network, *inputs)

    @property
    @torch.no_grad()
    def width(self) -> int:
        """D of the vectors."""
        return int(self(*self.inputs).shape[-1])


def noise_like(example: Tensor) -> Tensor:
    """Two rows of noise, of the shape and the type of an example."""
    return torch.randn(2, *example.shape, generator=torch.Generator().manual_seed(0)).to(example)


class TrainedModel(nn.Module):
    """A trained model with methods for its use; each paper has one such class.

    `embed_<modality>` of a class takes what its `read_<modality>` reads, one by one, and gives one row for each.

    Args:
        trained: see `Trained`; `from_export` reads it.

    Attributes:
        paper: package of the paper.
        kinds: import paths of the modules whose checkpoints can be used.
        classes: all classes that a trained model is made of: its modules, their networks, what reads its inputs. No
            other is built, whatever a configuration asks for.
        no_files: arguments that are files where they are text; what was in them stands in the weights or beside them.
        example: a stage that can be used, as `<paper>/<scale>/seed<k>/<stage>`.
        otherwise: end of the error for a checkpoint of another module: what it lacks, and which stage to give.
        embeds: what can be embedded.
        retrieves: what can be compared: the query, and what is searched.
        compares_vectors: whether that is done by the vectors of `embed`.
        options: what of the model the command line may set: `language`, `regions`. A class has the method `answer`,
            `caption` or `generate` where the command of that name goes with it; one that answers or generates has
            `notes`.
        limits: what the model is for and what it cannot do, for its card.
        usage: a line of Python that uses `model`, for its card.
    """

    paper: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[type, ...]]
    no_files: ClassVar[frozenset[str]] = SOURCES
    example: ClassVar[str]
    otherwise: ClassVar[str]
    embeds: ClassVar[tuple[Modality, ...]] = ()
    retrieves: ClassVar[tuple[tuple[Modality, Modality], ...]] = ()
    compares_vectors: ClassVar[bool] = True
    options: ClassVar[tuple[Literal["language", "regions"], ...]] = ()
    limits: ClassVar[str]
    usage: ClassVar[str]

    @classmethod
    def usage_of(cls, trained: Trained) -> str:
        """The line of Python for the card of one model; `usage` unless it cannot do what that shows."""
        return cls.usage

    @classmethod
    @abstractmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        """What of a finished stage is needed to use its model; without its record."""

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """Read the folder of an export, or `checkpoints/last.ckpt` of a finished stage."""
        path = Path(path)
        if path.is_dir():
            return read_export(path, cls.paper)
        stage = open_finished(path, cls.kinds, cls.otherwise, cls.example)
        found = cls.gather(stage)
        record = stage.folder / RECORD
        with parsing(record, StageError):
            text = record.read_text(encoding="utf-8") if record.is_file() else None
        step = stage.content.get("global_step")
        return Trained(found.model, found.inputs, found.weights, found.files, text, str(path), step)

    @classmethod
    def from_export(cls, path: str | Path, device: str = "cpu") -> Self:
        """A model of an export's folder or a stage's `checkpoints/last.ckpt`, in evaluation mode.

        Raises:
            StageError: it is missing, damaged, or of another model; there is no such device.
        """
        trained = cls.read(path)
        with parsing(Path(trained.where), StageError):
            model = cls.of(trained)
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise StageError(f"--device {device}: {str(error).splitlines()[0]}") from None

    @classmethod
    def from_pretrained(cls, repo: str, revision: str | None = None, device: str = "cpu") -> Self:
        """A model of the Hugging Face Hub, in evaluation mode; see `from_export`.

        Args:
            repo: `user/name` of a repository that `assemble export --push` made.
            revision: branch, tag or commit; None is the newest. A commit never changes.
            device: where it runs.
        """
        from common.stages.hub import fetch_export

        return cls.from_export(fetch_export(repo, revision), device)

    @classmethod
    def of(cls, trained: Trained) -> Self:
        """The model with its weights, and what reads files for it."""
        return cls(trained)

    @classmethod
    def build(cls, trained: Trained) -> Any:
        """The module of the configuration, with random weights; made of `classes` alone."""
        import lightning.pytorch as pl

        return Builder(trained.where, cls.classes, cls.no_files).value(trained.model, pl.LightningModule, "model")

    @classmethod
    def input(cls, trained: Trained, name: str, kind: Any) -> Any:
        """One of `Trained.inputs` as the type that it must have; see `Builder.value`."""
        if name not in trained.inputs:
            raise StageError(f"{trained.where}: inputs.{name} is missing; export the model again")
        return Builder(trained.where, cls.classes, cls.no_files).value(trained.inputs[name], kind, f"inputs.{name}")

    def fill(self, trained: Trained) -> None:
        """Load the weights, which must fit."""
        problem = differences(self.state_dict(), trained.weights)
        if problem:
            raise StageError(f"{trained.origin} does not fit its configuration: {problem}")
        self.load_state_dict(trained.weights)

    @property
    def reads(self) -> tuple[Modality, ...]:
        """What of `embeds` this model embeds, which may have been trained without some of it."""
        return self.embeds

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    def fingerprint(self) -> str:
        """Hash of the weights, which tells vectors of different models apart."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    # -- embedding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None, at_once: int = 16
    ) -> tuple[Tensor, list[int]]:
        """Embeddings on the CPU, one row for each item that could be read, and the positions of these.

        Args:
            modality: one of `embeds`.
            items: paths, or texts.
            skipped: gets the position and the reason of every item that cannot be read; None raises instead.
            at_once: items that go through the network together.

        Raises:
            StageError: nothing could be read.
        """
        embed = getattr(self, f"embed_{modality}")
        rows: list[Tensor] = []
        kept: list[int] = []
        held: list[Any] = []
        for place, sample in self.samples(modality, items, skipped):
            held.append(sample)
            kept.append(place)
            if len(held) == at_once:
                rows.append(embed(held).cpu())
                held = []
        if held:
            rows.append(embed(held).cpu())
        if not rows:
            raise StageError(nothing_to_read(modality, items, skipped))
        return torch.cat(rows), kept

    def samples(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """What `read_<modality>` makes of every item that can be read, with its position; see `embed`."""
        from common.data.media import MediaError
        from common.data.regions import RegionError

        read: Callable[[Any], Any] = getattr(self, f"read_{modality}")
        for place, item in enumerate(items):
            try:
                yield place, read(item)
            except (MediaError, RegionError) as error:
                if skipped is None:
                    raise
                skipped.append((place, str(error)))

    def read_all(self, modality: Modality, items: Items) -> list[Any]:
        """What `read_<modality>` makes of one or several files or texts; what was read already stays as it is."""
        read: Callable[[Any], Any] = getattr(self, f"read_{modality}")
        several = [items] if isinstance(items, str | Path) else list(items)
        if not several:
            raise ValueError(f"there is no {modality} to embed")
        return [read(one) if isinstance(one, str | Path) else one for one in several]

    def read_text(self, text: str) -> str:
        """A text as `embed_text` takes it."""
        return text

    def captions(self, modality: Modality, embeddings: Tensor) -> list[str] | None:
        """What embeddings [N, ...] say in words, one line for each; None where they say nothing."""
        return None

    def encoders(self) -> dict[str, Encoder]:
        """Encoders that take tensors alone, by modality; they give what `embed_<modality>` gives of one clip."""
        return {}

    # -- retrieval -----------------------------------------------------------------------------------------------------

    def searched(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> tuple[Any, list[int]]:
        """What is searched, as `compare` takes it, and the positions of the items that could be read."""
        return self.embed(modality, items, skipped)

    def compare(self, query_modality: Modality, query: Any, modality: Modality, searched: Any) -> Tensor:
        """Scores [N] of a query with everything that is searched; here the cosine of the embeddings."""
        found = self.embed(query_modality, [query])[0]
        return (F.normalize(searched.float(), dim=-1) @ F.normalize(found.float(), dim=-1)[0]).cpu()


def trained_model(paper: str) -> type[TrainedModel]:
    """The class of a paper's trained models."""
    model: type[TrainedModel] = part(paper, *TRAINED).MODEL
    return model


def nothing_to_read(modality: str, items: Sequence[Any], skipped: Sequence[tuple[int, str]] | None) -> str:
    if not items:
        return f"there is no {modality} to read"
    return f"none of the {len(items)} can be read as {modality}; the first: {skipped[0][1] if skipped else items[0]}"


# -- configurations ----------------------------------------------------------------------------------------------------


def without_sources(config: Any) -> Any:
    """A configuration without the files that training started from."""
    if isinstance(config, Mapping):
        return {name: None if name in SOURCES else without_sources(value) for name, value in config.items()}
    return [without_sources(value) for value in config] if isinstance(config, list) else config


def with_arguments(config: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """The configuration of an object with some of its arguments replaced."""
    return {**config, "init_args": {**config["init_args"], **arguments}}


def renamed(state: Mapping[str, Tensor], **prefixes: str) -> dict[str, Tensor]:
    """Tensors below some parts of a module; `prefixes` maps the new name of a part to the old one."""
    return {
        f"{new}.{name.removeprefix(f'{old}.')}": value
        for new, old in prefixes.items()
        for name, value in state.items()
        if name.startswith(f"{old}.")
    }


# -- the folder --------------------------------------------------------------------------------------------------------


def write_export(
    model: type[TrainedModel], checkpoint: str | Path, output: str | Path, force: bool = False, repo: str | None = None
) -> Path:
    """Write the model of a stage or an export to a folder, which appears whole or not at all.

    Args:
        model: its class.
        checkpoint: `checkpoints/last.ckpt` of a finished stage, or an export.
        output: the folder; it is returned.
        force: replace an export that is there.
        repo: where it will be on the Hub, for its card.
    """
    from safetensors.torch import save_file

    from common.reporting.records import Record
    from common.stages.model_card import model_card

    output = Path(output)
    put_back(output)
    _check_free(output, force)
    trained = model.read(checkpoint)
    if trained.record is None:
        raise StageError(f"{checkpoint}: the stage has no record yet, which an export carries; let it finish first")
    with parsing(Path(checkpoint), StageError):
        record = Record.from_json(trained.record)
    if trained.step not in (None, record.steps):
        raise StageError(
            f"{checkpoint} is of step {trained.step:,}, but the record beside it measured step {record.steps:,}: "
            "export last.ckpt"
        )
    # Built once, so that no folder is written that cannot be read.
    model.of(trained)
    with whole_folder(output) as partial:
        tensors, shared = _stored_once(trained.weights)
        # Several entries of metadata would come in random order, and the file would never be the same.
        save_file(tensors, partial / WEIGHTS, metadata={"shared": json.dumps(shared, sort_keys=True)})
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner alone
        (partial / RECORD).write_text(trained.record, encoding="utf-8")
        for name, content in trained.files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, partial / name)
            else:
                (partial / name).write_bytes(content)
        config = {
            "format": FORMAT,
            "paper": model.paper,
            "use": f"papers.{model.paper}.{model.__name__}",
            "stage": record.stage,
            "scale": record.scale,
            "seed": record.seed,
            "config_hash": record.config_hash,
            "model": trained.model,
            "inputs": trained.inputs,
            "files": {
                name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
                for name in (WEIGHTS, RECORD, *sorted(trained.files))
            },
        }
        (partial / CONFIGURATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        card = model_card(record, output.name, model, model.usage_of(trained), repo)
        (partial / CARD).write_text(card, encoding="utf-8")
    return output


def _check_free(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise StageError(f"--output {output} is a file: give a folder")
    if not any(output.iterdir()):
        return
    if not (output / CONFIGURATION).is_file():
        raise StageError(f"--output {output} holds something else and is not touched: give another folder")
    written = {CONFIGURATION, CARD, *_read_configuration(output).files}
    if not force:
        raise StageError(f"--output {output} holds an export already: give another folder, or --force to replace it")
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    more = [name for name in names if name not in written and not name.startswith(".cache/")]  # of `hf download`
    if more:
        raise StageError(
            f"--output {output} also holds {more[0]}, which is no part of the export and --force would delete: move it "
            "away, or give another folder"
        )


@dataclass(frozen=True)
class _Content:
    """What the configuration says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Configuration:
    """What reading needs of `config.json`."""

    format: str
    paper: str
    model: dict[str, Any]
    inputs: dict[str, Any]
    files: dict[str, _Content]


def _read_configuration(folder: Path) -> _Configuration:
    path = folder / CONFIGURATION
    with parsing(path, StageError):
        config, builder = json.loads(path.read_bytes()), Builder(str(path))
        kinds = arguments_of(_Configuration)
        found = _Configuration(**{name: builder.value(config[name], kind, name) for name, kind in kinds.items()})
        if found.format != FORMAT:
            raise ValueError(f"format is {found.format!r:.80}, not {FORMAT!r}: export the model again")
    return found


def read_export(folder: str | Path, paper: str) -> Trained:
    """Read the folder of an export of a paper, and check that it is whole."""
    from safetensors import safe_open

    folder = Path(folder)
    path = folder / CONFIGURATION
    if not path.is_file():
        raise StageError(
            f"{folder} is no export, it holds no {CONFIGURATION}: give a folder of `assemble export`, or "
            "checkpoints/last.ckpt of a finished stage"
        )
    config = _read_configuration(folder)
    if config.paper != paper:
        short = {one.name: one.short for one in existing_papers()}
        raise StageError(f"{folder} is a model of {short.get(config.paper, config.paper)} and not of {short[paper]}")
    for name in (WEIGHTS, RECORD):
        if name not in config.files:
            raise StageError(f"{path}: files has no {name}, which every export holds; export the model again")
    for name, expected in config.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StageError(f"{path}: {name} lies outside of the export")
        with parsing(folder / name, StageError):
            if not (folder / name).is_file():
                raise ValueError("is missing from the export: copy the whole folder, or export the model again")
            if (folder / name).stat().st_size != expected.bytes or _digest(folder / name) != expected.sha256:
                raise ValueError(f"has not the size and SHA-256 of {CONFIGURATION}: copy it or export the model again")
    with parsing(folder / WEIGHTS, StageError), safe_open(folder / WEIGHTS, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        shared = json.loads((opened.metadata() or {}).get("shared", "{}"))
        weights |= {name: weights[other] for name, other in shared.items()}
    with parsing(folder / RECORD, StageError):
        record = (folder / RECORD).read_text(encoding="utf-8")
    kept: dict[str, bytes | Path] = {name: folder / name for name in config.files if name not in (WEIGHTS, RECORD)}
    return Trained(config.model, config.inputs, weights, kept, record, str(folder))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and the further names of those that go by several."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, value in weights.items():
        known = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), name)
        if known == name or value.numel() == 0:
            tensors[name] = value.detach().cpu().contiguous().clone()
        else:
            shared[name] = known
    return tensors, shared
