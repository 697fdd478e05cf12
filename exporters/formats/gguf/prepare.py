"""Brings every input to one form: a whole GGUF in the wanted scheme, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from skipstone.bundle import EncoderFacts, ModelFacts, hash_file
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.exits import recorded_exits
from skipstone.exporters.facts import (
    DEFAULT_LENGTH,
    adds_bos,
    check_disk_space,
    checkpoint_facts,
    encoder_facts,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
    read_text,
)
from skipstone.exporters.formats import ExportOptions, refuse_options
from skipstone.exporters.formats.gguf import cut, vocabulary
from skipstone.exporters.formats.gguf.mapping import decoder_of
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.schemes import FLOATS, SCHEMES, TERNARY, Scheme, scheme_of
from skipstone.exporters.formats.gguf.t5 import encoder_decoder_of
from skipstone.exporters.formats.gguf.ternary import check_ternary
from skipstone.exporters.formats.gguf.whole import layout_of, native_float_type, write_whole
from skipstone.exporters.isolation import run_isolated

_OF_ENCODER_DECODERS = {
    "encoder_exits": "a .gguf input is a decoder alone",
    "max_source_length": "a .gguf input is a decoder alone",
}
_CHOOSES_NOTHING = {"imatrix": "ternary weights are kept as they are"}
_SHORTEST = 8  # positions that the self-test can work with
_GIVEN_WHEN_OPENED = {"context_length": "a GGUF bundle of a decoder alone takes it when it is opened"}


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


def prepare(source: str, options: ExportOptions, scratch: Path, step: Callable[[str], None]) -> Prepared:
    """Read a checkpoint or .gguf file, and write it whole and quantised into `scratch`; see
    `skipstone.exporters.formats.Exporter`.
    """
    from_ = _from_gguf if source.endswith(".gguf") else _from_checkpoint
    return from_(source, options, scratch, step)


def _from_checkpoint(
    source: str, options: ExportOptions, scratch: Path, step: Callable[[str], None]
) -> Prepared:
    checkpoint = open_checkpoint(source)
    encoder = encoder_facts(checkpoint, options.encoder_exits, options.max_source_length)
    context_length = _context_length(checkpoint, encoder, options)
    scheme = scheme_of(options.quantize or "q8_0")
    if scheme.name in TERNARY:
        check_ternary(checkpoint, layout_of(checkpoint), scheme.name)
        refuse_options(options, _CHOOSES_NOTHING)
    tokenizer = load_tokenizer(checkpoint)
    float_type = scheme.name if scheme.name in FLOATS else native_float_type(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, max(SCHEMES[float_type].bits, scheme.bits) + scheme.bits)
    step("write")
    whole = scratch / "whole.gguf"
    source_length = DEFAULT_LENGTH if encoder is None else encoder.max_source_length
    write_whole(checkpoint, whole, float_type, max_source_length=source_length, codes=options.codes)
    parameters = sum(part.num_elements for part in GgufModel(whole).parts.values())
    facts = checkpoint_facts(checkpoint, tokenizer, context_length, parameters, encoder)
    imatrix = None
    if options.codes is None:
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


def _context_length(checkpoint: Checkpoint, encoder: EncoderFacts | None, options: ExportOptions) -> int:
    """Positions of the decoder, after checking that llama.cpp can compute the model at all."""
    if encoder is None:
        refuse_options(options, _GIVEN_WHEN_OPENED)
        return decoder_of(checkpoint).context_length
    encoder_decoder_of(checkpoint)
    if options.imatrix is not None:
        raise UsageError(
            f"--imatrix {options.imatrix}: importance matrices are made for decoders alone",
            hint="leave it out",
        )
    length = DEFAULT_LENGTH if options.context_length is None else options.context_length
    if length < _SHORTEST:
        raise UsageError(f"--context-length {length}: at least {_SHORTEST} was expected")
    return length


def _from_gguf(source: str, options: ExportOptions, scratch: Path, step: Callable[[str], None]) -> Prepared:
    path = Path(source)
    refuse_options(options, _OF_ENCODER_DECODERS | _GIVEN_WHEN_OPENED)
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
    if scheme.name in TERNARY and scheme.name != present.name:
        raise UsageError(
            f"--quantize {scheme.name}: takes a checkpoint whose layers are ternary, not a .gguf file",
            hint="export the checkpoint, or leave --quantize out",
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
    return known or Scheme(f"ftype-{file_type}", int(file_type or 0), bits_per_weight(model), 0.0)


def bits_per_weight(model: GgufModel) -> float:
    """Mean over all weights."""
    parts = model.parts.values()
    return 8 * sum(part.num_bytes for part in parts) / sum(part.num_elements for part in parts)
