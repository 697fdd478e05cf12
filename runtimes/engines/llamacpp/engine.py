"""Weights of a GGUF bundle on llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle, GgufManifest, manifest_of
from skipstone.errors import BundleError, UsageError
from skipstone.runtimes.cores import num_cores
from skipstone.runtimes.engines.llamacpp.cache import LlamaCppCache
from skipstone.runtimes.engines.llamacpp.cross import CrossLane
from skipstone.runtimes.engines.llamacpp.embedding import EmbeddingTable
from skipstone.runtimes.engines.llamacpp.encoder import SourceEncoder
from skipstone.runtimes.engines.llamacpp.kv_types import check_heads, chosen_kv_type
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.load_plan import PlannedPart, load_plan
from skipstone.runtimes.engines.llamacpp.memory import check_room, check_room_for_cells
from skipstone.runtimes.engines.llamacpp.threads import choose_encoder_threads, choose_threads
from skipstone.runtimes.engines.llamacpp.trust import repacking_is_safe
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions

_SOURCE_BRANCHES = 32  # the source is tagged with every one of them


class LlamaCppEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Every weight is read from disk once and held once: the segments share nothing, the LM head lives in the last
    segment, the embedding table is mapped out of that same file, and the draft head holds its own few rows.

    Raises:
        EngineError: llama.cpp is missing, refuses a file, or finds no GPU although GPU layers were asked for; or
            the weights need more memory than there is, on the machine or on the GPU.
        BundleError: the artefacts do not fit the manifest.
        UsageError: a number of threads or a type of K and V that cannot be.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        manifest = manifest_of(bundle, GgufManifest)
        self._lane_options = _lane_options(bundle, options)
        self._parts: dict[int, Part] = {}
        self._head: Part | None = None
        self.exits = (*manifest.exits, manifest.model.num_layers)
        self.encoder = manifest.model.encoder
        self.hidden_size, self.vocab_size = manifest.model.hidden_size, manifest.model.vocab_size
        self.max_context_length = manifest.model.context_length
        self.draft_vocabulary: NDArray[np.int32] | None = None
        self._outputs = [segment.output for segment in manifest.segments]
        self._encoder_parts: list[Part] = []
        self._table = EmbeddingTable(bundle.file(manifest.embedding.file), manifest.embedding)
        self._plan = load_plan(bundle, options)
        check_room(bundle, self._plan)
        try:
            self._load(bundle)
            if options.threads is None and not options.gpu_layers:
                self._choose_threads()
        except Exception:
            self.close()
            raise

    @property
    def threads(self) -> int:
        """CPU threads per batch, at most: small parts may run faster with one."""
        return self._lane_options.threads

    @property
    def kv_type(self) -> str:
        """Type of K and V in ggml."""
        return self._lane_options.kv.name

    def open_cache(self, context_length: int, tree: RowTree) -> LlamaCppCache:
        options, lane_class = self._lane_options, self._lane_class
        check_room_for_cells(self._parts.values(), context_length, options)
        lanes = {
            segment: lane_class(part, self._outputs[segment], context_length, options)
            for segment, part in self._parts.items()
        }
        head = None
        if self._head is not None:
            head = Lane(self._head, "logits", options.max_width, options)
            head.flags[:] = 1
            head.positions[:] = np.arange(options.max_width)
        encoder = None
        if self.encoder is not None:
            stops = (*self.encoder.exits, self.encoder.num_layers)
            encoder = SourceEncoder(self._encoder_parts, stops, options)
        return LlamaCppCache(
            self._table, lanes, head, tree, context_length, options.max_width, options.max_branches, encoder
        )

    @property
    def _lane_class(self) -> type[Lane]:
        return Lane if self.encoder is None else CrossLane

    def close(self) -> None:
        for part in (*self._encoder_parts, *self._parts.values(), self._head):
            if part is not None:
                part.close()

    def _load(self, bundle: Bundle) -> None:
        manifest, planned = manifest_of(bundle, GgufManifest), self._plan
        for source_entry, planned_part in zip(manifest.encoder_segments, planned.encoder, strict=True):
            part = self._open(planned_part)
            self._encoder_parts.append(part)
            self._expect(part, part.hidden_size == self.hidden_size, f"hidden size {part.hidden_size}")
            layers = source_entry.stop - source_entry.first
            self._expect(part, part.num_layers == layers, f"{part.num_layers} layers")
            self._expect(part, not part.has_decoder, "no segment of an encoder")
        for segment, planned_part in planned.segments.items():
            entry, part = manifest.segments[segment], self._open(planned_part)
            self._parts[segment] = part
            check_heads(self._lane_options.kv, part.head_sizes)
            self._expect(part, part.hidden_size == self.hidden_size, f"hidden size {part.hidden_size}")
            self._expect(part, part.num_layers == entry.stop - entry.first, f"{part.num_layers} layers")
            # llama.cpp aborts on an encoder's part that is to decode, and on rows that should have been given a source
            kind = (part.has_encoder, part.has_decoder)
            self._expect(part, kind == (self.encoder is not None, True), "no segment of such a decoder")
            if entry.output == "logits":
                self._expect(part, part.vocab_size == self.vocab_size, f"vocabulary of {part.vocab_size}")
        draft = manifest.draft_head
        if draft is not None and planned.draft_head is not None:
            self._head = self._open(planned.draft_head)
            self.draft_vocabulary = np.fromfile(bundle.file(draft.vocabulary), "<i4").astype(np.int32)
            ids = self.draft_vocabulary
            self._expect(
                self._head, self._head.vocab_size == draft.rows == len(ids), f"{len(ids)} draft tokens"
            )
            fits = len(ids) > 0 and int(ids.min()) >= 0 and int(ids.max()) < self.vocab_size
            self._expect(self._head, fits, "draft tokens outside the vocabulary")

    def _open(self, planned: PlannedPart) -> Part:
        return Part(planned.path, self._lane_options, gpu_layers=planned.gpu_layers)

    def _choose_threads(self) -> None:
        """Give every segment, and the draft head, the threads that it is fastest with."""
        for part in self._encoder_parts:
            part.threads = choose_encoder_threads(part, self._lane_options)
        for segment, part in self._parts.items():
            part.threads = choose_threads(part, self._outputs[segment], self._lane_options, self._lane_class)
        if self._head is not None:
            self._head.threads = choose_threads(self._head, "logits", self._lane_options)

    def _expect(self, part: Part, holds: bool, found: str) -> None:
        if not holds:
            raise BundleError(
                f"{part.path}: {found}, which does not fit the manifest", hint="export the bundle again"
            )


def _lane_options(bundle: Bundle, options: EngineOptions) -> LaneOptions:
    threads = options.threads if options.threads is not None else num_cores()
    if not 1 <= threads <= 512:
        raise UsageError(f"--threads {threads}: expected 1 to 512")
    scheme = bundle.manifest.quantization.scheme
    encoder = bundle.manifest.model.encoder
    kv = chosen_kv_type(options.kv_type, scheme, encodes=encoder is not None)
    usual = LaneOptions(
        threads=threads, kv=kv, extra_buffers=repacking_is_safe(bundle), exact=scheme == "f32"
    )
    if encoder is None:
        return usual
    return replace(usual, source_length=encoder.max_source_length, max_branches=_SOURCE_BRANCHES)
