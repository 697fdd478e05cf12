"""A T5 checkpoint as one GGUF, against what llama.cpp's own converter writes; and the files that it is cut into."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.cut import Cut
from skipstone.exporters.formats.gguf.cut_t5 import write_decoder_segment, write_encoder_segment
from skipstone.exporters.formats.gguf.library import whole_model
from skipstone.exporters.formats.gguf.parts import GgufModel, zero_matrix
from skipstone.exporters.formats.gguf.t5 import idle_encoder_layer
from skipstone.exporters.formats.gguf.whole import native_float_type, write_whole
from skipstone.runtimes.engines.llamacpp.library import dequantizer
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny_t5 import EOS, PAD
from tests.oracles.gguf_golden import GOLDEN_T5, describe

_CONVERTED = json.loads(GOLDEN_T5.read_text(encoding="utf-8"))
_NORM = "dec.output_norm.weight"


@pytest.mark.parametrize("name", list(_CONVERTED))
def test_every_tensor_and_key_is_what_llama_cpps_converter_writes(
    name: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    """But for the scale of the head's input, which it loses: it belongs to the decoder's final norm."""
    checkpoint = open_checkpoint(tiny_t5(name.split("/")[0]))
    write_whole(checkpoint, tmp_path / "whole.gguf", "f32")
    ours, theirs = describe(tmp_path / "whole.gguf"), _CONVERTED[name]
    gain = checkpoint.tensor("decoder.final_layer_norm.weight").numpy()
    assert theirs["tensors"].pop(_NORM)[2] == hashlib.sha256(gain.tobytes()).hexdigest()
    del ours["tensors"][_NORM]
    scale = 1.0 if name.startswith("flan") else 64**-0.5
    np.testing.assert_allclose(
        GgufModel(tmp_path / "whole.gguf").parts[_NORM].data(), gain * scale, rtol=1e-6
    )
    assert ours["tensors"] == theirs["tensors"]
    assert {k: v for k, v in ours["keys"].items() if k in theirs["keys"]} == theirs["keys"]
    assert ours["keys"].keys() - theirs["keys"].keys() <= {"t5.vocab_size"}


@pytest.mark.parametrize("name", ["t5", "deep-decoder"])
def test_llama_cpp_computes_the_whole_file_as_eager_transformers(
    name: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    checkpoint = tiny_t5(name)
    write_whole(open_checkpoint(checkpoint), tmp_path / "whole.gguf", "f32")
    source, tokens = [*range(5, 40), EOS], [PAD, *range(50, 70)]
    with whole_model(tmp_path / "whole.gguf", 64) as model:
        model.encode(source)
        found = model.logits(tokens)
    reference = T5ForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(torch.tensor([source]), decoder_input_ids=torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_position_biases_stay_in_f32_whatever_the_matrices_are(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_t5("t5"))
    assert native_float_type(checkpoint) == "f32"
    write_whole(checkpoint, tmp_path / "whole.gguf", "f16")
    types = {name: part.type.name for name, part in GgufModel(tmp_path / "whole.gguf").parts.items()}
    assert types["enc.blk.0.attn_rel_b.weight"] == types["dec.blk.0.attn_rel_b.weight"] == "F32"
    assert types["dec.blk.2.cross_attn_q.weight"] == types["token_embd.weight"] == "F16"


def test_segments_hold_raw_copies_of_their_layers_numbered_from_zero(
    tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    write_whole(open_checkpoint(tiny_t5("t5")), tmp_path / "whole.gguf", "f32")
    whole = GgufModel(tmp_path / "whole.gguf")
    write_encoder_segment(whole, 1, 3, tmp_path / "encoder.gguf")
    write_decoder_segment(whole, Cut(1, 3, "logits"), tmp_path / "decoder.gguf")
    for file, side in (("encoder.gguf", "enc"), ("decoder.gguf", "dec")):
        piece = GgufModel(tmp_path / file)
        for name, part in piece.parts.items():
            if not name.startswith(f"{side}.blk."):
                continue
            _, _, layer, rest = name.split(".", 3)
            number = 0 if rest == "attn_rel_b.weight" else int(layer) + 1
            expected = whole.parts[f"{side}.blk.{number}.{rest}"]
            np.testing.assert_array_equal(part.data(), expected.data(), err_msg=f"{file} {name}")
    encoder, decoder = GgufModel(tmp_path / "encoder.gguf"), GgufModel(tmp_path / "decoder.gguf")
    assert (encoder.arch, encoder.num_layers) == ("t5encoder", 2)
    assert (decoder.arch, decoder.num_layers, decoder.fact("decoder_block_count")) == ("t5", 2, 2)
    assert not any(name.startswith("dec.") for name in encoder.parts)


def test_idle_layers_are_zeros_in_the_smallest_type_that_their_rows_fit() -> None:
    types = {columns: zero_matrix("zeros", 8, columns).type.name for columns in (384, 96, 80)}
    assert types == {384: "Q1_0", 96: "Q5_0", 80: "F16"}
    for columns in types:
        part = zero_matrix("zeros", 8, columns)
        row = dequantizer(part.type.name)(part.data()[0], columns)  # as ggml computes it
        assert (row.shape, row.any()) == ((columns,), False)
        assert part.data().nbytes == part.num_bytes
    layer = idle_encoder_layer(3, 128, 384, 256)
    assert sum(part.num_bytes for part in layer) < 0.04 * 4 * sum(part.num_elements for part in layer)
    assert {part.name.split(".")[2] for part in layer} == {"3"}
