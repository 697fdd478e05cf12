"""`optimum-cli export skipstone`: our own `export` command, offered by optimum's command line.

    optimum-cli export skipstone --model samples/models/coder --device cpu --quantize q8_0 --output out/

optimum collects commands from the namespace package `optimum.commands.register`; the module that this project
installs there hands our command line in. The flags are read off our `export` command and an invocation is
turned back into one of its command lines, so flags, checks, progress, errors and exit codes are the same.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from typer.core import TyperArgument, TyperOption

Run = Callable[[Sequence[str]], int]
Flag = TyperArgument | TyperOption


def optimum_commands(
    app: typer.Typer, run: Run
) -> list[tuple[type[BaseOptimumCLICommand], type[BaseOptimumCLICommand]]]:
    """What optimum looks for under the name REGISTER_COMMANDS: commands, each with its parent.

    Args:
        app: our command line; its command `export` is the one offered.
        run: runs a command line of `app`, tells of errors itself, and returns the exit code.
    """
    command = typer.main.get_group(app).commands["export"]
    flags = [flag for flag in command.params if isinstance(flag, Flag)]

    class SkipstoneExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
        COMMAND = CommandInfo(
            name="skipstone", help="Export a model to a Skipstone bundle, cut at its exits."
        )

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            parser.__class__ = _OneLineParser
            parser.description = command.help
            parser.allow_abbrev = False
            add_flags(parser, flags)

        def run(self) -> None:
            sys.exit(run(["export", *command_line(flags, self.args)]))

    return [(SkipstoneExportCommand, ExportCommand)]


def add_flags(parser: ArgumentParser, flags: Sequence[Flag]) -> None:
    """Give an argparse parser the flags of a typer command; its argument becomes optimum's usual `--model`.

    Values stay texts here: typer converts and checks them when the command line is run.
    """
    required = parser.add_argument_group("Required arguments")
    optional = parser.add_argument_group("Optional arguments")
    for flag in flags:
        group = required if flag.required else optional
        if isinstance(flag, TyperArgument):
            group.add_argument(
                "-m", "--model", dest=flag.name, metavar="MODEL", required=True, help=_help(flag)
            )
        elif flag.is_flag:
            group.add_argument(*_names(flag), dest=flag.name, action="store_true", help=_help(flag))
        elif flag.multiple:
            group.add_argument(*_names(flag), dest=flag.name, action="append", help=_help(flag))
        else:
            group.add_argument(*_names(flag), dest=flag.name, required=flag.required, help=_help(flag))


def command_line(flags: Sequence[Flag], chosen: Namespace) -> list[str]:
    """The arguments of a typer command that say what was chosen; what was left out stays out."""
    options: list[str] = []
    arguments: list[str] = []
    for flag in flags:
        value = getattr(chosen, str(flag.name))
        if value is None or value is False:
            continue
        if isinstance(flag, TyperArgument):
            arguments.append(value)
        elif value is True:
            options.append(flag.opts[0])
        else:
            values = value if flag.multiple else [value]
            options.extend(f"{flag.opts[0]}={each}" for each in values)
    return [*options, "--", *arguments]


def _names(option: TyperOption) -> list[str]:
    return sorted(option.opts, key=len)  # -o before --output, as argparse's help has it


def _help(flag: Flag) -> str:
    """Help text of a flag with the default that typer would show, in argparse's notation."""
    default = flag.show_default if isinstance(flag.show_default, str) else flag.default
    shown = "" if flag.required or not default else f" (default: {default})"
    return f"{flag.help}{shown}".replace("%", "%%")


class _OneLineParser(ArgumentParser):
    """Tells what is wrong with a command line in one line, as our own command line does."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        # optimum's root parser, to which unknown flags would be passed on, prints its usage too.
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")
