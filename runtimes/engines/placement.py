"""Which bundle's engine runs which segment, and whether the bundles belong together.

>>> placement = Placement((open_bundle("gguf/"), open_bundle("executorch/")), owners=(1, 0, 0))
>>> [str(stretch) for stretch in placement.stretches()]
['segment 0 (layers 0–1): executorch, executorch/', 'segments 1–2 (layers 2–11): gguf, gguf/']
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from skipstone.bundle import Bundle, Manifest
from skipstone.errors import BundleError, VocabularyMismatchError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine, Share
from skipstone.runtimes.engines.placed import PlacedEngine


@dataclass(frozen=True)
class Stretch:
    """Segments that follow each other on one engine.

    Attributes:
        segments: the first and the last of them.
        layers: likewise.
        format: of the bundle.
        folder: its folder.
    """

    segments: tuple[int, int]
    layers: tuple[int, int]
    format: str
    folder: Path

    def __str__(self) -> str:
        (first, last), (top, bottom) = self.segments, self.layers
        name = f"segment {first}" if first == last else f"segments {first}–{last}"
        return f"{name} (layers {top}–{bottom}): {self.format}, {self.folder.name}/"


@dataclass(frozen=True)
class Placement:
    """Bundles of one checkpoint with the same cuts, and who runs what.

    Attributes:
        bundles: the first is the one that the user generates from; its tokenizer and n-gram table serve.
        owners: for every segment, the index of its bundle.
        drafts: index of the bundle whose draft head is used; None: the first segment's, or another that has one.

    Raises:
        BundleError, VocabularyMismatchError: bundles that do not belong together.
    """

    bundles: tuple[Bundle, ...]
    owners: tuple[int, ...]
    drafts: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would compute nonsense."""
        for other in self.bundles[1:]:
            check_same_model(self.bundles[0], other)

    @property
    def used(self) -> tuple[Bundle, ...]:
        """Bundles that run something."""
        return tuple(self.bundles[index] for index in sorted({*self.owners, *self._named_drafts}))

    @property
    def near_tie_margin(self) -> float:
        """The widest of the used bundles'."""
        return max(bundle.manifest.near_tie_margin for bundle in self.used)

    @property
    def _named_drafts(self) -> tuple[int, ...]:
        return () if self.drafts is None else (self.drafts,)

    @property
    def name(self) -> str:
        """Names what runs where, and of which files: figures measured with another name are of no use."""
        digests = [_digest(bundle) for bundle in self.bundles]
        parts = (f"{segment}={digests[owner]}" for segment, owner in enumerate(self.owners))
        return ",".join([*parts, *(f"drafts={digests[index]}" for index in self._named_drafts)])

    def stretches(self) -> tuple[Stretch, ...]:
        """What runs where, from the first segment to the last."""
        manifest = self.bundles[0].manifest
        edges = (0, *manifest.exits, manifest.model.num_layers)
        found = []
        for owner, group in groupby(range(len(self.owners)), key=lambda segment: self.owners[segment]):
            segments, bundle = list(group), self.bundles[owner]
            first, last = segments[0], segments[-1]
            layers = (edges[first], edges[last + 1] - 1)
            found.append(Stretch((first, last), layers, bundle.manifest.format, bundle.path))
        return tuple(found)


def open_placed(placement: Placement, options: EngineOptions) -> PlacedEngine:
    """The engines of a placement as one.

    Args:
        placement: who runs what.
        options: `threads` are every engine's; `kv_type` and `gpu_layers` are for the first bundle's engine, the others
            take their defaults.

    Raises:
        SkipstoneError: as the engines'.
    """

    def open_share(number: int, share: Share) -> Engine:
        mine = options if number == 0 else EngineOptions(threads=options.threads)
        return open_engine(placement.bundles[number], replace(mine, share=share))

    return PlacedEngine(placement.owners, open_share, placement.drafts, placement.name)


# what must be the same: how to call it, and where it stands
_SAME: tuple[tuple[str, Callable[[Manifest], object]], ...] = (
    ("layers", lambda manifest: manifest.model.num_layers),
    ("hidden size", lambda manifest: manifest.model.hidden_size),
    ("exits", lambda manifest: manifest.exits),
    ("encoder layers", lambda manifest: manifest.model.encoder and manifest.model.encoder.num_layers),
    ("encoder exits", lambda manifest: manifest.model.encoder and manifest.model.encoder.exits),
)


def check_same_model(first: Bundle, other: Bundle) -> None:
    """Refuse bundles whose segments cannot go on from each other's hidden states.

    Raises:
        BundleError: another checkpoint, or other cuts.
        VocabularyMismatchError: other tokens.
    """
    mine, theirs = first.manifest, other.manifest
    sources = (mine.provenance.source_sha256, theirs.provenance.source_sha256)
    if None not in sources and sources[0] != sources[1]:
        raise BundleError(
            f"{other.path}: made from another checkpoint ({theirs.model.name}) than {first.path} ({mine.model.name})",
            hint="export both from the same one",
        )
    for name, value in _SAME:
        if value(mine) != value(theirs):
            raise BundleError(
                f"{other.path}: {name} {_plain(value(theirs))}, {first.path} has {_plain(value(mine))}",
                hint="export both from the same checkpoint with the same exits",
            )
    if mine.model.vocab_size != theirs.model.vocab_size or _tokenizer(first) != _tokenizer(other):
        raise VocabularyMismatchError(
            f"{other.path}: its tokens are not those of {first.path}",
            hint="export both from the same checkpoint",
        )


def _tokenizer(bundle: Bundle) -> str:
    """Hash of the tokenizer's file."""
    name = bundle.manifest.tokenizer
    return next(entry.sha256 for entry in bundle.manifest.files if entry.path == name)


def _digest(bundle: Bundle) -> str:
    """Names a bundle's format and files."""
    text = "".join(sorted(f"{entry.path} {entry.sha256}" for entry in bundle.manifest.files))
    return f"{bundle.manifest.format}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
