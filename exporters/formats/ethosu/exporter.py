"""The Ethos-U exporter: the checkpoint's own layers, cut, rounded to integers, and compiled for each number of rows.

checkpoint ─ cut ─▶ segments, heads ─ calibrate, round ─▶ graphs ─ TOSA, vela ─▶ programs, cycles ─ compute ─▶ bundle
                 └▶ embedding ─────────────────────────────────────────────────────────────────────▶ table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipstone.bundle import (
    EthosUManifest,
    NpuEntry,
    NpuProgramEntry,
    Quantization,
    TableEntry,
    hash_file,
    part_names,
)
from skipstone.errors import CheckpointError, ExportError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.formats import Artefacts, ExportOptions, refuse_options
from skipstone.exporters.formats.ethosu.graphs import (
    Shapes,
    examples,
    quantized_graphs,
    shapes_of,
    use_multiplied_norms,
)
from skipstone.exporters.formats.ethosu.lowering import MEMORY, SYSTEM, Lowered, lower
from skipstone.exporters.formats.ethosu.reference import ReferenceProgram
from skipstone.exporters.formats.ethosu.schemes import Scheme, scheme_of
from skipstone.exporters.formats.ethosu.tools import VELA, load_tools
from skipstone.exporters.formats.ethosu.walk import MASKED, Array, FloatArray, GraphWalk
from skipstone.exporters.formats.onnx.calibration import read_tokens
from skipstone.exporters.formats.onnx.files import write_table
from skipstone.exporters.formats.onnx.modules import (
    GraphKeyValues,
    GraphSegment,
    RotaryTable,
    check_rope,
)
from skipstone.exporters.formats.widths import chosen_widths
from skipstone.exporters.probe import Probe, probe_of
from skipstone.exporters.reading import Reading, Room, read_checkpoint, refuse_gguf
from skipstone.exporters.reference import EagerReference
from skipstone.exporters.segments import Parts, cut_decoder, load_decoder

_DEFAULT_SCHEME, _DEFAULT_TARGET = "a16w8", "ethos-u85-256"
_WIDTHS = (1, 4, 8)
_CONTEXT = 128
_OWN_TOKENS = 128
_SRAM = 4 << 20  # bytes that a call may take; boards have less or more


@dataclass(frozen=True)
class _Program:
    part: str
    width: int
    lowered: Lowered

    @property
    def file(self) -> str:
        return f"{self.part}-{self.width}.pte"


def export_ethosu(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write an Ethos-U bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input or the format.
        ExportError: Arm's tools are missing, the disk is full, the NPU does not take an operator, a program needs more
            memory than there is, or what the programs compute is not the checkpoint's model.
    """
    step("read")
    scheme, widths = scheme_of(options.quantize or _DEFAULT_SCHEME), chosen_widths(options.widths, _WIDTHS)
    refuse_gguf(source, "ethosu")
    refuse_options(options, _REASONS)
    load_tools()
    reading = read_checkpoint(source, options, scratch, Room(_CONTEXT, widths[-1]))
    facts = reading.facts
    if facts.encoder is not None:
        raise CheckpointError(
            f"{source}: {facts.architecture} is an encoder-decoder; --format ethosu takes decoders alone",
            hint="use --format gguf or executorch with --device cpu",
        )
    parts = _cut(reading)
    shapes = shapes_of(parts, facts.context_length)
    heads = {shape for shapes_ in shapes.heads for shape in shapes_}
    if len(heads) != 1:
        raise CheckpointError(f"{source}: layers keep K and V of {len(heads)} shapes, one was expected")
    table = write_table(parts.embedding, True, folder)
    rows = np.fromfile(folder / table.file, "<f2").reshape(facts.vocab_size, facts.hidden_size)
    step("calibrate")
    tokens = (
        own_text(reading)
        if options.calibration is None
        else read_tokens(options.calibration, reading.tokenizer)
    )
    step("lower")
    target = options.target or _DEFAULT_TARGET
    programs = _compile(parts, shapes, scheme, widths, rows, tokens, target)
    for program in programs:
        (folder / program.file).write_bytes(program.lowered.program)
    probe = probe_of(reading.tokenizer, facts)
    agreement = _agreement(reading, programs, shapes, rows, widths[-1], probe)
    check_agreement(agreement, scheme.min_agreement)
    beside = reading.write_side_files(folder)
    head = heads.pop()
    npu = NpuEntry(
        target=target,
        compiler=f"vela {VELA}",
        system=SYSTEM,
        memory=MEMORY,
        clock=programs[0].lowered.clock,
        slots=facts.context_length,
        widths=widths,
        masked=MASKED,
        key_value_heads=head.heads,
        head_size=head.size,
        embedding=table,
        draft_vocabulary=beside.vocabulary,
        agreement=agreement,
        programs=_entries(programs, part_names(len(reading.exits), beside.vocabulary is not None)),
    )
    return Artefacts(
        model=facts,
        exits=reading.exits,
        manifest=partial(EthosUManifest, npu=npu),
        draft_table=beside.draft_table,
        quantization=Quantization(
            scheme=scheme.name,
            calibration_sha256=None if options.calibration is None else hash_file(options.calibration),
            bits_per_weight=_bits(npu, table, reading),
        ),
        files=(*(program.file for program in programs), table.file, *beside.names),
        oracle=None,
        probe=probe,
        reference=reading.checkpoint.path,
        min_agreement=scheme.min_agreement,
        reference_tolerance=None,
        source_sha256=reading.sha256,
        engine=npu.compiler,
        runs_here=False,
    )


_REASONS = {
    "imatrix": "importance matrices belong to --format gguf",
    "mix": "mixes of schemes belong to --format executorch",
    "share_weights": "programs of different widths hold weights of their own",
}


def own_text(reading: Reading) -> list[int]:
    """Tokens that the model itself samples at temperature 1, the same ones every time, in contexts of full length."""
    facts = reading.facts
    starts = (facts.bos_token_id, *facts.eos_token_ids)
    start = next((token for token in starts if token is not None), 0)
    contexts = -(-_OWN_TOKENS // facts.context_length)
    random, model = torch.Generator().manual_seed(0), load_eager(reading.checkpoint.path)
    tokens = torch.full((contexts, 1), start)
    with torch.no_grad():
        while tokens.shape[1] < min(facts.context_length, _OWN_TOKENS):
            logits = model(tokens).logits[:, -1].float()
            tokens = torch.cat((tokens, torch.multinomial(torch.softmax(logits, -1), 1, generator=random)), 1)
    return [int(token) for token in tokens.flatten()]


def check_memory(name: str, needed: int) -> None:
    """Refuse a program that does not fit.

    Raises:
        ExportError: naming both sizes.
    """
    if needed > _SRAM:
        raise ExportError(
            f"{name}: a call needs {needed / 1e6:.1f} MB of SRAM, {_SRAM / 1e6:.1f} is allowed",
            hint="give fewer --widths, a shorter --context-length, or more --exits",
        )


def check_agreement(found: float, least: float) -> None:
    """Refuse programs that compute something else than the checkpoint does.

    Raises:
        ExportError: naming both shares.
    """
    if not found >= least:
        raise ExportError(
            f"on TOSA's reference model the best token is the checkpoint's at {found:.0%} of positions, at least "
            f"{least:.0%} were expected",
            hint="give a --calibration text like what will be generated",
        )


def _cut(reading: Reading) -> Parts:
    checkpoint, slots = reading.checkpoint.path, reading.facts.context_length
    model: Any = load_decoder(checkpoint)
    check_rope(checkpoint, model.config, slots)
    model.model.rotary_emb = RotaryTable(model.model.rotary_emb, slots)
    use_multiplied_norms(model)
    return cut_decoder(model, reading.exits, reading.draft_tokens, GraphKeyValues, GraphSegment)


def _compile(
    parts: Parts,
    shapes: Shapes,
    scheme: Scheme,
    widths: Sequence[int],
    table: Array,
    tokens: Sequence[int],
    target: str,
) -> list[_Program]:
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import EthosUQuantizer

    quantizer = EthosUQuantizer(EthosUCompileSpec(target))
    graphs = quantized_graphs(parts, shapes, scheme, widths, table, tokens, quantizer)
    programs = []
    for part, width, graph in graphs:
        lowered = lower(f"{part}-{width}", graph, examples(part, width, shapes), target)
        programs.append(_Program(part, width, lowered))
        check_memory(programs[-1].file, lowered.working_bytes)  # before minutes go into the others
    return programs


def _agreement(
    reading: Reading, programs: Sequence[_Program], shapes: Shapes, table: Array, width: int, probe: Probe
) -> float:
    """Share of the probe's positions at which the best token is the checkpoint's, in batches of the widest programs."""
    calls: Mapping[str, ReferenceProgram] = {
        each.part: ReferenceProgram(each.file, each.lowered) for each in programs if each.width == width
    }

    def call(part: str, inputs: Sequence[Array]) -> list[FloatArray]:
        return calls[part](inputs)

    walk = GraphWalk(call, shapes.heads, table, width, shapes.slots)
    tokens = probe.tokens
    logits = np.concatenate([walk.logits(tokens[at : at + width]) for at in range(0, len(tokens), width)])
    expected = EagerReference(reading.checkpoint.path).logits(tokens)
    return float((logits.argmax(-1) == expected.argmax(-1)).mean())


def _entries(programs: Sequence[_Program], parts: Sequence[str]) -> tuple[NpuProgramEntry, ...]:
    return tuple(
        NpuProgramEntry(
            part=each.part,
            width=each.width,
            file=each.file,
            weight_bytes=each.lowered.weight_bytes,
            cycles=each.lowered.cycles,
            operators=each.lowered.operators,
            working_bytes=each.lowered.working_bytes,
        )
        for each in sorted(programs, key=lambda program: (parts.index(program.part), program.width))
    )


def _bits(npu: NpuEntry, table: TableEntry, reading: Reading) -> float:
    """Bits per weight of one width's programs and the table."""
    weights = sum(each.weight_bytes for each in npu.programs if each.width == npu.widths[0])
    return 8 * (weights + table.rows * table.columns * 2) / reading.num_weights
