"""The ExecuTorch exporter: the checkpoint's own layers, cut, quantised and lowered into one program.

checkpoint ─ cut ─▶ embedding, segments, heads ─ quantise ─▶ … ─ trace, lower ─▶ model.pte
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import ExecuTorchManifest, MethodEntry, ProgramEntry, Quantization
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.draft_material import DraftMaterial, write_vocabulary
from skipstone.exporters.exits import check_exits, default_exits, recorded_exits
from skipstone.exporters.facts import (
    TOKENIZER_FILE,
    check_disk_space,
    checkpoint_facts,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
)
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle
from skipstone.exporters.formats.executorch.lowering import Shape, cache_key, fetch, keep, lower
from skipstone.exporters.formats.executorch.modules import RowSegment, StaticKeyValues
from skipstone.exporters.formats.executorch.schemes import Scheme, quantize, scheme_of, weight_bytes
from skipstone.exporters.probe import probe_tokens
from skipstone.exporters.segments import Parts, cut_decoder, load_decoder

PROGRAM_FILE = "model.pte"
MAX_WIDTH = 64
_DEFAULT_CONTEXT = 512
_EXACT_TOLERANCE = 1e-4
_TARGET = "xnnpack"


def export_executorch(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write an ExecuTorch bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input or the format.
        ExportError: not enough disk space, or ExecuTorch cannot lower the model.
    """
    step("read")
    _refuse_gguf_options(source, options)
    checkpoint = open_checkpoint(source)
    scheme = scheme_of(options.quantize or "8da4w")
    tokenizer = load_tokenizer(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, 64.0)
    config: Any = checkpoint.config
    limit = _context_limit(config)
    context = min(limit, _DEFAULT_CONTEXT) if options.context_length is None else options.context_length
    if not MAX_WIDTH <= context <= limit:
        raise UsageError(f"--context-length {context}: this model takes {MAX_WIDTH} to {limit}")
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights)
    wanted = recorded_exits(checkpoint.path, config) if options.exits is None else options.exits
    exits = check_exits(default_exits(facts.num_layers) if wanted is None else wanted, facts.num_layers)
    material = DraftMaterial.find(checkpoint.path, options.draft_text, tokenizer)
    draft_tokens = material.choose_tokens(facts, options.draft_vocab_size) if exits else None
    source_sha256 = hash_checkpoint(checkpoint)
    shape = Shape(facts.hidden_size, context + scheme.reference_width - 1, MAX_WIDTH)
    parts = _cut(checkpoint.path, exits, draft_tokens, shape.slots)
    sizes = {name: weight_bytes(module, scheme) for name, module in _weighty(parts)}
    delegated = _program(
        parts, scheme, shape, source_sha256, exits, draft_tokens, folder / PROGRAM_FILE, step
    )
    vocabulary = None if draft_tokens is None else write_vocabulary(draft_tokens, folder)
    draft_table = material.write_table(facts, folder)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    extra = [name for name in (vocabulary, draft_table) if name is not None]
    return Artefacts(
        model=facts,
        exits=exits,
        manifest=partial(
            ExecuTorchManifest,
            program=ProgramEntry(
                file=PROGRAM_FILE,
                target=_TARGET,
                slots=shape.slots,
                max_width=shape.max_width,
                reference_width=scheme.reference_width,
                draft_vocabulary=vocabulary,
                methods=tuple(
                    MethodEntry(name=name, weight_bytes=sizes.get(name, 0), delegated=share)
                    for name, share in delegated.items()
                ),
            ),
        ),
        draft_table=draft_table,
        quantization=Quantization(
            scheme=scheme.name, bits_per_weight=8 * (folder / PROGRAM_FILE).stat().st_size / weights
        ),
        files=(PROGRAM_FILE, *extra, TOKENIZER_FILE),
        oracle=Oracle(
            "skipstone.exporters.formats.executorch.oracle:EagerDecoder", {"checkpoint": str(checkpoint.path)}
        ),
        probe=probe_tokens(tokenizer, facts.vocab_size, context),
        reference=checkpoint.path,
        min_agreement=scheme.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if scheme.weight is None else None,
        source_sha256=source_sha256,
        engine=f"executorch {importlib.metadata.version('executorch')}",
    )


def _program(
    parts: Parts,
    scheme: Scheme,
    shape: Shape,
    source_sha256: str,
    exits: tuple[int, ...],
    draft_tokens: NDArray[np.int32] | None,
    output: Path,
    step: Callable[[str], None],
) -> dict[str, float]:
    """Write the program, lowered now or before; by method, the share of its nodes that is delegated."""
    key = cache_key(
        source=source_sha256,
        scheme=scheme.name,
        shape=shape,
        exits=exits,
        draft_tokens=None if draft_tokens is None else draft_tokens.tolist(),
        target=_TARGET,
        versions=[
            importlib.metadata.version(name) for name in ("executorch", "torch", "torchao", "transformers")
        ],
    )
    found = fetch(key, output)
    if found is not None:
        return found
    step("quantise")
    for _, module in _weighty(parts):
        quantize(module, scheme)
    quantize(parts.embedding, scheme)
    delegated = lower(parts, shape, _TARGET, scheme.weight is not None, output, step)
    keep(key, output, delegated)
    return delegated


def _cut(folder: Path, exits: tuple[int, ...], draft_tokens: NDArray[np.int32] | None, slots: int) -> Parts:
    return cut_decoder(
        load_decoder(folder), exits, draft_tokens, lambda shape: StaticKeyValues(shape, slots), RowSegment
    )


def _weighty(parts: Parts) -> list[tuple[str, Any]]:
    """The methods whose calls read all their weights, with their modules."""
    segments = [(f"segment_{index}", segment) for index, segment in enumerate(parts.segments)]
    draft = [] if parts.draft_head is None else [("draft_head", parts.draft_head)]
    return [*segments, ("head", parts.head), *draft]


def _context_limit(config: Any) -> int:
    """Positions the model was trained for; within a sliding window every row sees all others."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _refuse_gguf_options(source: str, options: ExportOptions) -> None:
    if source.endswith(".gguf"):
        raise UsageError(
            f"{source}: --format executorch starts from a checkpoint",
            hint="pass the Hugging Face folder, or use --format gguf",
        )
    if options.imatrix is not None:
        raise UsageError(
            f"--imatrix {options.imatrix}: importance matrices belong to --format gguf", hint="leave it out"
        )
