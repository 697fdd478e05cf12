"""manifest.json: what a bundle says of itself. Every record is frozen and closed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, field_validator, model_validator

from skipstone.bundle.calibration import Calibration
from skipstone.bundle.compression import Compression, ExitAgreement
from skipstone.bundle.coreml import PackageEntry
from skipstone.bundle.ethosu import NpuEntry
from skipstone.bundle.graphs import GraphsEntry
from skipstone.bundle.record import Record

SCHEMA_VERSION: Literal[1] = 1
# what an ExecuTorch program's methods take and compute: a decoder's, an encoder-decoder's
PROGRAM_INTERFACE, SOURCE_PROGRAM_INTERFACE = 2, 3
MANIFEST_NAME = "manifest.json"


class FileEntry(Record):
    """One file of the bundle; `path` is relative, in POSIX form, and stays inside the folder."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _inside_the_folder(cls, value: str) -> str:
        pure = PurePosixPath(value)
        unsafe = pure.is_absolute() or ".." in pure.parts or "\\" in value or ":" in value or "\0" in value
        if unsafe or str(pure) != value or value in ("", "."):
            raise ValueError(f"path {value!r} is not a plain relative path inside the bundle")
        return value


class EncoderFacts(Record):
    """The encoder of an encoder-decoder. `exits` are the inner layer counts at which it can stop; a source has at most
    `max_source_length` tokens; the decoder's text begins with `start_token_id`.
    """

    num_layers: Annotated[int, Field(gt=0)]
    exits: tuple[int, ...] = ()
    max_source_length: Annotated[int, Field(gt=0)]
    start_token_id: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _exits_rise(self) -> Self:
        edges = (0, *self.exits, self.num_layers)
        if any(first >= second for first, second in pairwise(edges)):
            raise ValueError(f"encoder exits {self.exits} do not rise within {self.num_layers} layers")
        return self


class ModelFacts(Record):
    """What a runtime must know of the model; counts are in units of layers, tokens, rows.

    Of an encoder-decoder, `encoder` describes the encoder and everything else the decoder.
    """

    name: str
    architecture: str
    hidden_size: Annotated[int, Field(gt=0)]
    num_layers: Annotated[int, Field(gt=0)]
    vocab_size: Annotated[int, Field(gt=0)]
    context_length: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(ge=0)]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False
    tied_embeddings: bool = False
    chat_template: str | None = None
    encoder: EncoderFacts | None = None


class SegmentEntry(Record):
    """Layers `first` (included) to `stop` (excluded) in one file.

    `output` says how the rows leave: `nextn` (hidden states through the engine's own output, no callback),
    `callback` (hidden states through the graph callback), `logits` (the last segment: final norm and LM head included).
    """

    first: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(gt=0)]
    file: str
    output: Literal["nextn", "callback", "logits"]


class EncoderSegmentEntry(Record):
    """The encoder's layers `first` (included) to `stop` (excluded) in one file, and the encoder's final norm."""

    first: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(gt=0)]
    file: str


class EmbeddingEntry(Record):
    """The token embedding table, memory-mapped out of a file: `rows` x `columns`, ggml type name, byte offset."""

    file: str
    offset: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(gt=0)]
    columns: Annotated[int, Field(gt=0)]
    type: str
    scale: float = 1.0


class DraftHeadEntry(Record):
    """Final norm and LM head over a part of the vocabulary, used while drafting.

    `vocabulary` is a little-endian int32 file: the token id of every row of the head.
    """

    file: str
    vocabulary: str
    rows: Annotated[int, Field(gt=0)]


class Quantization(Record):
    """Scheme (`f32`, `f16`, `q8_0`, `8da4w`, …), schemes of single parts, and hashes of what was used: a text for an
    importance matrix, one for the scales of activations, codes that were carried from a compressed checkpoint.
    """

    scheme: str
    mix: dict[str, str] = Field(default_factory=dict)
    imatrix_sha256: str | None = None
    calibration_sha256: str | None = None
    codes_sha256: str | None = None
    bits_per_weight: float | None = None


class Parity(Record):
    """Self-test figures: largest absolute differences of logits.

    reference: against the eager reference in f32 (None where the input was a GGUF and no reference exists); the others,
    where weights are quantised, but for one logit in ten thousand;
    split: segments against the whole model; draft_verify: rows drafted to an exit, then advanced, and rows accepted
    out of trees, against rows advanced at once; width_noise: the same row computed alone and within a batch. A greedy
    divergence counts as a near-tie when the two best logits of plain decoding lie within `near_tie_margin`.
    """

    reference: float | None
    reference_tolerance: float | None
    split: float
    split_tolerance: float
    draft_verify: float
    width_noise: float
    near_tie_margin: float
    agreement_with_reference: float | None = None


class Quality(Record):
    """How the artefact predicts a held-out text: perplexity over `tokens` predicted tokens, its own and the checkpoint's
    in float32; mean divergence of its distribution from the checkpoint's (Kullback–Leibler, nats); share of positions
    with the same best token; its inner exits, which choose among the draft head's tokens, `dense` being the checkpoint.
    None where there is no checkpoint to compare with.
    """

    text_sha256: str
    tokens: Annotated[int, Field(gt=0)]
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    agreement: float | None = None
    exits: tuple[ExitAgreement, ...] = ()


class CostCurve(Record):
    """Seconds per call of each segment at each width (rows per batch), measured on one machine.

    segments[k][i] belongs to widths[i]; draft_head[i] likewise (empty without a draft head).
    """

    widths: tuple[int, ...]
    segments: tuple[tuple[float, ...], ...]
    draft_head: tuple[float, ...] = ()
    threads: int
    machine: str


class Provenance(Record):
    """Where the bundle came from."""

    source: str
    source_sha256: str | None = None
    tool: str
    engine: str
    created: str


class MethodEntry(Record):
    """One method of a program: bytes of weights a call reads, and the share of its nodes that the delegate runs."""

    name: str
    weight_bytes: Annotated[int, Field(ge=0)]
    delegated: Annotated[float, Field(ge=0, le=1)]


class ProgramEntry(Record):
    """An ExecuTorch program: one file with a method per segment (docs/executorch.md says what each computes).

    `slots` positions of K/V, drafts included; batches of 1 to `max_width` rows. Widths from `reference_width` on agree
    numerically; narrower batches are padded up to it. `draft_vocabulary` is a little-endian int32 file: the token id of
    every row of the draft head. `status` says whether the program `runs` where it was exported, and so went through the
    self-test, or was only `compiled` there, for a `target` that the machine does not have. `interface` numbers
    what the methods mean: 2 for a decoder's, 3 for an encoder-decoder's. When they come to mean something else they take
    the next free number; a runtime takes those it was written for.
    """

    file: str
    interface: Annotated[int, Field(gt=0)] = 1
    target: str
    status: Literal["runs", "compiled"] = "runs"
    slots: Annotated[int, Field(gt=0)]
    max_width: Annotated[int, Field(gt=0)]
    reference_width: Annotated[int, Field(gt=0)] = 1
    draft_vocabulary: str | None = None
    methods: tuple[MethodEntry, ...]

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if not self.reference_width <= self.max_width <= self.slots:
            raise ValueError(
                f"reference_width {self.reference_width} ≤ max_width {self.max_width} ≤ slots {self.slots} was expected"
            )
        return self

    @property
    def called_interface(self) -> int:
        """The interface by which this release calls these methods."""
        takes_sources = any(entry.name == "cross" for entry in self.methods)
        return SOURCE_PROGRAM_INTERFACE if takes_sources else PROGRAM_INTERFACE

    def weight_bytes(self, method: str) -> int:
        """Bytes of weights that a call of the method reads; 0 for a method without any."""
        return sum(entry.weight_bytes for entry in self.methods if entry.name == method)


class ManifestBase(Record):
    """What the manifests of all formats hold, schema version 1.

    `parity` is None only where the artefact could not be run on the machine that exported it; `calibrations` come later,
    at most one of each knob. `compression`: what the checkpoint had gone through, None where there is no record of it.
    `draft_model`: a folder below this one with the bundle of a smaller model of the same vocabulary, to draft for this
    one; None where there is none; `files` lists its files too.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    device: str
    model: ModelFacts
    exits: tuple[int, ...]
    draft_table: str | None = None
    lexicon: str | None = None
    draft_model: Annotated[str, Field(pattern=r"^[a-z-]+$")] | None = None
    tokenizer: str = "tokenizer.json"
    quantization: Quantization
    parity: Parity | None
    quality: Quality | None = None
    compression: Compression | None = None
    cost: CostCurve | None = None
    calibrations: tuple[Calibration, ...] = ()
    files: tuple[FileEntry, ...]
    provenance: Provenance

    @property
    def near_tie_margin(self) -> float:
        """See `Parity`; 0 where nothing could be measured."""
        return 0.0 if self.parity is None else self.parity.near_tie_margin

    @property
    def contents(self) -> dict[str, str]:
        """What each named file holds, for people."""
        table = {} if self.draft_table is None else {self.draft_table: "n-gram table to draft from"}
        words = {} if self.lexicon is None else {self.lexicon: "words to draft corrections from"}
        sibling = {} if self.draft_model is None else {f"{self.draft_model}/{MANIFEST_NAME}": "draft model"}
        return {self.tokenizer: "tokenizer", **table, **words, **sibling, **self._artefacts()}

    def _artefacts(self) -> dict[str, str]:
        """The part of `contents` that the format's own entries name."""
        return {}

    @field_validator("calibrations")
    @classmethod
    def _one_calibration_of_each_knob(cls, value: tuple[Calibration, ...]) -> tuple[Calibration, ...]:
        knobs = [calibration.knob for calibration in value]
        if len(set(knobs)) < len(knobs):
            raise ValueError(f"calibrations of {', '.join(knobs)}: at most one of each was expected")
        return value

    @model_validator(mode="after")
    def _named_files_are_listed(self) -> Self:
        missing = sorted(self.contents.keys() - {entry.path for entry in self.files})
        if missing:
            raise ValueError(f"files not listed with a hash: {', '.join(missing)}")
        return self


class GgufManifest(ManifestBase):
    """A bundle of GGUF files. `segments` are the decoder's, `encoder_segments` those of an encoder-decoder's encoder."""

    format: Literal["gguf"] = "gguf"
    encoder_segments: tuple[EncoderSegmentEntry, ...] = ()
    segments: tuple[SegmentEntry, ...]
    embedding: EmbeddingEntry
    draft_head: DraftHeadEntry | None = None

    @field_validator("segments")
    @classmethod
    def _segments_are_contiguous(cls, value: tuple[SegmentEntry, ...]) -> tuple[SegmentEntry, ...]:
        edge = 0
        for segment in value:
            if segment.first != edge or segment.stop <= segment.first:
                raise ValueError(f"segment {segment.first}..{segment.stop} does not continue at layer {edge}")
            edge = segment.stop
        if not value or value[-1].output != "logits" or any(s.output == "logits" for s in value[:-1]):
            raise ValueError("exactly the last segment must give logits")
        return value

    def _artefacts(self) -> dict[str, str]:
        found = {self.embedding.file: ""}
        for part in self.encoder_segments:
            found[part.file] = f"the encoder's layers {part.first}–{part.stop - 1}"
        for segment in self.segments:
            leaves = "logits" if segment.output == "logits" else f"hidden states ({segment.output})"
            found[segment.file] = f"layers {segment.first}–{segment.stop - 1}, gives {leaves}"
        found[self.embedding.file] += f", embeddings ({self.embedding.type})"
        if self.draft_head is not None:
            found[self.draft_head.file] = f"draft head, {self.draft_head.rows} tokens"
            found[self.draft_head.vocabulary] = "draft head's token ids"
        return found

    @model_validator(mode="after")
    def _was_tested(self) -> Self:
        if self.parity is None:
            raise ValueError("parity: figures were expected")
        return self

    @model_validator(mode="after")
    def _encoder_exits_are_its_inner_cuts(self) -> Self:
        encoder = self.model.encoder
        edges = (0,) if encoder is None else (0, *encoder.exits, encoder.num_layers)
        found = tuple((segment.first, segment.stop) for segment in self.encoder_segments)
        if found != tuple(pairwise(edges)):
            raise ValueError(f"encoder segments {found} do not match the encoder's cuts {edges}")
        return self

    @model_validator(mode="after")
    def _exits_are_the_inner_cuts(self) -> Self:
        cuts = tuple(segment.stop for segment in self.segments)
        if cuts != (*self.exits, self.model.num_layers):
            raise ValueError(f"exits {self.exits} do not match the segments' cuts {cuts}")
        return self


class ExecuTorchManifest(ManifestBase):
    """A bundle around one ExecuTorch program."""

    format: Literal["executorch"] = "executorch"
    program: ProgramEntry

    def _artefacts(self) -> dict[str, str]:
        methods = ", ".join(entry.name for entry in self.program.methods)
        found = {self.program.file: f"{self.program.target} program: {methods}"}
        if self.program.draft_vocabulary is not None:
            found[self.program.draft_vocabulary] = "draft head's token ids"
        return found

    @model_validator(mode="after")
    def _was_tested_where_it_runs(self) -> Self:
        if (self.parity is None) != (self.program.status == "compiled"):
            raise ValueError(f"program.status {self.program.status!r} does not go with the parity figures")
        return self

    @model_validator(mode="after")
    def _methods_are_the_exits(self) -> Self:
        edges = (0, *self.exits, self.model.num_layers)
        if any(first >= second for first, second in pairwise(edges)):
            raise ValueError(f"exits {self.exits} do not rise within {self.model.num_layers} layers")
        found = {entry.name for entry in self.program.methods}
        expected = {"embed", "head", "compact"} | {f"segment_{k}" for k in range(len(self.exits) + 1)}
        encoder = self.model.encoder
        if encoder is not None:
            expected |= {"cross"} | {f"encoder_{k}" for k in range(len(encoder.exits) + 1)}
        if self.program.draft_vocabulary is not None:
            expected.add("draft_head")
        if found != expected:
            raise ValueError(
                f"exits {self.exits} need the methods {', '.join(sorted(expected))}; found {', '.join(sorted(found))}"
            )
        return self


class OnnxManifest(ManifestBase):
    """A bundle of ONNX graphs."""

    format: Literal["onnx"] = "onnx"
    graphs: GraphsEntry

    def _artefacts(self) -> dict[str, str]:
        table = self.graphs.embedding
        found = {table.file: f"embeddings ({table.type})"}
        for graph in self.graphs.graphs:
            rows = "" if graph.width is None else f", {graph.width} rows"
            found[graph.file] = f"{self.graphs.target} graph: {graph.part}{rows}"
            if graph.weights is not None:
                found[graph.weights] = f"weights of {graph.part}"
        for shared in () if self.graphs.qnn is None else self.graphs.qnn.shared:
            found[shared.file] = (
                f"{self.graphs.target} graph: {shared.part}, {shared.width} rows, for the device alone"
            )
            found[shared.binary] = f"weights of {shared.part}, of all widths"
        if self.graphs.draft_vocabulary is not None:
            found[self.graphs.draft_vocabulary] = "draft head's token ids"
        return found

    @model_validator(mode="after")
    def _was_tested_where_it_runs(self) -> Self:
        if (self.parity is None) != (self.graphs.status == "compiled"):
            raise ValueError(f"graphs.status {self.graphs.status!r} does not go with the parity figures")
        return self

    @model_validator(mode="after")
    def _embeddings_fit(self) -> Self:
        table, model = self.graphs.embedding, self.model
        if (table.rows, table.columns) != (model.vocab_size, model.hidden_size):
            raise ValueError(
                f"embeddings {table.rows} x {table.columns} do not fit a model of {model.vocab_size} tokens and "
                f"{model.hidden_size} channels"
            )
        return self

    @model_validator(mode="after")
    def _graphs_are_the_exits(self) -> Self:
        edges = (0, *self.exits, self.model.num_layers)
        if any(first >= second for first, second in pairwise(edges)):
            raise ValueError(f"exits {self.exits} do not rise within {self.model.num_layers} layers")
        parts = ["head", *(f"segment_{index}" for index in range(len(self.exits) + 1))]
        encoder = self.model.encoder
        if encoder is not None:
            parts += ["cross", *(f"encoder_{index}" for index in range(len(encoder.exits) + 1))]
        if self.graphs.draft_vocabulary is not None:
            parts.append("draft_head")
        expected = sorted(f"{part} {width}" for part in parts for width in self.graphs.widths or ("any",))
        found = sorted(f"{graph.part} {graph.width or 'any'}" for graph in self.graphs.graphs)
        if found != expected:
            raise ValueError(
                f"exits {self.exits} need the graphs {', '.join(expected)}; found {', '.join(found)}"
            )
        return self


class CoreMlManifest(ManifestBase):
    """A bundle around one Core ML package, of a decoder alone."""

    format: Literal["coreml"] = "coreml"
    package: PackageEntry

    def _artefacts(self) -> dict[str, str]:
        package = self.package
        found = dict.fromkeys(package.files, f"Core ML package of {len(package.functions)} functions")
        found[package.embedding.file] = f"embeddings ({package.embedding.type})"
        if package.draft_vocabulary is not None:
            found[package.draft_vocabulary] = "draft head's token ids"
        return found

    @model_validator(mode="after")
    def _functions_are_the_exits(self) -> Self:
        if self.parity is not None:
            raise ValueError("parity: a package that was only compiled has no figures")
        self.package.check_pieces(self.exits, self.package.functions)
        return self


class EthosUManifest(ManifestBase):
    """A bundle of programs for an Ethos-U, of a decoder alone."""

    format: Literal["ethosu"] = "ethosu"
    npu: NpuEntry

    def _artefacts(self) -> dict[str, str]:
        npu = self.npu
        found = {each.file: f"{npu.target} program: {each.part}, {each.width} rows" for each in npu.programs}
        found[npu.embedding.file] = f"embeddings ({npu.embedding.type})"
        if npu.draft_vocabulary is not None:
            found[npu.draft_vocabulary] = "draft head's token ids"
        return found

    @model_validator(mode="after")
    def _programs_are_the_exits(self) -> Self:
        if self.parity is not None:
            raise ValueError("parity: programs that were never run have no figures")
        self.npu.check_pieces(self.exits, self.npu.programs)
        return self


AnyManifest = GgufManifest | ExecuTorchManifest | OnnxManifest | CoreMlManifest | EthosUManifest
Manifest = Annotated[AnyManifest, Field(discriminator="format")]
MANIFEST: TypeAdapter[AnyManifest] = TypeAdapter(Manifest)
