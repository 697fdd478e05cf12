r"""English sentences from the docstrings and comments of Python sources.

    >>> list(sentences('x = 1  # no\n# The list is sorted first, then it is cut.\n'))
    ['The list is sorted first, then it is cut.']

Strict on purpose: a model that corrects prose learns from what is left, so a doubtful sentence is better lost.
Doctests, indented code, tables, markup and lines about licences go; of a parameter's entry only the description
stays. Text that is not Python is taken as paragraphs of prose.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.exporters.tune.data import Source

MIN_WORDS, MAX_WORDS = 4, 40
_MAX_LETTERS = 280

# A paragraph that begins like one of these is no prose; "- " and "1. " are lists, whose items are.
_NOT_PROSE = re.compile(r">>>|\.\.\.|\.\. |@|#!|[-=~*^+_]{3,}|\||http|\$ |%|//")
_BULLET = re.compile(r"(?:[-*+•]|\d{1,2}[.)])\s+")
# What stands before an entry's description: `name (type, *optional*): `, `:param name: `, `name: `.
_ENTRY = re.compile(r":[a-z]+(?: [\w.*]+){0,2}: *|[`\w.*, ]{1,60}?(?:\([^)]{0,200}\))?\s*: ")
# A line that begins so is an entry of its own.
_NEW_ENTRY = re.compile(r":[a-z]+ |[`*]{0,2}[a-z_][\w.*]*`{0,2}\s*(?:\([^)]*\))?\s*: ")
_LICENCE = re.compile(r"copyright|licen[sc]e|warrant|all rights reserved|redistribut", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'(`]{0,2}[A-Z])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|resp|approx|incl|Fig|Eq|Sec|Ref|No|Dr|St|[A-Za-z]))\.$"
)

# Strings, so that a # within one is not taken for a comment, and comments.
_LEXEME = re.compile(
    r'''"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""|"(?:\\.|[^"\\\n])*"'''
    r"""|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''|'(?:\\.|[^'\\\n])*'|#[^\n]*""",
    re.DOTALL,
)

_PLAIN = re.compile(r"[A-Z\"'(][A-Za-z0-9 ,.;:!?'\"()%/&-]*[.!?][\")]?")
# Names that are marked as code may stay.
_QUOTED = re.compile(r"(?<![\w`])(``?)[A-Za-z_][\w.]*(?:\(\))?\1(?![\w`])")
_CODE = re.compile(r":[a-z]+:|[A-Za-z]\(\)|\w\.\w|\w/\w|\(\)|--|  |\.\.|[a-z][A-Z]|\d[A-Za-z]{2}|[A-Za-z]\d")
_SHORT = re.compile(r"\b(?:e\.g|i\.e)\.")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_COMMON = frozenset(
    _WORD.findall(
        "the a an of to in is it and or for that this be are with as on by not if from at which can will when has"
        " have was but we you they no should must may used use then than only all so its there into any does do"
    )
)


@dataclass(frozen=True)
class Sentence:
    """A sentence of prose, the source it comes from, and whether that source is held out."""

    text: str
    package: str
    path: str
    held_out: bool


def collect_sentences(sources: Iterable[Source]) -> list[Sentence]:
    """The sentences of `sources` in the order of the sources' hashes, none twice.

    Sentences that differ in numbers, punctuation or words with a capital alone count as one. Those of training files
    come first, so a held-out sentence is one that occurs in no training file.
    """
    seen: set[str] = set()
    kept: list[Sentence] = []
    for source in sorted(sources, key=lambda source: (source.held_out, source.digest)):
        found = sentences(source.text) if source.path.endswith(".py") else prose_sentences([source.text])
        for text in found:
            shape = _shape(text)
            if shape not in seen:
                seen.add(shape)
                kept.append(Sentence(text, source.package, source.path, source.held_out))
    return kept


def sentences(python: str) -> Iterator[str]:
    """The sentences in the docstrings and comments of a Python source; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the source's own, such as invalid escapes
            blocks = [*_docstrings(python), *_comments(python)]
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from prose_sentences(blocks)


def prose_sentences(blocks: Iterable[str]) -> Iterator[str]:
    """The sentences in blocks of text that pass for plain English prose."""
    for block in blocks:
        for paragraph in _paragraphs(block):
            yield from filter(_is_prose, _split(paragraph))


def _docstrings(python: str) -> Iterator[str]:
    pending: list[ast.AST] = [ast.parse(python)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Definitions are statements: expressions need not be searched.
        for block in ("body", "orelse", "handlers", "finalbody"):
            children = getattr(node, block, ())
            pending += children if isinstance(children, list) else ()


def _comments(python: str) -> Iterator[str]:
    """Comments that have their lines to themselves, those of adjacent lines and one column together."""
    block: list[str] = []
    expected = ""  # what stands between a comment and the one that continues it
    end = 0
    for match in _LEXEME.finditer(python):
        indent = python[python.rfind("\n", 0, match.start()) + 1 : match.start()]
        if not match[0].startswith("#") or indent.strip():
            continue
        if python[end : match.start()] != expected:
            yield "\n".join(block)
            block = []
        block.append(re.sub(r"^#+:? ?", "", match[0]))
        expected = "\n" + indent
        end = match.end()
    yield "\n".join(block)


def _paragraphs(block: str) -> Iterator[str]:
    """Runs of lines at one indentation, joined; bullets and entries of tables without what stands before them."""
    if _LICENCE.search(block[:600]) and len(block) > 400:
        return
    for part in re.split(r"\n\s*\n", textwrap.dedent(block).expandtabs()):
        run: list[str] = []
        indent = -1
        for line in part.splitlines():
            text = line.strip()
            column = len(line) - len(line.lstrip())
            bullet = _BULLET.match(text)
            if column != indent or bullet or _NOT_PROSE.match(text) or _NEW_ENTRY.match(text):
                yield _description(" ".join(run))
                run = []
            if text.startswith(">>>"):
                break  # the rest is code and its output
            # The lines of a list's item stand below its text, not below its bullet.
            indent = column + bullet.end() if bullet else column
            if not _NOT_PROSE.match(text):
                run.append(text[bullet.end() :] if bullet else text)
        yield _description(" ".join(run))


def _description(paragraph: str) -> str:
    entry = _ENTRY.match(paragraph)
    rest = paragraph[entry.end() :] if entry else ""
    return rest if rest[:1].isupper() else paragraph


def _split(paragraph: str) -> Iterator[str]:
    begin = 0
    for match in _SENTENCE_END.finditer(paragraph):
        # The closing quote or bracket belongs to the sentence before it.
        end = match.start() + (0 if match[0][0].isspace() else 1)
        if not _ABBREVIATION.search(paragraph[begin:end]):
            yield paragraph[begin:end].strip()
            begin = match.end()
    yield paragraph[begin:].strip()


def _is_prose(text: str) -> bool:
    marked = _SHORT.sub("eg", _QUOTED.sub("name", text))
    if (
        len(text) > _MAX_LETTERS
        or not _PLAIN.fullmatch(marked)
        or _CODE.search(marked)
        or _LICENCE.search(text)
    ):
        return False
    text = marked
    pieces = text.split(" ")
    words = _WORD.findall(text)
    capitals = sum(piece[:1].isupper() for piece in pieces[1:])
    return (
        MIN_WORDS <= len(pieces) <= MAX_WORDS
        and len(words) >= 0.85 * len(pieces)
        and capitals <= 0.3 * len(pieces)
        and sum(word.lower() in _COMMON for word in words) >= max(1, len(pieces) // 7)
        and text.count("(") == text.count(")")
        and text.count('"') % 2 == 0
    )


def _shape(text: str) -> str:
    """`text` without what tells near copies apart: numbers, punctuation, words with a capital, the first's case."""
    first, *rest = _WORD.findall(_QUOTED.sub("A", text))
    return " ".join([first.lower(), *("#" if word[0].isupper() else word for word in rest)])
