r"""Cut code prompts and text from the held-out files of a recipe's corpus, or text to learn from out of the others.

    python samples/recipes/cut_held_out.py prompts samples/recipes/coder.toml samples/models/coder \
        samples/prompts/code.jsonl
    python samples/recipes/cut_held_out.py text samples/recipes/coder.toml samples/prompts/held_out.jsonl
    python samples/recipes/cut_held_out.py text samples/recipes/coder.toml samples/calibration/code.jsonl \
        --training --count 48

A prompt is the beginning of a function: up to the end of its docstring, or up to a line in the middle of its
body. None shares a run of 24 tokens with a training file, neither in the prompt nor in the 96 tokens that
follow it. A text is some sixty lines from the middle of a file.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from tokenizers import Tokenizer

from skipstone.exporters.tune.data import Source, collect
from skipstone.exporters.tune.recipe import load_recipe

SHORTEST, LONGEST, FOLLOWING, RUN = 60, 200, 96, 24


@dataclass(frozen=True)
class Cut:
    """A prompt, the text that follows it in its file, and where both come from."""

    prompt: str
    following: str
    source: str


def cuts(source: Source) -> Iterator[Cut]:
    """Every function of a file, cut after its docstring and in the middle of its body."""
    lines = source.text.splitlines(keepends=True)
    name = f"{source.package}: {source.path}"
    for node in ast.walk(ast.parse(source.text)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 3:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        after_docstring = node.body[0].end_lineno if ast.get_docstring(node) else None
        middle = node.body[len(node.body) // 2].lineno - 1
        for end in (after_docstring, middle):
            if end is not None:
                yield Cut("".join(lines[first:end]), "".join(lines[end : end + 40]), name)


def runs(tokens: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every run of RUN tokens, wrapping arithmetic."""
    if len(tokens) < RUN:
        return np.empty(0, np.uint64)
    hashes = np.zeros(len(tokens) - RUN + 1, np.uint64)
    for offset in range(RUN):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(hashes)].astype(
            np.uint64
        )
        hashes ^= hashes >> np.uint64(29)
    return hashes


def fits(cut: Cut, tokenizer: Tokenizer) -> npt.NDArray[np.unsignedinteger] | None:
    """The tokens of the prompt and of what follows, or None when the prompt's length is not wanted."""
    prompt = tokenizer.encode(cut.prompt).ids
    following = tokenizer.encode(cut.following).ids[:FOLLOWING]
    if not SHORTEST <= len(prompt) <= LONGEST or len(following) < FOLLOWING:
        return None
    return np.array(prompt + following, dtype=np.uint32)


def choose(sources: list[Source], tokenizer: Tokenizer, count: int) -> list[Cut]:
    """`count` cuts from held-out files, in turn from each package, at most one per file, none seen in
    training.
    """
    candidates: dict[str, list[tuple[Cut, npt.NDArray[np.uint64]]]] = {}
    for source in sorted((s for s in sources if s.held_out), key=lambda s: s.digest):
        options = [(cut, tokens) for cut in cuts(source) if (tokens := fits(cut, tokenizer)) is not None]
        # The digest picks among a file's functions, and after-docstring and mid-body cuts in turn.
        begin = int(source.digest[:8], 16) % max(1, len(options))
        candidates.setdefault(source.package, []).extend(
            (cut, runs(tokens)) for cut, tokens in options[begin : begin + 4]
        )
    wanted = np.unique(np.concatenate([h for group in candidates.values() for _, h in group]))
    seen = training_runs(sources, tokenizer, wanted)
    chosen: list[Cut] = []
    files: set[str] = set()
    while len(chosen) < count and any(candidates.values()):
        for group in candidates.values():
            while group:
                cut, hashes = group.pop(0)
                if cut.source not in files and not np.isin(hashes, seen).any():
                    chosen.append(cut)
                    files.add(cut.source)
                    break
    return chosen[:count]


def training_runs(
    sources: list[Source], tokenizer: Tokenizer, wanted: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Those of the `wanted` hashes that occur in a training file."""
    found = []
    training = [source.text for source in sources if not source.held_out]
    for begin in range(0, len(training), 256):
        encodings = tokenizer.encode_batch_fast(training[begin : begin + 256])
        found += [np.intersect1d(runs(np.array(e.ids, dtype=np.uint32)), wanted) for e in encodings]
    return np.unique(np.concatenate(found))


def excerpt(source: Source, characters: int = 2_500) -> str:
    """Whole lines from the middle of a file."""
    begin = source.text.find("\n", len(source.text) // 2) + 1
    return source.text[begin : source.text.rfind("\n", begin, begin + characters) + 1]


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


app = typer.Typer(add_completion=False)


@app.command()
def prompts(recipe: str, model: Path, output: Path, count: int = 24) -> None:
    """Cut COUNT prompts for the tokenizer of MODEL: lines of prompt and source."""
    sources = collect(load_recipe(recipe).corpus)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    chosen = choose(sources, tokenizer, count)
    write_lines(output, [{"prompt": cut.prompt, "source": cut.source} for cut in chosen])


@app.command()
def text(
    recipe: str,
    output: Path,
    count: int = 24,
    training: Annotated[
        bool, typer.Option("--training", help="From training files, not held-out ones.")
    ] = False,
) -> None:
    """Cut COUNT texts, one per package in turn: lines of text and source."""
    groups: dict[str, list[Source]] = {}
    for source in sorted(collect(load_recipe(recipe).corpus), key=lambda s: s.digest):
        if source.held_out != training and len(source.text) > 6_000:
            groups.setdefault(source.package, []).append(source)
    turns = [source for turn in zip_longest(*groups.values()) for source in turn if source is not None]
    records = [{"text": excerpt(s), "source": f"{s.package}: {s.path}"} for s in turns[:count]]
    write_lines(output, records)


if __name__ == "__main__":
    app()
