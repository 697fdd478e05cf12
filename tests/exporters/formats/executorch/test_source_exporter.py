"""Exporting encoder-decoders to ExecuTorch: what is refused, what the manifest says, what is lowered once only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipstone.bundle import SOURCE_PROGRAM_INTERFACE, Bundle, ExecuTorchManifest, manifest_of
from skipstone.errors import UsageError
from skipstone.exporters.encoder_decoder import Cuts, Limits
from skipstone.exporters.formats.executorch import exporter, source_program
from skipstone.exporters.formats.executorch.methods import Shape
from skipstone.exporters.formats.executorch.schemes import parse_mix
from skipstone.exporters.formats.executorch.source_modules import SlotCompaction
from skipstone.exporters.formats.executorch.source_program import (
    SourceProgram,
    code_hash,
    cut_for_slots,
    named_parts,
    quantize_parts,
)
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.reference import EagerReference
from tests.exporters.tiny import VOCAB_SIZE
from tests.exporters.tiny_t5 import T5_CASES, T5Case, make_t5

Export = Callable[..., Bundle]
SHALLOW = T5Case({"num_layers": 1, "num_decoder_layers": 1}, scale=0.4)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("tiny") / "t5", T5_CASES["flan-t5"])


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer in either stack: quickly lowered."""
    return make_t5(tmp_path_factory.mktemp("tiny") / "shallow", SHALLOW)


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """An export to out/ with an empty cache of programs."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return functools.partial(
        export_checkpoint, output=tmp_path / "out", format="executorch", exits=(), max_source_length=72
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q8_0"}, "--quantize q8_0: unknown scheme for --format executorch"),
        ({"quantize": "int8"}, "--quantize int8: not for encoder-decoders"),
        (
            {"device": "android-vulkan"},
            "target vulkan: encoder-decoders are lowered for xnnpack alone",
        ),
        ({"context_length": 10}, "--context-length 10: this model takes 64 to 2048"),
        ({"context_length": 4096}, "--context-length 4096: this model takes 64 to 2048"),
        ({"max_source_length": 0}, "--max-source-length 0"),
        ({"max_source_length": 4096}, "--max-source-length 4096: at most 2048 are planned for"),
        ({"exits": (3,)}, "--exits 3: exit 3 is out of range for 3 layers"),
        ({"encoder_exits": (4,)}, "--encoder-exits 4: exit 4 is out of range for 4 layers"),
        ({"mix": "encoder=8da8w", "quantize": "none"}, "--mix: 'encoder' is no part"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    t5: Path, export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(t5, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_encoder_decoder_is_lowered_once(
    shallow: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(shallow, quantize="none", context_length=80)
    program = manifest_of(first, ExecuTorchManifest).program
    assert {method.name for method in program.methods} == {
        "embed", "encoder_0", "cross", "segment_0", "head", "compact",
    }  # fmt: skip
    assert (program.interface, program.slots, program.max_width) == (SOURCE_PROGRAM_INTERFACE, 80, 64)
    encoder = first.manifest.model.encoder
    assert encoder is not None
    assert (encoder.max_source_length, first.manifest.model.context_length) == (72, 80)
    parity = first.manifest.parity
    assert parity is not None
    assert parity.reference is not None
    assert max(parity.reference, parity.split, parity.draft_verify) <= 1e-4
    content = first.file(program.file).read_bytes()

    def never(*_arguments: object) -> None:
        raise AssertionError("lowered again")

    monkeypatch.setattr(exporter, "lower", never)
    again = export(shallow, quantize="none", context_length=80, overwrite=True)
    assert again.file(program.file).read_bytes() == content
    for other in ({"max_source_length": 71}, {"context_length": 81}, {"quantize": "8da8w"}):
        with pytest.raises(AssertionError, match="lowered again"):
            export(shallow, **{"quantize": "none", "context_length": 80, "overwrite": True, **other})
    monkeypatch.setattr(exporter, "code_hash", lambda: "another release")
    with pytest.raises(AssertionError, match="lowered again"):
        export(shallow, quantize="none", context_length=80, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp16", "8da8w"])
def test_the_other_schemes_pass_the_self_test(scheme: str, shallow: Path, export: Export) -> None:
    bundle = export(shallow, quantize=scheme)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.agreement_with_reference is not None
    assert parity.agreement_with_reference >= {"fp16": 0.95, "8da8w": 0.8}[scheme]
    assert bundle.manifest.quantization.scheme == scheme


def test_a_programs_hash_covers_the_modules_of_encoder_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_hash()
    changed = tmp_path / "changed.py"
    for name in ("source_modules", "encoder_decoder", "encoder_decoder_modules"):
        module = getattr(source_program, name)
        changed.write_bytes(Path(module.__file__).read_bytes() + b"\n# other\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert code_hash() != before, name
    assert code_hash() == before


def test_every_byte_of_weights_is_counted_for_one_method(t5: Path) -> None:
    parts = cut_for_slots(t5, Cuts((1,), (2,)), Limits(72, 80), np.arange(9, dtype=np.int32))
    mix = parse_mix("none", None, 3)
    sizes = SourceProgram(parts, Shape(64, 80, 64), 72).weight_bytes(mix)
    assert set(sizes) == {"encoder_0", "encoder_1", "cross", "segment_0", "segment_1", "head", "draft_head"}
    modules = [module for _, module in named_parts(parts) if module is not parts.embedding]
    weights = {id(weight): weight.numel() for module in modules for weight in module.parameters()}
    norm = parts.source.norm
    weights |= {id(weight): weight.numel() for weight in norm.parameters()}
    shared = 64  # the heads' norm
    assert sum(sizes.values()) == 4 * (sum(weights.values()) + shared)
    assert sizes["cross"] == 4 * (3 * 2 * 64 * 96 + 64)


@pytest.mark.parametrize("scheme", ["8da4w", "8da8w", "fp16"])
def test_a_quantised_model_stays_near_the_checkpoint(scheme: str, tmp_path: Path) -> None:
    """In eager torch; the biases by position, and in fp16 what feed-forwards end with, keep float32."""
    gentle = make_t5(tmp_path / "gentle", T5_CASES["gentle"])
    parts = cut_for_slots(gentle, Cuts((), ()), Limits(72, 80), None)
    quantize_parts(parts, parse_mix(scheme, None, 3))
    assert parts.decoder[0].table.dtype == parts.encoder[0].table.dtype == torch.float32
    if scheme == "fp16":
        kinds = {name: weight.dtype for name, weight in parts.decoder[0].named_parameters()}
        assert {dtype for name, dtype in kinds.items() if "wo" in name} == {torch.float32}
        assert {dtype for name, dtype in kinds.items() if "wo" not in name} == {torch.float16}
    source, text = list(range(2, 40)), [1, *range(5, 25)]
    places = torch.arange(len(text))
    with torch.no_grad():
        parts.source(parts.encoder[0](parts.embedding(torch.tensor([source]))))
        distances = (places[:, None] - places).clamp(min=-1)
        hidden = parts.embedding(torch.tensor([text]))
        hidden = parts.decoder[0](hidden, places[None], distances, torch.arange(len(source)))
        found = parts.head(hidden)[0].numpy()
    expected = EagerReference(gentle).logits(text, source)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < {"fp16": 3e-3, "8da8w": 0.05, "8da4w": 0.3}[scheme]


def test_compaction_moves_rows_of_every_layer_and_leaves_the_rest(t5: Path) -> None:
    """All sources are read before a target is written; the source's K and V are not touched."""
    parts = cut_for_slots(t5, Cuts((1,), ()), Limits(72, 24), None)
    generator = torch.Generator().manual_seed(0)
    buffers = {name: buffer for segment in parts.decoder for name, buffer in segment.named_buffers()}
    buffers = {name: buffer for name, buffer in buffers.items() if ".core." in name}
    assert len(buffers) == 3 * 2 * 2
    for buffer in buffers.values():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    expected = {name: buffer.numpy().copy() for name, buffer in buffers.items()}
    sources, targets = [7, 9, 12, 6], [4, 5, 6, 7]
    for name, array in expected.items():
        if "SelfAttention" in name:
            array[:, targets] = array[:, sources].copy()
    with torch.no_grad():
        returned = SlotCompaction(parts.decoder)(torch.tensor(sources), torch.tensor([targets]))
    assert returned.tolist() == sources
    for name, buffer in buffers.items():
        np.testing.assert_array_equal(buffer.numpy(), expected[name], err_msg=name)
    assert parts.head(torch.zeros(1, 1, 64)).shape[-1] == VOCAB_SIZE
