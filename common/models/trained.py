"""Read, use and export trained models.

An export is a self-contained folder: weights (safetensors), configuration, vocabularies, the stage's record, and a
model card. An export holds only tensors, text and plain data, and each paper lists the classes that may be built. So an
untrusted export cannot run code (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.checkpoint_files import differences
from common.errors import StageError
from common.files import digest, parsing, read_bytes, read_text, whole_folder
from common.models.finished_stage import FinishedStage, open_finished
from common.models.safe_builder import Builder
from common.types import hints_of

FORMAT = "representation-assemble/model/1"
WEIGHTS, RECORD = "model.safetensors", "record.json"
#: Arguments that name files that training started from; the exported weights replace them.
SOURCES = frozenset(
    {"pretrained", "warm_start", "text_pretrained", "video_pretrained", "audio_pretrained", "statistics"}
)

Modality = Literal["video", "audio", "image", "text"]
#: A file, a text, several of them, or what `read_<modality>` returned for them.
Items = str | Path | Sequence[Any] | Tensor


@dataclass(frozen=True)
class Trained:
    """A trained model as plain data.

    Attributes:
        model: `class_path` and `init_args` of the LightningModule.
        inputs: settings of tokenizers and transforms by name.
        files: content of other files, such as vocabularies.
        record: the stage's record as JSON; None if the stage isn't finished.
        step: the checkpoint's training step; None for an export.
    """

    model: dict[str, Any]
    inputs: dict[str, Any]
    weights: dict[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)
    record: str | None = None
    origin: Path = Path()
    step: int | None = None

    @property
    def where(self) -> str:
        here = self.origin
        return str(here / CONFIGURATION if here.is_dir() else here.parent.parent / "config.yaml")

    def file(self, name: str) -> bytes:
        if name not in self.files:
            raise StageError(f"{self.where}: files has no {name}, which the model needs; export the model again")
        return self.files[name]


class TrainedModel(nn.Module):
    """A trained model with methods to use it. Each paper has one subclass.

    `read_<modality>` reads a file or text. `embed_<modality>` takes a list of results of `read_<modality>` and returns
    a row for each.

    Attributes:
        kinds: import paths of the LightningModules whose checkpoints can be used.
        classes: all classes that may be built (modules, networks, readers). Configurations can't name other classes.
        no_files: arguments that may not be text, because text would name a file outside the export.
        example: a usable stage, as `<paper>/<scale>/seed<k>/<stage>`.
        otherwise: last sentence of the error for a checkpoint of another module: what the checkpoint lacks, and which
            stage to use.
        embeds: the modalities that can be embedded.
        retrieval: `vectors` compares results of `embed`, `pairs` scores pairs of inputs, None means no retrieval.

    To support the command `answer`, `caption` or `generate`, define a method of that name; `answer` and `generate` also
    need `notes` about the input. To accept region features as images, define the attribute `regions`.
    """

    paper: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[type, ...]]
    no_files: ClassVar[frozenset[str]] = SOURCES | {"vocabulary", "model"}
    example: ClassVar[str]
    otherwise: ClassVar[str]
    embeds: ClassVar[tuple[Modality, ...]] = ()
    retrieval: ClassVar[Literal["vectors", "pairs"] | None] = "vectors"

    @classmethod
    def card_usage(cls, trained: Trained) -> str:
        """Return the field of the paper's `model_card.yaml` that contains example code for this model."""
        return "usage"

    @classmethod
    @abstractmethod
    def gather(cls, stage: FinishedStage) -> Trained:
        """Collect everything that the model needs from a finished stage, except the record."""

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """Read the folder of an export, or `checkpoints/last.ckpt` of a finished stage."""
        path = Path(path)
        if path.is_dir():
            return read_export(path, cls.paper)
        stage = open_finished(path, cls.kinds, cls.otherwise, cls.example)
        record = path.parent.parent / RECORD
        with parsing(record, StageError):
            text = record.read_text(encoding="utf-8") if record.is_file() else None
        return replace(cls.gather(stage), record=text, origin=path, step=stage.content.get("global_step"))

    @classmethod
    def from_export(cls, path: str | Path, device: str = "cpu") -> Self:
        """Load a model in evaluation mode from an export's folder or a stage's `checkpoints/last.ckpt`."""
        trained = cls.read(path)
        with parsing(Path(trained.where), StageError):
            model = cls.of(trained)
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise StageError(f"--device {device}: {str(error).splitlines()[0]}") from None

    @classmethod
    def from_pretrained(cls, repo: str, revision: str | None = None, device: str = "cpu") -> Self:
        """Load a model (`user/name`) in evaluation mode from the Hub. `revision` is a branch, tag or commit."""
        return cls.from_export(fetch_export(repo, revision), device)

    @classmethod
    def of(cls, trained: Trained) -> Self:
        """Build the model from `classes` only, load the weights, and prepare tokenizers and transforms."""
        model: Self = Builder(trained.where, (cls, *cls.classes), cls.no_files).value(trained.model, cls, "model")
        model.read_inputs(trained)
        if problem := differences(model.state_dict(), trained.weights):
            raise StageError(f"{trained.origin} does not fit its configuration: {problem}")
        model.load_state_dict(trained.weights)
        return model

    @abstractmethod
    def read_inputs(self, trained: Trained) -> None:
        """Set up tokenizers and transforms from `Trained.inputs` and `Trained.files`."""

    @classmethod
    def input(cls, trained: Trained, name: str, kind: Any) -> Any:
        """Return the entry `name` of `Trained.inputs`, converted to the type `kind`; see `Builder.value`."""
        if name not in trained.inputs:
            raise StageError(f"{trained.where}: inputs.{name} is missing; export the model again")
        return Builder(trained.where, cls.classes, cls.no_files).value(trained.inputs[name], kind, f"inputs.{name}")

    @property
    def reads(self) -> tuple[Modality, ...]:
        """Return the modalities that this model was trained to embed, a part of `embeds`."""
        return self.embeds

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def fingerprint(self) -> str:
        """Hash the weights. Stored embeddings use the hash to identify their model."""
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
        """Embed files or texts. Return a row on the CPU for each readable item, and the items' positions.

        `skipped` collects the position and reason of each unreadable item. If `skipped` is None, an unreadable item
        raises.
        """
        embed = getattr(self, f"embed_{modality}")
        rows: list[Tensor] = []
        kept: list[int] = []
        samples = self.samples(modality, items, skipped)
        while batch := list(islice(samples, at_once)):
            rows.append(embed([sample for _, sample in batch]).cpu())
            kept += [place for place, _ in batch]
            batch.clear()  # frees memory for the next files
        return torch.cat(rows), kept

    def samples(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield position and content of each item that `read_<modality>` can read. Raise if none can. See `embed`."""
        from common.data.media import MediaError
        from common.data.regions import RegionError

        read: Callable[[Any], Any] = getattr(self, f"read_{modality}")
        unreadable = 0
        for place, item in enumerate(items):
            try:
                yield place, read(item)
            except (MediaError, RegionError) as error:
                if skipped is None:
                    raise
                skipped.append((place, str(error)))
                unreadable += 1
        if not items:
            raise StageError(f"there is no {modality} to read")
        if skipped and unreadable == len(items):
            first = skipped[-unreadable][1]
            raise StageError(f"none of the {len(items)} can be read as {modality}; the first: {first}")

    def read_all(self, modality: Modality, items: Items) -> list[Any]:
        """Apply `read_<modality>` to one or more files or texts. Keep items that have been read before."""
        read: Callable[[Any], Any] = getattr(self, f"read_{modality}")
        several = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else [items]
        if not several:
            raise ValueError(f"there is no {modality} to embed")
        if wrong := [item for item in several if item is None or isinstance(item, float | int)]:
            raise TypeError(f"{wrong[0]!r} is not a {modality}: give a file, a text, or the result of read_{modality}")
        return [read(item) if isinstance(item, str | Path) else item for item in several]

    def read_text(self, text: str) -> str:
        return text

    def captions(self, modality: Modality, embeddings: Tensor) -> list[str] | None:
        """Describe each of the embeddings [N, ...] in a line of words. Return None if the model can't."""
        return None

    # -- retrieval -----------------------------------------------------------------------------------------------------

    @classmethod
    def retrieves(cls) -> list[tuple[Modality, Modality]]:
        """Return the (query, gallery) modalities that can be compared. Pairs of different modalities come first."""
        if cls.retrieval is None:
            return []
        same = [(modality, modality) for modality in cls.embeds if cls.retrieval == "vectors"]
        return [*permutations(cls.embeds, 2), *same]

    def gallery(
        self, modality: Modality, items: Sequence[Any], skipped: list[tuple[int, str]] | None = None
    ) -> tuple[Any, list[int]]:
        """Prepare files or texts for `compare`. Return the gallery and the positions of readable items."""
        return self.embed(modality, items, skipped)

    def compare(self, query_modality: Modality, query: Any, modality: Modality, gallery: Any) -> Tensor:
        """Score a query against each of the N gallery items, [N]. The default is the cosine of the embeddings."""
        vector = self.embed(query_modality, [query])[0]
        return (F.normalize(gallery.float(), dim=-1) @ F.normalize(vector.float(), dim=-1)[0]).cpu()


# -- configurations ----------------------------------------------------------------------------------------------------


def without_sources(config: Any) -> Any:
    """Copy a configuration with `SOURCES` set to None."""
    if isinstance(config, Mapping):
        return {name: None if name in SOURCES else without_sources(value) for name, value in config.items()}
    return [without_sources(value) for value in config] if isinstance(config, list) else config


def with_arguments(config: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**config, "init_args": {**config["init_args"], **arguments}}


def renamed(state: Mapping[str, Tensor], **prefixes: str) -> dict[str, Tensor]:
    """Select and rename tensors of some parts of a module. `prefixes` maps each new prefix to an old prefix."""
    return {
        f"{new}.{name.removeprefix(f'{old}.')}": value
        for new, old in prefixes.items()
        for name, value in state.items()
        if name.startswith(f"{old}.")
    }


# -- the folder --------------------------------------------------------------------------------------------------------


def save(trained: Trained, model: type[TrainedModel], output: Path, about: Mapping[str, Any], card: str) -> None:
    """Export a trained model and the record to a new folder. `about` describes the stage; `card` is the model card."""
    from safetensors.torch import save_file

    assert trained.record is not None
    with whole_folder(output) as partial:
        tensors, shared = _stored_once(trained.weights)
        # As a single entry: safetensors writes several in random order, so the file would differ every time.
        save_file(tensors, partial / WEIGHTS, metadata={"shared": json.dumps(shared, sort_keys=True)})
        (partial / WEIGHTS).chmod(0o644)  # safetensors lets only the owner read it
        (partial / RECORD).write_text(trained.record, encoding="utf-8")
        for name, content in trained.files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        config = {
            "format": FORMAT,
            "paper": model.paper,
            "use": f"papers.{model.paper}.{model.__name__}",
            **about,
            "model": trained.model,
            "inputs": trained.inputs,
            "files": {
                name: {"bytes": (partial / name).stat().st_size, "sha256": digest(partial / name, "sha256")}
                for name in (WEIGHTS, RECORD, *sorted(trained.files))
            },
        }
        (partial / CONFIGURATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class Contents:
    """The entries of `config.json` needed to read an export."""

    format: str
    paper: str
    model: dict[str, Any]
    inputs: dict[str, Any]
    files: dict[str, dict[str, Any]]


def read_export(folder: Path, paper: str) -> Trained:
    """Read a paper's export, and check that the export is complete."""
    from safetensors import safe_open

    if not (folder / CONFIGURATION).is_file():
        raise StageError(
            f"{folder} is not an export, it has no {CONFIGURATION}: give a folder of `assemble export`, or "
            "checkpoints/last.ckpt of a finished stage"
        )
    path = folder / CONFIGURATION
    with parsing(path, StageError):
        document, builder = json.loads(read_bytes(path)), Builder(str(path))
        fields = hints_of(Contents).items()
        config = Contents(**{name: builder.value(document[name], kind, name) for name, kind in fields})
        if config.format != FORMAT:
            raise ValueError(f"format is {config.format!r:.80}, not {FORMAT!r}: export the model again")
    if config.paper != paper:
        raise StageError(f"{folder} is a model of {config.paper}, not of {paper}")
    unlisted: dict[str, dict[str, Any]] = {name: {} for name in (WEIGHTS, RECORD) if name not in config.files}
    for name, expected in (config.files | unlisted).items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StageError(f"{path}: files lists {name}, which is outside the export")
        with parsing(folder / name, StageError):
            if digest(folder / name, "sha256") != expected.get("sha256"):
                raise ValueError(f"SHA-256 differs from {CONFIGURATION}: copy the file or export the model again")
    with parsing(folder / WEIGHTS, StageError), safe_open(folder / WEIGHTS, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        shared = json.loads((opened.metadata() or {}).get("shared", "{}"))
        weights |= {name: weights[other] for name, other in shared.items()}
    with parsing(folder / RECORD, StageError):
        record = read_text(folder / RECORD)
    files = {name: read_bytes(folder / name, None) for name in config.files if name not in (WEIGHTS, RECORD)}
    return Trained(config.model, config.inputs, weights, files, record, folder)


def _stored_once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors without those that share memory with another, and the name to use for each removed tensor."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, value in weights.items():
        stored = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), name)
        if stored == name or value.numel() == 0:
            tensors[name] = value.detach().cpu().contiguous().clone()
        else:
            shared[name] = stored
    return tensors, shared


# -- the Hugging Face Hub ----------------------------------------------------------------------------------------------

#: Files of an export.
CONFIGURATION, CARD = "config.json", "README.md"
#: Files to download: configuration, record, weights and vocabularies.
READ = ["*.json", "*.safetensors", "*.txt", "*.model"]


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """Download an export (`user/name`) to the Hub client's cache and return the folder. Offline, only use the cache."""
    from huggingface_hub import snapshot_download

    with _named(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=READ))


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Upload an export to the Hub as one commit, and return the address. Create the repository if it is missing."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="representation-assemble")
    files = json.loads(read_bytes(folder / CONFIGURATION))["files"]
    with _named(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIGURATION, CARD, *files],
            commit_message=f"Export of {folder.name}",
        )
    return str(sent.commit_url)


@contextmanager
def _named(repo: str) -> Iterator[None]:
    """Add the repository's name to errors of the Hub client."""
    try:
        yield
    except Exception as error:  # The client, its HTTP library or the system can raise anything.
        raise StageError(f"Hugging Face Hub, {repo}: {' '.join(str(error).split())}") from error
