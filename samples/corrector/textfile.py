"""Reading text and replacing files, so that nothing that is no text is touched and no file is left half written."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from skipstone.errors import UsageError

_MARK = "\ufeff"  # the byte order mark that some editors begin a file with


@dataclass(frozen=True)
class TextFile:
    """What was read; `mark` and `text` joined are its content, line breaks as they were.

    Attributes:
        path: None for standard input.
        content: as read, UTF-8.
    """

    path: Path | None
    content: bytes
    mark: str
    text: str

    @property
    def name(self) -> str:
        """To call it by in messages."""
        return str(self.path or "standard input")


def read_text(name: str) -> TextFile:
    """Read a file, or standard input by the name of `-`.

    Raises:
        UsageError: it cannot be read or is not text in UTF-8.
    """
    path = None if name == "-" else Path(name)
    called = str(path or "standard input")
    with _readable_errors(called, "read"):
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
    if b"\0" in content:
        at = content.index(b"\0")
        raise UsageError(f"{called}: not text: a zero byte at {at}", hint="pass a text file in UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}"
        raise UsageError(
            f"{called}: not UTF-8: {found}", hint="convert it, say with `iconv -t utf-8`"
        ) from error
    mark = _MARK if text.startswith(_MARK) else ""
    return TextFile(path, content, mark, text.removeprefix(_MARK))


def write_text(target: Path, content: bytes) -> None:
    """Put `content` in the place of a file, all of it or nothing; its mode, and links to it, stay.

    Raises:
        UsageError: the disk refuses.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():
        raise UsageError(f"{target}: not a regular file", hint="name a file, or pass --output -")
    with (
        _readable_errors(str(target), "written"),
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder,
    ):
        draft = Path(folder) / target.name
        draft.write_bytes(content)
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)


def write_back(source: TextFile, content: bytes) -> None:
    """Replace the file that was read.

    Raises:
        UsageError: somebody else has written to it since, or the disk refuses.
    """
    if source.path is None:
        raise UsageError("--write: standard input is no file", hint="pass --output FILE")
    with _readable_errors(source.name, "read"):
        now = source.path.read_bytes()
    if now != source.content:
        raise UsageError(f"{source.name}: changed while it was corrected; left as it is", hint="run it again")
    write_text(source.path, content)


@contextmanager
def _readable_errors(name: str, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{name}: cannot be {verb}: {error.strerror or error}", hint="check the path and its permissions"
        ) from error
