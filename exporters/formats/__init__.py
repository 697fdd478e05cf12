"""Output formats: a registry from name to exporter, imported when used.

A new format is one module or package with a function of the type `Exporter`, and one line in `FORMATS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from skipstone.bundle import Manifest, ModelFacts, Quantization
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.probe import Probe

if TYPE_CHECKING:
    from skipstone.exporters.compress.work import FixedCodes


@dataclass(frozen=True)
class Step:
    """One step of an export, as told to the caller: `index` counts from 1 to `total`."""

    name: str
    index: int
    total: int


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for; None means the default, which may depend on the model.

    Attributes:
        quantize: scheme; None: the format's default, or what a .gguf has.
        exits: layer counts to cut at; empty: no cuts. Of an encoder-decoder, the decoder's.
        encoder_exits: layer counts to cut an encoder at; None: those recorded with the checkpoint, or none.
        draft_vocab_size: rows of the draft head; 0: the whole vocabulary.
        draft_text: text to count tokens and n-grams in.
        imatrix: calibration text for the importance matrix.
        calibration: text that fixes the scales of activations, in schemes that round them so.
        mix: schemes of single parts, say `head=8da8w,0-1=none`.
        codes: those that the checkpoint's weights have, to be carried as they are, in a scheme of this format, which is
            `quantize`; None: there are none, or the weights are to be rounded anew.
        threads: CPU threads.
        context_length: positions to plan K/V for, where the format fixes them or the model sets no limit.
        max_source_length: tokens of an encoder's source at most.
        target: what to compile for, where the format compiles; None: the format's default.
        widths: numbers of rows to compile graphs for, ascending, where the target takes fixed shapes alone.
        share_weights: whether to add graphs that share their weights between widths, for targets that can.
    """

    quantize: str | None = None
    exits: tuple[int, ...] | None = None
    encoder_exits: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    draft_text: Path | None = None
    imatrix: Path | None = None
    calibration: Path | None = None
    mix: str | None = None
    codes: FixedCodes | None = None
    threads: int = 2
    context_length: int | None = None
    max_source_length: int | None = None
    target: str | None = None
    widths: tuple[int, ...] | None = None
    share_weights: bool | None = None


def refuse_options(options: ExportOptions, reasons: Mapping[str, str]) -> None:
    """Refuse what a format does not take.

    Args:
        options: what the user asked for.
        reasons: by the name of a field of `ExportOptions`, why it cannot be given.

    Raises:
        UsageError: one was given.
    """
    for name, reason in reasons.items():
        value = getattr(options, name)
        if value is not None:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else "" if value is True else value
            flag = f"--{name.replace('_', '-')} {shown}".rstrip()
            raise UsageError(f"{flag}: {reason}", hint="leave it out")


@dataclass(frozen=True)
class Oracle:
    """What the self-test compares the artefact with: a class (`module:Class`) and the arguments to make it with.

    Its instances have `logits(tokens)`, float32 [n, vocab_size] of the uncut model in the same quantisation (of an
    encoder-decoder `logits(tokens, source)`), and `draft_logits(hidden, token_ids)`, the final norm and those rows of
    the head over hidden states [n, hidden_size].

    Attributes:
        made_by: the class.
        arguments: by name.
        here: whether the exporting process asks it, instead of the one that the engine runs in, which then need not load
            torch.
    """

    made_by: str
    arguments: dict[str, str]
    here: bool = False


@dataclass(frozen=True)
class Artefacts:
    """What a format wrote: the manifest's parts, and what the self-test compares with.

    Attributes:
        manifest: makes the format's manifest from the keys that all formats share.
        files: names of every file of the bundle.
        oracle: the uncut model in the same quantisation, for the self-test alone; None where there never is one.
        probe: what the self-test runs.
        reference: checkpoint folder to compare with; None where there is none.
        min_agreement: share of positions at which the best token must be the reference's.
        reference_tolerance: see `skipstone.exporters.selftest.SelfTest`.
        slack: likewise.
        source_sha256: hash of the input.
        engine: library and version.
        runs_here: whether this machine can run it, and so test it.
    """

    model: ModelFacts
    exits: tuple[int, ...]
    manifest: Callable[..., Manifest]
    draft_table: str | None
    quantization: Quantization
    files: tuple[str, ...]
    oracle: Oracle | None
    probe: Probe
    reference: Path | None
    min_agreement: float
    reference_tolerance: float | None
    source_sha256: str
    engine: str
    runs_here: bool = True
    slack: float = 1.0


class Exporter(Protocol):
    """Writes the artefacts of one format into `folder`; `scratch` is deleted afterwards."""

    def __call__(
        self, source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
    ) -> Artefacts: ...


FORMATS = {
    "gguf": "skipstone.exporters.formats.gguf.exporter:export_gguf",
    "executorch": "skipstone.exporters.formats.executorch.exporter:export_executorch",
    "onnx": "skipstone.exporters.formats.onnx.exporter:export_onnx",
    "coreml": "skipstone.exporters.formats.coreml.exporter:export_coreml",
    "ethosu": "skipstone.exporters.formats.ethosu.exporter:export_ethosu",
}

_EXTRAS = {
    "gguf": "llamacpp",
    "executorch": "executorch",
    "onnx": "onnx",
    "coreml": "executorch,onnx",
    "ethosu": "executorch,onnx",
}


def exporter_of(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
        UsageError: no such format; lists them.
        ExportError: a package that the format needs is not installed.
    """
    target = FORMATS.get(name)
    if target is None:
        raise UsageError(f"--format {name}: unknown format, expected {', '.join(FORMATS)}")
    module, function = target.split(":")
    try:
        return cast("Exporter", getattr(importlib.import_module(module), function))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "skipstone":
            raise
        raise ExportError(
            f"--format {name}: {error.name} is not installed",
            hint=f'install it with `pip install "skipstone[export,{_EXTRAS[name]}]"`',
        ) from error
