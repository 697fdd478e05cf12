"""The ExecuTorch exporter: the checkpoint's own layers, cut, quantised and lowered into one program.

checkpoint ─ cut ─▶ embedding, segments, heads ─ quantise ─▶ … ─ trace, lower ─▶ model.pte
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from skipstone.bundle import (
    PROGRAM_INTERFACE,
    SOURCE_PROGRAM_INTERFACE,
    ExecuTorchManifest,
    MethodEntry,
    ProgramEntry,
    Quantization,
)
from skipstone.errors import ExportError
from skipstone.exporters.compress.work import FixedCodes
from skipstone.exporters.encoder_decoder import Cuts, Limits
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.executorch.calibration_text import CalibrationText, read_calibration
from skipstone.exporters.formats.executorch.codes import mix_of_codes
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
from skipstone.exporters.reading import Reading, Room, read_checkpoint, refuse_gguf
from skipstone.runtimes.engines.executorch.backends import has_target
from skipstone.runtimes.engines.executorch.program import method_names

PROGRAM_FILE = "model.pte"
MAX_WIDTH = 64
_DEFAULT_CONTEXT = 512
_EXACT_TOLERANCE = 1e-4
_CARRIED_AGREEMENT = 0.8  # with weights equal to the reference's, where activations alone are rounded
_DEFAULT_TARGET = "xnnpack"
_ORACLES = "skipstone.exporters.formats.executorch"
_NOT_HERE = {
    "imatrix": "importance matrices belong to --format gguf",
    "widths": "its methods take any number of rows",
    "share_weights": "its weights lie in the file once",
}


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked: a program's ingredients."""

    reading: Reading
    mix: Mix
    target: Target
    calibration: CalibrationText | None
    codes: FixedCodes | None

    @property
    def shape(self) -> Shape:
        """What the program can hold."""
        facts = self.reading.facts
        return Shape(facts.hidden_size, facts.context_length, MAX_WIDTH)

    @property
    def interface(self) -> int:
        """What the methods mean."""
        return PROGRAM_INTERFACE if self.reading.facts.encoder is None else SOURCE_PROGRAM_INTERFACE

    @property
    def cache_key(self) -> str:
        """See `program_cache.cache_key`."""
        libraries = ("executorch", "torch", "torchao", "transformers")
        reading = self.reading
        encoder, draft_tokens = reading.facts.encoder, reading.draft_tokens
        encoding = {} if encoder is None else {"encoder": encoder.model_dump(), "code": code_hash()}
        return cache_key(
            source=reading.sha256,
            scheme=self.mix.scheme.name,
            mix=self.mix.names,
            calibration=None if self.calibration is None else self.calibration.sha256,
            codes=None if self.codes is None else self.codes.sha256,
            shape=self.shape,
            exits=reading.exits,
            draft_tokens=None if draft_tokens is None else draft_tokens.tolist(),
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
    reading, beside = request.reading, request.reading.write_side_files(folder)
    program = ProgramEntry(
        file=PROGRAM_FILE,
        interface=request.interface,
        target=request.target.name,
        status="runs" if runs_here else "compiled",
        slots=request.shape.slots,
        max_width=request.shape.max_width,
        draft_vocabulary=beside.vocabulary,
        methods=methods,
    )
    mix, calibration, codes = request.mix, request.calibration, request.codes
    return Artefacts(
        model=reading.facts,
        exits=reading.exits,
        manifest=partial(ExecuTorchManifest, program=program),
        draft_table=beside.draft_table,
        quantization=Quantization(
            scheme=mix.scheme.name,
            mix=mix.names,
            calibration_sha256=None if calibration is None else calibration.sha256,
            codes_sha256=None if codes is None else codes.sha256,
            bits_per_weight=8 * (folder / PROGRAM_FILE).stat().st_size / reading.num_weights,
        ),
        files=(PROGRAM_FILE, *beside.names),
        oracle=_oracle(request, scratch),
        probe=probe_of(reading.tokenizer, reading.facts),
        reference=reading.checkpoint.path,
        min_agreement=mix.min_agreement if codes is None else _CARRIED_AGREEMENT,
        reference_tolerance=_EXACT_TOLERANCE if mix.exact else None,
        source_sha256=reading.sha256,
        engine=f"executorch {importlib.metadata.version('executorch')}",
        runs_here=runs_here,
    )


def _check(source: str, options: ExportOptions, scratch: Path) -> _Request:
    """Read the input and refuse what cannot work, before anything is made."""
    refuse_gguf(source, "executorch")
    refuse_options(options, _NOT_HERE)
    quantize = options.quantize or "8da4w"
    scheme_of(quantize)  # an unknown one stops here
    reading = read_checkpoint(source, options, scratch, Room(_DEFAULT_CONTEXT, MAX_WIDTH))
    if options.codes is None:
        mix = parse_mix(quantize, options.mix, reading.facts.num_layers)
    else:
        mix = mix_of_codes(options.codes, reading.checkpoint.tensor_files)
    target = target_of(options.target or _DEFAULT_TARGET, mix)
    if reading.facts.encoder is not None:
        target = suited(target, mix)
    calibration = read_calibration(mix.scheme, options.calibration, reading.tokenizer)
    return _Request(reading, mix, target, calibration, options.codes)


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
    reading, shape = request.reading, request.shape
    folder, exits, encoder = reading.checkpoint.path, reading.exits, reading.facts.encoder
    if encoder is None:
        return DecoderProgram(folder, exits, reading.draft_tokens, shape, request.calibration, request.codes)
    limits = Limits(encoder.max_source_length, shape.slots)
    parts = cut_for_slots(folder, Cuts(exits, encoder.exits), limits, reading.draft_tokens)
    return SourceProgram(parts, shape, limits.source, reading.draft_tokens, request.codes)


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
    arguments = {"checkpoint": str(request.reading.checkpoint.path)}
    if request.reading.facts.encoder is not None:
        return Oracle(f"{_ORACLES}.source_oracle:EagerEncoderDecoder", arguments)
    if request.calibration is None:
        return Oracle(f"{_ORACLES}.oracle:EagerDecoder", arguments)
    arguments["calibration"] = str(request.calibration.save(scratch))
    return Oracle(f"{_ORACLES}.oracle:CalibratedDecoder", arguments)
