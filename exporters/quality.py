"""How well an artefact predicts held-out text, beside the checkpoint it was made from.

    >>> measure_quality(Path("out"), "held_out.jsonl", Path("samples/models/coder")).perplexity

Measured through the engine and the session that will generate, in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import EncoderFacts, ModelFacts, Quality, hash_file, open_bundle, read_manifest
from skipstone.errors import UsageError
from skipstone.exporters.facts import read_text
from skipstone.exporters.isolation import num_threads, run_isolated
from skipstone.exporters.probe import Probe
from skipstone.exporters.reference import EagerReference
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.session import Session

FloatArray = NDArray[np.float32]

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
    texts = held_out_texts(file)
    check_kind(file, texts, encodes=read_manifest(folder).model.encoder is not None)
    answer = run_isolated(
        "skipstone.exporters.quality:measure",
        folder=str(folder),
        texts=[asdict(text) for text in texts],
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    if not answer["tokens"]:
        raise UsageError(f"--held-out {file}: no two tokens to predict in it", hint="pass a longer text")
    return Quality(text_sha256=hash_file(file), **answer)


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


@dataclass
class _Sums:
    """Sums over predicted tokens."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, logits: FloatArray, reference: FloatArray | None, following: NDArray[np.int64]) -> None:
        """Take in a window: logits [n, vocab_size], and the token that follows each [n]."""
        places = np.arange(len(following))
        found = _log_softmax(logits)
        self.tokens += len(following)
        self.loss -= float(found[places, following].sum())
        if reference is not None:
            expected = _log_softmax(reference)
            self.reference_loss -= float(expected[places, following].sum())
            self.divergence += float((np.exp(expected) * (expected - found)).sum())
            self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())


def measure(
    folder: str, texts: list[dict[str, str | None]], checkpoint: str | None
) -> dict[str, float | None]:
    """See `measure_quality`. Called through `run_isolated`.

    Returns:
        The fields of `Quality` that are figures.
    """
    bundle = open_bundle(folder, verify_hashes=False)
    manifest = bundle.manifest
    threads = num_threads(sum(entry.size for entry in manifest.files))
    engine = open_engine(bundle, EngineOptions(threads=threads))
    tokenizer = Tokenizer.from_file(str(bundle.file(manifest.tokenizer)))
    facts = manifest.model
    length = min(_WINDOW, engine.max_context_length, facts.context_length)
    model = None if checkpoint is None else EagerReference(Path(checkpoint))
    sums = _Sums()
    given = [HeldOut(str(text["text"]), text["source"]) for text in texts]
    for window in probes(tokenizer, given, facts, length, MAX_TOKENS):
        logits = _logits(engine, window)[:-1]
        reference = None if model is None else model.logits(window.tokens, window.source)[:-1]
        sums.add(logits, reference, np.array(window.tokens[1:], np.int64))
    engine.close()
    count = max(sums.tokens, 1)
    compared = checkpoint is not None
    return {
        "tokens": sums.tokens,
        "perplexity": float(np.exp(sums.loss / count)),
        "reference_perplexity": float(np.exp(sums.reference_loss / count)) if compared else None,
        "kl_divergence": sums.divergence / count if compared else None,
        "agreement": sums.agreed / count if compared else None,
    }


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


def _logits(engine: Engine, window: Probe) -> FloatArray:
    """Logits [n, vocab_size] of the artefact."""
    found: list[FloatArray] = []
    tokens = window.tokens
    with Session(engine, len(tokens)) as session:
        if window.source:
            session.encode(window.source)
        width = min(session.max_width, _WINDOW)
        for first in range(0, len(tokens), width):
            rows = session.push(tokens[first : first + width])
            found += session.advance(rows, session.exits[-1])
            session.commit(rows[-1])
    return np.stack(found)


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
