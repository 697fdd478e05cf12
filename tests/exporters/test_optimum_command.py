"""`optimum-cli export skipstone`: the same flags, artefacts and errors as `skipstone export`."""

import os
import subprocess
import sysconfig
from argparse import ArgumentParser
from pathlib import Path
from typing import Annotated

import pytest
import typer
from optimum.commands.export.base import ExportCommand

from skipstone.bundle import Manifest, open_bundle
from skipstone.cli import app
from skipstone.exporters.optimum_command import optimum_commands
from tests.exporters.conftest import MakeTiny
from tests.sdk.cli.command import Done, assert_refused, skipstone

OPTIMUM_CLI = Path(sysconfig.get_path("scripts")) / "optimum-cli"


def optimum_cli(*arguments: str | Path) -> Done:
    return subprocess.run(
        [OPTIMUM_CLI, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "400"},
        check=False,
    )


def without_time(manifest: Manifest) -> Manifest:
    """The manifest but for when it was written."""
    provenance = manifest.provenance.model_copy(update={"created": ""})
    return manifest.model_copy(update={"provenance": provenance})


def test_optimums_command_line_lists_the_command() -> None:
    done = optimum_cli("export", "--help")
    assert done.returncode == 0, done.stderr
    assert "skipstone" in done.stdout


def test_it_makes_the_bundle_that_our_own_command_makes(tiny: MakeTiny, tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    flags = ("--device", "cpu", "--format", "gguf", "--quantize", "f32", "--exits", "1,3")
    theirs = optimum_cli("export", "skipstone", "--model", checkpoint, *flags, "--output", tmp_path / "a")
    ours = skipstone("export", checkpoint, *flags, "--output", tmp_path / "b")
    assert (theirs.returncode, ours.returncode) == (0, 0), theirs.stderr + ours.stderr
    first, second = open_bundle(tmp_path / "a").manifest, open_bundle(tmp_path / "b").manifest
    assert first.exits == (1, 3)
    assert len(first.files) > 3
    assert {file.path: file.sha256 for file in first.files} == {
        file.path: file.sha256 for file in second.files
    }
    assert without_time(first) == without_time(second)
    assert theirs.stdout == ours.stdout.replace(str(tmp_path / "b"), str(tmp_path / "a"))


def test_its_help_names_every_flag_of_our_own_command() -> None:
    done = optimum_cli("export", "skipstone", "--help")
    assert done.returncode == 0, done.stderr
    ours = typer.main.get_group(app).commands["export"].params
    assert {"--device", "--format", "--quantize", "--exits", "--overwrite", "--json"} <= {
        name for parameter in ours for name in parameter.opts
    }
    printed = " ".join(done.stdout.split())
    for parameter in ours:
        name = "--model" if parameter.name == "checkpoint" else parameter.opts[0]
        value = "" if vars(parameter).get("is_flag") else f" {name[2:].replace('-', '_').upper()}"
        assert f"{name}{value} {vars(parameter)['help']}" in printed


class TestCommandLine:
    """What a command of our own is given, for a command line of optimum's."""

    @pytest.fixture
    def taken(self) -> dict[str, object]:
        return {}

    @pytest.fixture
    def parser(self, taken: dict[str, object]) -> ArgumentParser:
        """A parser that has the command `skipstone`, in front of a typer command with flags of every kind."""
        stand_in = typer.Typer(add_completion=False)

        @stand_in.callback()
        def group() -> None: ...

        @stand_in.command()
        def export(
            checkpoint: Annotated[str, typer.Argument(help="100 % of it.")],
            output: Annotated[Path, typer.Option("--output", "-o")],
            quantize: Annotated[str | None, typer.Option(show_default="7 %")] = None,
            rows: Annotated[int | None, typer.Option()] = None,
            step: Annotated[list[str] | None, typer.Option()] = None,
            overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
        ) -> None:
            taken["checkpoint"], taken["output"], taken["overwrite"] = checkpoint, output, overwrite
            taken["quantize"], taken["rows"], taken["step"] = quantize, rows, step

        ((command, _),) = optimum_commands(
            stand_in, lambda arguments: stand_in(args=list(arguments), standalone_mode=False) or 0
        )
        parser = ArgumentParser("optimum-cli")
        command(parser.add_subparsers(), command=command.COMMAND)
        return parser

    def run(self, parser: ArgumentParser, *arguments: str) -> int:
        chosen = parser.parse_args(["skipstone", *arguments])
        with pytest.raises(SystemExit) as ended:
            chosen.func(chosen).run()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (("--model", "m", "--output", "o"), {}),
            (("-m", "m", "-o", "o", "--overwrite"), {"overwrite": True}),
            (("--model=m", "--output=o", "--rows", "7"), {"rows": 7}),
            (("--output", "o", "--quantize", "two words", "--model", "m"), {"quantize": "two words"}),
            (("--model", "m", "--output", "o", "--quantize="), {"quantize": ""}),
            (("--model", "m", "--output", "o", "--rows=-3"), {"rows": -3}),
            (("--model=--overwrite", "--output", "o"), {"checkpoint": "--overwrite"}),
            (("-m", "m", "-o", "o", "--step", "a:b=1", "--step=c,d"), {"step": ["a:b=1", "c,d"]}),
        ],
    )
    def test_flags_arrive_as_they_were_given_and_others_keep_their_defaults(
        self,
        parser: ArgumentParser,
        taken: dict[str, object],
        arguments: tuple[str, ...],
        expected: dict[str, object],
    ) -> None:
        assert self.run(parser, *arguments) == 0
        defaults = {
            "checkpoint": "m",
            "output": Path("o"),
            "quantize": None,
            "rows": None,
            "step": None,
            "overwrite": False,
        }
        assert taken == defaults | expected

    def test_percent_signs_in_help_are_printed(
        self, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            parser.parse_args(["skipstone", "--help"])
        printed = capsys.readouterr().out
        assert "100 % of it." in printed
        assert "(default: 7 %)" in printed

    def test_the_exit_code_is_that_of_our_own_command_line(self) -> None:
        ((command, parent),) = optimum_commands(app, lambda _arguments: 7)
        assert parent is ExportCommand
        parser = ArgumentParser("optimum-cli")
        command(parser.add_subparsers(), command=command.COMMAND)
        assert self.run(parser, "--model", "m", "--output", "o") == 7


class TestErrors:
    """One line on standard error, exit code 2, nothing left behind."""

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--device", "toaster"), ("--device toaster", "cpu")),
            (("--format", "tarball"), ("--format tarball", "gguf")),
            (("--exits", "two"), ("--exits two", "whole numbers")),
            (("--draft-vocab-size", "many"), ("--draft-vocab-size", "integer")),
            (("--no-such-flag",), ("--no-such-flag", "optimum-cli export skipstone --help")),
            (("--over",), ("--over", "--help")),
        ],
    )
    def test_a_flag_that_cannot_work_is_refused(
        self, tmp_path: Path, tiny: MakeTiny, flags: tuple[str, ...], words: tuple[str, ...]
    ) -> None:
        done = optimum_cli(
            "export", "skipstone", "--model", tiny("llama"), "--output", tmp_path / "out", *flags
        )
        assert_refused(done, *words)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("given", "missing"), [("--model", "--output"), ("--output", "--model")])
    def test_a_missing_flag_is_named(self, tmp_path: Path, given: str, missing: str) -> None:
        assert_refused(optimum_cli("export", "skipstone", given, tmp_path / "x"), missing)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_checkpoint_is_named_in_the_words_of_our_own_command(self, tmp_path: Path) -> None:
        theirs = optimum_cli(
            "export", "skipstone", "--model", tmp_path / "nothing", "--output", tmp_path / "out"
        )
        assert_refused(theirs, "nothing")
        assert theirs.stderr == skipstone("export", tmp_path / "nothing", "--output", tmp_path / "out").stderr
        assert list(tmp_path.iterdir()) == []
