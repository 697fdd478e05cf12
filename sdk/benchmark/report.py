"""A benchmark's report: what ran where, the rows, and writing it as JSON."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from skipstone.benchmark.rows import Row
from skipstone.bundle import Bundle, CostCurve
from skipstone.devices.machine import processor_name
from skipstone.errors import UsageError
from skipstone.runtimes.cores import num_cores

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BundleFacts:
    """What was measured: name, shape, exits, scheme, sizes of the files in bytes, and the near-tie margin."""

    path: str
    model: str
    parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    exits: tuple[int, ...]
    quantization: str
    bytes: int
    near_tie_margin: float
    source_sha256: str | None


@dataclass(frozen=True)
class Machine:
    """Where it ran."""

    system: str
    processor: str
    cores: int
    python: str
    engine: str


@dataclass(frozen=True)
class Report:
    """Everything a reader needs to judge the rows.

    Attributes:
        rows: `plain` first, then as asked, baselines last.
        prompts, repeats, max_new_tokens, threads, context_length, sampling: how it was run.
        cost: the cost curve, measured at the start or given.
        cost_followed: the curve on this machine as sampled all along; None: it was not followed.
        command: the command line.
        started: ISO time, UTC.
        seconds: the whole benchmark took.
        placement: what ran where, where segments ran on several bundles' engines.
    """

    rows: tuple[Row, ...]
    bundle: BundleFacts
    machine: Machine
    prompts: int
    prompts_source: str
    repeats: int
    max_new_tokens: int
    ignore_eos: bool
    threads: int
    context_length: int
    kv_type: str
    temperature: float
    cost: CostCurve
    cost_followed: CostCurve | None
    command: tuple[str, ...]
    started: str
    seconds: float
    placement: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        curves = {"cost": self.cost.model_dump(mode="json")}
        if self.cost_followed is not None:
            curves["cost_followed"] = self.cost_followed.model_dump(mode="json")
        return {"schema_version": SCHEMA_VERSION} | asdict(self) | curves


def bundle_facts(bundle: Bundle) -> BundleFacts:
    """Facts of a bundle for the report."""
    manifest = bundle.manifest
    model = manifest.model
    return BundleFacts(
        path=bundle.path.name,
        model=model.name,
        parameters=model.parameters,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        exits=manifest.exits,
        quantization=manifest.quantization.scheme,
        bytes=sum(entry.size for entry in manifest.files),
        near_tie_margin=manifest.near_tie_margin,
        source_sha256=manifest.provenance.source_sha256,
    )


def this_machine() -> Machine:
    """This machine, as far as it tells."""
    from skipstone.runtimes.engines.llamacpp.library import build_identity

    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        cores=num_cores(),
        python=platform.python_version(),
        engine=build_identity(),
    )


def check_writable(path: Path, flag: str = "--json") -> None:
    """Refuse an output file that cannot be written, before hours are spent on its content.

    Raises:
        UsageError: its folder is missing or closed, or it is a folder itself.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {path}: cannot be written", hint="name a file in a folder that exists")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as a whole or not at all.

    Raises:
        UsageError: the disk refuses; nothing is left behind.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str, flag: str = "--json") -> None:
    """Write a text file as a whole or not at all.

    Raises:
        UsageError: the disk refuses; nothing is left behind.
    """
    draft: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as stream:
            draft = Path(stream.name)
            stream.write(text)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise UsageError(f"{flag} {path}: cannot be written: {error}", hint="choose another file") from error
