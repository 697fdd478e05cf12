"""Zero-padding to a bigger shape leaves the function as it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from samples import inflate
from samples.inflate import Shape, layer_places, main, place_exit
from skipstone.errors import CheckpointError, ExportError, UsageError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.draft_table import DRAFT_TABLE_FILE
from skipstone.exporters.draft_vocabulary import FREQUENCIES_FILE
from skipstone.exporters.pipeline import export_checkpoint
from tests.exporters.tiny import CASES, VOCAB_SIZE, Case, make_checkpoint

CODER = Path(__file__).parents[2] / "samples/models/coder"
BIGGER = Shape(layers=6, hidden=96, heads=12, kv_heads=3, feed_forward=160, head_dim=32)
_GROUPS = Case("LlamaForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("inflate") / "tiny", _GROUPS)
    (folder / "exits.json").write_text('{"exits": [1, 3]}', encoding="utf-8")
    return folder


def logits(folder: Path, num_layers: int | None = None) -> np.ndarray:
    limit = {} if num_layers is None else {"num_hidden_layers": num_layers}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **limit)
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits[0].numpy()


@pytest.mark.parametrize("case", [_GROUPS, CASES["llama-untied"], CASES["llama-3"]])
def test_the_padded_model_gives_the_same_logits(case: Case, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", case)
    inflate.inflate(open_checkpoint(folder), BIGGER, tmp_path / "big", torch.float32)
    np.testing.assert_allclose(logits(tmp_path / "big"), logits(folder), atol=1e-4)
    config = open_checkpoint(tmp_path / "big").config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (6, 96, 160)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (12, 3, VOCAB_SIZE)


def test_the_recorded_exits_compute_what_they_did(checkpoint: Path, tmp_path: Path) -> None:
    inflate.inflate(open_checkpoint(checkpoint), BIGGER, tmp_path / "big", torch.float32)
    exits = json.loads((tmp_path / "big" / "exits.json").read_text())["exits"]
    for original, moved in zip((1, 3), exits, strict=True):
        np.testing.assert_allclose(logits(tmp_path / "big", moved), logits(checkpoint, original), atol=1e-4)


def test_what_drafting_needs_comes_along(checkpoint: Path, tmp_path: Path) -> None:
    """Without the table and the frequencies the bigger model would draft worse than the one it stands for."""
    shutil.copytree(checkpoint, tmp_path / "tiny")
    for name in (DRAFT_TABLE_FILE, FREQUENCIES_FILE):
        shutil.copy(CODER / name, tmp_path / "tiny")
    inflate.inflate(open_checkpoint(tmp_path / "tiny"), BIGGER, tmp_path / "big", torch.float32)
    for name in (DRAFT_TABLE_FILE, FREQUENCIES_FILE):
        assert (tmp_path / "big" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()


def test_a_padded_checkpoint_can_be_exported_at_those_exits(checkpoint: Path, tmp_path: Path) -> None:
    inflate.inflate(open_checkpoint(checkpoint), BIGGER, tmp_path / "big", torch.float32)
    manifest = export_checkpoint(tmp_path / "big", tmp_path / "out", quantize="f32").manifest
    assert manifest.exits == tuple(json.loads((tmp_path / "big" / "exits.json").read_text())["exits"])


@pytest.mark.parametrize(("layers", "target"), [(12, 16), (4, 4), (4, 11), (12, 32)])
def test_added_layers_are_spread_and_every_exit_is_inside(layers: int, target: int) -> None:
    places = layer_places(layers, target)
    gaps = np.diff([*places, target])
    assert places[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert [place_exit(exit_layer, places) for exit_layer in range(1, layers + 1)] == [p + 1 for p in places]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(3, 96, 12, 3, 160, 32), "3 layers"),
        (Shape(6, 32, 12, 3, 160, 32), "hidden size 32"),
        (Shape(6, 96, 12, 3, 64, 32), "feed-forward size 64"),
        (Shape(6, 96, 12, 1, 160, 32), "key-value heads 1"),
        (Shape(6, 96, 3, 3, 160, 32), "query heads per key-value head 1"),
        (Shape(6, 96, 12, 3, 160, 64), "head_dim 64"),
    ],
)
def test_a_shape_that_cannot_hold_the_checkpoint_is_refused(
    shape: Shape, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        inflate.inflate(open_checkpoint(checkpoint), shape, tmp_path / "big")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "qwen", CASES["qwen-2"])
    with pytest.raises(CheckpointError, match="Qwen2ForCausalLM"):
        inflate.inflate(open_checkpoint(folder), BIGGER, tmp_path / "big")


def test_a_result_that_computes_something_else_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate.math, "sqrt", lambda _value: 1.0)  # the norms' gain is not scaled
    with pytest.raises(ExportError, match="logits differ"):
        inflate.inflate(open_checkpoint(checkpoint), BIGGER, tmp_path / "big", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_the_script_says_what_is_wrong_and_ends_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([str(tmp_path / "missing"), "--shape", "llama-3.2-1b", "--output", str(tmp_path / "out")])
    assert status == 2
    assert "missing: no such folder" in capsys.readouterr().err
