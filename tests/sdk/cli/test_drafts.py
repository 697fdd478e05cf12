"""Colours of streamed text."""

import io
from pathlib import Path

from rich.console import Console

from skipstone.cli._drafts import DraftView
from skipstone.model import Chunk
from skipstone.runtimes.text import TextCodec
from tests.sdk.scripted import VOCAB, byte_tokenizer


def shown(chunks: list[Chunk], tmp_path: Path, *, terminal: bool) -> str:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    out = io.StringIO()
    colours = "standard" if terminal else None
    console = Console(file=out, force_terminal=terminal, color_system=colours, soft_wrap=True, _environ={})
    view = DraftView(TextCodec(tmp_path / "tokenizer.json", VOCAB).stream(), console)
    for chunk in chunks:
        view.show(chunk)
    view.end()
    return out.getvalue()


def test_accepted_refused_and_own_tokens_look_different(tmp_path: Path) -> None:
    chunk = Chunk("abcd", tuple(b"abcd"), 3, "xy\n")
    assert shown([chunk], tmp_path, terminal=True) == "\x1b[32mabc\x1b[0m\x1b[9;31mxy⏎\x1b[0md\n"


def test_without_colours_the_pieces_are_marked(tmp_path: Path) -> None:
    chunk = Chunk("abcd", tuple(b"abcd"), 3, "xy")
    assert shown([chunk], tmp_path, terminal=False) == "{+abc+}[-xy-]d\n"


def test_text_held_back_keeps_its_origin_when_it_comes(tmp_path: Path) -> None:
    chunks = [Chunk("a", tuple(b"ab"), 1, ""), Chunk("bcd", tuple(b"cd"), 2, "")]
    assert shown(chunks, tmp_path, terminal=False) == "{+a+}b{+cd+}\n"


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(tmp_path: Path) -> None:
    first, second = "é".encode()
    chunks = [Chunk("", (first,), 1, ""), Chunk("é!", (second, ord("!")), 1, "")]
    assert shown(chunks, tmp_path, terminal=False) == "{+é+}!\n"


def test_square_brackets_are_text_and_no_markup(tmp_path: Path) -> None:
    chunk = Chunk("[red]x[/red]", tuple(b"[red]x[/red]"), 0, "")
    assert shown([chunk], tmp_path, terminal=False) == "[red]x[/red]\n"
