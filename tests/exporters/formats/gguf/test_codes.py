"""Codes that a compressed checkpoint has, in the tensors of a GGUF: gguf-py says what their bytes stand for."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.folder import read_codes
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.whole import layout_of, write_whole
from skipstone.exporters.pipeline import export_checkpoint
from tests.exporters.compress.carried import logits, quantized
from tests.exporters.conftest import MakeTiny
from tests.exporters.test_pipeline import TOKENS, bundle_logits
from tests.exporters.tiny import GENTLE, Case, make_checkpoint

_MIX = {"0": "q4_1", "down_proj": "q8_0", "embed": "q5_1", "3": "q5_0"}
# Heads of 64, and rows that fill blocks of 256.
_WIDE = Case(
    "LlamaForCausalLM",
    {
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
    },
    scale=0.4,
)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of llama.cpp's rotary order, pairs (x1, y1, x2, y2, …) in each head, as halves (x1, x2, … y1, y2, …)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


def test_a_bundles_bytes_are_the_codes_in_the_layouts_that_were_chosen(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    folder = quantized(tiny("gentle"), tmp_path / "small", Quantize(scheme="q4_0", method="gptq", mix=_MIX))
    bundle = export_checkpoint(folder, tmp_path / "out", exits=())
    assert bundle.manifest.quantization.scheme == "q4_0"
    assert bundle.manifest.quantization.codes_sha256 == read_codes(folder).sha256
    expected = load_eager(folder).state_dict()
    whole = GgufModel(bundle.file(bundle.manifest.segments[0].file))
    kinds, seen = {}, 0
    for name, source in layout_of(open_checkpoint(folder)).sources.items():
        part = whole.parts[name]
        if len(part.shape) == 1:
            continue
        values = gguf.quants.dequantize(part.data(), part.type)
        if "attn_q" in name or "attn_k" in name:
            values = half_split(values, 2 if "attn_q" in name else 1)
        np.testing.assert_array_equal(values, expected[source.name].numpy(), err_msg=name)
        kinds[name], seen = part.type.name, seen + 1
    assert seen == 4 * 7 + 1
    assert kinds["token_embd.weight"] == "Q5_1"
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up")} == {"Q4_1"}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.3.ffn_down.weight"]) == ("Q8_0", "Q5_0")
    assert kinds["blk.1.attn_q.weight"] == "Q4_0"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4_k_m", "q2_k"])
def test_a_bundle_computes_what_torch_computes_with_the_codes_values(scheme: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "wide", _WIDE)
    folder = quantized(source, tmp_path / "small", Quantize(scheme=scheme, method="gptq"))
    bundle = export_checkpoint(folder, tmp_path / "out", exits=(1,))
    found, expected = bundle_logits(bundle, TOKENS), logits(folder, TOKENS).numpy()
    dense = logits(source, TOKENS).numpy()
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(
        expected
    )  # activations are rounded to 8 bits
    assert np.linalg.norm(found - dense) > 0.05 * np.linalg.norm(dense)  # and weights to few
    assert bundle.manifest.parity.agreement_with_reference > 0.9


def test_an_encoder_decoders_codes_are_carried_under_every_name_of_its_table(
    tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    mix = {"embed": "q8_0", "encoder.1": "q4_1"}
    for name in ("t5", "flan-t5"):
        folder = quantized(tiny_t5(name), tmp_path / name, Quantize(scheme="q4_0", mix=mix))
        write_whole(open_checkpoint(folder), tmp_path / f"{name}.gguf", codes=read_codes(folder))
        whole, expected = GgufModel(tmp_path / f"{name}.gguf"), load_eager(folder).state_dict()
        for target, source in layout_of(open_checkpoint(folder)).sources.items():
            part = whole.parts[target]
            if len(part.shape) == 2:
                values = gguf.quants.dequantize(part.data(), part.type)
                np.testing.assert_array_equal(values, expected[source.name].numpy(), err_msg=target)
        assert whole.parts["token_embd.weight"].type.name == "Q8_0"
        assert whole.parts["enc.blk.1.attn_q.weight"].type.name == "Q4_1"
        assert whole.parts["dec.blk.1.cross_attn_k.weight"].type.name == "Q4_0"
        assert whole.get("general.file_type") == 2


def test_codes_of_another_model_are_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    small = quantized(tiny("gentle"), tmp_path / "small", Quantize(scheme="q4_0"))
    other = open_checkpoint(make_checkpoint(tmp_path / "wide", _WIDE))
    with pytest.raises(CheckpointError, match=r"codes of \d+ weights have no place in GGUF"):
        write_whole(other, tmp_path / "whole.gguf", codes=read_codes(small))
    deep = Case("LlamaForCausalLM", {**_WIDE.config, "num_hidden_layers": 4}, scale=GENTLE.scale)
    other = open_checkpoint(make_checkpoint(tmp_path / "deep", deep))
    with pytest.raises(CheckpointError, match="codes in the layout q8_0 do not fit a weight of shape"):
        write_whole(other, tmp_path / "whole.gguf", codes=read_codes(small))
