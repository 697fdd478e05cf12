"""A model over the windows of a text, the dense model beside it.

>>> measure_folder(Path("out"), (2, 6), probes, Path("samples/models/coder"), (2, 6)).kl_divergence
0.0123
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skipstone.bundle import MANIFEST_NAME, open_bundle
from skipstone.exporters.evaluation.readers import ArtefactReader, CheckpointReader, Reader
from skipstone.exporters.evaluation.sums import Prediction, Sums
from skipstone.exporters.isolation import num_threads, run_isolated
from skipstone.exporters.probe import Probe
from skipstone.runtimes.engines import EngineOptions


def measure_folder(
    model: Path,
    exits: Sequence[int],
    probes: Sequence[Probe],
    dense: Path | None = None,
    dense_exits: Sequence[int | None] = (),
    threads: int | None = None,
    kv_type: str | None = None,
) -> Prediction:
    """`measure` of a folder: of a bundle in a process of its own, which its engine may bring down.

    Args:
        model: a bundle's folder or a checkpoint's.
        exits: see `measure`.
        probes: see `measure`.
        dense: folder of the dense model's checkpoint.
        dense_exits: see `measure`.
        threads: of a bundle's engine; None: one for small models, else one per core.
        kv_type: of a bundle's engine; None: the usual one.

    Raises:
        ExportError: the engine crashed.
        EngineError: it refused.
    """
    if not (model / MANIFEST_NAME).is_file():
        return _measure_folder(model, exits, probes, dense, dense_exits, threads, kv_type)
    found = run_isolated(
        "skipstone.exporters.evaluation.measure:measure_json",
        model=str(model),
        exits=list(exits),
        probes=[asdict(probe) for probe in probes],
        dense=None if dense is None else str(dense),
        dense_exits=list(dense_exits),
        threads=threads,
        kv_type=kv_type,
    )
    return Prediction.of_json(found)


def measure_json(
    model: str,
    exits: list[int],
    probes: list[dict[str, Any]],
    dense: str | None,
    dense_exits: list[int | None],
    threads: int | None,
    kv_type: str | None,
) -> dict[str, Any]:
    """`measure_folder` from and to JSON. Called through `run_isolated`."""
    given = [Probe(tuple(probe["tokens"]), tuple(probe["source"])) for probe in probes]
    against = None if dense is None else Path(dense)
    return _measure_folder(Path(model), exits, given, against, dense_exits, threads, kv_type).as_json()


def _measure_folder(
    model: Path,
    exits: Sequence[int],
    probes: Sequence[Probe],
    dense: Path | None,
    dense_exits: Sequence[int | None],
    threads: int | None,
    kv_type: str | None,
) -> Prediction:
    reader = open_reader(model, exits, max(len(probe.tokens) for probe in probes), threads, kv_type)
    named = sorted({exit_layer for exit_layer in dense_exits if exit_layer is not None})
    try:
        against = None if dense is None else CheckpointReader(dense, named)
        return measure(reader, probes, exits, against, dense_exits)
    finally:
        reader.close()


def measure(
    model: Reader,
    probes: Sequence[Probe],
    exits: Sequence[int] = (),
    dense: Reader | None = None,
    dense_exits: Sequence[int | None] = (),
) -> Prediction:
    """Have a model, and the dense one, read texts.

    Args:
        model: what is measured.
        probes: windows of a text, at least two tokens each.
        exits: inner exits of the model that are judged.
        dense: what it is compared with; None: nothing.
        dense_exits: for each of `exits` the dense model's at the same place; None: it has none.
    """
    sums = Sums(exits, dense_exits or [None] * len(exits))
    for probe in probes:
        sums.add(probe.tokens, model.read(probe), None if dense is None else dense.read(probe))
    return sums.prediction()


def open_reader(
    folder: Path,
    exits: Sequence[int],
    context_length: int,
    threads: int | None = None,
    kv_type: str | None = None,
) -> Reader:
    """A bundle's folder or a checkpoint's, opened; `exits` are those that a checkpoint is read at, a bundle has its own.
    See `open_artefact`.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return CheckpointReader(folder, exits)
    return open_artefact(folder, context_length, threads, kv_type)


def open_artefact(
    folder: Path, context_length: int, threads: int | None = None, kv_type: str | None = None
) -> ArtefactReader:
    """A bundle, opened; its hashes are taken to be right.

    Args:
        folder: the bundle's.
        context_length: positions to hold.
        threads: None: one for small models, else one per core.
        kv_type: type of K and V; None: the usual one.

    Raises:
        BundleError, EngineError, UsageError: it cannot be opened, or does not hold so many positions.
    """
    bundle = open_bundle(folder, verify_hashes=False)
    small = num_threads(sum(entry.size for entry in bundle.manifest.files))
    options = EngineOptions(threads=small if threads is None else threads, kv_type=kv_type)
    return ArtefactReader(bundle, options, context_length)
