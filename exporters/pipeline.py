"""Checkpoint → bundle, in one call.

    >>> from skipstone.exporters.pipeline import export_checkpoint
    >>> bundle = export_checkpoint("samples/models/coder", "out/", quantize="q8_0", exits=(2, 4))
    >>> export_checkpoint("samples/models/coder", "out/", compress=parse_steps(["drop_layers:count=3,by=top"]))

The bundle is written into a folder beside the target, put to the self-test there, and moved into place only
after it passed; a failure of any kind leaves nothing behind. What this machine cannot run (a program compiled for
another device) is not tested, and its manifest says so.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.bundle import (
    Bundle,
    Manifest,
    Parity,
    Provenance,
    bundle_in_progress,
    describe_file,
    open_bundle,
    write_manifest,
)
from skipstone.errors import ExportError, UsageError
from skipstone.exporters import draft_sibling, lexicon
from skipstone.exporters.checkpoint import find_folder
from skipstone.exporters.compress.record import has_codes, read_record
from skipstone.exporters.compress.steps import Step as CompressionStep
from skipstone.exporters.compress.steps import Target as CompressionTarget
from skipstone.exporters.formats import (
    Artefacts,
    ExportOptions,
    Progress,
    Step,
    exporter_of,
    refuse_options,
)
from skipstone.exporters.quality import held_out_texts, measure_quality
from skipstone.exporters.selftest import SelfTest, run_self_test
from skipstone.runtimes.cores import num_cores

if TYPE_CHECKING:
    from skipstone.devices.profiles import DeviceProfile
    from skipstone.exporters.compress.work import FixedCodes

_UNTESTED = Parity(
    reference=None,
    reference_tolerance=None,
    split=0.0,
    split_tolerance=0.0,
    draft_verify=0.0,
    width_noise=0.0,
    near_tie_margin=0.0,
)
_SCRATCH = ".scratch"
_STEPS = (
    "compress", "read", "write", "calibrate", "quantise", "trace", "lower", "save", "split", "draft head", "hash",
    "self-test", "measure quality",
)  # fmt: skip


def export_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    format: str | None = None,
    quantize: str | None = None,
    exits: Sequence[int] | None = None,
    encoder_exits: Sequence[int] | None = None,
    draft_vocab_size: int | None = None,
    draft_text: str | os.PathLike[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    mix: str | None = None,
    requantize: bool = False,
    context_length: int | None = None,
    widths: Sequence[int] | None = None,
    share_weights: bool = False,
    max_source_length: int | None = None,
    held_out: str | os.PathLike[str] | None = None,
    compress: Sequence[CompressionStep] = (),
    compress_text: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = None,
    draft_quantize: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model, test the artefact against its source, and write a bundle.

    Args:
        source: checkpoint folder, hub name, or a .gguf file.
        output: folder of the bundle.
        device: name of a device profile.
        format: name of a format (`skipstone.exporters.formats.FORMATS`); None: the one that the checkpoint's codes are
            for, else the device's first.
        quantize: scheme; None: the one that the checkpoint's codes are for, else the device's default for the format,
            or for a .gguf the one it has.
        exits: layer counts to cut at; None: those recorded with the checkpoint, or a default by depth; (): no
            cuts. Of an encoder-decoder, the decoder's.
        encoder_exits: layer counts at which an encoder can stop; None: those recorded with the checkpoint, or none.
        draft_vocab_size: rows of the draft head; None: a quarter of the vocabulary; 0: all of it.
        draft_text: text in which tokens are counted to choose the draft head's rows, and n-grams for the draft
            table; None: what was recorded with the checkpoint, if anything.
        imatrix: calibration text for an importance matrix (gguf).
        calibration: text that fixes the scales of activations (executorch, `int8`).
        mix: schemes of single parts, say `head=8da8w,0-1=none` (executorch).
        requantize: whether the weights of a checkpoint whose codes are fixed are rounded anew, instead of carrying the
            codes.
        context_length: positions to plan K/V for, in formats that fix them at export and for models that set no limit
            themselves; None: at most 512.
        widths: numbers of rows to compile graphs for, where the device takes fixed shapes alone; None: the device's.
        share_weights: whether to add graphs that share their weights between widths (Qualcomm).
        max_source_length: tokens of an encoder's source at most; None: 512.
        held_out: text, or .jsonl of `{"text": …}`, to measure perplexity on.
        compress: steps to take first (`skipstone.exporters.compress.recipe`); the artefact is then compared with the
            checkpoint that they leave. Measured on `held_out`, or on `compress_text`.
        compress_text: what these steps learn from.
        draft: checkpoint of a smaller model with the same vocabulary, to draft for this one from the same bundle.
        draft_quantize: its scheme; None: that of its fixed codes, else as `quantize`.
        overwrite: replace a bundle that stands at `output`.
        progress: told of every step as it begins.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that cannot work.
        DeviceError: an unknown device.
        ExportError: the artefact failed its self-test, or the disk is full.
        BundleError: `output` cannot be written.
    """
    from skipstone.devices.profiles import load_profile

    if compress:
        from skipstone.exporters.compress.before_export import compress_first
    elif compress_text is not None:
        raise UsageError(f"--compress-text {compress_text}: no step would read it", hint="leave it out")
    text = None if held_out is None else Path(held_out)
    if text is not None:
        held_out_texts(text)  # one that cannot be read stops here
    profile = load_profile(device)
    codes = None if requantize else _fixed_codes(source)
    chosen = profile.choose_format(_format_for(codes, profile) if format is None else format)
    exporter, support = exporter_of(chosen), profile.formats[chosen]
    keeps_its_own = os.fspath(source).endswith(".gguf")
    if quantize is None and not keeps_its_own:
        quantize = support.default_quantize if codes is None else codes.scheme
    options = ExportOptions(
        quantize=quantize,
        exits=None if exits is None else tuple(exits),
        encoder_exits=None if encoder_exits is None else tuple(encoder_exits),
        draft_vocab_size=draft_vocab_size,
        draft_text=None if draft_text is None else Path(draft_text),
        imatrix=None if imatrix is None else Path(imatrix),
        calibration=None if calibration is None else Path(calibration),
        mix=mix,
        codes=codes,
        threads=num_cores(),
        context_length=context_length,
        max_source_length=max_source_length,
        target=support.backend if support.engine != "llamacpp" else None,
        widths=None if widths is None else tuple(widths),
        share_weights=share_weights or None,
    )
    if codes is not None:
        _refuse_other_codes(source, codes, chosen, options)
    if draft is not None:
        draft_sibling.check_sibling(source, draft)
    target = Path(output)
    step = _Reporter(progress)
    with bundle_in_progress(target, overwrite=overwrite) as folder:
        scratch = folder / _SCRATCH
        scratch.mkdir()
        made_from = os.fspath(source)
        if compress:
            made_from = compress_first(
                source,
                compress,
                CompressionTarget(chosen, quantize, device),
                scratch,
                text=compress_text,
                held_out=held_out,
                report=step,
            )
        artefacts = exporter(made_from, options, folder, scratch, step)
        if text is not None and not artefacts.runs_here:
            raise UsageError(
                f"--held-out {text}: this machine cannot run what is made for --device {device}",
                hint="leave it out; the same scheme's figures can be taken with --device cpu",
            )
        step("hash")
        manifest = _manifest(os.fspath(source), device, artefacts, folder)
        write_manifest(folder, manifest)
        figures: dict[str, object] = {}
        if artefacts.runs_here:
            step("self-test")
            figures["parity"] = run_self_test(folder, _self_test(artefacts), scratch)
            if text is not None:
                step("measure quality")
                figures["quality"] = measure_quality(folder, text, artefacts.reference)
        if draft is not None:
            export_checkpoint(
                draft,
                folder / draft_sibling.FOLDER,
                device=device,
                format=chosen,
                quantize=draft_quantize or (None if _has_codes(draft) else options.quantize),
                exits=(),
                imatrix=imatrix,
                calibration=calibration,
                context_length=context_length,
                widths=widths,
                max_source_length=max_source_length,
                progress=progress,
            )
            figures |= {
                "draft_model": draft_sibling.FOLDER,
                "files": (*manifest.files, *draft_sibling.list_sibling(folder)),
            }
        write_manifest(folder, manifest.model_copy(update=figures))
        shutil.rmtree(scratch)
    return open_bundle(target, verify_hashes=False)


def _has_codes(source: str | os.PathLike[str]) -> bool:
    return not os.fspath(source).endswith(".gguf") and has_codes(find_folder(source))


def _fixed_codes(source: str | os.PathLike[str]) -> FixedCodes | None:
    """The codes that a checkpoint's weights have, if they have any."""
    if not _has_codes(source):
        return None
    from skipstone.exporters.compress.folder import read_codes  # needs torch

    return read_codes(find_folder(source))


def _format_for(codes: FixedCodes | None, profile: DeviceProfile) -> str | None:
    """The format that codes are for, where the device takes it."""
    if codes is None:
        return None
    from skipstone.exporters.compress.quantize.plan import format_of

    wanted = format_of(codes.scheme)
    return wanted if wanted in profile.formats else None


def _refuse_other_codes(
    source: str | os.PathLike[str], codes: FixedCodes, format: str, options: ExportOptions
) -> None:
    """Refuse to carry codes into another scheme than their own, and what would choose them anew.

    Raises:
        UsageError: names what can be done instead.
    """
    from skipstone.exporters.compress.quantize.plan import format_of

    wanted = format_of(codes.scheme)
    if (format, str(options.quantize).lower()) != (wanted, codes.scheme):
        raise UsageError(
            f"{source}: its codes are fixed for --format {wanted} --quantize {codes.scheme}, "
            f"not for --format {format} --quantize {options.quantize}",
            hint="export it as that, compress the checkpoint that it came from for this target, or pass --requantize "
            "to round its weights anew",
        )
    refuse_options(options, dict.fromkeys(("imatrix", "mix"), "the checkpoint's codes are fixed already"))


class _Reporter:
    """Turns step names into `Step`s; steps left out by a model just do not show."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, name: str) -> None:
        if self._progress is not None:
            self._progress(Step(name, _STEPS.index(name) + 1, len(_STEPS)))


def _self_test(artefacts: Artefacts) -> SelfTest:
    if artefacts.oracle is None:
        raise ExportError(
            f"{artefacts.engine}: its artefacts run here, but there is nothing to compare them with"
        )
    return SelfTest(
        oracle=artefacts.oracle,
        reference=artefacts.reference,
        probe=artefacts.probe,
        min_agreement=artefacts.min_agreement,
        reference_tolerance=artefacts.reference_tolerance,
        slack=artefacts.slack,
    )


def _manifest(source: str, device: str, artefacts: Artefacts, folder: Path) -> Manifest:
    words = lexicon.carry_over(artefacts.reference, artefacts.model, folder)
    files = artefacts.files if words is None else (*artefacts.files, words)
    return artefacts.manifest(
        device=device,
        model=artefacts.model,
        exits=artefacts.exits,
        draft_table=artefacts.draft_table,
        lexicon=words,
        quantization=artefacts.quantization,
        compression=None if artefacts.reference is None else read_record(artefacts.reference),
        parity=_UNTESTED if artefacts.runs_here else None,
        files=tuple(describe_file(folder, name) for name in files),
        provenance=Provenance(
            source=source,
            source_sha256=artefacts.source_sha256,
            tool=f"skipstone {importlib.metadata.version('skipstone')}",
            engine=artefacts.engine,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
    )
