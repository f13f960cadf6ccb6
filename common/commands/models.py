"""The commands that use trained models: embed, retrieve, generate, answer, caption and export."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import files
from common.errors import StageError, nearest, printable
from common.reporting.papers import existing_papers, names_of_papers, paper_named
from common.stages.paper_modules import TRAINED, check_part, has_part, optional_part

CHECKPOINT = "checkpoints/last.ckpt of a finished stage, or the folder of an export"
#: Layouts of an export that every paper has: a folder for `from_export`, and encoders as programs of `torch.export`.
OWN_LAYOUT, PROGRAMS = "safetensors", "torch_export"
#: Commands that are methods of a paper's model class, which few have, and what the others do not do.
SPECIAL = {"answer": "answers no questions", "caption": "describes no clips", "generate": "makes no images"}
#: Letters and digits of a caption in the name of its files, at most.
NAME_LENGTH = 60
#: Options of the command line that a model class may declare.
OPTIONS = ("language", "regions")
#: Skipped files that are named; the others are counted.
NAMED = 10
#: Rows of an embedding that are shown.
SHOWN = 20
#: Files of region features, besides .npz.
REGION_SUFFIXES = frozenset({".h5", ".hdf5"})
#: Suffixes of files of weights, which a folder's name will not have.
FILE_SUFFIXES = frozenset({".pth", ".pt", ".pkl", ".bin", ".ckpt", ".safetensors"})


def add_parsers(commands: Any) -> None:
    """Add the commands to the parser of `assemble`."""
    command = _add(commands, "embed", _embed_command, "vectors of files and texts, by a trained model")
    command.description = (
        "Write what a trained model makes of files and texts as vectors, one row each, into an .npz file. A file that "
        "cannot be read is skipped, counted and named."
    )
    command.epilog = (
        "Video, audio, images or texts, whatever the paper's model embeds; its README says so. For each of these the "
        "file has two arrays, such as `video`, the vectors, and `video_names`."
    )
    command.add_argument("files", nargs="*", type=Path, metavar="FILE", help="files, or folders of them")
    command.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a text; may be given several times"
    )
    command.add_argument("--captions", type=Path, metavar="FILE", help="a text file with one text a line")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npz file to write")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at a time; default: 16")
    _add_text_and_regions(command)

    command = _add(commands, "retrieve", _retrieve_command, "search files or texts with a trained model")
    command.description = "Rank what is searched by how well it fits a query."
    command.epilog = "Sounds for a video, images for a text and the reverse, whatever the paper's model compares."
    command.add_argument("--query", required=True, metavar="FILE|TEXT", help="a file, or a text in quotes")
    command.add_argument(
        "--among",
        type=Path,
        required=True,
        metavar="FOLDER|FILE",
        help="what is searched: a folder of files, a text file with one text a line, an .npz file of `assemble embed`, "
        "or, by a model of regions, a file of region features",
    )
    command.add_argument("--top", type=int, default=5, metavar="N", help="so many are shown; default: 5")
    kinds = ("video", "audio", "image", "text")
    command.add_argument("--from", dest="query_kind", choices=kinds, help="what of the query is compared")
    command.add_argument("--to", dest="kind", choices=kinds, help="what it is compared with; default: by the paper")
    _add_text_and_regions(command)

    command = _add(commands, "answer", _answer_command, "answer a question about a clip with a trained model")
    command.add_argument("clip", type=Path, help="video file, with or without sound")
    command.add_argument("question", help="in quotes")
    command.add_argument(
        "--option", dest="options", action="append", default=[], metavar="TEXT",
        help="an answer to choose from, for a model that chooses (tvqa): give five",
    )  # fmt: skip
    command.add_argument(
        "--turn", dest="history", action="append", nargs=2, default=[], metavar=("QUESTION", "ANSWER"),
        help="an earlier question and its answer; may be given several times, in their order",
    )  # fmt: skip
    command.add_argument("--known", default="", metavar="TEXT", help="a description of the clip")
    _add_speech(command)

    command = _add(commands, "caption", _caption_command, "describe a clip with a trained model")
    command.add_argument("clip", type=Path, help="video file, with or without sound")
    _add_speech(command)

    command = _add(commands, "generate", _generate_command, "make images of captions with a trained model")
    command.description = "Make images of captions and write them as PNG files."
    command.epilog = (
        'assemble generate PAPER "a red circle left of a blue square" --checkpoint '
        "runs/PAPER/mini/seed0/STAGE/checkpoints/last.ckpt --number 4"
    )
    command.add_argument("captions", nargs="+", metavar="caption", help="what is to be seen, in quotes")
    command.add_argument("--output", type=Path, default=Path("generated"), help="folder; default: generated")
    command.add_argument("--number", type=int, default=1, help="images of each caption; default: 1")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise; default: 0")

    command = commands.add_parser(
        "export",
        help="export a model as a folder, or its backbone as a file for other code",
        description="Write a trained model as a folder that needs nothing else: weights (safetensors), configuration, "
        "vocabularies, the record, and a model card; without queues, banks or optimizer. Other layouts write the "
        "backbone alone, as other libraries read it.",
    )
    command.add_argument("paper", help=names_of_papers())
    command.add_argument(
        "--checkpoint", type=Path, help=f"{CHECKPOINT}; backbones are read of a last.ckpt or a released file"
    )
    command.add_argument(
        "--layout", default=OWN_LAYOUT, help=f"default: {OWN_LAYOUT}, the folder; `--layout list` names all"
    )
    command.add_argument("--output", type=Path, help="folder, or file of another layout, to write")
    command.add_argument("--force", action="store_true", help="replace an export that is there")
    command.add_argument(
        "--push", metavar="USER/NAME", help="also send the folder to this repository of the Hugging Face Hub"
    )
    command.add_argument("--private", action="store_true", help="with --push: make a new repository private")
    command.set_defaults(func=_export_command)


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A command that uses a trained model."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    command.add_argument(
        "paper", help="one whose model does; another one names it" if name in SPECIAL else names_of_papers()
    )
    command.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT)
    command.add_argument("--device", default="cpu", help="where it runs: cpu, cuda; default: cpu")
    command.set_defaults(func=run)
    return command


def _add_speech(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--speech", action="append", default=[], metavar="TEXT",
        help="a line that is said in the clip; may be given several times, in their order",
    )  # fmt: skip


def _add_text_and_regions(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group("models of many languages and of regions alone")
    own.add_argument("--language", metavar="CODE", help="language of the texts, such as de")
    own.add_argument(
        "--regions", type=Path, metavar="FILE", help="region features of the pictures, for a model without a detector"
    )


# -- the model ---------------------------------------------------------------------------------------------------------


def _kind(arguments: argparse.Namespace, able: Callable[[Any], object], lacks: str) -> Any:
    """The class of a paper's trained models, if it is `able`; else an error with what it `lacks` and who is able."""
    paper = paper_named(arguments.paper)
    check_part(paper.name, *TRAINED)
    if not arguments.checkpoint.exists():
        raise StageError(f"--checkpoint {arguments.checkpoint} does not exist: give {CHECKPOINT}")
    from common.stages.export import trained_model

    kind = trained_model(paper.name)

    def others(able: Callable[[Any], object]) -> str:
        usable = [one for one in existing_papers() if has_part(one.name, TRAINED[0])]
        return ", ".join(one.short for one in usable if able(trained_model(one.name)))

    if not able(kind):
        raise StageError(f"{paper.short} {lacks}; {others(able)} can")
    given = [option for option in OPTIONS if getattr(arguments, option, None) is not None]
    foreign = next((option for option in given if option not in kind.options), None)
    if foreign is not None:
        raise StageError(f"--{foreign} goes with {others(lambda one: foreign in one.options)}, not with {paper.short}")
    return kind


def _loaded(kind: Any, arguments: argparse.Namespace) -> Any:
    """The trained model, with what the command line sets of it."""
    model = kind.from_export(arguments.checkpoint, arguments.device)
    if arguments.regions is not None:
        model.regions = _region_features(arguments.regions)
    if arguments.language is not None:
        if model.languages and arguments.language not in model.languages:
            raise StageError(f"--language {arguments.language}: {nearest(arguments.language, model.languages)}")
        model.language = arguments.language
    return model


def _region_features(path: Path) -> Any:
    from common.data.regions import RegionFeatures

    return RegionFeatures(path)


def _suffixes(kind: str) -> frozenset[str]:
    from common.data.datasets.base import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES

    return {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES | VIDEO_SUFFIXES}[kind]


def _found(paths: Sequence[Path], kinds: Sequence[str]) -> list[Path]:
    """Files, and the files below folders that can be of one of the kinds, sorted by name."""
    from common.data.datasets.base import walk

    suffixes = frozenset[str]().union(*(_suffixes(kind) for kind in kinds))
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(path / name for name, _ in walk(path, suffixes, []) if (path / name).is_file())
            if not below:
                raise StageError(f"{path} holds no file that can be read as {' or '.join(kinds)}")
            found += below
        else:
            found.append(path)
    return found


def _lines(path: Path) -> list[str]:
    """The texts of a file, one a line."""
    with files.parsing(path, StageError):
        texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not texts:
            raise ValueError("holds no text: one is expected a line")
    return texts


def _tell_skipped(items: Sequence[Any], skipped: Sequence[tuple[int, str]], told: str = "passed over") -> None:
    if skipped:
        reasons = list(dict.fromkeys(reason for _, reason in skipped))  # each kind reads a file anew
        count = len({place for place, _ in skipped})
        print(f"{count} of {len(items)} {'texts' if items and isinstance(items[0], str) else 'files'} {told}:")
        for reason in reasons[:NAMED]:
            print(f"  {printable(reason)}")
        if len(reasons) > NAMED:
            print(f"  and {len(reasons) - NAMED} more")


def _require_positive(arguments: argparse.Namespace, name: str) -> None:
    if getattr(arguments, name) < 1:
        raise StageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")


# -- embed -------------------------------------------------------------------------------------------------------------


def _embed_command(arguments: argparse.Namespace) -> int:
    import numpy as np

    if arguments.output.suffix != ".npz" or arguments.output.is_dir():
        raise StageError(f"--output {arguments.output}: give a file that ends in .npz")
    files.require_writable(arguments.output.parent, "--output")
    _require_positive(arguments, "batch_size")
    texts = [*arguments.text, *(_lines(arguments.captions) if arguments.captions else [])]
    if not arguments.files and not texts:
        raise StageError("there is nothing to embed: give files, --text or --captions")
    wanted = ("text",) if texts else ()
    of_paper = _kind(arguments, lambda kind: set(wanted) <= set(kind.embeds), "cannot embed text")
    absent = next((path for path in arguments.files if not path.exists()), None)
    if absent and arguments.regions is None:  # region features go by the names of pictures, which may be elsewhere
        raise StageError(f"{absent} does not exist")
    kinds = [kind for kind in of_paper.embeds if kind != "text"]
    paths = _found(arguments.files, kinds)
    model = _loaded(of_paper, arguments)
    kinds = [kind for kind in kinds if kind in model.reads] or kinds  # of one that reads nothing, the reading says so
    columns: dict[str, Any] = {}
    rows: dict[str, dict[str, int]] = {}
    skipped: list[tuple[int, str]] = []
    for kind, items in [*((kind, paths) for kind in kinds if paths), *((kind, texts) for kind in wanted)]:
        missed: list[tuple[int, str]] = []
        try:
            vectors, kept = model.embed(kind, items, missed, arguments.batch_size)
        except StageError:
            if not missed or (kind == kinds[-1] and not columns):
                raise
            skipped += missed
            continue
        skipped += missed
        names = [str(items[place]) for place in kept]
        columns |= {kind: vectors.numpy(), f"{kind}_names": np.array(names)}
        rows[kind] = {name: row for row, name in enumerate(names)}
        told = model.captions(kind, vectors)
        if told is not None:
            columns[f"{kind}_words"] = np.array(told)
    _print_rows([*map(str, paths), *texts], rows, columns)
    partly = any(str(paths[place]) in named for place, _ in skipped for named in rows.values())
    _tell_skipped(paths, skipped, "not read in every way" if partly else "passed over")
    columns["model"] = np.array(model.fingerprint())

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **columns)

    files.write_whole(arguments.output, write)
    shapes = ", ".join(f"{kind} {list(columns[kind].shape)}" for kind in rows)
    print(f"written to {arguments.output}: {shapes}")
    return 0


def _print_rows(names: Sequence[str], rows: dict[str, dict[str, int]], columns: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file or text", overflow="fold")
    worded = [kind for kind in rows if f"{kind}_words" in columns]
    for kind in rows:
        table.add_column(f"row of {kind}", justify="right")
    for kind in worded:
        table.add_column(f"words of {kind}", overflow="fold")
    several = list(dict.fromkeys(names))
    for name in several[:SHOWN]:
        places = [rows[kind].get(name) for kind in rows]
        words = [str(columns[f"{kind}_words"][rows[kind][name]]) if name in rows[kind] else "" for kind in worded]
        table.add_row(printable(name), *("-" if place is None else str(place) for place in places), *words)
    files.console(highlight=False, markup=False).print(table)
    if len(several) > SHOWN:
        print(f"and {len(several) - SHOWN} more, in the order of the file's `..._names`")


# -- retrieve ----------------------------------------------------------------------------------------------------------


def _retrieve_command(arguments: argparse.Namespace) -> int:
    _require_positive(arguments, "top")
    among = arguments.among
    if not among.exists():
        raise StageError(f"--among {among} does not exist: give a folder, a text file or an .npz file")
    of_paper = _kind(arguments, lambda kind: kind.retrieves, "cannot compare anything")
    query_kind, kind = _pair(of_paper, arguments)
    query = arguments.query if query_kind == "text" else Path(arguments.query)
    model = _loaded(of_paper, arguments)
    skipped: list[tuple[int, str]] = []
    items: Sequence[Any]
    if among.suffix == ".npz" and "model" in _arrays_of(among):
        searched, items = _embedded(among, kind, model)
        kept = list(range(len(items)))
    else:
        items = _lines(among) if kind == "text" else _searched_files(model, among, kind)
        searched, kept = model.searched(kind, items, skipped)
    scores = model.compare(query_kind, query, kind, searched)
    order = scores.argsort(descending=True, stable=True)[: arguments.top].tolist()
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column(f"{kind} for {printable(arguments.query)} ({query_kind})", overflow="fold")
    for rank, place in enumerate(order, start=1):
        table.add_row(str(rank), f"{scores[place]:.3f}", printable(str(items[kept[place]])))
    files.console(highlight=False, markup=False).print(table)
    _tell_skipped(items, skipped)
    return 0


def _pair(of_paper: Any, arguments: argparse.Namespace) -> tuple[str, str]:
    """What of the query is compared with what: as asked for, or the first that the files allow."""
    path, among = Path(arguments.query), arguments.among
    # Unlike `Path.is_file`, it takes a text that is longer than a name can be.
    is_file = os.path.isfile(arguments.query)

    def fits(query_kind: str, kind: str) -> bool:
        if query_kind != (arguments.query_kind or query_kind) or kind != (arguments.kind or kind):
            return False
        if (query_kind == "text") == is_file or (is_file and path.suffix.lower() not in _suffixes(query_kind)):
            return False
        if among.suffix == ".npz":
            return True
        return (kind != "text") == (among.is_dir() or among.suffix in REGION_SUFFIXES)

    found = [pair for pair in of_paper.retrieves if fits(*pair)]
    media = frozenset[str]().union(*(_suffixes(kind) for pair in of_paper.retrieves for kind in pair if kind != "text"))
    if not is_file and arguments.query_kind is None and path.suffix.lower() in media:
        raise StageError(f"--query {path}: there is no such file; `--from text` takes the name as a text")
    if not found:
        known = ", ".join(f"--from {query_kind} --to {kind}" for query_kind, kind in of_paper.retrieves)
        what = f"the file {path}" if is_file else f"the text {arguments.query!r} (no file has that name)"
        raise StageError(
            f"{of_paper.paper} cannot search {among} by {what}. It does {known}; --among takes a folder for files and "
            "a text file for texts"
        )
    held = _arrays_of(among) if among.suffix == ".npz" else []
    return next((pair for pair in found if pair[1] in held), found[0])


def _arrays_of(path: Path) -> list[str]:
    """Names of what an .npz file holds: `model` if it is of `assemble embed`; others may hold region features."""
    import numpy as np

    with files.parsing(path, StageError), np.load(path, allow_pickle=False) as content:
        return list(content.files)


def _embedded(path: Path, kind: str, model: Any) -> tuple[Any, list[str]]:
    """Vectors and names out of a file of `assemble embed`."""
    import numpy as np
    import torch

    if not model.compares_vectors:
        raise StageError(f"{model.paper} reads every pair anew and cannot search {path}: give the folder of the files")
    with files.parsing(path, StageError), np.load(path, allow_pickle=False) as content:
        if kind not in content.files:
            there = [name for name in content.files if f"{name}_names" in content.files]
            raise ValueError(f"holds no {kind}, but {', '.join(there)}")
        if str(content["model"]) != model.fingerprint():
            raise ValueError("was embedded by another model: embed the files again with this one")
        return torch.from_numpy(content[kind]), content[f"{kind}_names"].tolist()


def _searched_files(model: Any, among: Path, kind: str) -> list[Any]:
    if among.is_dir():
        return _found([among], [kind])
    if not hasattr(model, "regions"):
        raise StageError(f"--among {among} is no file of `assemble embed`: give one, or a folder of files")
    model.regions = _region_features(among)
    return list(model.regions.keys)


# -- the others --------------------------------------------------------------------------------------------------------


def _special(arguments: argparse.Namespace) -> Any:
    """The trained model, for a command that is a method of it."""
    name = arguments.command
    kind = _kind(arguments, lambda kind: hasattr(kind, name), SPECIAL[name])
    return kind.from_export(arguments.checkpoint, arguments.device)


def _answer_command(arguments: argparse.Namespace) -> int:
    a = arguments
    model = _special(a)
    for note in model.notes(a.question):
        print(f"{a.question!r}: {note}", file=sys.stderr)
    print(model.answer(a.clip, a.question, speech=a.speech, options=a.options, history=a.history, known=a.known))
    return 0


def _caption_command(arguments: argparse.Namespace) -> int:
    print(_special(arguments).caption(arguments.clip, speech=arguments.speech))
    return 0


def _generate_command(arguments: argparse.Namespace) -> int:
    a = arguments
    _require_positive(a, "number")
    if a.seed < 0:
        raise StageError(f"--seed must not be below 0, got {a.seed}")
    files.require_writable(a.output, "--output")
    for path in write_images(_special(a), a.captions, a.output, a.number, a.seed):
        print(f"written to {path}")
    return 0


def write_images(model: Any, captions: Sequence[str], output: Path, number: int = 1, seed: int = 0) -> list[Path]:
    """Write `number` images of each caption as PNG files, and `grid.png` with a line for each where there are several.

    Files are named by place, caption, number and seed; those of the same name are replaced.
    """
    from torchvision.utils import make_grid, save_image

    for caption in captions:
        for note in model.notes(caption):
            print(f"{caption!r}: {note}")
    images = model.generate(captions, number, seed)
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
    return written


def _export_command(arguments: argparse.Namespace) -> int:
    a = arguments
    paper = paper_named(a.paper).name
    weights = optional_part(paper, "weights")
    backbones = () if weights is None else tuple(weights.LAYOUTS)
    if a.layout == "list":
        print(", ".join((OWN_LAYOUT, PROGRAMS, *backbones)))
        return 0
    if a.layout not in (OWN_LAYOUT, PROGRAMS, *backbones):
        raise StageError(f"--layout {a.layout}: {nearest(a.layout, (OWN_LAYOUT, PROGRAMS, *backbones))}")
    if a.layout not in backbones:
        check_part(paper, *TRAINED)
    _check_export(a, backbones)
    if a.layout in backbones:
        written = weights.export(a.checkpoint, a.output, a.layout)
    elif a.layout == PROGRAMS:
        from common.stages.encoder_programs import write_programs
        from common.stages.export import trained_model

        written, told = write_programs(trained_model(paper), a.checkpoint, a.output)
        print("\n".join(told))
    else:
        from common.stages.export import trained_model, write_export

        written = write_export(trained_model(paper), a.checkpoint, a.output, a.force, a.push)
    print(f"written to {written}")
    if a.push:
        from common.stages.hub import push_export

        print(f"sent to {push_export(written, a.push, a.private)}")
    return 0


def _check_export(arguments: argparse.Namespace, backbones: Sequence[str]) -> None:
    """Refuse what cannot be written, before the model is read."""
    checkpoint, layout, output = arguments.checkpoint, arguments.layout, arguments.output
    if missing := [f"--{name}" for name in ("checkpoint", "output") if getattr(arguments, name) is None]:
        raise StageError(f"an export needs {' and '.join(missing)}")
    if not checkpoint.exists():
        raise StageError(f"--checkpoint {checkpoint} does not exist: give checkpoints/last.ckpt of a stage")
    if layout in backbones and checkpoint.is_dir():
        raise StageError(f"--layout {layout} reads a checkpoint and not an export: give the last.ckpt it was made of")
    if output.name in ("", ".."):  # it is put in place by its name, which no process may be standing in
        raise StageError(f"--output {output}: give a folder or file by its name")
    if layout in backbones and output.is_dir():
        raise StageError(f"--output {output} is a folder: give a file for --layout {layout}")
    if layout == OWN_LAYOUT and output.suffix in FILE_SUFFIXES:
        others = f"; files are of --layout {', '.join(backbones)}" if backbones else ""
        raise StageError(f"--output {output}: the layout {OWN_LAYOUT} is a folder{others}")
    files.require_writable(output.parent, "--output")
    if arguments.push:
        from common.stages.hub import check_repository

        if layout != OWN_LAYOUT:
            raise StageError(f"--push sends the folder of --layout {OWN_LAYOUT}, not {layout}")
        check_repository(arguments.push)
    elif arguments.private:
        raise StageError("--private goes with --push USER/NAME")
