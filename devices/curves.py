"""Cost curves that outlive the process: kept beside the bundle they belong to, and read from files of other machines.

    >>> measured = kept_or_measured(bundle, engine, options, lambda: measure(engine), budget_seconds=2.0)
    >>> measured.curve.segments[0]         # measured at first use, read from the file afterwards

A curve lies in `DIR/.skipstone/cost-KEY.json`, which is not one of the bundle's hashed files, or in the user's cache
folder where DIR cannot be written. It holds for one machine, engine, library, driver, set of options and artefact:
everything in `CurveKey`. When one of these changes, it is measured again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from skipstone.bundle import Bundle, CostCurve
from skipstone.devices.kept import artefacts_hash, folders, keep_text
from skipstone.devices.machine import gpu_driver, processor_name
from skipstone.errors import EngineError, UsageError
from skipstone.runtimes.cores import num_cores
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.base import Engine

SCHEMA_VERSION: Literal[1] = 1
_METHOD = 2  # of `skipstone.devices.cost`; raised when its figures come to mean something else
_KIND = "skipstone cost curve"
_HINT = "make one with `skipstone bench DIR --curve-only --json FILE`"
# what computes the bundles of a format, plug-ins included; GGUF's library tells more of itself than a version
_DISTRIBUTIONS = {
    "executorch": ("executorch",),
    "onnx": ("onnxruntime", "onnxruntime-qnn", "onnxruntime-ep-webgpu"),
}


class CurveKey(BaseModel):
    """What a curve depends on.

    Attributes:
        processor, cores, system: the machine; cores are those that the process may use.
        threads: CPU threads at most.
        threads_chosen: the user left the number of threads to the engine, which may run small parts with fewer.
        kv_type: type of K and V.
        gpu_layers: layers on a GPU.
        driver: the GPU's, "" where none is used.
        format: the bundle's.
        library: the engine's library, its version and build; of all that may take part where engines are several.
        placement: what runs where, of an engine that is made of several.
        artefacts: sha256 over the names and hashes of the bundle's files.
        method: how it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    cores: int
    system: str
    threads: int
    threads_chosen: bool
    kv_type: str
    gpu_layers: int
    driver: str = ""
    format: str
    library: str
    placement: str = ""
    artefacts: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    method: int = _METHOD

    @property
    def digest(self) -> str:
        """Names the curve's file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class MeasuredCurve(BaseModel):
    """A cost curve and where it comes from; the content of a curve file.

    Attributes:
        kind, schema_version: what the file is.
        status: `estimated` where no device was measured; then of programs of fixed shapes, for `curve.widths` alone.
        key: what the curve holds for.
        exits: layer counts at the segments' ends, the last one included.
        curve: seconds by segment and width.
        budget_seconds: about how long measuring might take.
        measured: when, ISO time, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["skipstone cost curve"] = "skipstone cost curve"
    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["measured", "estimated"] = "measured"
    key: CurveKey
    exits: tuple[int, ...]
    curve: CostCurve
    budget_seconds: float
    measured: str

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        curve, width = self.curve, len(self.curve.widths)
        if not curve.widths or any(a >= b for a, b in pairwise((0, *curve.widths))):
            raise ValueError(f"widths {curve.widths}: positive and rising ones were expected")
        if len(curve.segments) != len(self.exits):
            raise ValueError(f"{len(curve.segments)} segments for exits {self.exits}")
        rows = [*curve.segments, *([curve.draft_head] if curve.draft_head else [])]
        if any(len(row) != width for row in rows):
            raise ValueError(f"{width} figures were expected for every part, one of each width")
        if not all(math.isfinite(seconds) and seconds > 0.0 for row in rows for seconds in row):
            raise ValueError("seconds that are not positive numbers")
        return self


@dataclass(frozen=True)
class FoundCurve:
    """A curve file beside a bundle: its content, or why it cannot be used."""

    path: Path
    content: MeasuredCurve | None
    problem: str = ""


def curve_key(bundle: Bundle, engine: Engine, options: EngineOptions) -> CurveKey:
    """What the curve of an opened engine depends on."""
    placement = str(getattr(engine, "placement", ""))
    formats = [bundle.manifest.format, *(["gguf", *_DISTRIBUTIONS] if placement else [])]
    return CurveKey(
        processor=processor_name(),
        cores=num_cores(),
        system=f"{platform.system()} {platform.machine()}",
        threads=getattr(engine, "threads", 1),
        threads_chosen=options.threads is None,
        kv_type=str(getattr(engine, "kv_type", "f32")),
        gpu_layers=options.gpu_layers,
        driver=gpu_driver() if options.gpu_layers else "",
        format=bundle.manifest.format,
        library="; ".join(filter(None, map(_library, dict.fromkeys(formats)))),
        placement=placement,
        artefacts=artefacts_hash(bundle),
    )


def new_curve(
    bundle: Bundle, engine: Engine, options: EngineOptions, curve: CostCurve, budget_seconds: float
) -> MeasuredCurve:
    """A curve just measured, with what it holds for.

    Raises:
        ValidationError: it is no whole table of positive figures.
    """
    return MeasuredCurve(
        key=curve_key(bundle, engine, options),
        exits=engine.exits,
        curve=curve,
        budget_seconds=budget_seconds,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def kept_or_measured(
    bundle: Bundle,
    engine: Engine,
    options: EngineOptions,
    measure: Callable[[], CostCurve],
    *,
    budget_seconds: float,
) -> CostCurve:
    """The curve that was kept for this bundle, machine and engine; else a new one, kept for the next time.

    A file that is damaged, newer, or of another machine counts as none, and a disk that takes no file is no error.

    Args:
        bundle: whose.
        engine: opened from it.
        options: it was opened with.
        measure: measures the curve.
        budget_seconds: about how long `measure` may take, for the record.
    """
    key = curve_key(bundle, engine, options)
    for folder in folders(bundle):
        found = _read(folder / f"cost-{key.digest}.json")
        if found.content is not None and found.content.key == key and found.content.exits == engine.exits:
            return found.content.curve
    curve = measure()
    with contextlib.suppress(
        ValidationError
    ):  # an engine that takes single rows only has no curve worth keeping
        keep(bundle, new_curve(bundle, engine, options, curve, budget_seconds))
    return curve


def keep(bundle: Bundle, measured: MeasuredCurve) -> Path | None:
    """Keep a curve beside the bundle, or else in the user's cache folder.

    Returns:
        Its file; None where neither can be written.
    """
    return keep_text(bundle, f"cost-{measured.key.digest}.json", measured.model_dump_json(indent=2) + "\n")


def kept_curves(bundle: Bundle) -> Iterator[FoundCurve]:
    """All curve files of a bundle, of this machine and others, unusable ones included."""
    for folder in folders(bundle):
        for path in sorted(folder.glob("cost-*.json")):
            found = _read(path)
            if found.content is not None and found.content.key.artefacts != artefacts_hash(bundle):
                found = FoundCurve(path, None, "measured with other artefacts")
            yield found


def read_curve(path: Path, flag: str = "--curve") -> MeasuredCurve:
    """A curve file that the user names.

    Raises:
        UsageError: missing, damaged, newer, or with too few widths to plan with.
    """
    found = _read(path)
    if found.content is None:
        raise UsageError(f"{flag} {path}: {found.problem}", hint=_HINT)
    check_widths(found.content, path, flag, _HINT)
    return found.content


def check_widths(measured: MeasuredCurve, path: Path, flag: str, hint: str) -> None:
    """Refuse a curve that nothing can be planned with.

    Raises:
        UsageError: a single width, or none of one row; with the hint.
    """
    widths = measured.curve.widths
    if widths[0] != 1 or len(widths) < 2:
        raise UsageError(
            f"{flag} {path}: widths {', '.join(map(str, widths))}: planning needs 1 and at least one more",
            hint=hint,
        )


def check_fits(measured: MeasuredCurve, bundle: Bundle, path: Path, flag: str = "--curve") -> None:
    """Refuse a curve of another bundle.

    Raises:
        UsageError: its exits or its artefacts are not the bundle's.
    """
    exits = (*bundle.manifest.exits, bundle.manifest.model.num_layers)
    check_exits(measured, exits, path, flag)
    if measured.key.artefacts != artefacts_hash(bundle):
        raise UsageError(
            f"{flag} {path}: measured with other files than those of {bundle.path} "
            f"(artefacts {measured.key.artefacts[:12]}, here {artefacts_hash(bundle)[:12]})",
            hint="copy this very bundle to the device and measure there",
        )


def check_exits(measured: MeasuredCurve, exits: Sequence[int], path: Path, flag: str = "--curve") -> None:
    """Refuse a curve of a model that is cut elsewhere.

    Raises:
        UsageError: naming both.
    """
    if measured.exits != tuple(exits):
        raise UsageError(
            f"{flag} {path}: measured for segments up to layers {', '.join(map(str, measured.exits))}, "
            f"these end at {', '.join(map(str, exits))}",
            hint="measure a bundle with the same exits",
        )


def _library(format: str) -> str:
    """Names and versions of what computes a format's bundles; "" where it is not installed."""
    if format == "gguf":
        from skipstone.runtimes.engines.llamacpp.library import build_identity

        try:
            return build_identity()
        except EngineError:
            return ""
    found = []
    for name in _DISTRIBUTIONS.get(format, (format,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _read(path: Path) -> FoundCurve:
    """A curve file's content, or what is wrong with it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return FoundCurve(path, None, f"not readable as JSON: {error}")
    if not isinstance(raw, dict) or raw.get("kind") != _KIND:
        return FoundCurve(path, None, "not a cost curve")
    if raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version")
        return FoundCurve(path, None, f"schema version {version!r}, this Skipstone reads {SCHEMA_VERSION}")
    try:
        return FoundCurve(path, MeasuredCurve.model_validate_json(json.dumps(raw)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        return FoundCurve(path, None, f"{where}: {first['msg']}")
