"""The ExecuTorch exporter: what it refuses, what its self-test finds, what is lowered once only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.formats.executorch import exporter
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.segments import KeyValues, cut_decoder, load_decoder
from skipstone.runtimes.quiet import quiet_libraries
from tests.exporters.tiny import CASES, GENTLE, make_checkpoint

pytestmark = pytest.mark.slow
Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", CASES["llama-untied"])


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """An export to out/ with an empty cache of programs."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return functools.partial(
        export_checkpoint, output=tmp_path / "out", format="executorch", quantize="none", exits=(1,)
    )


def test_the_manifest_says_what_the_program_holds(tiny: Path, export: Export) -> None:
    bundle = export(tiny)
    program = manifest_of(bundle, ExecuTorchManifest).program
    assert {method.name for method in program.methods} == {
        "embed", "segment_0", "segment_1", "head", "draft_head", "compact",
    }  # fmt: skip
    parity = bundle.manifest.parity
    assert parity.reference is not None
    assert max(parity.reference, parity.split, parity.draft_verify) <= 1e-4
    delegated = {method.name: method.delegated for method in program.methods}
    assert delegated["head"] > 0.5
    weights = {method.name: method.weight_bytes for method in program.methods}
    config: Any = load_decoder(tiny).config
    assert weights["head"] == 4 * config.hidden_size * (config.vocab_size + 1)
    assert bundle.file(program.file).stat().st_size > sum(weights.values())


def test_methods_that_do_not_share_their_state_fail_the_self_test(
    tiny: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ExecuTorch loads and runs such a program without a word."""
    with quiet_libraries():
        passes = importlib.import_module("executorch.exir.passes")
    planning = passes.MemoryPlanningPass
    monkeypatch.setattr(passes, "MemoryPlanningPass", lambda share_mutable_buffers: planning())
    with pytest.raises(ExportError, match=r"self-test: .* differ by"):
        export(tiny)
    assert not (tmp_path / "out").exists()


def test_a_program_is_lowered_once(
    tiny: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(tiny)
    content = first.file("model.pte").read_bytes()

    def never(*_arguments: object) -> None:
        raise AssertionError("lowered again")

    monkeypatch.setattr(exporter, "lower", never)
    again = export(tiny, overwrite=True)
    assert again.file("model.pte").read_bytes() == content
    assert manifest_of(again, ExecuTorchManifest).program == manifest_of(first, ExecuTorchManifest).program
    for other in ({"exits": (2,)}, {"context_length": 100}, {"draft_vocab_size": 9}, {"quantize": "8da8w"}):
        with pytest.raises(AssertionError, match="lowered again"):
            export(tiny, **{"overwrite": True, **other})
    weights = load_file(tiny / "model.safetensors")
    weights["lm_head.weight"][0] += 1.0
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in tiny.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="lowered again"):
        export(changed, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q8_0"}, "--quantize q8_0: unknown scheme for --format executorch"),
        ({"context_length": 10}, "--context-length 10: this model takes 64 to"),
        ({"context_length": 10**6}, "--context-length 1000000"),
        ({"imatrix": "text.txt"}, "--imatrix text.txt: importance matrices belong to --format gguf"),
        ({"exits": (99,)}, "99"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny: Path, export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny, **options)
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_no_input_for_this_format(export: Export) -> None:
    with pytest.raises(UsageError, match="starts from a checkpoint"):
        export("model.gguf")


def test_the_cut_model_computes_what_the_whole_one_does(tiny: Path) -> None:
    """In eager torch, with an attention written here."""

    class Plain(KeyValues):
        def attend(self, query, key, value, scaling, rows):  # type: ignore[no-untyped-def]
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            scores = query @ key.transpose(2, 3) * scaling + rows
            return (scores.softmax(-1) @ value).transpose(1, 2)

    from transformers import AutoModelForCausalLM

    tokens = torch.arange(5, 25)[None]
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    parts = cut_decoder(load_decoder(tiny), (1,), np.array([3, 7], np.int32), lambda _shape: Plain())
    mask = torch.full((20, 20), float("-inf")).triu(1)
    with torch.no_grad():
        expected = whole(tokens).logits
        hidden = parts.embedding(tokens)
        for segment in parts.segments:
            hidden = segment.run(hidden, torch.arange(20)[None], mask)
        assert parts.draft_head is not None
        torch.testing.assert_close(parts.head(hidden), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(parts.draft_head(hidden), expected[:, :, [3, 7]], atol=1e-4, rtol=0)


_CALIBRATION = (
    "def read(path):\n    return path.read_text()\n\nthe river of the other day is not the same\n" * 12
)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"quantize": "fp16"}, 2.0),
        ({"quantize": "8da8w"}, 1.0),
        ({"quantize": "8da8w", "mix": "1=none,head=none"}, 4.0),
        ({"quantize": "int8"}, 1.0),
    ],
    ids=["fp16", "8da8w", "mix", "int8"],
)
def test_every_scheme_runs_and_speculates_as_it_decodes(
    tmp_path: Path, export: Export, options: dict[str, Any], weights: float
) -> None:
    checkpoint = make_checkpoint(tmp_path / "gentle", replace(GENTLE, config={"num_hidden_layers": 2}))
    text = tmp_path / "calibration.txt"
    text.write_text(_CALIBRATION, encoding="utf-8")
    if options["quantize"] == "int8":
        options = {**options, "calibration": text}
    bundle = export(checkpoint, **{**options, "held_out": text})
    manifest = bundle.manifest
    assert manifest.quality is not None
    assert manifest.quality.kl_divergence is not None
    assert manifest.quality.kl_divergence < 0.1
    sizes = {
        method.name: method.weight_bytes for method in manifest_of(bundle, ExecuTorchManifest).program.methods
    }
    config: Any = load_decoder(checkpoint).config
    per_weight = sizes["head"] / (config.hidden_size * config.vocab_size)
    assert weights <= per_weight < weights + 0.1
    bench = BenchOptions(
        strategies=("layerskip", "staged"),
        prompts=("def read(", "the other day"),
        max_new_tokens=24,
        repeats=1,
        memory=False,
    )
    for row in run_bench(bundle.path, bench).rows:
        assert row.other_divergences == 0
        assert row.identical + row.near_tie_divergences == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "--quantize int8: needs a calibration text"),
        (
            {"quantize": "8da4w", "calibration": "text.txt"},
            "--calibration text.txt: --quantize 8da4w needs none",
        ),
        ({"quantize": "int8", "calibration": "missing.txt"}, "--calibration missing.txt: cannot be read"),
        ({"mix": "9=none"}, "no layers 9"),
        ({"format": "gguf", "mix": "0=none"}, "--mix 0=none: llama.cpp's schemes are mixes"),
        (
            {"format": "gguf", "calibration": "text.txt"},
            "--calibration text.txt: calibrated activations belong",
        ),
        (
            {"format": "gguf", "context_length": 64},
            "--context-length 64: a GGUF bundle of a decoder alone takes it when it is opened",
        ),
    ],
)
def test_options_of_other_schemes_and_formats_are_refused(
    tiny: Path, export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny, **options)
    assert not (tmp_path / "out").exists()
