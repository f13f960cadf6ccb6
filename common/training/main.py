"""The `assemble` command. Parsing and help import neither torch nor lightning."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.reporting.errors import ReportingError
from common.reporting.papers import PAPERS, SCALES, existing_papers, paper_named, project_root
from common.training.errors import StageError

RUN_COMMANDS = {
    "fit": "run one stage: train it (where it trains), test it, write its record",
    "validate": "loss of a trained stage on its validation data",
    "test": "measure a trained stage again",
    "predict": "write a trained stage's outputs for its held-out data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in RUN_COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    from common.training.configuration import ConfigurationError

    try:
        return int(arguments.func(arguments) or 0)
    except (ConfigurationError, StageError, ReportingError) as error:
        print(f"assemble: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("ASSEMBLE_TRACEBACK"):
            raise
        print(f"assemble: {error}\n(ASSEMBLE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    names = ", ".join(paper.short for paper in PAPERS)
    parser = argparse.ArgumentParser(
        prog="assemble",
        description="Re-run five CVPR 2021 papers on joint representations and regenerate their tables.",
        epilog=f"Papers: {names}. Scales: smoke (seconds), mini (minutes on a CPU), paper (the published recipe).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    for name, text in RUN_COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Any further --key value overrides the configuration, such as "
            "--trainer.max_epochs 3 or --model.temperature 0.1; --config FILE adds a layer.",
        )
        command.add_argument("name", help="<paper>/<stage or recipe>, such as avid_cma/avid or avid/ucf_1@avid_cma")
        _add_run_options(command)
        command.add_argument("--seed", type=int, default=0, help="seed of weights, order and miniature data")
        command.add_argument("--print_config", action="store_true", help="print the merged configuration and stop")
        command.add_argument("--checkpoint", type=Path, help="weights to use instead of the stage's own")
        command.set_defaults(func=_run_command)

    command = commands.add_parser("reproduce", help="run all stages of a paper that have not run, print its tables")
    command.add_argument("paper", help=names)
    _add_run_options(command)
    _add_selection(command)
    command.add_argument(
        "--jobs",
        type=int,
        default=0,
        help="stages side by side, one thread each; default: the cores, at most 4, on the CPU, and 1 on GPUs",
    )
    command.set_defaults(func=_reproduce_command)

    command = commands.add_parser("plan", help="print the stages and what is left, also as shell or SLURM lines")
    command.add_argument("paper", help=names)
    _add_run_options(command)
    _add_selection(command)
    command.add_argument("--format", choices=("text", "shell", "slurm"), default="text")
    command.set_defaults(func=_plan_command)

    from common.reporting.commands import add_parsers
    from common.training.rehearse import add_parsers as add_rehearse

    add_parsers(commands)
    add_rehearse(commands)

    command = commands.add_parser("data", help="what a paper's data sets are, what is there, how to get the rest")
    command.add_argument("paper", help=names)
    command.add_argument("--data", type=Path, default=_data_root(), help="folder that holds the data sets")
    command.add_argument("--prepare", action="store_true", help="index what is there and check a sample of files")
    features = command.add_argument_group(
        "text features",
        "With --text-features, the frozen text features of a paper that stores them (xmc_gan) are computed. A run that "
        "was stopped goes on.",
    )
    features.add_argument("--text-features", action="store_true", help="compute them")
    features.add_argument("--bert", type=Path, metavar="FOLDER", help="BERT's released weights")
    regions = command.add_argument_group(
        "region features",
        "With --extract-regions, the regions of all images below a folder are found by a detector and written into one "
        "file. A run that was stopped goes on; images that cannot be read are passed over and listed.",
    )
    regions.add_argument("--extract-regions", type=Path, metavar="FOLDER", help="folder of images")
    regions.add_argument(
        "--detector", type=Path, metavar="WEIGHTS", help="weights of the detector; none are downloaded"
    )
    regions.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write, .h5 or .npz; one that exists grows"
    )
    regions.add_argument(
        "--architecture", default="fasterrcnn_resnet50_fpn", help="torchvision's name; default: %(default)s"
    )
    regions.add_argument("--regions", type=int, default=100, help="regions per image, at most; default: 100")
    regions.add_argument("--min-score", type=float, default=0.0, help="least score of a region; default: 0")
    regions.add_argument("--half", action="store_true", help="keep features with 16 bits")
    regions.add_argument("--distribution", action="store_true", help="also keep the probabilities of all classes")
    both = command.add_argument_group("text and region features")
    both.add_argument(
        "--batch-size", type=int, metavar="N", help="captions or images at a time; default: 256 captions, 4 images"
    )
    both.add_argument("--device", default="auto", help="cpu, cuda or auto; default: auto")
    command.set_defaults(func=_data_command)

    command = commands.add_parser(
        "export",
        help="write the backbone of a trained checkpoint as a file for other code",
        description="Write the backbone of a checkpoint in the layout of another library, without heads, queues, banks "
        "or optimiser.",
    )
    command.add_argument("paper", help=names)
    command.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoints/last.ckpt of a stage, or a released file"
    )
    command.add_argument("--layout", help="which layout; a wrong name lists those of the paper")
    command.add_argument("--output", type=Path, required=True, help="file to write")
    command.set_defaults(func=_export_command)

    for name, text in (("answer", "answer a question about a clip"), ("caption", "describe a clip")):
        command = commands.add_parser(name, help=f"{text} with a trained model", description=f"{text.capitalize()}.")
        command.add_argument("paper", help="vx2text")
        command.add_argument("clip", type=Path, help="video file, with or without sound")
        if name == "answer":
            command.add_argument("question", help="in quotes")
        command.add_argument("--checkpoint", type=Path, required=True, help="checkpoints/last.ckpt of a finished stage")
        command.set_defaults(func=_tell_command)

    command = commands.add_parser(
        "generate",
        help="make images of captions with a trained model",
        description="Make images of captions and write them as PNG files.",
        epilog='assemble generate xmc_gan "a red circle left of a blue square" --checkpoint '
        "runs/xmc_gan/mini/seed0/xmc_gan/checkpoints/last.ckpt --number 4",
    )
    command.add_argument("paper", help="xmc_gan")
    command.add_argument(
        "captions", nargs="+", metavar="caption", help="what is to be seen, in quotes; several may be given"
    )
    command.add_argument("--checkpoint", type=Path, required=True, help="checkpoints/last.ckpt of a finished stage")
    command.add_argument(
        "--output", type=Path, default=Path("generated"), help="folder for the files; default: generated"
    )
    command.add_argument(
        "--number", type=int, default=1, help="images of each caption, with different noise; default: 1"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the noise; default: 0")
    command.add_argument("--device", default="cpu", help="where it runs: cpu, cuda; default: cpu")
    command.set_defaults(func=_generate_command)

    command = commands.add_parser("doctor", help="what this machine has and lacks: devices, keys, data, versions")
    command.add_argument("--data", type=Path, default=_data_root(), help="folder that holds the data sets")
    command.set_defaults(func=_doctor_command)
    return parser


def _data_root() -> Path:
    return Path(os.environ.get("ASSEMBLE_DATA", project_root() / "data"))


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", choices=SCALES, default="mini", help="default: mini")
    command.add_argument("--hardware", default="cpu", help="a file in configs/hardware: cpu, gpu1, gpu8, slurm")
    command.add_argument("--runs", type=Path, default=project_root() / "runs", help="folder of the runs")
    command.add_argument("--data", type=Path, default=_data_root(), help="folder that holds the data sets")


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    command.add_argument("--tables", nargs="+", help="only these tables (ids)")
    command.add_argument("--rows", nargs="+", help="only these rows (labels or models)")
    command.add_argument("--stages", nargs="+", help="only these stages and what they start from")


def _selection(arguments: argparse.Namespace) -> Any:
    from common.training.schedule import Selection

    def chosen(name: str) -> tuple[str, ...] | None:
        values = getattr(arguments, name, None)
        return tuple(values) if values else None

    return Selection(
        scale=arguments.scale,
        seeds=tuple(getattr(arguments, "seeds", None) or [arguments.seed]),
        hardware=arguments.hardware,
        runs=arguments.runs.resolve(),
        data=arguments.data.resolve(),
        tables=chosen("tables"),
        rows=chosen("rows"),
        stages=chosen("stages"),
    )


def _run_command(arguments: argparse.Namespace) -> int:
    from common.training.single import find_request, print_configuration, run_mode

    request = find_request(arguments.name, _selection(arguments), arguments.rest)
    if arguments.print_config:
        print_configuration(request)
        return 0
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        raise StageError(f"--checkpoint {arguments.checkpoint} does not exist")
    return run_mode(arguments.command, request, arguments.checkpoint)


def _reproduce_command(arguments: argparse.Namespace) -> int:
    from common.training.schedule import reproduce

    selection = _selection(arguments)
    jobs = arguments.jobs or (min(os.cpu_count() or 1, 4) if selection.hardware == "cpu" else 1)
    failed = reproduce(arguments.paper, selection, jobs=jobs)
    show_tables(paper_named(arguments.paper).name, selection.scale, selection.runs)
    return 1 if failed else 0


def show_tables(paper: str, scale: str, runs: Path) -> None:
    """Print a paper's tables from the records in `runs`, and write them to `runs/<paper>/<scale>/tables.md`."""
    from rich.console import Console

    from common.reporting import render
    from common.reporting.atomic import write_text_atomically
    from common.reporting.tables import load

    filled = [f for f in render.fill(load(paper), scale, render.records_of(paper, runs)) if f.result.measured]
    console = Console()
    render.print_tables(filled, console if console.is_terminal else Console(width=200))
    path = runs / paper / scale / "tables.md"
    write_text_atomically(path, "\n\n".join(render.table_markdown(f) for f in filled) + "\n")
    print(f"written to {path}; `assemble report` makes a page of it, `assemble promote {paper}` keeps the records")


def _plan_command(arguments: argparse.Namespace) -> int:
    from common.training.schedule import plan, render_plan

    print(render_plan(plan(arguments.paper, _selection(arguments)), arguments.format))
    return 0


def _data_command(arguments: argparse.Namespace) -> int:
    import importlib
    import importlib.util

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise StageError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    if arguments.extract_regions is not None:
        return _extract_command(arguments)
    for option in ("detector", "output"):
        if getattr(arguments, option) is not None:
            raise StageError(f"--{option} goes with --extract-regions FOLDER")
    if arguments.bert is not None and not arguments.text_features:
        raise StageError("--bert goes with --text-features")
    from common.data.prepare import report
    from common.training.single import datasets_of

    paper, data = paper_named(arguments.paper).name, arguments.data.resolve()
    name = f"papers.{paper}.prepare"
    own = importlib.import_module(name) if importlib.util.find_spec(name) else None
    if arguments.text_features:
        if own is None:
            raise StageError(f"--text-features: {paper} stores no text features; xmc_gan does")
        device = None if arguments.device == "auto" else arguments.device
        for path in own.text_features(data, arguments.bert, device, arguments.batch_size or 256):
            print(f"written to {path}")
        return 0
    report(datasets_of(paper, data), prepare=arguments.prepare)
    if own is not None:
        own.report(data)
    return 0


def _extract_command(arguments: argparse.Namespace) -> int:
    import torch

    from common.data.region_extraction import RegionExtractor, extract_regions, load_detector, write_skipped

    if arguments.output is None:
        raise StageError("--extract-regions needs --output FILE, .h5 or .npz")
    if arguments.regions < 1:
        raise StageError(f"--regions must be at least 1, got {arguments.regions}")
    try:
        detector = load_detector(arguments.detector, arguments.architecture)
    except (FileNotFoundError, ValueError) as error:
        raise StageError(str(error)) from None
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = RegionExtractor(detector, arguments.regions, arguments.min_score, device)
    result = extract_regions(
        arguments.extract_regions,
        arguments.output,
        extractor,
        batch_size=arguments.batch_size or 4,
        half=arguments.half,
        distribution=arguments.distribution,
    )
    listed = arguments.output.with_name(f"{arguments.output.name}.skipped.txt")
    write_skipped(listed, result.skipped)
    print(f"{arguments.output}: regions of {result.written:,} images, {result.found_before:,} of them from before")
    if result.skipped:
        print(
            f"{len(result.skipped):,} images cannot be read and are listed in {listed}; the first: {result.skipped[0]}"
        )
    return 0


def _export_command(arguments: argparse.Namespace) -> int:
    import importlib

    from common.reporting.errors import nearest

    paper = paper_named(arguments.paper).name
    checkpoints = importlib.import_module(f"papers.{paper}.checkpoints")
    layouts = tuple(checkpoints.LAYOUTS)
    layout = arguments.layout or layouts[0]
    if layout not in layouts:
        raise StageError(
            f"--layout {layout}: {nearest(layout, layouts)}; the layouts of {paper} are {', '.join(layouts)}"
        )
    print(f"written to {checkpoints.export(arguments.checkpoint, arguments.output, layout)}")
    return 0


def _tell_command(arguments: argparse.Namespace) -> int:
    import importlib
    import importlib.util

    module = f"papers.{paper_named(arguments.paper).name}.answer"
    if importlib.util.find_spec(module) is None:
        raise StageError(f"{arguments.paper} writes no text; `assemble {arguments.command}` goes with vx2text")
    question = (arguments.question,) if arguments.command == "answer" else ()
    tell = getattr(importlib.import_module(module), arguments.command)
    print(tell(arguments.checkpoint, arguments.clip, *question))
    return 0


def _generate_command(arguments: argparse.Namespace) -> int:
    import importlib
    import importlib.util

    module = f"papers.{paper_named(arguments.paper).name}.generate"
    if importlib.util.find_spec(module) is None:
        raise StageError(f"{arguments.paper} makes no images; `assemble generate` goes with xmc_gan")
    generate = importlib.import_module(module).generate
    a = arguments
    for path in generate(a.checkpoint, a.captions, a.output, a.number, a.seed, a.device):
        print(f"written to {path}")
    return 0


def _doctor_command(arguments: argparse.Namespace) -> int:
    from common.training.doctor import examine

    return examine(arguments.data.resolve(), [paper.name for paper in existing_papers()])


if __name__ == "__main__":
    sys.exit(main())
