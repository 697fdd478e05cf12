"""The command line: a file is corrected as a whole, without one the user types."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

import skipstone
from skipstone.errors import SkipstoneError, UsageError
from skipstone.model import Model
from skipstone.rewrite import Rewritten, rewrite
from skipstone.runtimes.strategies import STRATEGIES

from .diff import Kind, diff_words, show
from .textfile import TextFile, read_text, write_back, write_text

_STYLES: dict[Kind, str] = {"kept": "", "removed": "red strike", "added": "green underline"}
_STRATEGIES = [name for name in STRATEGIES if name != "draft-model"]  # which takes a model more
_CHANGES, _USER, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141


@dataclass(frozen=True)
class Options:
    """What the command line says; see `--help`."""

    bundle: str
    file: str | None
    write: bool
    output: str | None
    check: bool
    strategy: str
    threads: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is told in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parse(arguments)
        if options.file is None:
            return type_and_correct(options)
        return correct_file(options, read_text(options.file))
    except SkipstoneError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return _USER
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes standard output once more
        return _BROKEN_PIPE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line.

    Raises:
        UsageError: naming the argument.
    """
    parser = _Parser(
        prog="correct.py", description="Correct a file sentence by sentence, or text as you type it."
    )
    parser.add_argument("bundle", metavar="DIR", help="bundle of an encoder-decoder, from `skipstone export`")
    parser.add_argument("file", metavar="FILE", nargs="?", help="text in UTF-8; - is standard input")
    result = parser.add_mutually_exclusive_group()
    result.add_argument("--write", action="store_true", help="replace the file by its correction")
    result.add_argument(
        "--output", metavar="FILE", help="where to write the correction; - is standard output"
    )
    result.add_argument("--check", action="store_true", help="exit with 1 if anything would change")
    parser.add_argument("--strategy", choices=_STRATEGIES, default="auto", help="what drafts the text")
    parser.add_argument("--threads", type=int, help="CPU threads; one per core")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.file is None and (options.write or options.output or options.check):
        parser.error("--write, --output and --check go with a FILE")
    if options.file == "-" and options.write:
        parser.error("--write: standard input is no file; use --output")
    return options


def correct_file(options: Options, source: TextFile) -> int:
    """Correct a file, show what changed, and put it where the options say; returns the exit status."""
    if options.output not in (None, "-") and not Path(options.output).parent.is_dir():
        raise UsageError(f"--output {options.output}: no such folder", hint="make it first")
    console = Console(stderr=options.output == "-", highlight=False, soft_wrap=True)
    with skipstone.load(options.bundle, threads=options.threads) as model:
        pieces = list(show_changes(rewrite(model, source.text, strategy=options.strategy), source, console))
    corrected = (source.mark + "".join(piece.after for piece in pieces)).encode()
    if options.output == "-":
        sys.stdout.buffer.write(corrected)
        sys.stdout.buffer.flush()
    elif options.output is not None:
        write_text(Path(options.output), corrected)
    elif options.write and corrected != source.content:
        write_back(source, corrected)
    print(f"{source.name}: {summarize(pieces)}", file=sys.stderr)
    return _CHANGES if options.check and corrected != source.content else 0


def show_changes(pieces: Iterator[Rewritten], source: TextFile, console: Console) -> Iterator[Rewritten]:
    """Pass the pieces on and print those that changed, each with the number of its line."""
    marked = not console.is_terminal or console.no_color
    screen = console if console.file.isatty() else Console(stderr=True)
    line = 1
    with Progress(console=screen, transient=True, disable=not screen.file.isatty()) as progress:
        task = progress.add_task("correcting", total=len(source.text))
        for piece in pieces:
            if piece.before != piece.after:
                indent = piece.before[: len(piece.before) - len(piece.before.lstrip())]
                spans = show(diff_words(piece.before, piece.after), marked=marked)
                styled = ((text, _STYLES[kind]) for kind, text in spans)
                console.print(Text.assemble((f"{line + indent.count(chr(10))}: ", "cyan"), *styled))
            line += piece.before.count("\n")
            progress.advance(task, len(piece.before))
            yield piece


def summarize(pieces: Sequence[Rewritten]) -> str:
    """Figures of a corrected text in one line."""
    sentences = [piece for piece in pieces if piece.before.strip()]
    stats = [piece.result.stats for piece in sentences if piece.result is not None]
    seconds, drafted = sum(s.seconds for s in stats), sum(s.drafted for s in stats)
    untouched = sum(piece.result is None or piece.result.stop_reason != "eos" for piece in sentences)
    facts = [
        f"{len(sentences)} sentence{'s' * (len(sentences) != 1)}",
        f"{sum(piece.before != piece.after for piece in sentences)} changed",
    ]
    if untouched:  # the tokenizer cannot give them back, or the model came to no end
        facts.append(f"{untouched} not understood and left alone")
    if seconds:
        facts.append(f"{sum(s.new_tokens for s in stats) / seconds:.0f} tokens/s")
    if drafted:
        facts.append(f"{sum(s.accepted for s in stats) / drafted:.0%} of {drafted} drafts accepted")
    return ", ".join(facts)


def type_and_correct(options: Options) -> int:
    """Correct what the user types and print it at the end; returns the exit status."""
    if not sys.stdin.isatty():
        raise UsageError(
            "no FILE, and standard input is no terminal", hint="pass a file, or - to read a pipe"
        )
    try:
        from prompt_toolkit.output import create_output

        from .live import Editor
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed", hint="make setup, or pip install prompt_toolkit"
        ) from error
    with skipstone.load(options.bundle, threads=options.threads) as model:
        list(rewrite(model, ""))  # refuses a model that cannot

        def correct(sentence: str) -> str:
            return "".join(piece.after for piece in rewrite(model, sentence, strategy=options.strategy))

        with ThreadPoolExecutor(max_workers=1) as worker:
            worker.submit(_warm_up, model)
            no_color = bool(os.environ.get("NO_COLOR"))
            editor = Editor(correct, worker, marked=no_color, output=create_output(always_prefer_tty=True))
            text = asyncio.run(editor.run())
            if text is None:
                return _INTERRUPTED
            print(text, end="" if text.endswith("\n") or not text else "\n", flush=True)
    return 0


def _warm_up(model: Model) -> None:
    """Have the costs measured while the user types the first words; see `Model.costs`."""
    model.costs  # noqa: B018
