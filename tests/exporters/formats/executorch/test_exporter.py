"""The ExecuTorch exporter: what it refuses, what its self-test finds, what is lowered once only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skipstone.bundle import Bundle, executorch_manifest
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.formats.executorch import exporter, lowering, schemes
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.segments import KeyValues, cut_decoder, load_decoder
from skipstone.runtimes.quiet import quiet_libraries
from tests.exporters.tiny import CASES, make_checkpoint

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
    program = executorch_manifest(bundle).program
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
    assert executorch_manifest(again).program == executorch_manifest(first).program
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


def test_weights_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="has 40 inputs, a multiple of 32"):
        schemes.quantize(nn.Sequential(nn.Linear(40, 8)), schemes.scheme_of("8da4w"))


def test_quantising_is_rounding_to_fifteen_steps_per_group() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 16, bias=False)).requires_grad_(False)
    weight = layer[0].weight.clone()
    assert schemes.weight_bytes(layer, schemes.scheme_of("8da4w")) == 64 * 16 // 2 + 4 * 32
    schemes.quantize(layer, schemes.scheme_of("8da4w"))
    error = (layer(torch.eye(64)).T - weight).abs().reshape(16, 2, 32).amax(-1)
    step = weight.abs().reshape(16, 2, 32).amax(-1) / 7
    assert bool((error <= 0.62 * step + 0.01).all())
    assert float(error.max()) > 0


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


def test_the_oldest_programs_go_when_the_cache_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path))
    monkeypatch.setattr(lowering, "_CACHE_BYTES", 25)
    program = tmp_path / "model.pte"
    program.write_bytes(b"0123456789")
    for key in ("a", "b", "c"):
        lowering.keep(key, program, {"head": 0.5})
    kept = sorted(file.name for file in (tmp_path / "executorch").iterdir())
    assert len([name for name in kept if name.endswith(".pte")]) == 2
    assert lowering.fetch("missing", tmp_path / "out.pte") is None
    found = [key for key in "abc" if lowering.fetch(key, tmp_path / "out.pte") == {"head": 0.5}]
    assert len(found) == 2
