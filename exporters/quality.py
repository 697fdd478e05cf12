"""How well an artefact predicts held-out text, beside the checkpoint it was made from.

    >>> measure_quality(Path("out"), "held_out.jsonl", Path("samples/models/coder")).perplexity

Measured through the engine and the session that will generate, in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from skipstone.bundle import (
    EncoderFacts,
    ExecuTorchManifest,
    Manifest,
    ModelFacts,
    Quality,
    hash_file,
    read_manifest,
)
from skipstone.errors import UsageError
from skipstone.exporters.evaluation.measure import measure_folder
from skipstone.exporters.facts import read_text
from skipstone.exporters.probe import Probe

MAX_TOKENS = 8192
_WINDOW = 512
_SHORTEST = 2


@dataclass(frozen=True)
class HeldOut:
    """A text to predict; an encoder-decoder is given a source for it."""

    text: str
    source: str | None = None


def held_out_texts(file: Path, flag: str = "--held-out") -> tuple[HeldOut, ...]:
    """A held-out set: a text file as a whole, or a .jsonl file of `{"text": …}` or, for encoder-decoders, of
    `{"source": …, "target": …}`. `flag` is what the user named it with.

    Raises:
        UsageError: it cannot be read, or a line does not fit.
    """
    content = read_text(file, flag)
    if file.suffix != ".jsonl":
        return (HeldOut(content),)
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return tuple(_text(line, f"{flag} {file}, line {number}") for number, line in lines)


def _text(line: str, place: str) -> HeldOut:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    record = record if isinstance(record, dict) else {}
    text, source, target = (record.get(key) for key in ("text", "source", "target"))
    if isinstance(source, str) and isinstance(target, str):
        return HeldOut(target, source)
    if not isinstance(text, str):
        raise UsageError(
            f"{place}: no text under the key 'text'",
            hint='every line is an object like {"text": "def f(x):"}, for an encoder-decoder like '
            '{"source": "Their is a eror.", "target": "There is an error."}',
        )
    return HeldOut(text)


def measure_quality(folder: Path, file: Path, checkpoint: Path | None) -> Quality:
    """Measure a bundle on a held-out set.

    Args:
        folder: the bundle, whose manifest may still be without the figures.
        file: text or .jsonl; its first 8,192 tokens count, in windows of at most 512 that start anew. An
            encoder-decoder's texts are one window each, cut at its limits.
        checkpoint: what it is compared with; None: there is none.

    Raises:
        UsageError: a file that cannot be read or holds next to nothing, or not what this kind of model needs.
        ExportError: the engine crashed.
    """
    manifest = read_manifest(folder)
    texts = held_out_texts(file)
    check_kind(file, texts, encodes=manifest.model.encoder is not None)
    tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer))
    windows = list(probes(tokenizer, texts, manifest.model, longest_window(manifest), MAX_TOKENS))
    if not windows:
        raise UsageError(f"--held-out {file}: no two tokens to predict in it", hint="pass a longer text")
    compared = None if checkpoint is None else manifest.exits
    found = measure_folder(folder, manifest.exits, windows, checkpoint, compared or ())
    return Quality(
        text_sha256=hash_file(file),
        tokens=found.tokens,
        perplexity=found.perplexity,
        reference_perplexity=found.dense_perplexity,
        kl_divergence=found.kl_divergence,
        agreement=found.agreement,
        exits=found.exits,
    )


def longest_window(manifest: Manifest) -> int:
    """Most tokens that a bundle is given at once: 512, or what its engine holds if that is less."""
    padding = manifest.program.reference_width - 1 if isinstance(manifest, ExecuTorchManifest) else 0
    return min(_WINDOW, manifest.model.context_length - padding)


def check_kind(file: Path, texts: tuple[HeldOut, ...], *, encodes: bool, flag: str = "--held-out") -> None:
    """Refuse texts without sources for an encoder-decoder, and with them for a decoder alone.

    Raises:
        UsageError: these are such.
    """
    if any((text.source is not None) != encodes for text in texts):
        raise UsageError(
            f"{flag} {file}: an encoder-decoder is measured on sources and targets, a decoder alone on texts",
            hint='write a .jsonl file of {"source": …, "target": …} or of {"text": …}',
        )


def probes(
    tokenizer: Tokenizer, texts: Sequence[HeldOut], facts: ModelFacts, length: int, limit: int
) -> Iterator[Probe]:
    """Texts as stretches of at most `length` token ids that a model is given, until it was given `limit` of them.

    A decoder's begin with its first token, where it has one; an encoder-decoder's are a text each, cut at its limits.
    """
    if facts.encoder is None:
        return _windows(tokenizer, texts, length, facts.bos_token_id if facts.add_bos else None, limit)
    return _pairs(tokenizer, texts, length, facts.encoder, facts.eos_token_ids[:1], limit)


def _windows(
    tokenizer: Tokenizer, texts: Sequence[HeldOut], length: int, bos: int | None, left: int
) -> Iterator[Probe]:
    start = [] if bos is None else [bos]
    step = length - len(start)
    for text in texts:
        ids = tokenizer.encode(text.text, add_special_tokens=False).ids
        for first in range(0, len(ids), step):
            window = (start + ids[first : first + step])[:left]
            if len(window) < _SHORTEST:
                continue
            left -= len(window)
            yield Probe(tuple(window))


def _pairs(
    tokenizer: Tokenizer,
    texts: Sequence[HeldOut],
    length: int,
    encoder: EncoderFacts,
    eos: tuple[int, ...],
    left: int,
) -> Iterator[Probe]:
    """Targets with the start token before them and the end token behind them."""
    for text in texts:
        source = tokenizer.encode(text.source or "").ids[: encoder.max_source_length]
        ids = [encoder.start_token_id, *tokenizer.encode(text.text, add_special_tokens=False).ids, *eos]
        window = ids[: min(length, left)]
        if len(window) < _SHORTEST or not source:
            continue
        left -= len(window)
        yield Probe(tuple(window), tuple(source))
