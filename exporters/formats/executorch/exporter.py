"""The ExecuTorch exporter: the checkpoint's own layers, cut, quantised and lowered into one program.

checkpoint ─ cut ─▶ embedding, segments, heads ─ quantise ─▶ … ─ trace, lower ─▶ model.pte
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import (
    PROGRAM_INTERFACE,
    SOURCE_PROGRAM_INTERFACE,
    EncoderFacts,
    ExecuTorchManifest,
    MethodEntry,
    ModelFacts,
    ProgramEntry,
    Quantization,
)
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.draft_material import DraftMaterial, write_vocabulary
from skipstone.exporters.encoder_decoder import Cuts, Limits
from skipstone.exporters.exits import check_exits, default_exits, recorded_exits
from skipstone.exporters.facts import (
    TOKENIZER_FILE,
    check_context,
    check_disk_space,
    checkpoint_facts,
    encoder_facts,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
    planned_context,
)
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.executorch.calibration_text import CalibrationText, read_calibration
from skipstone.exporters.formats.executorch.decoder_program import DecoderProgram
from skipstone.exporters.formats.executorch.lowering import lower
from skipstone.exporters.formats.executorch.methods import Method, Shape
from skipstone.exporters.formats.executorch.program_cache import cache_key, fetch, keep
from skipstone.exporters.formats.executorch.schemes import Mix, parse_mix, scheme_of
from skipstone.exporters.formats.executorch.source_program import (
    SourceProgram,
    code_hash,
    cut_for_slots,
    suited,
)
from skipstone.exporters.formats.executorch.targets import Target, target_of
from skipstone.exporters.probe import probe_of
from skipstone.runtimes.engines.executorch.backends import has_target
from skipstone.runtimes.engines.executorch.program import method_names

PROGRAM_FILE = "model.pte"
MAX_WIDTH = 64
_DEFAULT_CONTEXT = 512
_LONGEST = 2048  # of an encoder-decoder's texts, which sets no limit of its own
_EXACT_TOLERANCE = 1e-4
_DEFAULT_TARGET = "xnnpack"
_ORACLES = "skipstone.exporters.formats.executorch"


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
    def interface(self) -> int:
        """What the methods mean."""
        return PROGRAM_INTERFACE if self.facts.encoder is None else SOURCE_PROGRAM_INTERFACE

    @property
    def cache_key(self) -> str:
        """See `program_cache.cache_key`."""
        libraries = ("executorch", "torch", "torchao", "transformers")
        encoder = self.facts.encoder
        encoding = {} if encoder is None else {"encoder": encoder.model_dump(), "code": code_hash()}
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
            **encoding,
        )


class CutModel(Protocol):
    """A model, cut, on its way into a program."""

    def weight_bytes(self, mix: Mix) -> dict[str, int]:
        """By method, bytes of weights that a call reads: all of its own, but for the embedding's rows. Asked first."""

    def methods(self, mix: Mix, step: Callable[[str], None]) -> list[Method]:
        """The methods, quantised."""


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
        interface=request.interface,
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
        oracle=_oracle(request, scratch),
        probe=probe_of(request.tokenizer, request.facts),
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
    encoder = encoder_facts(checkpoint, options.encoder_exits, options.max_source_length)
    context = _context_length(checkpoint.config, options.context_length, encoder)
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights, encoder)
    mix = parse_mix(quantize, options.mix, facts.num_layers)
    target = target_of(options.target or _DEFAULT_TARGET, mix)
    if encoder is not None:
        target = suited(target, mix)
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
    model = _cut(request)
    sizes, key = model.weight_bytes(request.mix), request.cache_key
    delegated = fetch(key, output)
    if delegated is None:
        step("quantise")
        methods = model.methods(request.mix, step)
        delegated = lower(methods, request.mix, request.target, output, step)
        keep(key, output, delegated)
    return tuple(
        MethodEntry(name=name, weight_bytes=sizes.get(name, 0), delegated=share)
        for name, share in delegated.items()
    )


def _cut(request: _Request) -> CutModel:
    folder, exits, draft_tokens = request.checkpoint.path, request.exits, request.draft_tokens
    encoder, shape = request.facts.encoder, request.shape
    if encoder is None:
        return DecoderProgram(folder, exits, draft_tokens, shape, request.calibration)
    limits = Limits(encoder.max_source_length, shape.slots)
    parts = cut_for_slots(folder, Cuts(exits, encoder.exits), limits, draft_tokens)
    return SourceProgram(parts, shape, limits.source)


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


def _oracle(request: _Request, scratch: Path) -> Oracle:
    arguments = {"checkpoint": str(request.checkpoint.path)}
    if request.facts.encoder is not None:
        return Oracle(f"{_ORACLES}.source_oracle:EagerEncoderDecoder", arguments)
    if request.calibration is None:
        return Oracle(f"{_ORACLES}.oracle:EagerDecoder", arguments)
    arguments["calibration"] = str(request.calibration.save(scratch))
    return Oracle(f"{_ORACLES}.oracle:CalibratedDecoder", arguments)


def _context_length(config: Any, wanted: int | None, encoder: EncoderFacts | None) -> int:
    """Positions to plan K/V for.

    Raises:
        UsageError: the model does not take so many, or they are fewer than the widest batch; or longer sources than a
            program is planned for.
    """
    if encoder is None:
        return planned_context(config, wanted, _DEFAULT_CONTEXT, MAX_WIDTH)
    if encoder.max_source_length > _LONGEST:
        raise UsageError(
            f"--max-source-length {encoder.max_source_length}: a program takes at most {_LONGEST}",
            hint="an encoder's memory grows with the square of it; split longer texts",
        )
    return check_context(_DEFAULT_CONTEXT if wanted is None else wanted, MAX_WIDTH, _LONGEST)


def _refuse_gguf_options(source: str, options: ExportOptions) -> None:
    if source.endswith(".gguf"):
        raise UsageError(
            f"{source}: --format executorch starts from a checkpoint",
            hint="pass the Hugging Face folder, or use --format gguf",
        )
    reasons = {
        "imatrix": "importance matrices belong to --format gguf",
        "widths": "its methods take any number of rows",
        "share_weights": "its weights lie in the file once",
    }
    refuse_options(options, reasons)
