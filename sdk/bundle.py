"""The bundle: a folder with a manifest, a tokenizer and the artefacts of one exported model.

    >>> from skipstone.bundle import open_bundle
    >>> bundle = open_bundle("out/")            # checks the schema, every path, size and hash
    >>> bundle.manifest.exits
    (2, 4, 6)

Nothing here imports torch or an engine; a bundle holds no pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from skipstone.errors import BundleError

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
_HASH_BLOCK = 1 << 20


class _Record(BaseModel):
    """Frozen, closed record: an unknown key is an error, not a silent loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
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


class ModelFacts(_Record):
    """What a runtime must know of the model; counts are in units of layers, tokens, rows."""

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


class SegmentEntry(_Record):
    """Layers `first` (included) to `stop` (excluded) in one file.

    `output` says how the rows leave: `nextn` (hidden states through the engine's own output, no callback),
    `callback` (hidden states through the graph callback), `logits` (the last segment: final norm and LM head included).
    """

    first: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(gt=0)]
    file: str
    output: Literal["nextn", "callback", "logits"]


class EmbeddingEntry(_Record):
    """The token embedding table, memory-mapped out of a file: `rows` x `columns`, ggml type name, byte offset."""

    file: str
    offset: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(gt=0)]
    columns: Annotated[int, Field(gt=0)]
    type: str
    scale: float = 1.0


class DraftHeadEntry(_Record):
    """Final norm and LM head over a part of the vocabulary, used while drafting.

    `vocabulary` is a little-endian int32 file: the token id of every row of the head.
    """

    file: str
    vocabulary: str
    rows: Annotated[int, Field(gt=0)]


class Quantization(_Record):
    """Scheme (`f32`, `f16`, `q8_0`, `q4_0`, …), and the calibration text's hash where an importance matrix was used."""

    scheme: str
    imatrix_sha256: str | None = None
    bits_per_weight: float | None = None


class Parity(_Record):
    """Self-test figures: largest absolute differences of logits.

    reference: against the eager reference in f32 (None where the input was a GGUF and no reference exists);
    split: segments against the whole model; draft_verify: rows drafted to an exit, then advanced, against rows
    advanced at once; width_noise: the same row computed alone and within a batch. A greedy divergence counts as a
    near-tie when the two best logits of plain decoding lie within `near_tie_margin`.
    """

    reference: float | None
    reference_tolerance: float | None
    split: float
    split_tolerance: float
    draft_verify: float
    width_noise: float
    near_tie_margin: float
    agreement_with_reference: float | None = None


class CostCurve(_Record):
    """Seconds per call of each segment at each width (rows per batch), measured on one machine.

    segments[k][i] belongs to widths[i]; draft_head[i] likewise (empty without a draft head).
    """

    widths: tuple[int, ...]
    segments: tuple[tuple[float, ...], ...]
    draft_head: tuple[float, ...] = ()
    threads: int
    machine: str


class Provenance(_Record):
    """Where the bundle came from."""

    source: str
    source_sha256: str | None = None
    tool: str
    engine: str
    created: str


class Manifest(_Record):
    """manifest.json, schema version 1."""

    schema_version: Literal[1] = SCHEMA_VERSION
    format: Literal["gguf"]
    device: str
    model: ModelFacts
    exits: tuple[int, ...]
    segments: tuple[SegmentEntry, ...]
    embedding: EmbeddingEntry
    draft_head: DraftHeadEntry | None = None
    draft_table: str | None = None
    tokenizer: str = "tokenizer.json"
    quantization: Quantization
    parity: Parity
    cost: CostCurve | None = None
    files: tuple[FileEntry, ...]
    provenance: Provenance

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

    def model_post_init(self, _context: object) -> None:
        """Cross-field rules: exits are the inner cuts, and every named file is listed."""
        cuts = tuple(segment.stop for segment in self.segments)
        if cuts != (*self.exits, self.model.num_layers):
            raise ValueError(f"exits {self.exits} do not match the segments' cuts {cuts}")
        named = {segment.file for segment in self.segments} | {self.embedding.file, self.tokenizer}
        if self.draft_head is not None:
            named |= {self.draft_head.file, self.draft_head.vocabulary}
        if self.draft_table is not None:
            named.add(self.draft_table)
        missing = sorted(named - {entry.path for entry in self.files})
        if missing:
            raise ValueError(f"files not listed with a hash: {', '.join(missing)}")


class Bundle:
    """An opened and checked bundle.

    Attributes:
        path: the folder.
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def file(self, name: str) -> Path:
        """Absolute path of one of the bundle's listed files."""
        return self.path / name

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.model.name}, exits={self.manifest.exits})"


def open_bundle(path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Bundle:
    """Open a bundle and check it: schema version, schema, paths inside the folder, sizes and hashes.

    Args:
        path: the folder written by `skipstone export`.
        verify_hashes: False skips the hashes (sizes are always checked).

    Raises:
        BundleError: naming the file that is missing, truncated or altered, or the key that does not fit.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for entry in manifest.files:
        _check_file(folder, entry, verify_hash=verify_hashes)
    return Bundle(folder.resolve(), manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate manifest.json alone.

    Raises:
        BundleError: no folder, no manifest, not JSON, an unknown schema version or a key that does not fit.
    """
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder", hint="pass a folder written by `skipstone export`")
    source = folder / MANIFEST_NAME
    if not folder.is_dir() or not source.is_file():
        raise BundleError(
            f"{folder}: not a bundle, {MANIFEST_NAME} not found",
            hint="make one with `skipstone export CHECKPOINT`",
        )
    try:
        raw = json.loads(source.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise BundleError(
            f"{source}: not readable as JSON: {error}", hint="export the bundle again"
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema version {version!r}, this Skipstone reads {SCHEMA_VERSION}",
            hint="upgrade Skipstone, or export the bundle again with this version",
        )
    try:
        return Manifest.model_validate_json(source.read_bytes(), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{source}: {where}: {first['msg']}", hint="export the bundle again") from error


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe_file(folder: Path, name: str) -> FileEntry:
    """FileEntry (size, hash) of a file just written into `folder`."""
    target = folder / name
    return FileEntry(path=name, size=target.stat().st_size, sha256=hash_file(target))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, through a temporary file."""
    target = folder / MANIFEST_NAME
    draft = folder / (MANIFEST_NAME + ".part")
    draft.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(target)


@contextmanager
def bundle_in_progress(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends well, and vanishes otherwise.

    Raises:
        BundleError: `output` exists and is not an (overwritable) bundle, or the disk refuses (no space, no permission).
    """
    if output.exists() and not (
        output.is_dir() and (not any(output.iterdir()) or (output / MANIFEST_NAME).is_file())
    ):
        raise BundleError(f"{output}: exists and is not a bundle", hint="choose another --output folder")
    if (output / MANIFEST_NAME).is_file() and not overwrite:
        raise BundleError(f"{output}: already holds a bundle", hint="pass --overwrite to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BundleError(
            f"{output}: cannot be written: {error}", hint="choose another --output folder"
        ) from error
    try:
        yield draft
        draft.chmod(0o755)
        _swap(draft, output)
    except OSError as error:
        raise BundleError(
            f"{output}: writing failed: {error}",
            hint="free space or choose another --output folder; nothing was kept",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, output: Path) -> None:
    """Put `draft` in `output`'s place, keeping the old folder until the new one stands."""
    if not output.exists():
        draft.rename(output)
        return
    old = draft.with_name(draft.name + ".old")
    output.rename(old)
    try:
        draft.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_file(folder: Path, entry: FileEntry, *, verify_hash: bool) -> None:
    target = folder / entry.path
    if not target.is_file():
        raise BundleError(f"{target}: missing from the bundle", hint="export or copy the bundle again")
    if not target.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{target}: points outside the bundle", hint="export or copy the bundle again")
    size = target.stat().st_size
    if size != entry.size:
        raise BundleError(
            f"{target}: {size} bytes, the manifest says {entry.size}",
            hint="the file is truncated; copy it again",
        )
    if verify_hash and hash_file(target) != entry.sha256:
        raise BundleError(
            f"{target}: its sha256 differs from the manifest's", hint="the file was altered; export again"
        )
