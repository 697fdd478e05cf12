"""What an encoder-decoder writes, greedily, and how far that is from what it should write.

>>> measure_corrections(Path("out"), sources, targets).character_error_rate
0.011
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from skipstone.bundle import MANIFEST_NAME, ModelFacts, read_manifest
from skipstone.exporters.evaluation.measure import open_artefact
from skipstone.exporters.isolation import run_isolated
from skipstone.exporters.quality import longest_window
from skipstone.exporters.tune.correction import CorrectionFigures, score
from skipstone.runtimes.session import Session


def measure_corrections(
    model: Path,
    sources: Sequence[str],
    targets: Sequence[str],
    threads: int | None = None,
    kv_type: str | None = None,
) -> CorrectionFigures:
    """The figures of what a bundle, in a process of its own, or a checkpoint makes of `sources`.

    Raises:
        ExportError: the engine crashed.
        EngineError: it refused.
    """
    if not (model / MANIFEST_NAME).is_file():
        return score(sources, write(str(model), list(sources)), targets)
    written = run_isolated(
        "skipstone.exporters.evaluation.corrections:write",
        model=str(model),
        sources=list(sources),
        threads=threads,
        kv_type=kv_type,
    )
    return score(sources, written, targets)


def write(
    model: str, sources: list[str], threads: int | None = None, kv_type: str | None = None
) -> list[str]:
    """What a bundle, plainly decoded, or a checkpoint makes of `sources`. Called through `run_isolated`, of a bundle."""
    folder = Path(model)
    if not (folder / MANIFEST_NAME).is_file():
        return _by_torch(folder, sources)
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer))
    encoded = [tokenizer.encode(text).ids for text in sources]
    room = min(max(map(_longest_text, encoded)) + 1, longest_window(manifest))
    reader = open_artefact(folder, room, threads, kv_type)
    try:
        written = [_greedy(reader.session, manifest.model, source) for source in encoded]
    finally:
        reader.close()
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]


def _longest_text(source: Sequence[int]) -> int:
    """Tokens to write at most, as `corrections` has it in torch."""
    return len(source) + len(source) // 2 + 8


def _greedy(session: Session, facts: ModelFacts, source: Sequence[int]) -> list[int]:
    """The likeliest tokens one by one, up to the end token."""
    if facts.encoder is None:
        raise AssertionError("only an encoder-decoder has a source to write from")
    session.encode(source)
    tokens: list[int] = []
    token = int(session.prefill([facts.encoder.start_token_id]).argmax())
    while token not in facts.eos_token_ids:
        tokens.append(token)
        if len(tokens) >= _longest_text(source) or not session.room:
            break
        token = int(session.prefill([token]).argmax())
    return tokens


def _by_torch(folder: Path, sources: Sequence[str]) -> list[str]:
    from transformers import AutoTokenizer

    from skipstone.exporters.checkpoint import load_eager
    from skipstone.exporters.tune.evaluate_seq2seq import corrections

    model: Any = load_eager(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    alike: dict[int, list[int]] = {}  # a batch may write as much as its longest source allows
    for index, text in enumerate(sources):
        alike.setdefault(len(tokenizer.backend_tokenizer.encode(text).ids), []).append(index)
    written = [""] * len(sources)
    for chosen in alike.values():
        texts = corrections(model, tokenizer, [sources[index] for index in chosen])
        for index, text in zip(chosen, texts, strict=True):
            written[index] = text
    return written
