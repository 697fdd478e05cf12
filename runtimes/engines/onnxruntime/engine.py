"""Weights of an ONNX bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipstone.bundle import GRAPH_INTERFACE, SOURCE_GRAPH_INTERFACE, Bundle, OnnxManifest, manifest_of
from skipstone.errors import BundleError
from skipstone.runtimes.engines.base import Share
from skipstone.runtimes.engines.onnxruntime.cache import CacheLimits, OnnxRuntimeCache
from skipstone.runtimes.engines.onnxruntime.parts import open_parts
from skipstone.runtimes.engines.onnxruntime.signature import layers_of
from skipstone.runtimes.engines.onnxruntime.source_cache import OnnxRuntimeSourceCache
from skipstone.runtimes.engines.onnxruntime.store import KeyValueStore
from skipstone.runtimes.engines.onnxruntime.table import Table
from skipstone.runtimes.engines.planned import planned_threads
from skipstone.runtimes.engines.vocabulary import read_vocabulary
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions


class OnnxRuntimeEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Every graph is opened once; caches of one engine share them, and each holds the K and V of its sequence.

    Args:
        bundle: opened and checked.
        options: the user's.

    Raises:
        EngineError: ONNX Runtime is missing or refuses a file.
        BundleError: the artefacts do not fit the manifest.
        DeviceError: the graphs were made for a device that is not here.
        UsageError: an option this engine does not have.
    """

    kv_type = "f32"

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        manifest = manifest_of(bundle, OnnxManifest)
        self._manifest, self._entry = manifest, manifest.graphs
        self.encoder = manifest.model.encoder
        called = GRAPH_INTERFACE if self.encoder is None else SOURCE_GRAPH_INTERFACE
        if self._entry.interface != called:
            raise BundleError(
                f"{bundle.path}: its graphs follow interface {self._entry.interface}, this release calls interface "
                f"{called}",
                hint="export the bundle again",
            )
        self.threads = planned_threads(options, self._entry.target)
        self.exits = (*manifest.exits, manifest.model.num_layers)
        self.hidden_size, self.vocab_size = manifest.model.hidden_size, manifest.model.vocab_size
        self.max_context_length = min(manifest.model.context_length, self._entry.slots)
        self._segments, names = _share(manifest, options.share)
        name = self._entry.draft_vocabulary if "draft_head" in names else None
        self.draft_vocabulary = None if name is None else read_vocabulary(bundle.file(name), self.vocab_size)
        self._table = Table(bundle.file(self._entry.embedding.file), self._entry.embedding)
        rows = 0 if self.draft_vocabulary is None else len(self.draft_vocabulary)
        self._parts = open_parts(bundle, manifest, names, rows, self.threads)

    def open_cache(self, context_length: int, tree: RowTree) -> OnnxRuntimeCache:
        entry, last = self._entry, len(self.exits) - 1
        layers = {segment: layers_of(self._manifest, segment) for segment in self._segments}
        store = KeyValueStore(
            layers,
            entry.key_value_heads,
            entry.head_size,
            entry.slots,
            stack="" if self.encoder is None else "decoder",
            fixed=bool(entry.widths),
        )
        limits = CacheLimits(context_length, entry.max_width, entry.masked)
        shared = (self._parts, self._table, store, tree, last, limits)
        if self.encoder is None:
            return OnnxRuntimeCache(*shared)
        return OnnxRuntimeSourceCache(*shared, self.encoder, layers)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()


def _share(manifest: OnnxManifest, share: Share | None) -> tuple[list[int], list[str]]:
    """The segments that are run, and the parts that this takes."""
    last = len(manifest.exits)
    segments = sorted(share.segments) if share else list(range(last + 1))
    names = [f"segment_{index}" for index in segments]
    if last in segments:
        names.append("head")
    encoder = manifest.model.encoder
    if encoder is not None:  # every engine's own
        names += [*(f"encoder_{index}" for index in range(len(encoder.exits) + 1)), "cross"]
    if manifest.graphs.draft_vocabulary is not None and (share is None or share.draft_head):
        names.append("draft_head")
    return segments, names
