"""The command line: one module per command, loaded with the command's own imports only.

`main` turns everything that can go wrong into one line on standard error and an exit code: 2 for what the
user can mend (a `SkipstoneError`, a flag that does not fit), 130 for an interruption, 1 for a fault of ours.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from skipstone.cli.bench import bench
from skipstone.cli.calibrate import calibrate
from skipstone.cli.compress import compress
from skipstone.cli.devices import devices
from skipstone.cli.evaluate import evaluate
from skipstone.cli.export import export
from skipstone.cli.generate import generate
from skipstone.cli.inspect import inspect
from skipstone.cli.simulate import simulate
from skipstone.cli.tune import tune
from skipstone.errors import SkipstoneError

_TRACEBACK = "SKIPSTONE_TRACEBACK"
_USER, _FAULT, _INTERRUPTED, _BROKEN_PIPE = 2, 1, 130, 141

app = typer.Typer(
    name="skipstone",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    export, generate, bench, evaluate, simulate, calibrate, inspect, tune, compress, devices,
):  # fmt: skip
    app.command()(_command)


@app.callback(invoke_without_command=True)
def skipstone(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Layer-skip and staged speculative decoding for language models on devices."""
    if version:
        from skipstone import __version__

        typer.echo(f"skipstone {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the `skipstone` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        The exit code; every error has been told on standard error.
    """
    try:
        status = app(args=list(arguments), prog_name="skipstone", standalone_mode=False)
        sys.stdout.flush()
    except (SystemExit, Exception, KeyboardInterrupt) as error:
        return _report(error)
    return status if isinstance(status, int) else 0


def _report(error: BaseException) -> int:
    """Tell of an error in one line; returns the exit code."""
    if isinstance(error, BrokenPipeError) or isinstance(
        error.__context__, BrokenPipeError
    ):  # typer exits on it
        # Python flushes standard output once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else _FAULT
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if os.environ.get(_TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, SkipstoneError):
        return _say(str(error), _USER)
    usage = _usage_message(error)
    if usage is not None:
        return _say(usage, _USER)
    return _say(
        f"{type(error).__name__}: {error} (a fault of Skipstone's; {_TRACEBACK}=1 shows where)",
        _FAULT,
    )


def _usage_message(error: BaseException) -> str | None:
    """Text of one of typer's usage errors, None for other errors.

    Their classes are private to typer; they are known by what they offer.
    """
    describe = getattr(error, "format_message", None)
    if describe is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "skipstone"
    return f"{str(describe()).rstrip('.')} (see `{command} --help`)"


def _say(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status
