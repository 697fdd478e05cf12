"""The cache that fits a program's manifest."""

from __future__ import annotations

from collections.abc import Callable

from skipstone.bundle import ExecuTorchManifest
from skipstone.runtimes.engines.executorch.cache import CacheLimits, ExecuTorchCache
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.engines.executorch.source_cache import ExecuTorchSourceCache
from skipstone.runtimes.rows import RowTree


def open_cache(
    program: Program,
    manifest: ExecuTorchManifest,
    tree: RowTree,
    context_length: int,
    release: Callable[[Program], None],
) -> ExecuTorchCache:
    """A fresh cache.

    Args:
        program: loaded; no other cache uses it.
        manifest: of its bundle.
        tree: the session's rows.
        context_length: positions, drafts included.
        release: called with the program when the cache is closed.
    """
    entry, encoder, segments = manifest.program, manifest.model.encoder, len(manifest.exits) + 1
    limits = CacheLimits(context_length, entry.slots, entry.max_width, entry.reference_width)
    if encoder is None:
        return ExecuTorchCache(program, release, segments, tree, limits)
    return ExecuTorchSourceCache(program, release, segments, tree, limits, encoder)
