"""Run the `assemble` command. Parsing and help import neither torch nor lightning."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence

from assemble.commands import data, doctor, explain, find, measure, models, reports, run, runs, verify
from assemble.commands.parsing import Command, overview, parse
from common.errors import ConfigurationError, Preempted, ReportingError, StageError, is_ours, message, nearest

#: In the order of `assemble --help`.
COMMANDS: dict[str, Command] = {
    command.__name__.strip("_").replace("_", "-"): command
    for command in (
        *(run.fit, run.test, run.reproduce, run.plan, find.list_, find.show, runs.runs),
        *(reports.tables, reports.claims, reports.compare, explain.explain, reports.power, reports.report),
        *(reports.contribute, reports.promote, reports.wandb_report, measure.gpu_check, data.data),
        *(models.embed, models.retrieve, models.answer, models.caption, models.generate, models.export),
        *(verify.verify, run.rehearse, doctor.doctor),
    )
}

#: Skip garbage collection at exit; it takes a tenth of a plan's time.
atexit.register(gc.freeze)


def parser() -> argparse.ArgumentParser:
    """Return the parser that `shtab assemble.commands.main.parser` turns into a shell completion script."""
    return overview(COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Print a question mark for characters that the terminal cannot encode, such as ±.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            command = _parsed(list(sys.argv[1:] if argv is None else argv))
            return command()
        except (Exception, Preempted, KeyboardInterrupt) as error:
            return _status_of(error)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Keep the interpreter from flushing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parsed(given: list[str]) -> Callable[[], int]:
    """Parse a command line into a command and its arguments. `--help` and `--version` print and exit."""
    if not given or given[0].startswith("-"):
        if given and given[0] not in (options := ("-h", "--help", "--version")):
            raise StageError(f"there is no option {given[0]!r}: {nearest(given[0], options)}")
        parser().parse_args(given)  # This prints help or the version, or says that the command is missing.
    elif given[0] not in COMMANDS:
        raise StageError(f"there is no command {given[0]!r}: {nearest(given[0], COMMANDS)}; see --help")
    return parse(COMMANDS[given[0]], given[0], given[1:])


def _status_of(error: BaseException) -> int:
    """Print an error and return the exit status. If only a bug can cause the error, raise it again."""
    if isinstance(error, Preempted):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, ConfigurationError | StageError | ReportingError):
        print(f"assemble: {message(error)}", file=sys.stderr)
        return 2
    explained = isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, BrokenPipeError)
    # Under a memory limit, a library cannot be mapped.
    explained = explained or (isinstance(error, ImportError) and str(error.path).endswith(".so"))
    if not explained or os.environ.get("ASSEMBLE_TRACEBACK"):
        raise error
    hint = "" if is_ours(error) else "\n(ASSEMBLE_TRACEBACK=1 shows the traceback)"
    print(f"assemble: {message(error)}{hint}", file=sys.stderr)
    return 1
