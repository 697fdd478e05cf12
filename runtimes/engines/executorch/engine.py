"""Weights of an ExecuTorch bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of
from skipstone.errors import BundleError, EngineError
from skipstone.runtimes.engines.base import Share
from skipstone.runtimes.engines.executorch.cache import ExecuTorchCache
from skipstone.runtimes.engines.executorch.caches import open_cache
from skipstone.runtimes.engines.executorch.native import native
from skipstone.runtimes.engines.executorch.program import Program, check_header
from skipstone.runtimes.engines.executorch.rehearsal import rehearse
from skipstone.runtimes.engines.executorch.signature import check_signatures, expected_signatures
from skipstone.runtimes.engines.planned import planned_threads
from skipstone.runtimes.engines.vocabulary import read_vocabulary
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions


class ExecuTorchEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    A program holds weights and the K/V of one sequence together, so every cache that is open at the same time loads the
    file once more; a closed cache's program is used again. ExecuTorch holds the interpreter lock while it computes and
    has one thread pool: for several streams at once run several processes.

    Args:
        bundle: opened and checked.
        options: the user's.
        rehearsed: this process may die of the program: it is the one that finds out.

    Raises:
        EngineError: ExecuTorch is missing or refuses the file.
        BundleError: the artefacts do not fit the manifest.
        DeviceError: the program was lowered for a device that is not this one.
        UsageError: an option this engine does not have.
    """

    kv_type = "f32"

    def __init__(self, bundle: Bundle, options: EngineOptions, *, rehearsed: bool = False) -> None:
        manifest = manifest_of(bundle, ExecuTorchManifest)
        self._manifest, self._entry = manifest, manifest.program
        self._path = bundle.file(manifest.program.file)
        self.threads = planned_threads(options, self._entry.target)
        self.exits = (*manifest.exits, manifest.model.num_layers)
        self.encoder = manifest.model.encoder
        self.hidden_size, self.vocab_size = manifest.model.hidden_size, manifest.model.vocab_size
        self.reference_width = self._entry.reference_width
        self.max_context_length = min(
            manifest.model.context_length, self._entry.slots - (self.reference_width - 1)
        )
        share = options.share
        self._methods = methods_of(manifest, share)
        name = self._entry.draft_vocabulary if "draft_head" in self._methods else None
        self.draft_vocabulary = None if name is None else read_vocabulary(bundle.file(name), self.vocab_size)
        check_header(self._path)
        native()
        if not rehearsed:
            rehearse(bundle)
        program = Program(self._path, self._entry, self.threads, methods=self._methods)
        rows = 0 if self.draft_vocabulary is None else len(self.draft_vocabulary)
        try:
            check_signatures(self._path, program.signatures, expected_signatures(manifest, rows))
        except (BundleError, EngineError):
            program.close()
            raise
        self._programs, self._idle = [program], [program]

    def open_cache(self, context_length: int, tree: RowTree) -> ExecuTorchCache:
        if not self._idle:
            self._idle.append(Program(self._path, self._entry, self.threads, methods=self._methods))
            self._programs += self._idle
        return open_cache(self._idle.pop(), self._manifest, tree, context_length, self._idle.append)

    def close(self) -> None:
        for program in self._programs:
            program.close()


def methods_of(manifest: ExecuTorchManifest, share: Share | None) -> frozenset[str]:
    """The methods that a share of the model needs; None: all of them."""
    names = {entry.name for entry in manifest.program.methods}
    if share is None:
        return frozenset(names)
    last = len(manifest.exits)
    elsewhere = {f"segment_{index}" for index in range(last + 1) if index not in share.segments}
    if 0 not in share.segments and manifest.model.encoder is None:  # a source is embedded here too
        elsewhere.add("embed")
    if last not in share.segments:
        elsewhere.add("head")
    if not share.draft_head:
        elsewhere.add("draft_head")
    return frozenset(names - elsewhere)
