"""Zero-padding an encoder-decoder to a bigger shape leaves the function as it was, and its exits where they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from samples.inflate_t5 import Shape, inflate_t5, main
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import open_checkpoint
from tests.exporters.tiny import CASES, make_checkpoint
from tests.exporters.tiny_t5 import T5_CASES, make_t5

BIGGER = Shape(encoder_layers=7, layers=5, hidden=96, heads=9, feed_forward=160)


def logits(folder: Path, encoder_layers: int | None = None, layers: int | None = None) -> np.ndarray:
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.encoder.block = model.encoder.block[:encoder_layers]
    model.decoder.block = model.decoder.block[:layers]
    with torch.no_grad():
        tokens = torch.arange(5, 45)[None]
        return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits[0].numpy()


@pytest.mark.parametrize("case", list(T5_CASES))
def test_the_padded_model_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "tiny", T5_CASES[case])
    inflate_t5(open_checkpoint(folder), BIGGER, tmp_path / "big", torch.float32)
    np.testing.assert_allclose(logits(tmp_path / "big"), logits(folder), atol=1e-4)
    config = open_checkpoint(tmp_path / "big").config
    assert (config.num_layers, config.num_decoder_layers, config.d_model) == (7, 5, 96)
    assert (config.num_heads, config.d_ff) == (9, 160)


def test_the_recorded_exits_of_both_stacks_compute_what_they_did(tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "tiny", T5_CASES["flan-t5"])
    (folder / "exits.json").write_text('{"exits": [1], "encoder_exits": [2, 3]}', encoding="utf-8")
    inflate_t5(open_checkpoint(folder), BIGGER, tmp_path / "big", torch.float32)
    moved = json.loads((tmp_path / "big" / "exits.json").read_text())
    for original, exit_layer in zip((2, 3), moved["encoder_exits"], strict=True):
        np.testing.assert_allclose(
            logits(tmp_path / "big", encoder_layers=exit_layer),
            logits(folder, encoder_layers=original),
            atol=1e-4,
        )
    np.testing.assert_allclose(
        logits(tmp_path / "big", layers=moved["exits"][0]), logits(folder, layers=1), atol=1e-4
    )


def test_what_cannot_be_padded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_t5(tmp_path / "tiny", T5_CASES["t5"])
    with pytest.raises(UsageError, match="heads 4 cannot hold the checkpoint's 6"):
        inflate_t5(open_checkpoint(folder), Shape(7, 5, 96, 4, 160), tmp_path / "big")
    decoder = make_checkpoint(tmp_path / "decoder", CASES["llama"])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM, a T5ForConditionalGeneration was expected"):
        inflate_t5(open_checkpoint(decoder), BIGGER, tmp_path / "big")
    assert main([str(decoder), "--shape", "t5-base", "--output", str(tmp_path / "big")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
