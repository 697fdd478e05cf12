"""The ExecuTorch exporter: the checkpoint's own layers, cut, quantised and lowered into one program.

checkpoint ─ cut ─▶ embedding, segments, heads ─ quantise ─▶ … ─ trace, lower ─▶ model.pte
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import (
    PROGRAM_INTERFACE,
    ExecuTorchManifest,
    MethodEntry,
    ModelFacts,
    ProgramEntry,
    Quantization,
)
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
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
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.executorch.calibration import calibrated
from skipstone.exporters.formats.executorch.calibration_text import CalibrationText, read_calibration
from skipstone.exporters.formats.executorch.lowering import lower
from skipstone.exporters.formats.executorch.methods import Method, Shape, methods_of
from skipstone.exporters.formats.executorch.modules import RowSegment, StaticKeyValues
from skipstone.exporters.formats.executorch.program_cache import cache_key, fetch, keep
from skipstone.exporters.formats.executorch.schemes import (
    Mix,
    parse_mix,
    quantize_parts,
    scheme_of,
    weight_bytes,
)
from skipstone.exporters.formats.executorch.targets import Target, target_of
from skipstone.exporters.probe import probe_tokens
from skipstone.exporters.segments import Parts, cut_decoder, load_decoder
from skipstone.runtimes.engines.executorch.backends import has_target
from skipstone.runtimes.engines.executorch.program import method_names

PROGRAM_FILE = "model.pte"
MAX_WIDTH = 64
_DEFAULT_CONTEXT = 512
_EXACT_TOLERANCE = 1e-4
_DEFAULT_TARGET = "xnnpack"


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked: a program's ingredients."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    facts: ModelFacts
    num_weights: int
    mix: Mix
    target: Target
    calibration: CalibrationText | None
    exits: tuple[int, ...]
    material: DraftMaterial
    draft_tokens: NDArray[np.int32] | None
    shape: Shape
    source_sha256: str

    @property
    def cache_key(self) -> str:
        """See `program_cache.cache_key`."""
        libraries = ("executorch", "torch", "torchao", "transformers")
        return cache_key(
            source=self.source_sha256,
            scheme=self.mix.scheme.name,
            mix=self.mix.names,
            calibration=None if self.calibration is None else self.calibration.sha256,
            shape=self.shape,
            exits=self.exits,
            draft_tokens=None if self.draft_tokens is None else self.draft_tokens.tolist(),
            target=self.target.name,
            versions=[importlib.metadata.version(name) for name in libraries],
        )


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
    request = _check(source, options, scratch)
    methods = _write_program(request, folder / PROGRAM_FILE, step)
    runs_here = _runs_here(folder / PROGRAM_FILE, request.target, {method.name for method in methods})
    vocabulary = None if request.draft_tokens is None else write_vocabulary(request.draft_tokens, folder)
    draft_table = request.material.write_table(request.facts, folder)
    request.tokenizer.save(str(folder / TOKENIZER_FILE))
    extra = [name for name in (vocabulary, draft_table) if name is not None]
    program = ProgramEntry(
        file=PROGRAM_FILE,
        interface=PROGRAM_INTERFACE,
        target=request.target.name,
        status="runs" if runs_here else "compiled",
        slots=request.shape.slots,
        max_width=request.shape.max_width,
        draft_vocabulary=vocabulary,
        methods=methods,
    )
    mix, calibration, checkpoint = request.mix, request.calibration, request.checkpoint
    return Artefacts(
        model=request.facts,
        exits=request.exits,
        manifest=partial(ExecuTorchManifest, program=program),
        draft_table=draft_table,
        quantization=Quantization(
            scheme=mix.scheme.name,
            mix=mix.names,
            calibration_sha256=None if calibration is None else calibration.sha256,
            bits_per_weight=8 * (folder / PROGRAM_FILE).stat().st_size / request.num_weights,
        ),
        files=(PROGRAM_FILE, *extra, TOKENIZER_FILE),
        oracle=_oracle(checkpoint.path, calibration, scratch),
        probe=probe_tokens(request.tokenizer, request.facts.vocab_size, request.facts.context_length),
        reference=checkpoint.path,
        min_agreement=mix.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if mix.exact else None,
        source_sha256=request.source_sha256,
        engine=f"executorch {importlib.metadata.version('executorch')}",
        runs_here=runs_here,
    )


def _check(source: str, options: ExportOptions, scratch: Path) -> _Request:
    """Read the input and refuse what cannot work, before anything is made."""
    _refuse_gguf_options(source, options)
    checkpoint = open_checkpoint(source)
    quantize = options.quantize or "8da4w"
    scheme_of(quantize)  # an unknown one stops here
    tokenizer = load_tokenizer(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, 64.0)
    context = _context_length(checkpoint.config, options.context_length)
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights)
    mix = parse_mix(quantize, options.mix, facts.num_layers)
    target = target_of(options.target or _DEFAULT_TARGET, mix)
    wanted = recorded_exits(checkpoint.path, checkpoint.config) if options.exits is None else options.exits
    exits = check_exits(default_exits(facts.num_layers) if wanted is None else wanted, facts.num_layers)
    material = DraftMaterial.find(checkpoint.path, options.draft_text, tokenizer)
    return _Request(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        facts=facts,
        num_weights=weights,
        mix=mix,
        target=target,
        calibration=read_calibration(mix.scheme, options.calibration, tokenizer),
        exits=exits,
        material=material,
        draft_tokens=material.choose_tokens(facts, options.draft_vocab_size) if exits else None,
        shape=Shape(facts.hidden_size, context, MAX_WIDTH),
        source_sha256=hash_checkpoint(checkpoint),
    )


def _write_program(request: _Request, output: Path, step: Callable[[str], None]) -> tuple[MethodEntry, ...]:
    """Write the program, lowered now or before; its methods."""
    slots = request.shape.slots
    parts = cut_decoder(
        load_decoder(request.checkpoint.path),
        request.exits,
        request.draft_tokens,
        lambda shape: StaticKeyValues(shape, slots),
        RowSegment,
    )
    sizes, key = _weight_bytes(parts, request.mix), request.cache_key
    delegated = fetch(key, output)
    if delegated is None:
        delegated = _lower(request, parts, output, step)
        keep(key, output, delegated)
    return tuple(
        MethodEntry(name=name, weight_bytes=sizes.get(name, 0), delegated=share)
        for name, share in delegated.items()
    )


def _lower(request: _Request, parts: Parts, output: Path, step: Callable[[str], None]) -> dict[str, float]:
    """Write the program; by method, the share of its nodes that is delegated."""
    step("quantise")
    quantize_parts(parts, request.mix)
    methods: list[Method] = list(methods_of(parts, request.shape))
    if request.calibration is not None:
        step("calibrate")
        methods = calibrated(methods, request.shape, request.calibration.tokens)
    return lower(methods, request.mix, request.target, output, step)


def _runs_here(program: Path, target: Target, methods: set[str]) -> bool:
    """Whether this machine's ExecuTorch runs the program, and the self-test can; if not, it must at least open.

    Raises:
        ExportError: it does not open, or holds other methods.
    """
    if has_target(target.name):
        return True
    found = method_names(program)
    if found != methods:
        raise ExportError(
            f"{program.name}: lowered for {target.name}, holds the methods {', '.join(sorted(found))} instead of "
            f"{', '.join(sorted(methods))}"
        )
    return False


def _weight_bytes(parts: Parts, mix: Mix) -> dict[str, int]:
    """By method, bytes of weights that a call reads: all of its own, but for the embedding's one row."""
    sizes = {
        f"segment_{index}": sum(weight_bytes(layer, mix.of(part)) for part, layer in segment.layers.items())
        for index, segment in enumerate(parts.segments)
    }
    sizes["head"] = weight_bytes(parts.head, mix.of("head"))
    if parts.draft_head is not None:
        sizes["draft_head"] = weight_bytes(parts.draft_head, mix.of("head"))
    return sizes


def _oracle(checkpoint: Path, calibration: CalibrationText | None, scratch: Path) -> Oracle:
    arguments = {"checkpoint": str(checkpoint)}
    if calibration is None:
        return Oracle("skipstone.exporters.formats.executorch.oracle:EagerDecoder", arguments)
    arguments["calibration"] = str(calibration.save(scratch))
    return Oracle("skipstone.exporters.formats.executorch.oracle:CalibratedDecoder", arguments)


def _context_length(config: Any, wanted: int | None) -> int:
    """Positions to plan K/V for: within what the model was trained for, and a sliding window that sees all of them.

    Raises:
        UsageError: the model does not take so many, or they are fewer than the widest batch.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    limit = int(min(config.max_position_embeddings, window or config.max_position_embeddings))
    context = min(limit, _DEFAULT_CONTEXT) if wanted is None else wanted
    if not MAX_WIDTH <= context <= limit:
        raise UsageError(f"--context-length {context}: this model takes {MAX_WIDTH} to {limit}")
    return context


def _refuse_gguf_options(source: str, options: ExportOptions) -> None:
    if source.endswith(".gguf"):
        raise UsageError(
            f"{source}: --format executorch starts from a checkpoint",
            hint="pass the Hugging Face folder, or use --format gguf",
        )
    refuse_options(options, {"imatrix": "importance matrices belong to --format gguf"})
