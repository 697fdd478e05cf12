"""Importance matrices, against the inputs of transformers' own linear layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.imatrix import check_calibration
from skipstone.exporters.formats.gguf.whole import write_whole
from skipstone.exporters.isolation import run_isolated
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import VOCAB_SIZE

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}


def mean_squares(checkpoint: Path, tokens: list[int]) -> dict[str, np.ndarray]:
    """Mean squared input of every linear layer, by GGUF name."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, np.ndarray] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = (inputs[0][0] ** 2).mean(0).numpy()

        module.register_forward_pre_hook(hook)

    for layer in range(4):
        for name, module in _MODULES.items():
            watch(f"blk.{layer}.{name}.weight", model.get_submodule(f"model.layers.{layer}.{module}"))
    watch("output.weight", model.lm_head)
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen-3"])
def test_importances_are_the_mean_squared_inputs_of_every_matrix(
    name: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    tokens = [int(token) for token in np.random.default_rng(5).integers(0, VOCAB_SIZE, 200)]
    write_whole(open_checkpoint(tiny(name)), tmp_path / "whole.gguf", "f32")
    run_isolated(
        "skipstone.exporters.formats.gguf.imatrix:save_imatrix",
        source=str(tmp_path / "whole.gguf"),
        tokens=tokens,
        target=str(tmp_path / "imatrix.npz"),
    )
    ours, expected = np.load(tmp_path / "imatrix.npz"), mean_squares(tiny(name), tokens)
    for tensor, values in expected.items():
        np.testing.assert_allclose(ours[tensor], values, rtol=1e-3, atol=1e-6, err_msg=tensor)


def test_a_text_of_a_few_words_is_no_calibration() -> None:
    with pytest.raises(UsageError, match=r"--imatrix few\.txt: 3 tokens"):
        check_calibration([1, 2, 3], Path("few.txt"))
