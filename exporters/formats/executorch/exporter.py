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

from skipstone.bundle import ExecuTorchManifest, MethodEntry, ProgramEntry, Quantization, hash_file
from skipstone.errors import ExportError, UsageError
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
    read_text,
)
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.executorch.calibration import calibrated
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
from skipstone.runtimes.engines.executorch.program import check_header, load_runtime
from skipstone.runtimes.quiet import quiet_libraries

PROGRAM_FILE = "model.pte"
MAX_WIDTH = 64
_DEFAULT_CONTEXT = 512
_EXACT_TOLERANCE = 1e-4
_DEFAULT_TARGET = "xnnpack"
_MIN_CALIBRATION = 64


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
    quantize = options.quantize or "8da4w"
    scheme_of(quantize)  # an unknown one stops here
    tokenizer = load_tokenizer(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, 64.0)
    config: Any = checkpoint.config
    limit = _context_limit(config)
    context = min(limit, _DEFAULT_CONTEXT) if options.context_length is None else options.context_length
    if not MAX_WIDTH <= context <= limit:
        raise UsageError(f"--context-length {context}: this model takes {MAX_WIDTH} to {limit}")
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights)
    mix = parse_mix(quantize, options.mix, facts.num_layers)
    target = target_of(options.target or _DEFAULT_TARGET, mix)
    calibration = _calibration(mix, options, tokenizer)
    wanted = recorded_exits(checkpoint.path, config) if options.exits is None else options.exits
    exits = check_exits(default_exits(facts.num_layers) if wanted is None else wanted, facts.num_layers)
    material = DraftMaterial.find(checkpoint.path, options.draft_text, tokenizer)
    draft_tokens = material.choose_tokens(facts, options.draft_vocab_size) if exits else None
    source_sha256 = hash_checkpoint(checkpoint)
    shape = Shape(facts.hidden_size, context, MAX_WIDTH)
    parts = _cut(checkpoint.path, exits, draft_tokens, shape.slots)
    sizes = _weight_bytes(parts, mix)
    ingredients = {
        "source": source_sha256,
        "scheme": quantize,
        "mix": mix.names,
        "calibration": None if calibration is None else calibration.sha256,
        "shape": shape,
        "exits": exits,
        "draft_tokens": None if draft_tokens is None else draft_tokens.tolist(),
        "target": target.name,
    }
    make = partial(_lower, parts, mix, shape, calibration, target, step=step)
    delegated = _program(ingredients, make, folder / PROGRAM_FILE)
    runs_here = _runs_here(folder / PROGRAM_FILE, target, set(delegated))
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
                target=target.name,
                status="runs" if runs_here else "compiled",
                slots=shape.slots,
                max_width=shape.max_width,
                draft_vocabulary=vocabulary,
                methods=tuple(
                    MethodEntry(name=name, weight_bytes=sizes.get(name, 0), delegated=share)
                    for name, share in delegated.items()
                ),
            ),
        ),
        draft_table=draft_table,
        quantization=Quantization(
            scheme=mix.scheme.name,
            mix=mix.names,
            calibration_sha256=None if calibration is None else calibration.sha256,
            bits_per_weight=8 * (folder / PROGRAM_FILE).stat().st_size / weights,
        ),
        files=(PROGRAM_FILE, *extra, TOKENIZER_FILE),
        oracle=_oracle(checkpoint.path, calibration, scratch),
        probe=probe_tokens(tokenizer, facts.vocab_size, context),
        reference=checkpoint.path,
        min_agreement=mix.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if mix.exact else None,
        source_sha256=source_sha256,
        engine=f"executorch {importlib.metadata.version('executorch')}",
        runs_here=runs_here,
    )


@dataclass(frozen=True)
class Calibration:
    """Text that fixes activations' scales: token ids int64 [n], and the hash of the file they are from."""

    tokens: NDArray[np.int64]
    sha256: str

    def save(self, folder: Path) -> Path:
        """Write the token ids for another process."""
        file = folder / "calibration.npy"
        np.save(file, self.tokens)
        return file


def _calibration(mix: Mix, options: ExportOptions, tokenizer: Tokenizer) -> Calibration | None:
    """The user's calibration text where the scheme wants one."""
    if mix.scheme.activations != "static":
        if options.calibration is not None:
            raise UsageError(
                f"--calibration {options.calibration}: --quantize {mix.scheme.name} needs none",
                hint="leave it out, or use --quantize int8",
            )
        return None
    if options.calibration is None:
        raise UsageError(
            f"--quantize {mix.scheme.name}: needs a calibration text", hint="pass --calibration TEXT-FILE"
        )
    tokens = tokenizer.encode(read_text(options.calibration, "--calibration"), add_special_tokens=False).ids
    if len(tokens) < _MIN_CALIBRATION:
        raise UsageError(
            f"--calibration {options.calibration}: {len(tokens)} tokens, at least {_MIN_CALIBRATION} are needed"
        )
    return Calibration(np.array(tokens, np.int64), hash_file(options.calibration))


def _program(
    ingredients: dict[str, Any], make: Callable[[Path], dict[str, float]], output: Path
) -> dict[str, float]:
    """Write the program, lowered now or before; by method, the share of its nodes that is delegated."""
    libraries = ("executorch", "torch", "torchao", "transformers")
    key = cache_key(**ingredients, versions=[importlib.metadata.version(name) for name in libraries])
    found = fetch(key, output)
    if found is not None:
        return found
    delegated = make(output)
    keep(key, output, delegated)
    return delegated


def _lower(
    parts: Parts,
    mix: Mix,
    shape: Shape,
    calibration: Calibration | None,
    target: Target,
    output: Path,
    step: Callable[[str], None],
) -> dict[str, float]:
    step("quantise")
    quantize_parts(parts, mix)
    methods: list[Method] = list(methods_of(parts, shape))
    if calibration is not None:
        step("calibrate")
        methods = calibrated(methods, shape, calibration.tokens)
    return lower(methods, mix, target, output, step)


def _runs_here(program: Path, target: Target, methods: set[str]) -> bool:
    """Whether this machine's ExecuTorch runs the program, and the self-test can; if not, it must at least open.

    Raises:
        ExportError: it does not open, or holds other methods.
    """
    runtime = load_runtime()
    if has_target(runtime, target.name):
        return True
    check_header(program)
    with quiet_libraries():
        found = set(runtime.load_program(program).method_names)
    if found != methods:
        raise ExportError(
            f"{program.name}: lowered for {target.name}, holds the methods {', '.join(sorted(found))} instead of "
            f"{', '.join(sorted(methods))}"
        )
    return False


def _cut(folder: Path, exits: tuple[int, ...], draft_tokens: NDArray[np.int32] | None, slots: int) -> Parts:
    return cut_decoder(
        load_decoder(folder), exits, draft_tokens, lambda shape: StaticKeyValues(shape, slots), RowSegment
    )


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


def _oracle(checkpoint: Path, calibration: Calibration | None, scratch: Path) -> Oracle:
    arguments = {"checkpoint": str(checkpoint)}
    if calibration is None:
        return Oracle("skipstone.exporters.formats.executorch.oracle:EagerDecoder", arguments)
    arguments["calibration"] = str(calibration.save(scratch))
    return Oracle("skipstone.exporters.formats.executorch.oracle:CalibratedDecoder", arguments)


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
    refuse_options(options, {"imatrix": "importance matrices belong to --format gguf"})
