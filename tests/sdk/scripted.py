"""A bundle without weights and an engine that says what it is told: full control over tokens and drafts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from skipstone.bundle import (
    Bundle,
    CostCurve,
    DraftHeadEntry,
    EmbeddingEntry,
    EncoderFacts,
    EncoderSegmentEntry,
    GgufManifest,
    ModelFacts,
    Parity,
    Provenance,
    Quantization,
    SegmentEntry,
    describe_file,
    write_manifest,
)
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
EOS = 256
VOCAB = 257
FILES = ("segment-0.bin", "segment-1.bin", "draft-head.bin", "draft-vocabulary.i32", "tokenizer.json")


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose token i is byte i, and EOS."""
    alphabet = _byte_symbols()
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in of every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


ENCODER = EncoderFacts(num_layers=2, max_source_length=120, start_token_id=0)


def write_bundle(folder: Path, *, context_length: int = 512, encoder: EncoderFacts | None = None) -> Bundle:
    """A bundle with a right manifest; its artefacts hold a few bytes each. With an encoder sources end with EOS."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    if encoder is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", EOS)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = FILES if encoder is None else ("encoder-0.bin", *FILES)
    for index, name in enumerate(names[:-1]):
        (folder / name).write_bytes(bytes(range(16 + index)))
    encoders = (
        () if encoder is None else (EncoderSegmentEntry(first=0, stop=encoder.num_layers, file=names[0]),)
    )
    manifest = GgufManifest(
        format="gguf",
        device="cpu",
        model=ModelFacts(
            name="scripted",
            architecture="Scripted",
            hidden_size=1,
            num_layers=2,
            vocab_size=VOCAB,
            context_length=context_length,
            parameters=0,
            eos_token_ids=(EOS,),
            encoder=encoder,
        ),
        exits=(1,),
        segments=(
            SegmentEntry(first=0, stop=1, file=FILES[0], output="nextn"),
            SegmentEntry(first=1, stop=2, file=FILES[1], output="logits"),
        ),
        encoder_segments=encoders,
        embedding=EmbeddingEntry(file=FILES[1], offset=0, rows=1, columns=1, type="F32"),
        draft_head=DraftHeadEntry(file=FILES[2], vocabulary=FILES[3], rows=1),
        quantization=Quantization(scheme="f32"),
        parity=Parity(
            reference=None,
            reference_tolerance=None,
            split=0.0,
            split_tolerance=0.0,
            draft_verify=0.0,
            width_noise=0.0,
            near_tie_margin=1e-4,
        ),
        files=tuple(describe_file(folder, name) for name in names),
        provenance=Provenance(source="test", tool="test", engine="test", created="2026-01-01"),
    )
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


# Costs at which long drafts by the early exit pay: the second segment is dear and does not mind the width.
CHEAP_DRAFTS = CostCurve(
    widths=(1, 32),
    segments=((1e-3, 1e-3), (2e-2, 2e-2)),
    draft_head=(1e-4, 1e-4),
    threads=1,
    machine="made up",
)


class ScriptedEngine:
    """See `skipstone.runtimes.engines.base.Engine`: after position i comes script[i + 1], whatever came.

    Args:
        script: prompt and what is to follow; after its end comes EOS.
        misses: positions at which the early exit says something else.
    """

    encoder: EncoderFacts | None = None
    hidden_size, vocab_size, exits, threads = 1, VOCAB, (1, 2), 1

    def __init__(
        self, script: Sequence[int], misses: Sequence[int] = (), *, max_context_length: int = 512
    ) -> None:
        self.script, self.misses = list(script), frozenset(misses)
        self.max_context_length = max_context_length
        self.draft_vocabulary = np.arange(VOCAB, dtype=np.int32)

    def open_cache(self, context_length: int, tree: RowTree) -> "ScriptedCache":
        return ScriptedCache(self, context_length, tree)

    def close(self) -> None:
        return None

    def logits(self, position: int, *, draft: bool) -> FloatArray:
        """Logits [vocabulary] after a position."""
        following = self.script[position + 1] if position + 1 < len(self.script) else EOS
        if draft and position in self.misses:
            following = (following + 1) % 256
        out = np.full(VOCAB, -4.0, np.float32)
        out[following] = 8.0
        return out


class ScriptedCache:
    """See `skipstone.runtimes.engines.base.Cache`; a hidden state is the row's position."""

    max_width, max_branches = 64, 64

    def __init__(self, engine: ScriptedEngine, context_length: int, tree: RowTree) -> None:
        self.engine, self.context_length, self.tree = engine, context_length, tree

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return np.zeros((len(tokens), 1), np.float32)

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        positions = [self.tree.base + self.tree.depths[row] for row in rows]
        if segment == 0:
            return np.array(positions, np.float32)[:, None]
        assert [int(state[0]) for state in hidden] == positions
        kept = [self.engine.logits(p, draft=False) for p, keep in zip(positions, wanted, strict=True) if keep]
        return np.stack(kept) if kept else np.empty((0, VOCAB), np.float32)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        return np.stack([self.engine.logits(int(state[0]), draft=True) for state in hidden])

    def commit(self, path: Sequence[int]) -> None:
        return None

    def rewind(self, length: int) -> None:
        return None

    def close(self) -> None:
        return None


class ScriptedTranslator(ScriptedEngine):
    """An encoder-decoder that answers any source with `answer`, whatever its decoder is given.

    Args:
        answer: from the source's bytes to those of its output.
    """

    encoder = ENCODER

    def __init__(self, answer: Callable[[bytes], bytes], *, max_context_length: int = 512) -> None:
        super().__init__((), max_context_length=max_context_length)
        self.answer = answer
        self.sources: list[bytes] = []

    def open_cache(self, context_length: int, tree: RowTree) -> "ScriptedSourceCache":
        return ScriptedSourceCache(self, context_length, tree)


class ScriptedSourceCache(ScriptedCache):
    """See `skipstone.runtimes.engines.base.SourceCache`; the engine notes every source."""

    def __init__(self, engine: ScriptedTranslator, context_length: int, tree: RowTree) -> None:
        super().__init__(engine, context_length, tree)
        self.translator = engine

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        read = bytes(token for token in source if token != EOS)
        self.translator.sources.append(read)
        self.engine = ScriptedEngine([ENCODER.start_token_id, *self.translator.answer(read), EOS])
        return ENCODER.num_layers
