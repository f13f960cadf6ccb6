"""Define the commands that use trained models: embed, retrieve, generate, answer, caption and export."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from assemble.commands.find import print_rows
from assemble.commands.parsing import Option, PaperName, at_least, parse_seed
from assemble.reporting.papers import existing_papers, paper_named
from assemble.stages.paper_modules import optional_part, trained_model
from common import files
from common.errors import StageError, nearest, printable

CHECKPOINT = "checkpoints/last.ckpt of a finished stage, or the folder of an export"
#: The default export layout, which every paper supports: a folder for `from_export`.
EXPORT_LAYOUT = "safetensors"
#: How many characters of a caption a file name may have.
NAME_LENGTH = 60
#: How many reasons for skipped files to print.
NAMED = 10


@dataclass(frozen=True)
class ModelOptions:
    """The flags of commands that use a trained model."""

    checkpoint: Annotated[Path, CHECKPOINT]
    device: Annotated[str, "device to run on: cpu or cuda"] = "cpu"


@dataclass(frozen=True)
class EncoderOptions(ModelOptions):
    """The flags of commands that embed files or texts."""

    regions: Annotated[Path | None, "file of the images' region features, if the model has no detector"] = None


SpecialPaper = Annotated[str, "a paper whose model supports this command; any other name lists them"]
Clip = Annotated[Path, "video file, with or without sound"]
Speech = Annotated[Sequence[str], "the lines spoken in the clip, in order"]


# -- the model ---------------------------------------------------------------------------------------------------------


def _kind(name: str, options: ModelOptions, task: str, able: Callable[[Any], object]) -> Any:
    """Return the class of a paper's trained models, or fail if it doesn't support the task or an option."""
    paper = paper_named(name)
    _check_exists(options.checkpoint)
    kind = trained_model(paper.name)
    if not able(kind):
        usable = [other for other in existing_papers() if optional_part(other.name, "use")]
        able_papers = ", ".join(other.short for other in usable if able(trained_model(other.name)))
        raise StageError(f"{paper.short} cannot {task}; {able_papers} can")
    if isinstance(options, EncoderOptions) and options.regions is not None and not hasattr(kind, "regions"):
        raise StageError(f"{paper.short} does not support --regions")
    return kind


def _check_exists(checkpoint: Path) -> None:
    if not checkpoint.exists():
        raise StageError(f"--checkpoint {checkpoint} does not exist: give {CHECKPOINT}")


def _loaded(kind: Any, options: EncoderOptions) -> Any:
    model = kind.from_export(options.checkpoint, options.device)
    if options.regions is not None:
        from common.data.regions import RegionFeatures

        model.regions = RegionFeatures(options.regions)
    return model


def _suffixes(kind: str) -> frozenset[str]:
    from common.data.datasets.base import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES

    return {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES | VIDEO_SUFFIXES}[kind]


def _files(paths: Sequence[Path], kinds: Sequence[str]) -> list[Path]:
    """List the given files, and the files of these kinds (such as `image`) below the given folders, sorted by name."""
    from common.data.datasets.base import walk

    suffixes = frozenset[str]().union(*(_suffixes(kind) for kind in kinds))
    listed: list[Path] = []
    for path in paths:
        if not path.is_dir():
            listed.append(path)
        elif below := sorted(path / name for name, _ in walk(path, suffixes, []) if (path / name).is_file()):
            listed += below
        else:
            raise StageError(f"{path} has no file that can be read as {' or '.join(kinds)}")
    return listed


def _lines(path: Path) -> list[str]:
    """Read the texts of a file, one per line."""
    with files.parsing(path, StageError):
        content = files.read_text(path, None, encoding="utf-8-sig")
        # Not splitlines(), which also splits at other characters.
        texts = [line.strip() for line in content.split("\n") if line.strip()]
        if not texts:
            raise ValueError("has no text: write one per line")
    return texts


def _print_skipped(items: Sequence[Any], skipped: Sequence[tuple[int, str]]) -> None:
    if skipped:
        print(f"{len({place for place, _ in skipped})} of {len(items)} files not fully read:")
        reasons = dict.fromkeys(reason for _, reason in skipped)  # A file may be skipped once for each kind.
        for reason in list(reasons)[:NAMED]:
            print(f"  {printable(reason)}")


def _print_cut(model: Any, texts: Sequence[Any]) -> None:
    if cut := [text for text in texts if model.tokenizer.excess(text)]:
        limit = model.tokenizer.max_tokens
        print(printable(f"{len(cut)} of {len(texts)} texts are cut to {limit} tokens, such as {cut[0]!r}"))


# -- embed -------------------------------------------------------------------------------------------------------------


def embed(
    paper: PaperName,
    media: Annotated[Sequence[Path], "files, or folders of them; a .txt file has one text per line"] = (),
    *,
    options: EncoderOptions,
    text: Annotated[Sequence[str], "texts"] = (),
    output: Annotated[Path, ".npz file to write"],
) -> int:
    """Embed files and texts with a trained model and write the vectors to an .npz file.

    Takes video, audio, images or texts, depending on the paper's model (see its README). For each kind, the file has
    two arrays, such as `video` (one vector per row) and `video_names`. Unreadable files are skipped, counted and named.
    """
    import numpy as np

    if output.suffix != ".npz" or output.is_dir():
        raise StageError(f"--output {output}: give a file that ends in .npz")
    files.require_writable(output.parent, "--output")
    lists = [path for path in media if path.suffix == ".txt"]
    texts = [*text, *itertools.chain.from_iterable(map(_lines, lists))]
    if clash := next((name for name in text if os.path.isfile(name)), None):  # A long text may not be a valid path.
        raise StageError(f"--text {clash}: this is a file, not a text; give files before --text")
    if not media and not texts:
        raise StageError("nothing to embed: give files or --text")
    able = lambda kind: not texts or "text" in kind.embeds  # noqa: E731
    of_paper = _kind(paper, options, "embed text", able)
    paths = _files([path for path in media if path not in lists], [kind for kind in of_paper.embeds if kind != "text"])
    model = _loaded(of_paper, options)
    columns: dict[str, Any] = {"model": np.array(model.fingerprint())}
    shapes: list[str] = []
    skipped: list[tuple[int, str]] = []
    # A model that reads no files raises an error that says why.
    kinds = [kind for kind in model.reads if kind != "text"] or [kind for kind in of_paper.embeds if kind != "text"]
    rounds: list[tuple[str, Sequence[Any]]] = [*((kind, paths) for kind in kinds), ("text", texts)]
    for kind, items in rounds:
        if not items:
            continue
        before = len(skipped)
        try:
            vectors, kept = model.embed(kind, items, skipped)
        except StageError:
            if len(skipped) == before or (kind == kinds[-1] and not shapes):
                raise
            continue  # No file is of this kind.
        shapes.append(f"{kind} {list(vectors.shape)}")
        columns |= {kind: vectors.numpy(), f"{kind}_names": np.array([str(items[place]) for place in kept])}
        if (words := model.captions(kind, vectors)) is not None:
            columns[f"{kind}_words"] = np.array(words)
            for name, line in zip(columns[f"{kind}_names"], words):
                print(printable(f"{name}, {kind}: {line}"))
    _print_cut(model, texts)
    _print_skipped(paths, skipped)
    files.write_whole(output, lambda path: np.savez(path, **columns))
    print(f"written to {output}: {', '.join(shapes)}")
    return 0


# -- retrieve ----------------------------------------------------------------------------------------------------------


def retrieve(
    paper: PaperName,
    *,
    options: EncoderOptions,
    query: Annotated[str, "a file, or a text in quotes"],
    among: Annotated[
        Path,
        "what to search: a folder, a file with one text per line, or an .npz file of `assemble embed`",
    ],
    top: Annotated[int, Option("number of results", parse=at_least(1))] = 5,
) -> int:
    """Rank files or texts by how well they match a query, with a trained model.

    Finds sounds for a video, images for a text or the reverse, depending on the paper's model.
    """
    if not among.exists():
        raise StageError(f"--among {among} does not exist: give a folder, a text file or an .npz file")
    of_paper = _kind(paper, options, "retrieve", lambda kind: kind.retrieval)
    if not query.strip():
        raise StageError("--query is empty: give a file, or a text in quotes")
    arrays = _arrays(among) if among.suffix == ".npz" else {}
    query_kind, kind = _pair(of_paper, query, among, arrays)
    model = _loaded(of_paper, options)
    wanted = query if query_kind == "text" else Path(query)
    getattr(model, f"read_{query_kind}")(wanted)  # Fail before embedding the gallery.
    skipped: list[tuple[int, str]] = []
    texts = [query] if query_kind == "text" else []
    if arrays:
        if arrays["model"] != model.fingerprint():
            raise StageError(f"{among}: was embedded by another model: embed the files again with this one")
        import torch

        gallery, items = torch.from_numpy(arrays[kind]), arrays[f"{kind}_names"].tolist()
        kept = list(range(len(items)))
    else:
        items = _lines(among) if kind == "text" else _files([among], [kind])
        gallery, kept = model.gallery(kind, items, skipped)
        texts += map(str, items) if kind == "text" else []
    scores = model.compare(query_kind, wanted, kind, gallery)
    _print_cut(model, texts)
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    rows = [(str(rank), f"{scores[at]:.3f}", str(items[kept[at]])) for rank, at in enumerate(order, start=1)]
    print_rows(("", "score", f"{kind} for {query} ({query_kind})"), rows)
    _print_skipped(items, skipped)
    return 0


def _pair(of_paper: Any, query: str, among: Path, arrays: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kinds of the query and of the results: the model's first pair of kinds that fits the files."""
    if arrays and of_paper.retrieval != "vectors":
        raise StageError(f"{of_paper.paper} compares files, not vectors: give their folder, not {among}")
    media = [kind for kind in of_paper.embeds if kind != "text"]
    fitting = [kind for kind in media if Path(query).suffix.lower() in _suffixes(kind)]
    queries = fitting or ["text"]
    # Unlike `Path.is_file`, this accepts a text longer than a file name can be.
    if "text" not in queries and not os.path.isfile(query):
        raise StageError(f"--query {query}: there is no such file")
    searched = [*arrays] or (media if among.is_dir() else ["text"])
    for query_kind, kind in of_paper.retrieves():
        if query_kind in queries and kind in searched:
            return query_kind, kind
    pairs = ", ".join(f"{kind} by {query_kind}" for query_kind, kind in of_paper.retrieves())
    raise StageError(
        f"{of_paper.paper} cannot search {among} by the {queries[0]} {query!r}. It finds {pairs}; --among takes a "
        "folder for files and a text file for texts"
    )


def _arrays(path: Path) -> dict[str, Any]:
    """Read a file of `assemble embed`: the vectors and names by kind, and the model's fingerprint."""
    import numpy as np

    with files.parsing(path, StageError), files.open_regular(path) as file, np.load(file) as content:
        return {name: content[name] for name in ("model", *content.files)}


# -- the other commands -----------------------------------------------------------------------------------------------


def _special(command: str, paper: str, options: ModelOptions) -> Any:
    """Load the trained model of a paper. Fail if the model lacks the method named like the command."""
    kind = _kind(paper, options, command, lambda kind: hasattr(kind, command))
    return kind.from_export(options.checkpoint, options.device)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(printable(note), file=sys.stderr)


def answer(
    paper: SpecialPaper,
    clip: Clip,
    question: Annotated[str, "in quotes"],
    *,
    model: ModelOptions,
    option: Annotated[Sequence[str], "five answers to choose from, for a multiple-choice model (tvqa)"] = (),
    turn: Annotated[
        Sequence[tuple[str, str]], "an earlier question and its answer; repeat the flag for each, oldest first"
    ] = (),
    known: Annotated[str, "a description of the clip"] = "",
    speech: Speech = (),
) -> int:
    """Answer a question about a clip with a trained model."""
    trained = _special("answer", paper, model)
    _print_notes(trained.notes(question, speech, known, turn, option))
    print(trained.answer(clip, question, speech=speech, options=option, history=turn, known=known))
    return 0


def caption(paper: SpecialPaper, clip: Clip, *, model: ModelOptions, speech: Speech = ()) -> int:
    """Describe a clip with a trained model."""
    trained = _special("caption", paper, model)
    _print_notes(trained.notes(speech=speech))
    print(trained.caption(clip, speech=speech))
    return 0


def generate(
    paper: SpecialPaper,
    captions: Annotated[Sequence[str], "what the image should show, in quotes"],
    *,
    model: ModelOptions,
    output: Annotated[Path, "folder"] = Path("generated"),
    number: Annotated[int, Option("images per caption", parse=at_least(1))] = 1,
    seed: Annotated[int, Option("seed of the noise", parse=parse_seed)] = 0,
) -> int:
    """Generate images from captions with a trained model and write them as PNG files.

    Example: assemble generate PAPER "a red circle left of a blue square" --checkpoint
    runs/PAPER/mini/seed0/STAGE/checkpoints/last.ckpt --number 4
    """
    files.require_writable(output, "--output")
    trained = _special("generate", paper, model)
    from torchvision.utils import make_grid, save_image

    for caption in captions:
        for note in trained.notes(caption):
            print(f"{caption!r}: {note}")
    images = trained.generate(captions, number, seed)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for place, (caption, copies) in enumerate(zip(captions, images), start=1):
        name = re.sub(r"\W+", "-", caption.lower()).strip("-")[:NAME_LENGTH].strip("-")
        for copy, image in enumerate(copies, start=1):
            written.append(output / f"{place:02d}-{name}-{copy}-seed{seed}.png")
            save_image(image, written[-1])
    if len(written) > 1:
        written.append(output / "grid.png")
        save_image(make_grid(images.flatten(0, 1), nrow=number, pad_value=1.0), written[-1])
    for path in written:
        print(f"written to {path}")
    return 0


def export(
    paper: PaperName,
    *,
    checkpoint: Annotated[Path, f"{CHECKPOINT}; a backbone needs a last.ckpt or a released file"],
    output: Annotated[Path, "folder to write (a file for a backbone); must not exist"],
    layout: Annotated[
        str, "default: safetensors; other layouts write only the backbone; an unknown name lists them"
    ] = EXPORT_LAYOUT,
    push: Annotated[str | None, "also upload the folder to this repository on the Hugging Face Hub"] = None,
    private: Annotated[bool, "with --push: create the repository as private"] = False,
) -> int:
    """Export a trained model as a folder, or its backbone as a file for other code.

    The folder has weights (safetensors), configuration, vocabularies, record and model card. It has no queues, banks or
    optimizer. Other layouts write only the backbone, for use with other libraries.
    """
    from assemble.stages.export import write_export
    from common.models.trained import push_export

    name = paper_named(paper).name
    weights = optional_part(name, "weights")
    layouts = (EXPORT_LAYOUT, *(weights.LAYOUTS if weights else ()))
    if layout not in layouts:
        raise StageError(f"--layout {layout}: {nearest(layout, layouts)}")
    if private and not push:
        raise StageError("--private only works with --push")
    if push and layout != EXPORT_LAYOUT:
        raise StageError(f"--push sends the folder of --layout {EXPORT_LAYOUT}, not {layout}")
    if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise StageError(f"--push {push}: write a repository of the Hub as USER/NAME")
    _check_exists(checkpoint)
    if layout == EXPORT_LAYOUT:
        written = write_export(trained_model(name), checkpoint, output, push)
    else:
        if output.exists():
            raise StageError(f"--output {output} exists: give another file, or delete it first")
        written = weights.export(checkpoint, output, layout)
    print(f"written to {written}")
    if push:
        print(f"sent to {push_export(written, push, private)}")
    return 0
