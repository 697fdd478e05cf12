"""How well an artefact predicts held-out text, beside the checkpoint it was made from.

    >>> measure_quality(Path("out"), "held_out.jsonl", Path("samples/models/coder")).perplexity

Measured through the engine and the session that will generate, in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import Quality, hash_file, open_bundle
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.facts import read_text
from skipstone.exporters.isolation import num_threads, run_isolated
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.session import Session

FloatArray = NDArray[np.float32]

MAX_TOKENS = 8192
_WINDOW = 512
_SHORTEST = 2


def held_out_texts(file: Path) -> tuple[str, ...]:
    """A held-out set's texts: the values of `text` of a .jsonl file, or a text file as a whole.

    Raises:
        UsageError: it cannot be read, or a line does not fit.
    """
    content = read_text(file, "--held-out")
    if file.suffix != ".jsonl":
        return (content,)
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return tuple(_text(line, file, number) for number, line in lines)


def _text(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(
            f"--held-out {file}, line {number}: no text under the key 'text'",
            hint='every line is an object like {"text": "def f(x):"}',
        )
    return text


def measure_quality(folder: Path, file: Path, checkpoint: Path | None) -> Quality:
    """Measure a bundle on a held-out set.

    Args:
        folder: the bundle, whose manifest may still be without the figures.
        file: text or .jsonl; its first 8,192 tokens count, in windows of at most 512 that start anew.
        checkpoint: what it is compared with; None: there is none.

    Raises:
        UsageError: a file that cannot be read or holds next to nothing.
        ExportError: the engine crashed.
    """
    answer = run_isolated(
        "skipstone.exporters.quality:measure",
        folder=str(folder),
        texts=list(held_out_texts(file)),
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    if not answer["tokens"]:
        raise UsageError(f"--held-out {file}: no two tokens to predict in it", hint="pass a longer text")
    return Quality(text_sha256=hash_file(file), **answer)


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


def measure(folder: str, texts: list[str], checkpoint: str | None) -> dict[str, float | None]:
    """See `measure_quality`. Called through `run_isolated`.

    Returns:
        The fields of `Quality` that are figures.
    """
    bundle = open_bundle(folder, verify_hashes=False)
    manifest = bundle.manifest
    threads = num_threads(sum(entry.size for entry in manifest.files))
    engine = open_engine(bundle, EngineOptions(threads=threads))
    tokenizer = Tokenizer.from_file(str(bundle.file(manifest.tokenizer)))
    length = min(_WINDOW, engine.max_context_length, manifest.model.context_length)
    model = None if checkpoint is None else _reference(Path(checkpoint))
    sums = _Sums()
    for window in _windows(
        tokenizer, texts, length, manifest.model.bos_token_id if manifest.model.add_bos else None
    ):
        logits = _logits(engine, window)[:-1]
        reference = None if model is None else model(window)[:-1]
        sums.add(logits, reference, np.array(window[1:], np.int64))
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


def _windows(tokenizer: Tokenizer, texts: list[str], length: int, bos: int | None) -> Iterator[list[int]]:
    """Stretches of token ids, `bos` before each, until enough tokens were seen."""
    start = [] if bos is None else [bos]
    step, left = length - len(start), MAX_TOKENS
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for first in range(0, len(ids), step):
            window = (start + ids[first : first + step])[:left]
            if len(window) < _SHORTEST:
                continue
            left -= len(window)
            yield window


def _logits(engine: Engine, tokens: list[int]) -> FloatArray:
    """Logits [n, vocab_size] of the artefact."""
    found: list[FloatArray] = []
    with Session(engine, len(tokens)) as session:
        width = min(session.max_width, _WINDOW)
        for first in range(0, len(tokens), width):
            rows = session.push(tokens[first : first + width])
            found += session.advance(rows, session.exits[-1])
            session.commit(rows[-1])
    return np.stack(found)


def _reference(checkpoint: Path) -> Callable[[list[int]], FloatArray]:
    """Token ids → logits [n, vocab_size] of the checkpoint in float32."""
    import torch

    model = load_eager(checkpoint)

    def logits(tokens: list[int]) -> FloatArray:
        return np.asarray(model(torch.tensor([tokens])).logits[0].numpy(), np.float32)

    return logits


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
