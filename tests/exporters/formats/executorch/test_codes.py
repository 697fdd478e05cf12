"""Codes that a compressed checkpoint has, in the weights of a program."""

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipstone.bundle import Bundle
from skipstone.errors import CheckpointError, ExportError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.folder import read_codes
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.work import FixedCodes
from skipstone.exporters.encoder_decoder import Cuts, Limits
from skipstone.exporters.formats.executorch import codes as carrying
from skipstone.exporters.formats.executorch import exporter
from skipstone.exporters.formats.executorch.codes import mix_of_codes, put_codes, put_codes_in_parts
from skipstone.exporters.formats.executorch.schemes import SCHEMES, quantize
from skipstone.exporters.formats.executorch.source_program import (
    cut_for_slots,
    named_parts,
    quantize_parts,
)
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from tests.exporters.compress.carried import logits, quantized
from tests.exporters.conftest import MakeTiny
from tests.exporters.test_pipeline import TOKENS, bundle_logits
from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.exporters.tiny_t5 import EOS, PAD, T5Case, make_t5

_SMALL = replace(GENTLE, config={"num_hidden_layers": 2, "tie_word_embeddings": False})
_MIX = {"1": "8da8w", "0.down_proj": "8da8w", "0.o_proj": "none", "head": "8da8w"}


def fixed(folder: Path) -> FixedCodes:
    found = read_codes(folder)
    assert found is not None
    return found


def as_xnnpack_stores(codes: torch.Tensor, grid: str) -> bytes:
    """Int8 as it is; int4 from 0 on, the even column in the low half of a byte."""
    if grid != "int4_g32":
        return codes.numpy().tobytes()
    shifted = (codes + 8).to(torch.uint8)
    return (shifted[:, 1::2] << 4 | shifted[:, ::2]).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codes")
    source = make_checkpoint(root / "gentle", _SMALL)
    return quantized(source, root / "small", Quantize(scheme="8da4w", method="gptq", mix=_MIX))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer in either stack, a head of its own."""
    root = tmp_path_factory.mktemp("t5-codes")
    shape = {"num_layers": 1, "num_decoder_layers": 1, "tie_word_embeddings": False}
    source = make_t5(root / "t5", T5Case(shape, scale=0.4))
    mix = {"encoder.0.wi": "8da8w", "0.k": "8da8w", "0.wo": "none"}
    return quantized(source, root / "small", Quantize(scheme="8da4w", method="gptq", mix=mix))


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("program")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPSTONE_CACHE", str(root / "cache"))
        return export_checkpoint(folder, root / "out", exits=(1,))


@pytest.mark.slow
def test_a_programs_bytes_are_the_codes(folder: Path, bundle: Bundle) -> None:
    program, found = bundle.file("model.pte").read_bytes(), fixed(folder).weights
    assert len(found) == 2 * 7 - 1 + 2
    for name, weight in found.items():
        codes, scales = weight.parts["codes"], weight.parts["scales"]
        if name == "model.embed_tokens.weight":
            continue  # packed in another order; its rows are looked at below
        assert as_xnnpack_stores(codes, weight.grid) in program, name
        if weight.grid != "int4_g32":  # of which XNNPACK keeps the scales in bfloat16
            assert scales.numpy().tobytes() in program, name


@pytest.mark.slow
def test_a_program_computes_what_torch_computes_with_the_codes_values(folder: Path, bundle: Bundle) -> None:
    assert bundle.manifest.format == "executorch"
    quantization = bundle.manifest.quantization
    assert (quantization.scheme, quantization.codes_sha256) == ("8da4w", fixed(folder).sha256)
    assert quantization.mix["layer_1"] == quantization.mix["head"] == "8da8w"
    assert quantization.mix["layer_0.mlp.down_proj"] == "8da8w"
    assert quantization.mix["layer_0.self_attn.o_proj"] == "none"
    found, expected = bundle_logits(bundle, TOKENS), logits(folder, TOKENS).numpy()
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    assert bundle.manifest.parity.agreement_with_reference > 0.9


@pytest.mark.slow
def test_codes_left_out_of_the_program_fail_the_self_test(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle has them, in its own process."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    module = "skipstone.exporters.formats.executorch.decoder_program.put_codes_in_parts"
    monkeypatch.setattr(module, _spoiled)
    with pytest.raises(ExportError, match="self-test"):
        export_checkpoint(changed, tmp_path / "out", exits=(1,))


def _spoiled(parts: Any, codes: FixedCodes, tokens: Any) -> None:
    turned = {
        name: replace(weight, parts={**weight.parts, "codes": weight.parts["codes"].flip(0)})
        for name, weight in codes.weights.items()
    }
    carrying.put_codes_in_parts(parts, replace(codes, weights=turned), tokens)


@pytest.mark.parametrize("name", ["gentle", "flan-t5"])
def test_an_encoder_decoders_parts_hold_what_the_codes_stand_for(
    name: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    step = Quantize(scheme="8da4w", method="gptq", mix={"encoder.1": "8da8w", "0.k": "8da8w"})
    folder = quantized(tiny_t5(name), tmp_path / "small", step)
    expected, tokens = load_eager(folder).state_dict(), np.array([5, 300, 7], np.int32)
    mix = mix_of_codes(fixed(folder), open_checkpoint(folder).tensor_files)
    assert mix.names["encoder_layer_1"] == "8da8w"
    parts = cut_for_slots(folder, Cuts((1,), (2,)), Limits(32, 64), tokens)
    quantize_parts(parts, mix)
    put_codes_in_parts(named_parts(parts), fixed(folder), tokens)
    names = {"encoder_layer": "encoder.block", "layer": "decoder.block"}
    heads = iter((slice(None), torch.from_numpy(tokens).long()))
    seen = 0
    for part, module in named_parts(parts):
        rows = next(heads) if part == "head" else slice(None)
        for matrix, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
                stack, _, number = part.rpartition("_")
                table = "lm_head.weight" if part == "head" else "shared.weight"
                weight = f"{names[stack]}.{number}.{matrix}.weight" if stack else table
                held: Any = layer.weight
                assert torch.equal(held.dequantize(), expected[weight][rows]), weight
                seen += 1
    assert seen == len(fixed(folder).weights) + (
        2 if name == "gentle" else 1
    )  # heads that share the table, or one


@pytest.mark.slow
def test_an_encoder_decoders_program_holds_the_codes_and_computes_what_torch_does(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    bundle = export_checkpoint(t5, tmp_path / "out", exits=(), context_length=64, max_source_length=32)
    codes = fixed(t5)
    quantization = bundle.manifest.quantization
    assert (bundle.manifest.format, quantization.scheme) == ("executorch", "8da4w")
    assert quantization.codes_sha256 == codes.sha256
    program = bundle.file("model.pte").read_bytes()
    for name, weight in codes.weights.items():
        if name != "shared.weight":  # packed in another order
            assert as_xnnpack_stores(weight.parts["codes"], weight.grid) in program, name
    assert {weight.grid for weight in codes.weights.values()} == {"int4_g32", "int8_channel"}
    source, tokens = [*range(7, 30), EOS], [PAD, *range(40, 60)]
    with closing(open_engine(bundle, EngineOptions(threads=1))) as engine, Session(engine, 64) as session:
        session.encode(source)
        found = np.stack(session.advance(session.push(tokens), session.exits[-1]))
    with torch.no_grad():
        given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([tokens])}
        expected = load_eager(t5)(**given).logits[0].numpy()
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    assert bundle.manifest.parity.agreement_with_reference > 0.9


@pytest.mark.slow
def test_a_program_with_other_codes_is_another_program(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(bundle.path.parent / "cache"))

    def never(*_arguments: object) -> None:
        raise AssertionError("lowered again")

    monkeypatch.setattr(exporter, "lower", never)
    assert export_checkpoint(folder, tmp_path / "same", exits=(1,)).manifest.files == bundle.manifest.files
    other = shutil.copytree(folder, tmp_path / "other")
    listed = other / "quantization.json"
    listed.write_text(listed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    for options in ({}, {"requantize": True, "quantize": "8da4w"}):
        with pytest.raises(AssertionError, match="lowered again"):
            export_checkpoint(other, tmp_path / "out", exits=(1,), format="executorch", **options)


def test_a_layer_in_one_layout_is_named_once_and_floats_are_named(folder: Path) -> None:
    weights = [*fixed(folder).weights, "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"]
    mix = mix_of_codes(fixed(folder), weights)
    assert mix.names == {
        "head": "8da8w",
        "layer_0.mlp.down_proj": "8da8w",
        "layer_0.self_attn.o_proj": "none",
        "layer_1": "8da8w",
    }
    assert mix.of("layer_0.mlp.up_proj").name == "8da4w"
    assert mix.of("layer_1.mlp.up_proj").name == "8da8w"


def test_a_draft_head_gets_the_rows_of_its_tokens(folder: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Linear(64, 3, bias=False))
    quantize(head, SCHEMES["8da8w"])
    put_codes("head", head, fixed(folder), torch.tensor([7, 300, 8]))
    weight: Any = head[0].weight
    expected = fixed(folder).weights["lm_head.weight"].parts
    assert torch.equal(weight.qdata, expected["codes"][[7, 300, 8]])
    assert torch.equal(weight.scale, expected["scales"][[7, 300, 8]])


def test_codes_of_another_shape_are_refused(folder: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Linear(64, 100, bias=False))
    quantize(head, SCHEMES["8da8w"])
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: codes in the layout int8_channel do not fit"
    ):
        put_codes("head", head, fixed(folder))
