"""Turn typed functions into commands. Docstrings become help texts, and annotations describe the arguments.

Parameters before `*` are positional; parameters after `*` are flags (`batch_size`: `--batch-size` or `--batch_size`).
`*overrides` takes the remaining arguments. A keyword-only dataclass adds a flag for each of its fields.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import common
from assemble.reporting.papers import SCALES, existing_papers, names_of_papers
from common.errors import StageError, nearest

Command = Callable[..., int]


@dataclass(frozen=True)
class Option:
    """Describe how a parameter is given on the command line.

    Attributes:
        help: the help text, or a function that returns it.
        parse: converts the argument's text; by default, the parameter's type.
        const: returns the value when the flag is given without one.
    """

    help: str | Callable[[], str] = ""
    choices: Sequence[str] = ()
    parse: Callable[[str], Any] | None = None
    const: Callable[[], Any] | None = None


def existing_folder(text: str) -> Path:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return folder


Scale = Annotated[str, Option(choices=SCALES)]
OneScale = Annotated[str | None, Option("use only this scale", choices=SCALES)]
Runs = Annotated[Path | None, "folder of the runs; default: runs"]
ExistingRuns = Annotated[Path | None, Option("folder of the runs; default: runs", parse=existing_folder)]
PaperName = Annotated[str, Option(names_of_papers)]
StageName = Annotated[str, "<paper>/<stage or recipe>; `assemble list PAPER` names them"]
PaperNames = Annotated[Sequence[str], Option(lambda: f"{names_of_papers()}; default: all")]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a converter that accepts one of `choices`. Its error suggests the nearest choice."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r}: {nearest(text, choices)}")
        return text

    return parse


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a converter for whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            limit = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            several = " (separate several with spaces)" if "," in text else ""
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, got {text}{several}")
        return int(text)

    return parse


#: NumPy's limit.
parse_seed = at_least(0, 2**32 - 1)


def overview(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of `assemble --help`, `--version` and shell completion."""
    parser = _Parser(
        prog="assemble",
        description="Rerun CVPR 2021 papers on joint representations and regenerate their tables.",
        epilog=f"Papers: {names_of_papers()}. Scales: smoke (seconds), mini (minutes on a CPU), single (a day on one "
        "GPU), paper (the published recipe).",
    )
    parser.add_argument("--version", action="version", version=f"assemble {common.__version__}")
    listed = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in commands.items():
        _fill(listed.add_parser(name, help=_documentation(command)[0]), command)
    return parser


def parse(command: Command, name: str, given: Sequence[str]) -> functools.partial[int]:
    """Parse a command line into the function to call and its arguments."""
    parameters = inspect.signature(command).parameters.values()
    about, *paragraphs = _documentation(command)
    parser = _Parser(prog=f"assemble {name}", description=about, epilog=" ".join(paragraphs))
    places, groups, overrides = _fill(parser, command)

    def dashed(argument: str) -> str:
        """Replace a flag's underscores by dashes, since LightningCLI's users write underscores: `--print_config`."""
        name, equals, value = argument.partition("=")
        flag = name.replace("_", "-")
        return f"{flag}{equals}{value}" if flag in parser._option_string_actions else argument

    given = [dashed(argument) for argument in given]
    # Before Python 3.12.7, `parse_known_args` doesn't recognize list arguments after a flag.
    namespace, rest = (parser.parse_known_args if overrides else parser.parse_known_intermixed_args)(given)
    values = vars(namespace)
    if rest and not overrides:
        papers = {name for paper in existing_papers() for name in (paper.name, paper.short)}
        hint = " (it takes one paper; run it for each)" if papers & set(rest) else ""
        if rest[0].startswith("--"):
            hint = f": {nearest(rest[0], [flag for flag in parser._option_string_actions if flag.startswith('--')])}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    place = values.get(places[0]) if rest else None
    flag = next((argument for argument in rest if argument.startswith("--") and "=" not in argument), None)
    if isinstance(place, str) and flag and given.index(flag) < given.index(place):
        parser.error(f"give {places[0]} before {flag}, whose value was read as the {places[0]}")
    defaults = {parameter.name: parameter.default for parameter in parameters}
    positional = [values.pop(place, defaults[place]) for place in places]
    for group, kind in groups.items():
        values[group] = kind(**{field.name: values.pop(field.name) for field in fields(kind) if field.name in values})
    return functools.partial(command, *positional, *rest, **values)


def _fill(parser: argparse.ArgumentParser, command: Command) -> tuple[list[str], dict[str, Any], bool]:
    """Add a command's arguments. Return the positional ones, the dataclasses, and whether overrides are accepted."""
    hints = get_type_hints(command, include_extras=True)
    places: list[str] = []
    groups: dict[str, Any] = {}
    overrides = False
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            overrides = True
        elif is_dataclass(hint):
            groups[parameter.name] = hint
            inner = get_type_hints(hint, include_extras=True)
            for field in fields(hint):
                _add(parser, field.name, inner[field.name], field.default, flag=True)
        else:
            flag = parameter.kind is parameter.KEYWORD_ONLY
            _add(parser, parameter.name, hint, parameter.default, flag)
            places += [] if flag else [parameter.name]
    return places, groups, overrides


def _documentation(command: Command) -> list[str]:
    """Return the paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n")]


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, flag: bool) -> None:
    option, several = Option(), False
    # A missing argument keeps the function's default.
    arguments: dict[str, Any] = {"default": argparse.SUPPRESS}
    while (origin := get_origin(hint)) is not None:
        if origin is Annotated:
            hint, option = hint.__origin__, hint.__metadata__[0]
        elif origin in (Union, UnionType):
            hint = next(alternative for alternative in get_args(hint) if alternative is not NoneType)
        elif origin is tuple:
            arguments["nargs"], hint = len(get_args(hint)), get_args(hint)[0]
        else:
            several, hint = True, get_args(hint)[0]
    option = Option(option) if isinstance(option, str) else option
    required = default in (inspect.Parameter.empty, MISSING)
    help_ = option.help() if callable(option.help) else option.help
    if option.choices:
        help_ = "; ".join(filter(None, [help_, ", ".join(option.choices)]))
    if default and not required and "default:" not in help_:
        help_ = "; ".join(filter(None, [help_, f"default: {default}"]))
    arguments["help"] = help_.replace("%", "%%")
    if hint is bool:
        arguments["action"] = "store_true"
    else:
        by_type = one_of(option.choices) if option.choices else _path if hint is Path else hint
        arguments["type"] = option.parse or by_type
        if option.const is not None:
            arguments |= {"nargs": "?", "const": option.const()}
        elif several and flag:
            arguments["action"] = "append" if "nargs" in arguments else "extend"
            arguments.setdefault("nargs", "+")
        elif several:
            arguments["nargs"] = "+" if required else "*"
        elif not flag and not required:
            arguments["nargs"] = "?"
        if flag:
            arguments["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")
            arguments["choices"] = option.choices or None
    if flag:
        parser.add_argument(f"--{name.strip('_').replace('_', '-')}", dest=name, required=required, **arguments)
    else:
        parser.add_argument(name, **arguments)


def _path(text: str) -> Path:
    return Path(text).expanduser()  # Shells don't expand `~` after `--output=`.
