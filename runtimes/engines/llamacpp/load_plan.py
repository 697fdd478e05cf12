"""Which files of a bundle are loaded, and how many layers of each go to a GPU.

llama.cpp counts GPU layers from the end of a model: what follows the layers (final norm and LM head) is the first of
them, the last layer the second, and so on; embeddings are always looked up on the CPU. `--gpu-layers` means the same
over the segments together, and every file is told its own number.

    >>> spread((2, 4, 6), gpu_layers=9)       # the head and the 8 layers before it: all 6 of the last segment, 2 before
    (0, 3, 7)

A segment with layers on the GPU has what follows them there too, so its own number is one more than its layers; of an
inner segment that is next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.bundle import Bundle, GgufManifest, manifest_of
from skipstone.errors import UsageError
from skipstone.runtimes.engines.llamacpp.embedding import table_bytes

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions

ALL = -1


@dataclass(frozen=True)
class PlannedPart:
    """A file to load.

    Attributes:
        path: of the file.
        num_layers: in it.
        gpu_layers: of them, and of what follows them, so many go to a GPU, the end first.
        layer_bytes: of all layers together.
        tail_bytes: of what follows them.
        lookup_bytes: of an embedding table that stays on the CPU.
    """

    path: Path
    num_layers: int
    gpu_layers: int
    layer_bytes: int
    tail_bytes: int = 0
    lookup_bytes: int = 0

    @property
    def gpu_bytes(self) -> int:
        """Of its weights, those on a GPU, layers being taken for equally large."""
        if self.gpu_layers == 0:
            return 0
        layers = min(self.gpu_layers - 1, self.num_layers)
        return self.tail_bytes + self.layer_bytes * layers // max(1, self.num_layers)

    @property
    def host_bytes(self) -> int:
        """The rest."""
        return self.layer_bytes + self.tail_bytes + self.lookup_bytes - self.gpu_bytes


@dataclass(frozen=True)
class LoadPlan:
    """The files of a bundle that an engine loads.

    Attributes:
        encoder: of an encoder-decoder's encoder.
        segments: by index; those of the engine's share.
        draft_head: None where there is none, or another engine gives the draft logits.
        gpu_layers: as the user asked for; -1: all.
    """

    encoder: tuple[PlannedPart, ...]
    segments: Mapping[int, PlannedPart]
    draft_head: PlannedPart | None
    gpu_layers: int

    def __iter__(self) -> Iterator[PlannedPart]:
        yield from self.encoder
        yield from self.segments.values()
        if self.draft_head is not None:
            yield self.draft_head


def load_plan(bundle: Bundle, options: EngineOptions) -> LoadPlan:
    """What of a bundle is loaded, and where.

    Raises:
        UsageError: fewer than -1 GPU layers.
    """
    if options.gpu_layers < ALL:
        raise UsageError(f"--gpu-layers {options.gpu_layers}: expected a number of layers, or -1 for all")
    manifest, share = manifest_of(bundle, GgufManifest), options.share
    sizes = {entry.path: entry.size for entry in manifest.files}
    counts = [part.stop - part.first for part in manifest.encoder_segments]
    counts += [part.stop - part.first for part in manifest.segments]
    numbers = spread(counts, options.gpu_layers)
    before = len(manifest.encoder_segments)
    encoder = tuple(
        PlannedPart(bundle.file(part.file), counts[index], numbers[index], sizes[part.file])
        for index, part in enumerate(manifest.encoder_segments)
    )
    segments = {
        index: _segment(bundle, manifest, index, sizes, numbers[before + index])
        for index in range(len(manifest.segments))
        if share is None or index in share.segments
    }
    head, planned_head = manifest.draft_head, None
    if head is not None and (share is None or share.draft_head):
        # it judges the rows that leave the first segment, most of all
        whole = 2 if numbers[before] else 0
        planned_head = PlannedPart(bundle.file(head.file), 1, whole, 0, tail_bytes=sizes[head.file])
    return LoadPlan(encoder, segments, planned_head, options.gpu_layers)


def spread(counts: Sequence[int], gpu_layers: int) -> tuple[int, ...]:
    """Every file's own number of GPU layers.

    Args:
        counts: layers of each file, in the model's order.
        gpu_layers: of the whole model; -1: all.
    """
    left = sum(counts) if gpu_layers == ALL else gpu_layers - 1
    numbers = [0] * len(counts)
    for index in range(len(counts) - 1, -1, -1):
        here = min(counts[index], max(0, left))
        left -= here
        follows = here > 0 or (index == len(counts) - 1 and gpu_layers != 0)
        numbers[index] = here + 1 if follows else 0
    return tuple(numbers)


def _segment(
    bundle: Bundle, manifest: GgufManifest, index: int, sizes: Mapping[str, int], gpu_layers: int
) -> PlannedPart:
    """A segment's file. The last one holds the LM head, and the embedding table if that is another."""
    entry, table = manifest.segments[index], manifest.embedding
    tail = lookup = 0
    if entry.file == table.file:
        tail = min(table_bytes(table), sizes[entry.file])
        lookup = 0 if manifest.model.tied_embeddings else min(tail, sizes[entry.file] - tail)
    layers = sizes[entry.file] - tail - lookup
    return PlannedPart(bundle.file(entry.file), entry.stop - entry.first, gpu_layers, layers, tail, lookup)
