"""`--place`, `skipstone.load(place=…)`: segments of one model on the engines of several bundles.

    >>> model = skipstone.load("gguf/", place={0: "executorch/"})           # segment 0 there, the others here
    >>> model = skipstone.load("gguf/", place={"0-1": "executorch/"})
    >>> model = skipstone.load("gguf/", place={"auto": "executorch/"})      # as the measured costs have it
    >>> model = skipstone.load("gguf/", place={"auto": "executorch/", "trace": "trace.jsonl"})
    >>> model.generate("def f(").stats.placement
    ('segment 0 (layers 0–1): executorch, executorch/', 'segments 1–2 (layers 2–11): gguf, gguf/')

The bundles must be exports of one checkpoint with the same exits. Quantisation, format and device may differ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.devices.accepted import acceptance_of, check_model, kept_acceptance
from skipstone.devices.cost import measure
from skipstone.devices.curves import kept_or_measured
from skipstone.devices.placement import Acceptance, choose_placement
from skipstone.devices.traces import read_trace
from skipstone.errors import UsageError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.placed import PlacedEngine
from skipstone.runtimes.engines.placement import Placement, open_placed

Place = Mapping[int | str, str | os.PathLike[str]]
AUTO, TRACE = "auto", "trace"
_COST_SECONDS = 2.0
_HINT = "say --place 0=DIR, --place 1-2=DIR or --place auto=DIR, with that also --place trace=FILE"


@dataclass(frozen=True)
class Opened:
    """A bundle's engine, or that of several bundles.

    Attributes:
        bundle: the one that the user generates from.
        engine: weights loaded.
        placement: who runs what; None where all is one bundle's.
        acceptance: by which that was chosen; None where the user did.
    """

    bundle: Bundle
    engine: Engine
    placement: Placement | None = None
    acceptance: Acceptance | None = None

    @property
    def near_tie_margin(self) -> float:
        """See `skipstone.bundle.Parity`; of several bundles the widest."""
        return (self.placement or self.bundle.manifest).near_tie_margin

    @property
    def described(self) -> tuple[str, ...]:
        """What runs where, a line each, and by what acceptance it was chosen; nothing where all is one bundle's."""
        lines = () if self.placement is None else tuple(map(str, self.placement.stretches()))
        return lines if self.acceptance is None else (*lines, f"acceptance: {self.acceptance}")

    @property
    def part_owners(self) -> tuple[tuple[Bundle, ...], Bundle]:
        """The bundle whose weights run each segment, and the one whose draft head is used."""
        if self.placement is None or not isinstance(self.engine, PlacedEngine):
            return (self.bundle,) * len(self.engine.exits), self.bundle
        bundles, owners = self.placement.bundles, self.placement.owners
        drafts = owners[0] if self.engine.drafts is None else self.engine.drafts
        return tuple(bundles[owner] for owner in owners), bundles[drafts]


def open_places(bundle: Bundle, options: EngineOptions, place: Place) -> Opened:
    """A bundle's engine, with some of its segments on other bundles' engines.

    Args:
        bundle: opened and checked.
        options: how the engines run; see `skipstone.runtimes.engines.placement.open_placed`.
        place: from segments (`0`, `"1-2"`) to folders of other bundles, or from `"auto"` to one that may run some. With
            that, `"trace"` names a trace that tells what is accepted; without it what was kept beside a bundle does.

    Raises:
        UsageError: segments that the model does not have, or named twice; a trace that is none, or of another model.
        BundleError, VocabularyMismatchError: a bundle that does not belong to this one.
        EngineError: as the engines'.
    """
    acceptance = None
    if AUTO in place:
        placement, acceptance = _choose(bundle, options, place)
    else:
        placement = _named(bundle, place)
    return Opened(bundle, open_placed(placement, options), placement, acceptance)


def parse_place(texts: Sequence[str]) -> dict[int | str, str | os.PathLike[str]]:
    """What the command line says: `0=DIR`, `1-2=DIR`, `auto=DIR`, `trace=FILE`.

    Raises:
        UsageError: not of this form, or a name given twice.
    """
    found: dict[int | str, str | os.PathLike[str]] = {}
    for text in texts:
        where, equals, folder = text.partition("=")
        if not equals or not where or not folder:
            raise UsageError(f"--place {text}: expected SEGMENT=DIR", hint=_HINT)
        if where in found:
            raise UsageError(f"--place {text}: {where} is placed twice", hint="name it once")
        found[where] = folder
    return found


def _named(bundle: Bundle, place: Place) -> Placement:
    """The placement that the user names."""
    num_segments = len(bundle.manifest.exits) + 1
    bundles, owners = [bundle], [0] * num_segments
    taken: set[int] = set()
    for where, folder in place.items():
        segments = _segments(where, folder, num_segments)
        if taken & segments:
            twice = ", ".join(map(str, sorted(taken & segments)))
            raise UsageError(
                f"--place {where}={folder}: segment {twice} is placed twice", hint="name it once"
            )
        taken |= segments
        number = _number_of(bundles, folder)
        for segment in segments:
            owners[segment] = number
    return Placement(tuple(bundles), tuple(owners))


def _segments(where: int | str, folder: str | os.PathLike[str], num_segments: int) -> set[int]:
    """`0` → {0}, `1-2` → {1, 2}.

    Raises:
        UsageError: neither, or segments that are not there.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(where), re.ASCII)
    if found is None:
        raise UsageError(f"--place {where}={folder}: {where} is no segment and no range of them", hint=_HINT)
    start, stop = int(found[1]), int(found[2] or found[1])
    if not start <= stop < num_segments:
        raise UsageError(
            f"--place {where}={folder}: this bundle's segments are 0 to {num_segments - 1}",
            hint="`skipstone inspect` shows which layers each holds",
        )
    return set(range(start, stop + 1))


def _number_of(bundles: list[Bundle], folder: str | os.PathLike[str]) -> int:
    """The number of a folder's bundle, opened if it is a new one."""
    resolved = Path(folder).resolve()
    for number, known in enumerate(bundles):
        if known.path.resolve() == resolved:
            return number
    bundles.append(open_bundle(folder))
    return len(bundles) - 1


def _choose(bundle: Bundle, options: EngineOptions, place: Place) -> tuple[Placement, Acceptance]:
    """The placement that the engines' cost curves make the fastest, and what was taken to be accepted."""
    if set(place) - {AUTO, TRACE}:
        raise UsageError("--place auto: does not go with named segments", hint="name all of them, or none")
    other, num_segments = open_bundle(place[AUTO]), len(bundle.manifest.exits) + 1
    bundles = (bundle, other)
    Placement(bundles, (0,) * num_segments)  # refused before anything is measured
    acceptance = _acceptance(bundles, place)
    curves = [_curve(bundle, options), _curve(other, EngineOptions(threads=options.threads))]
    exits = (*bundle.manifest.exits, bundle.manifest.model.num_layers)
    choice = choose_placement(curves, exits, acceptance)
    return Placement(bundles, choice.owners, choice.drafts), acceptance


def _acceptance(bundles: Sequence[Bundle], place: Place) -> Acceptance:
    """What the user's trace tells, or what was kept beside one of the bundles; else estimated.

    Raises:
        UsageError: the trace is none, or of another model.
    """
    if TRACE in place:
        path, said = Path(place[TRACE]), f"--place trace={os.fspath(place[TRACE])}"
        trace = read_trace(path)
        check_model(trace, bundles[0], said)
        return replace(acceptance_of(trace, said), source=str(path))
    for bundle in bundles:
        kept = kept_acceptance(bundle)
        if kept is not None:
            return kept
    manifest = bundles[0].manifest
    return Acceptance.usual((*manifest.exits, manifest.model.num_layers))


def _curve(bundle: Bundle, options: EngineOptions) -> CostCurve:
    """The cost curve of a whole bundle: the one that was kept, or measured now."""
    engine = open_engine(bundle, replace(options, share=None))
    try:
        return kept_or_measured(
            bundle,
            engine,
            options,
            lambda: measure(engine, budget_seconds=_COST_SECONDS),
            budget_seconds=_COST_SECONDS,
        )
    finally:
        engine.close()
