"""The GGUF exporter: whole file, quantised by llama.cpp, cut at the exits, with a trimmed draft head beside
it.

    checkpoint ─ write ─▶ whole.gguf ─ quantise ─▶ q8_0.gguf ─ cut ─▶ segment-0.gguf … draft-head.gguf

Quantising comes before cutting because some schemes choose a tensor's type by its layer's place in the whole
model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from skipstone.bundle import DraftHeadEntry, EmbeddingEntry, ModelFacts, Quantization, SegmentEntry, hash_file
from skipstone.errors import CheckpointError, ExportError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.draft_table import DRAFT_TABLE_FILE, count_table
from skipstone.exporters.draft_vocabulary import (
    FREQUENCIES_FILE,
    choose_tokens,
    count_tokens,
    read_frequencies,
)
from skipstone.exporters.exits import check_exits, default_exits, recorded_exits
from skipstone.exporters.formats import Artefacts, ExportOptions
from skipstone.exporters.formats.gguf import cut, vocabulary
from skipstone.exporters.formats.gguf.mapping import decoder_of
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.schemes import FLOATS, SCHEMES, Scheme, scheme_of
from skipstone.exporters.formats.gguf.whole import native_float_type, write_whole
from skipstone.exporters.isolation import run_isolated
from skipstone.exporters.probe import probe_tokens
from skipstone.runtimes.drafters.table import NGramTable

_EXACT_TOLERANCE = 1e-3
_TOKENIZER = "tokenizer.json"
_DRAFT_HEAD, _DRAFT_VOCABULARY = "draft-head.gguf", "draft-vocabulary.i32"


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
    frequencies: Mapping[int, int] | None
    table: Path | None
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
    text = _draft_text(options, prepared.tokenizer)
    draft_head = _write_draft_head(model, prepared, options, text, folder) if exits else None
    draft_table = _write_draft_table(prepared, text, folder)
    prepared.tokenizer.save(str(folder / _TOKENIZER))
    table_files = [] if draft_table is None else [draft_table]
    head_files = [] if draft_head is None else [draft_head.file, draft_head.vocabulary]
    return Artefacts(
        model=prepared.facts,
        exits=exits,
        segments=segments,
        embedding=_embedding_entry(folder, segments[-1].file),
        draft_head=draft_head,
        draft_table=draft_table,
        quantization=Quantization(
            scheme=prepared.scheme.name,
            imatrix_sha256=prepared.imatrix_sha256,
            bits_per_weight=_bits_per_weight(model),
        ),
        files=(*(segment.file for segment in segments), *head_files, *table_files, _TOKENIZER),
        whole=prepared.whole,
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
    tokenizer = _load_tokenizer(checkpoint)
    float_type = scheme.name if scheme.name in FLOATS else native_float_type(checkpoint)
    weights = _num_weights(checkpoint)
    _check_disk_space(scratch, weights, max(SCHEMES[float_type].bits, scheme.bits) + scheme.bits)
    step("write")
    whole = scratch / "whole.gguf"
    write_whole(checkpoint, whole, float_type)
    facts = _checkpoint_facts(checkpoint, tokenizer, decoder.context_length, whole)
    whole, imatrix = _quantized(whole, scheme, float_type, tokenizer, options, scratch, step)
    frequencies, table = checkpoint.path / FREQUENCIES_FILE, checkpoint.path / DRAFT_TABLE_FILE
    return Prepared(
        whole=whole,
        scheme=scheme,
        facts=facts,
        tokenizer=tokenizer,
        exits=recorded_exits(checkpoint.path, checkpoint.config),
        frequencies=read_frequencies(frequencies) if frequencies.is_file() else None,
        table=table if table.is_file() else None,
        reference=checkpoint.path,
        source_sha256=_hash_checkpoint(checkpoint),
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
    _check_disk_space(scratch, weights, 2 * scheme.bits)
    whole, imatrix = _quantized(path, scheme, present.name, tokenizer, options, scratch, step)
    return Prepared(
        whole=whole,
        scheme=scheme,
        facts=_gguf_facts(model, tokenizer),
        tokenizer=tokenizer,
        exits=None,
        frequencies=None,
        table=None,
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


def _draft_text(options: ExportOptions, tokenizer: Tokenizer) -> list[int] | None:
    """Token ids of the text drafts are counted from, if the user gave one."""
    if options.draft_text is None:
        return None
    return list(
        tokenizer.encode(_read_text(options.draft_text, "--draft-text"), add_special_tokens=False).ids
    )


def _calibrate(whole: Path, text: Path, tokenizer: Tokenizer, scratch: Path) -> tuple[str, str]:
    from skipstone.exporters.formats.gguf.imatrix import check_calibration

    tokens = tokenizer.encode(_read_text(text, "--imatrix"), add_special_tokens=False).ids
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


def _write_draft_head(
    model: GgufModel, prepared: Prepared, options: ExportOptions, text: list[int] | None, folder: Path
) -> DraftHeadEntry:
    """The trimmed head; `text` (token ids), where given, says which tokens are frequent."""
    facts, frequencies = prepared.facts, prepared.frequencies
    if text is not None:
        frequencies = count_tokens(text)
    tokens = choose_tokens(facts.vocab_size, options.draft_vocab_size, frequencies, facts.eos_token_ids)
    cut.write_draft_head(model, tokens, folder / _DRAFT_HEAD)
    (folder / _DRAFT_VOCABULARY).write_bytes(tokens.astype("<i4").tobytes())
    return DraftHeadEntry(file=_DRAFT_HEAD, vocabulary=_DRAFT_VOCABULARY, rows=len(tokens))


def _write_draft_table(prepared: Prepared, text: list[int] | None, folder: Path) -> str | None:
    """The n-gram table counted in `text`, else the one recorded with the checkpoint, else none."""
    facts = prepared.facts
    if text is not None:
        count_table(np.array(text, np.int64), facts.vocab_size).save(folder / DRAFT_TABLE_FILE)
        return DRAFT_TABLE_FILE
    if prepared.table is None:
        return None
    recorded = NGramTable.load(prepared.table)
    if recorded.vocab_size != facts.vocab_size:
        raise CheckpointError(
            f"{prepared.table}: counted for {recorded.vocab_size} tokens, the model has {facts.vocab_size}",
            hint="remove the file or pass --draft-text",
        )
    shutil.copyfile(prepared.table, folder / DRAFT_TABLE_FILE)
    return DRAFT_TABLE_FILE


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


def _checkpoint_facts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, context_length: int, whole: Path
) -> ModelFacts:
    config = checkpoint.config
    generation = checkpoint.json("generation_config.json")
    eos = generation.get("eos_token_id", config.eos_token_id)
    bos = generation.get("bos_token_id", config.bos_token_id)
    return ModelFacts(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        context_length=context_length,
        parameters=sum(part.num_elements for part in GgufModel(whole).parts.values()),
        bos_token_id=bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        add_bos=vocabulary.adds_bos(tokenizer, bos),
        tied_embeddings=bool(config.tie_word_embeddings),
        chat_template=vocabulary.chat_template_of(checkpoint),
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
        add_bos=vocabulary.adds_bos(tokenizer, bos),
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


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    file = checkpoint.path / _TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"{file}: not found", hint="save the tokenizer with save_pretrained(...)")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"{file}: not a readable tokenizer: {error}", hint="save the tokenizer again"
        ) from error


def _num_weights(checkpoint: Checkpoint) -> int:
    from safetensors import safe_open

    total = 0
    for file in set(checkpoint.tensor_files.values()):
        if not file.is_file():
            raise CheckpointError(f"{file}: not found", hint="download the checkpoint again")
        with safe_open(file, framework="np") as stored:
            total += sum(int(np.prod(stored.get_slice(name).get_shape())) for name in stored.keys())  # noqa: SIM118
    return total


def _check_disk_space(folder: Path, weights: int, bits: float) -> None:
    """`bits`: per weight, of all files that stand beside each other at the worst moment."""
    needed, free = int(weights * bits / 8), shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{folder.parent.parent}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed",
            hint="free space or choose another --output folder",
        )


def _hash_checkpoint(checkpoint: Checkpoint) -> str:
    """One hash over the configuration and the weights, file by file in order of name."""
    files = sorted(
        {*checkpoint.tensor_files.values(), checkpoint.path / "config.json", checkpoint.path / _TOKENIZER}
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def _read_text(file: Path, flag: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{flag} {file}: cannot be read as text: {error}", hint="pass a UTF-8 text file"
        ) from error
