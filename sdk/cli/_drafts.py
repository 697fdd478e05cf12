"""Showing streamed text, plainly or with the drafts marked."""

from __future__ import annotations

import sys
from collections import deque
from typing import Literal, Protocol

from rich.console import Console
from rich.text import Text

from skipstone.model import Chunk
from skipstone.runtimes.text import TextStream

Origin = Literal["draft", "target", "refused"]
_STYLES: dict[Origin, str] = {"draft": "green", "target": "", "refused": "red strike"}
_MARKS: dict[Origin, tuple[str, str]] = {"draft": ("{+", "+}"), "target": ("", ""), "refused": ("[-", "-]")}


class View(Protocol):
    """Shows chunks as they come."""

    def show(self, chunk: Chunk) -> None: ...

    def end(self) -> None:
        """The text is complete."""


class DraftView:
    """Colours every piece of text by where it came from; without colours it is marked as wdiff does.

    Args:
        stream: decoder of the bundle's tokenizer, fresh.
        console: where to write; None: standard output.
    """

    def __init__(self, stream: TextStream, console: Console | None = None) -> None:
        self._stream = stream
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._coloured = self._console.is_terminal and not self._console.no_color
        # Decoded, but perhaps held back for a stop string: characters and their origin.
        self._waiting: deque[tuple[str, Origin]] = deque()

    def show(self, chunk: Chunk) -> None:
        for index, token in enumerate(chunk.tokens):
            origin: Origin = "draft" if index < chunk.accepted else "target"
            self._waiting.extend((character, origin) for character in self._stream.push(token))
        shown = self._take(chunk.text)
        cut = next((at for at, (_, origin) in enumerate(shown) if origin == "target"), len(shown))
        refused: list[tuple[str, Origin]] = [(c, "refused") for c in chunk.rejected.replace("\n", "⏎")]
        self._write([*shown[:cut], *refused, *shown[cut:]])

    def end(self) -> None:
        self._console.print()

    def _take(self, text: str) -> list[tuple[str, Origin]]:
        """Origins of characters; what is not waiting (an incomplete character's stand-in) is the target's."""
        return [(c, self._waiting.popleft()[1] if self._waiting else "target") for c in text]

    def _write(self, characters: list[tuple[str, Origin]]) -> None:
        runs: list[tuple[str, Origin]] = []
        for character, origin in characters:
            if runs and runs[-1][1] == origin:
                runs[-1] = (runs[-1][0] + character, origin)
            else:
                runs.append((character, origin))
        for text, origin in runs:
            before, after = ("", "") if self._coloured else _MARKS[origin]
            self._console.print(Text(f"{before}{text}{after}", _STYLES[origin]), end="")


class _PlainView:
    def show(self, chunk: Chunk) -> None:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n")


class _QuietView:
    def show(self, chunk: Chunk) -> None:
        return None

    def end(self) -> None:
        return None


def plain_view(*, quiet: bool) -> View:
    """Text as it is, or nothing at all."""
    return _QuietView() if quiet else _PlainView()
