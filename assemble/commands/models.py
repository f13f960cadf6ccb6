"""The commands that use trained models: embed, retrieve, generate, answer, caption and export."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
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
#: The layout of an export that every paper has: a folder for `from_export`.
OWN_LAYOUT = "safetensors"
KINDS = ("video", "audio", "image", "text")
#: Most characters of a caption in a file name.
NAME_LENGTH = 60
#: Most reasons for skipping files to print.
NAMED = 10


@dataclass(frozen=True)
class ModelOptions:
    """Flags of the commands that use a trained model."""

    checkpoint: Annotated[Path, CHECKPOINT]
    device: Annotated[str, "where it runs: cpu, cuda"] = "cpu"


@dataclass(frozen=True)
class EncoderOptions(ModelOptions):
    """Flags of the commands that embed files or texts."""

    regions: Annotated[Path | None, "region features of the images, for a model without a detector"] = None


SpecialPaper = Annotated[str, "a paper whose model supports this; naming another one lists them"]
Clip = Annotated[Path, "video file, with or without sound"]
Speech = Annotated[Sequence[str], "the lines spoken in the clip, in order"]


# -- the model ---------------------------------------------------------------------------------------------------------


def _kind(name: str, options: ModelOptions, task: str, able: Callable[[Any], object]) -> Any:
    """The class of a paper's trained models; refuses one that isn't `able` to do the task or lacks a given option."""
    paper = paper_named(name)
    _check_exists(options.checkpoint)
    kind = trained_model(paper.name)
    if not able(kind):
        usable = [one for one in existing_papers() if optional_part(one.name, "use")]
        others = ", ".join(one.short for one in usable if able(trained_model(one.name)))
        raise StageError(f"{paper.short} cannot {task}; {others} can")
    _check_option(kind, "regions", getattr(options, "regions", None))
    return kind


def _check_option(kind: Any, option: str, given: object) -> None:
    if given is not None and option not in kind.options:
        raise StageError(f"{paper_named(kind.paper).short} does not support --{option}")


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


def _found(paths: Sequence[Path], kinds: Sequence[str]) -> list[Path]:
    """The given files, and the files of these kinds below the given folders, sorted by name."""
    from common.data.datasets.base import walk

    suffixes = frozenset[str]().union(*(_suffixes(kind) for kind in kinds))
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(path / name for name, _ in walk(path, suffixes, []) if (path / name).is_file())
            if not below:
                raise StageError(f"{path} has no file that can be read as {' or '.join(kinds)}")
            found += below
        else:
            found.append(path)
    return found


def _lines(path: Path) -> list[str]:
    """The texts of a file, one per line."""
    with files.parsing(path, StageError):
        content = files.read_text(path, None, encoding="utf-8-sig")
        # Not splitlines(), which also splits at other characters.
        texts = [line.strip() for line in content.split("\n") if line.strip()]
        if not texts:
            raise ValueError("has no text: write one per line")
    return texts


def _tell_skipped(items: Sequence[Any], skipped: Sequence[tuple[int, str]], told: str = "skipped") -> None:
    if skipped:
        print(f"{len({place for place, _ in skipped})} of {len(items)} files {told}:")
        reasons = dict.fromkeys(reason for _, reason in skipped)  # several kinds may fail to read a file
        for reason in list(reasons)[:NAMED]:
            print(f"  {printable(reason)}")


def _tell_cut(model: Any, texts: Sequence[Any]) -> None:
    cut = [text for text in texts if model.tokenizer.excess(text)]
    if cut:
        limit = model.tokenizer.max_tokens
        print(printable(f"{len(cut)} of {len(texts)} texts are cut to {limit} tokens, such as {cut[0]!r}"))


# -- embed -------------------------------------------------------------------------------------------------------------


def embed(
    paper: PaperName,
    media: Annotated[Sequence[Path], "files, or folders of them"] = (),
    *,
    options: EncoderOptions,
    text: Annotated[Sequence[str], "texts"] = (),
    captions: Annotated[Path | None, "a file with one text per line"] = None,
    language: Annotated[str | None, "language of the texts, such as de"] = None,
    output: Annotated[Path, ".npz file to write"],
    batch_size: Annotated[int, Option("files or texts at a time", parse=at_least(1))] = 16,
) -> int:
    """Embed files and texts with a trained model and write the vectors to an .npz file.

    Takes video, audio, images or texts, depending on the paper's model (see its README). Each kind has two arrays, such
    as `video` (one vector per row) and `video_names`. Unreadable files are skipped, counted and named.
    """
    import numpy as np

    if output.suffix != ".npz" or output.is_dir():
        raise StageError(f"--output {output}: give a file that ends in .npz")
    files.require_writable(output.parent, "--output")
    texts = [*text, *(_lines(captions) if captions else [])]
    if clash := next((one for one in text if os.path.isfile(one)), None):  # a long text is no valid path
        raise StageError(f"--text {clash}: this is a file; give files before --text")
    if not media and not texts:
        raise StageError("nothing to embed: give files, --text or --captions")
    if second := next((path for path in media if path.suffix == ".ckpt"), None):
        raise StageError(f"--checkpoint takes one file, but {second} follows: did a pattern match several?")
    of_paper = _kind(paper, options, "embed text", lambda kind: not texts or "text" in kind.embeds)
    _check_option(of_paper, "language", language)
    absent = next((path for path in media if not path.exists()), None)
    if absent and options.regions is None:  # region features only need the names of images
        raise StageError(f"{absent} does not exist")
    kinds = [kind for kind in of_paper.embeds if kind != "text"]
    paths = _found(media, kinds)
    model = _loaded(of_paper, options)
    if language is not None:
        model.language = language
    if texts and "text" not in model.reads:
        raise StageError("this model was trained without texts: leave out --text and --captions")
    _tell_cut(model, texts)
    kinds = [kind for kind in kinds if kind in model.reads] or kinds  # if it reads none, `embed` raises an error
    columns: dict[str, Any] = {"model": np.array(model.fingerprint())}
    shapes: list[str] = []
    skipped: list[tuple[int, str]] = []
    rounds: list[tuple[str, Sequence[Any]]] = [*((kind, paths) for kind in kinds), ("text", texts)]
    for kind, items in rounds:
        if not items:
            continue
        before = len(skipped)
        try:
            vectors, kept = model.embed(kind, items, skipped, batch_size)
        except StageError:
            if len(skipped) == before or (kind == kinds[-1] and not shapes):
                raise
            continue
        shapes.append(f"{kind} {list(vectors.shape)}")
        columns |= {kind: vectors.numpy(), f"{kind}_names": np.array([str(items[place]) for place in kept])}
        told = model.captions(kind, vectors)
        if told is not None:
            columns[f"{kind}_words"] = np.array(told)
            for name, words in zip(columns[f"{kind}_names"], told):
                print(printable(f"{name}, {kind}: {words}"))
    _tell_skipped(paths, skipped, "not fully read")
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
    from_: Annotated[str | None, Option("kind of the query", choices=KINDS)] = None,
    to: Annotated[str | None, Option("kind of the results", choices=KINDS)] = None,
) -> int:
    """Rank files or texts by how well they match a query, with a trained model.

    Finds sounds for a video, images for a text or the reverse, depending on the paper's model.
    """
    if not among.exists():
        raise StageError(f"--among {among} does not exist: give a folder, a text file or an .npz file")
    of_paper = _kind(paper, options, "retrieve", lambda kind: kind.retrieval)
    query_kind, kind = _pair(of_paper, query, among, from_, to)
    if not query.strip():
        raise StageError("--query is empty: give a file, or a text in quotes")
    model = _loaded(of_paper, options)
    if lacking := {query_kind, kind} - {*model.reads}:
        raise StageError(f"this model was trained without {' and '.join(sorted(lacking))}")
    wanted = query if query_kind == "text" else Path(query)
    getattr(model, f"read_{query_kind}")(wanted)  # fails before the gallery is embedded
    skipped: list[tuple[int, str]] = []
    items: Sequence[Any]
    if among.suffix == ".npz":
        gallery, items = _embedded(among, kind, model)
        kept = list(range(len(items)))
    else:
        items = _lines(among) if kind == "text" else _found([among], [kind])
        gallery, kept = model.gallery(kind, items, skipped)
    texts = [query] if query_kind == "text" else []
    _tell_cut(model, [*texts, *items] if kind == "text" and among.suffix != ".npz" else texts)
    scores = model.compare(query_kind, wanted, kind, gallery)
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    rows = [(str(rank), f"{scores[at]:.3f}", str(items[kept[at]])) for rank, at in enumerate(order, start=1)]
    print_rows(("", "score", f"{kind} for {query} ({query_kind})"), rows)
    _tell_skipped(items, skipped)
    return 0


def _pair(of_paper: Any, query: str, among: Path, from_: str | None, to: str | None) -> tuple[str, str]:
    """Kinds of query and results: the requested ones, else the first that the files allow."""
    path = Path(query)
    media = [kind for kind in of_paper.embeds if kind != "text"]
    like_media = [kind for kind in media if kind == from_ or path.suffix.lower() in _suffixes(kind)]
    # Unlike `Path.is_file`, this accepts a text longer than a file name can be.
    is_file = from_ != "text" and os.path.isfile(query)
    if like_media and not is_file and from_ is None:
        raise StageError(f"--query {path}: there is no such file; `--from text` takes the name as a text")
    held = _arrays_of(among) if among.suffix == ".npz" else media if among.is_dir() else ["text"]
    found = [
        (query_kind, kind)
        for query_kind, kind in of_paper.retrieves()
        if query_kind in (like_media if is_file else ["text"]) and kind in held
        if from_ in (None, query_kind) and to in (None, kind)
    ]
    if not found:
        known = ", ".join(f"--from {query_kind} --to {kind}" for query_kind, kind in of_paper.retrieves())
        what = f"the file {path}" if is_file else f"the text {query!r} (no file has that name)"
        raise StageError(
            f"{of_paper.paper} cannot search {among} by {what}. It supports {known}; --among takes a folder for files "
            "and a text file for texts"
        )
    return found[0]


def _arrays_of(path: Path) -> list[str]:
    """Names of the arrays in an .npz file."""
    import numpy as np

    with files.parsing(path, StageError), files.open_regular(path) as file, np.load(file) as content:
        return list(content.files)


def _embedded(path: Path, kind: str, model: Any) -> tuple[Any, list[str]]:
    """Vectors and names from a file of `assemble embed`."""
    import numpy as np
    import torch

    if model.retrieval != "vectors":
        raise StageError(f"{model.paper} compares files, not vectors: give their folder, not {path}")
    with files.parsing(path, StageError), files.open_regular(path) as file, np.load(file) as content:
        if str(content["model"]) != model.fingerprint():
            raise ValueError("was embedded by another model: embed the files again with this one")
        return torch.from_numpy(content[kind]), content[f"{kind}_names"].tolist()


# -- the other commands -----------------------------------------------------------------------------------------------


def _special(command: str, paper: str, options: ModelOptions, clip: Path | None = None) -> Any:
    """The trained model, for a command that is one of its methods."""
    if clip is not None and not clip.exists():
        raise StageError(f"{clip} does not exist")
    kind = _kind(paper, options, command, lambda kind: hasattr(kind, command))
    return kind.from_export(options.checkpoint, options.device)


def answer(
    paper: SpecialPaper,
    clip: Clip,
    question: Annotated[str, "in quotes"],
    *,
    model: ModelOptions,
    option: Annotated[Sequence[str], "answers to choose from, for a multiple-choice model (tvqa): give five"] = (),
    turn: Annotated[Sequence[tuple[str, str]], "an earlier question and its answer; repeat the flag in order"] = (),
    known: Annotated[str, "a description of the clip"] = "",
    speech: Speech = (),
) -> int:
    """Answer a question about a clip with a trained model."""
    trained = _special("answer", paper, model, clip)
    for note in trained.notes(question, speech, known, turn, option):
        print(printable(note), file=sys.stderr)
    print(trained.answer(clip, question, speech=speech, options=option, history=turn, known=known))
    return 0


def caption(paper: SpecialPaper, clip: Clip, *, model: ModelOptions, speech: Speech = ()) -> int:
    """Describe a clip with a trained model."""
    trained = _special("caption", paper, model, clip)
    for note in trained.notes(speech=speech):
        print(printable(note), file=sys.stderr)
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
    for place, (caption, own) in enumerate(zip(captions, images), start=1):
        name = re.sub(r"\W+", "-", caption.lower()).strip("-")[:NAME_LENGTH].strip("-")
        for copy, image in enumerate(own, start=1):
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
    output: Annotated[Path, "folder to write, or file of a backbone"],
    layout: Annotated[str, f"default: {OWN_LAYOUT}; others write a backbone; an unknown name lists all"] = OWN_LAYOUT,
    force: Annotated[bool, "replace an existing export"] = False,
    push: Annotated[str | None, "also send the folder to this repository of the Hugging Face Hub"] = None,
    private: Annotated[bool, "with --push: make a new repository private"] = False,
) -> int:
    """Export a trained model as a folder, or its backbone as a file for other code.

    The folder has weights (safetensors), configuration, vocabularies, record and model card, but no queues, banks or
    optimizer. Other layouts write only the backbone, for other libraries.
    """
    from assemble.stages.export import write_export
    from common.models.hub import push_export

    name = paper_named(paper).name
    weights = optional_part(name, "weights")
    layouts = (OWN_LAYOUT, *(weights.LAYOUTS if weights else ()))
    if layout not in layouts:
        raise StageError(f"--layout {layout}: {nearest(layout, layouts)}")
    if private and not push:
        raise StageError("--private only works with --push")
    if push and layout != OWN_LAYOUT:
        raise StageError(f"--push sends the folder of --layout {OWN_LAYOUT}, not {layout}")
    if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise StageError(f"--push {push}: write a repository of the Hub as USER/NAME")
    _check_exists(checkpoint)
    files.require_writable(output.parent, "--output")
    if layout == OWN_LAYOUT:
        written = write_export(trained_model(name), checkpoint, output, force, push)
    else:
        if output.is_dir():
            raise StageError(f"--output {output} is a folder: --layout {layout} writes a file")
        if output.exists() and not force:
            raise StageError(f"--output {output} exists: give another file, or --force to replace it")
        written = weights.export(checkpoint, output, layout)
    print(f"written to {written}")
    if push:
        print(f"sent to {push_export(written, push, private)}")
    return 0
