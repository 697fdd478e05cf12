"""The GGUF exporter: whole file, quantised by llama.cpp, cut at the exits, with a trimmed draft head beside
it.

    checkpoint ─ write ─▶ whole.gguf ─ quantise ─▶ q8_0.gguf ─ cut ─▶ segment-0.gguf … draft-head.gguf

Quantising comes before cutting because some schemes choose a tensor's type by its layer's place in the whole
model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from skipstone.bundle import (
    DraftHeadEntry,
    EmbeddingEntry,
    GgufManifest,
    ModelFacts,
    Quantization,
    SegmentEntry,
    hash_file,
)
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.draft_material import DraftMaterial, write_vocabulary
from skipstone.exporters.exits import check_exits, default_exits, recorded_exits
from skipstone.exporters.facts import (
    TOKENIZER_FILE,
    adds_bos,
    check_disk_space,
    checkpoint_facts,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
    read_text,
)
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.gguf import cut, vocabulary
from skipstone.exporters.formats.gguf.mapping import decoder_of
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.schemes import FLOATS, SCHEMES, Scheme, scheme_of
from skipstone.exporters.formats.gguf.whole import native_float_type, write_whole
from skipstone.exporters.isolation import run_isolated
from skipstone.exporters.probe import probe_tokens

_EXACT_TOLERANCE = 1e-3
_NOT_HERE = {
    "calibration": "calibrated activations belong to --format executorch",
    "mix": "llama.cpp's schemes are mixes already",
    "context_length": "a GGUF bundle takes it when it is opened",
}
_DRAFT_HEAD = "draft-head.gguf"


@dataclass(frozen=True)
class Prepared:
    """An input brought to one form: a whole GGUF in the wanted scheme, its tokenizer and what to compare
    with.
    """

    whole: Path
    scheme: Scheme
    facts: ModelFacts
    tokenizer: Tokenizer
    exits: tuple[int, ...] | None
    reference: Path | None
    source_sha256: str
    imatrix_sha256: str | None


def export_gguf(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write a GGUF bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input.
        ExportError: not enough disk space, or llama.cpp failed.
    """
    step("read")
    refuse_options(options, _NOT_HERE)
    prepare = _from_gguf if source.endswith(".gguf") else _from_checkpoint
    prepared = prepare(source, options, scratch, step)
    model = GgufModel(prepared.whole)
    period = cut.cut_period(model.arch)
    wanted = prepared.exits if options.exits is None else options.exits
    exits = check_exits(
        default_exits(model.num_layers, period) if wanted is None else wanted, model.num_layers, period
    )
    step("split")
    segments = _write_segments(model, exits, folder)
    step("draft head")
    material = DraftMaterial.find(prepared.reference, options.draft_text, prepared.tokenizer)
    draft_head = None
    if exits:
        tokens = material.choose_tokens(prepared.facts, options.draft_vocab_size)
        cut.write_draft_head(model, tokens, folder / _DRAFT_HEAD)
        vocabulary_file = write_vocabulary(tokens, folder)
        draft_head = DraftHeadEntry(file=_DRAFT_HEAD, vocabulary=vocabulary_file, rows=len(tokens))
    draft_table = material.write_table(prepared.facts, folder)
    prepared.tokenizer.save(str(folder / TOKENIZER_FILE))
    table_files = [] if draft_table is None else [draft_table]
    head_files = [] if draft_head is None else [draft_head.file, draft_head.vocabulary]
    return Artefacts(
        model=prepared.facts,
        exits=exits,
        manifest=partial(
            GgufManifest,
            segments=segments,
            embedding=_embedding_entry(folder, segments[-1].file),
            draft_head=draft_head,
        ),
        draft_table=draft_table,
        quantization=Quantization(
            scheme=prepared.scheme.name,
            imatrix_sha256=prepared.imatrix_sha256,
            bits_per_weight=_bits_per_weight(model),
        ),
        files=(*(segment.file for segment in segments), *head_files, *table_files, TOKENIZER_FILE),
        oracle=Oracle("skipstone.exporters.formats.gguf.oracle:UncutGguf", {"whole": str(prepared.whole)}),
        probe=probe_tokens(prepared.tokenizer, prepared.facts.vocab_size, prepared.facts.context_length),
        reference=prepared.reference,
        min_agreement=prepared.scheme.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if prepared.scheme.name == "f32" else None,
        source_sha256=prepared.source_sha256,
        engine=f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
    )


def _from_checkpoint(
    source: str, options: ExportOptions, scratch: Path, step: Callable[[str], None]
) -> Prepared:
    checkpoint = open_checkpoint(source)
    decoder = decoder_of(checkpoint)
    scheme = scheme_of(options.quantize or "q8_0")
    tokenizer = load_tokenizer(checkpoint)
    float_type = scheme.name if scheme.name in FLOATS else native_float_type(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, max(SCHEMES[float_type].bits, scheme.bits) + scheme.bits)
    step("write")
    whole = scratch / "whole.gguf"
    write_whole(checkpoint, whole, float_type)
    parameters = sum(part.num_elements for part in GgufModel(whole).parts.values())
    facts = checkpoint_facts(checkpoint, tokenizer, decoder.context_length, parameters)
    whole, imatrix = _quantized(whole, scheme, float_type, tokenizer, options, scratch, step)
    return Prepared(
        whole=whole,
        scheme=scheme,
        facts=facts,
        tokenizer=tokenizer,
        exits=recorded_exits(checkpoint.path, checkpoint.config),
        reference=checkpoint.path,
        source_sha256=hash_checkpoint(checkpoint),
        imatrix_sha256=imatrix,
    )


def _from_gguf(source: str, options: ExportOptions, scratch: Path, step: Callable[[str], None]) -> Prepared:
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(
            f"{source}: no such file", hint="pass a checkpoint folder, a hub name or a .gguf file"
        )
    model = GgufModel(path)
    cut.check_can_be_cut(model)
    tokenizer = vocabulary.tokenizer_from_keys(model)
    present = _scheme_of_file(model)
    scheme = present if options.quantize is None else scheme_of(options.quantize)
    if scheme.name != present.name and present.name not in FLOATS:
        raise UsageError(
            f"--quantize {scheme.name}: {source} is quantised already ({present.name})",
            hint="leave --quantize out to keep it, or start from the f32 or f16 file",
        )
    weights = sum(part.num_elements for part in model.parts.values())
    check_disk_space(scratch, weights, 2 * scheme.bits)
    whole, imatrix = _quantized(path, scheme, present.name, tokenizer, options, scratch, step)
    return Prepared(
        whole=whole,
        scheme=scheme,
        facts=_gguf_facts(model, tokenizer),
        tokenizer=tokenizer,
        exits=None,
        reference=None,
        source_sha256=hash_file(path),
        imatrix_sha256=imatrix,
    )


def _quantized(
    whole: Path,
    scheme: Scheme,
    present: str,
    tokenizer: Tokenizer,
    options: ExportOptions,
    scratch: Path,
    step: Callable[[str], None],
) -> tuple[Path, str | None]:
    """The whole GGUF in the wanted scheme, and the hash of the calibration text if one was used."""
    if scheme.name == present:
        if options.imatrix is not None:
            raise UsageError(f"--imatrix {options.imatrix}: nothing is quantised ({scheme.name})")
        return whole, None
    weights = sha256 = None
    if options.imatrix is not None:
        if scheme.name in FLOATS:
            raise UsageError(f"--imatrix {options.imatrix}: nothing is quantised ({scheme.name})")
        step("calibrate")
        weights, sha256 = _calibrate(whole, options.imatrix, tokenizer, scratch)
    step("quantise")
    target = scratch / f"{scheme.name}.gguf"
    run_isolated(
        "skipstone.exporters.formats.gguf.schemes:quantize_file",
        source=str(whole),
        target=str(target),
        file_type=scheme.file_type,
        imatrix=weights,
        threads=options.threads,
    )
    if whole.parent == scratch:
        whole.unlink()
    return target, sha256


def _calibrate(whole: Path, text: Path, tokenizer: Tokenizer, scratch: Path) -> tuple[str, str]:
    from skipstone.exporters.formats.gguf.imatrix import check_calibration

    tokens = tokenizer.encode(read_text(text, "--imatrix"), add_special_tokens=False).ids
    check_calibration(tokens, text)
    target = scratch / "imatrix.npz"
    run_isolated(
        "skipstone.exporters.formats.gguf.imatrix:save_imatrix",
        source=str(whole),
        tokens=tokens,
        target=str(target),
    )
    return str(target), hash_file(text)


def _write_segments(model: GgufModel, exits: tuple[int, ...], folder: Path) -> tuple[SegmentEntry, ...]:
    cut.check_can_be_cut(model)
    entries = []
    for index, piece in enumerate(cut.plan_cuts(model, exits)):
        name = f"segment-{index}.gguf"
        cut.write_segment(model, piece, folder / name)
        entries.append(SegmentEntry(first=piece.first, stop=piece.stop, file=name, output=piece.output))
    return tuple(entries)


def _embedding_entry(folder: Path, name: str) -> EmbeddingEntry:
    last = GgufModel(folder / name)
    part = last.parts["token_embd.weight"]
    return EmbeddingEntry(
        file=name,
        offset=last.offsets["token_embd.weight"],
        rows=part.shape[0],
        columns=part.shape[1],
        type=part.type.name,
    )


def _gguf_facts(model: GgufModel, tokenizer: Tokenizer) -> ModelFacts:
    bos = model.get("tokenizer.ggml.bos_token_id")
    ends = (model.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return ModelFacts(
        name=str(model.get("general.name") or model.path.stem),
        architecture=model.arch,
        hidden_size=model.fact("embedding_length"),
        num_layers=model.num_layers,
        vocab_size=model.parts["token_embd.weight"].shape[0],
        context_length=model.fact("context_length"),
        parameters=sum(part.num_elements for part in model.parts.values()),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        add_bos=adds_bos(tokenizer, bos),
        tied_embeddings="output.weight" not in model.parts,
        chat_template=model.get("tokenizer.chat_template"),
    )


def _scheme_of_file(model: GgufModel) -> Scheme:
    file_type = model.get("general.file_type")
    known = next((scheme for scheme in SCHEMES.values() if scheme.file_type == file_type), None)
    return known or Scheme(f"ftype-{file_type}", int(file_type or 0), _bits_per_weight(model), 0.0)


def _bits_per_weight(model: GgufModel) -> float:
    parts = model.parts.values()
    return 8 * sum(part.num_bytes for part in parts) / sum(part.num_elements for part in parts)
