"""The walk over a model's blocks, against hooks on the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.activations import Block, walk
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import VOCAB_SIZE


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random token ids, a tensor for each length."""
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.integers(2, VOCAB_SIZE, length)) for length in lengths]


def inputs_of_the_whole(
    model: Any, windows: list[Tensor], sources: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """What every linear layer is given when transformers runs the whole model, [rows, inputs]."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _module, given: found.setdefault(name, []).append(given[0][0])
        )

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            watch(name, module)
    with torch.no_grad():
        for index, tokens in enumerate(windows):
            if sources is None:
                model(tokens[None])
            else:
                model(input_ids=sources[index][None], decoder_input_ids=tokens[None])
    return {name: torch.cat(rows) for name, rows in found.items()}


def check(block: Block, expected: dict[str, Tensor]) -> None:
    """Hold a block's statistics against the rows that its layers were given."""
    for name, inputs in block.inputs.items():
        rows = expected[f"{block.name}.{name}"].double()
        assert inputs.count == len(rows)
        torch.testing.assert_close(inputs.second_moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean_abs, rows.abs().mean(0).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inputs.max_abs, rows.abs().amax(0).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inputs.mean_square, (rows**2).mean(0).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inputs.norms, rows.norm(dim=0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen-3", "smollm-3"])
def test_every_linear_layer_of_a_decoder_is_given_what_the_whole_model_gives_it(
    name: str, tiny: MakeTiny
) -> None:
    windows = texts((40, 40, 25))
    expected = inputs_of_the_whole(load_eager(tiny(name)), windows)
    model, seen = load_eager(tiny(name)), set()
    for block in walk(model, windows):
        check(block, expected)
        seen |= {f"{block.name}.{part}" for part in block.inputs}
    assert seen | {"lm_head"} == set(expected)


@pytest.mark.parametrize("name", ["t5", "flan-t5", "deep-decoder"])
def test_every_linear_layer_of_an_encoder_decoder_is_too(name: str, tiny_t5: MakeTiny) -> None:
    windows, sources = texts((20, 31)), texts((33, 18), seed=1)
    expected = inputs_of_the_whole(load_eager(tiny_t5(name)), windows, sources)
    model, seen = load_eager(tiny_t5(name)), set()
    for block in walk(model, windows, sources):
        check(block, expected)
        seen |= {f"{block.name}.{part}" for part in block.inputs}
    assert seen | {"lm_head"} == set(expected)


@pytest.mark.parametrize("stack", ["decoder", "encoder-decoder"])
def test_a_changed_block_shapes_the_inputs_of_those_behind_it(
    stack: str, tiny: MakeTiny, tiny_t5: MakeTiny
) -> None:
    folder: Path = tiny("llama") if stack == "decoder" else tiny_t5("t5")
    windows, sources = texts((30, 30)), None if stack == "decoder" else texts((20, 25), seed=1)

    def change(block: Block) -> None:
        for linear in block.linears.values():
            linear.weight.mul_(0.5)

    changed = load_eager(folder)
    for block in walk(changed, windows, sources):
        change(block)
    expected = inputs_of_the_whole(changed, windows, sources)
    model = load_eager(folder)
    for block in walk(model, windows, sources):
        first = next(iter(block.inputs))
        check(Block(block.name, block.module, block.linears, {first: block.inputs[first]}), expected)
        change(block)


def test_layers_fed_by_one_tensor_share_their_statistics(tiny: MakeTiny) -> None:
    block = next(walk(load_eager(tiny("llama")), texts((30,))))
    inputs = block.inputs
    assert inputs["self_attn.q_proj"] is inputs["self_attn.k_proj"] is inputs["self_attn.v_proj"]
    assert inputs["mlp.gate_proj"] is inputs["mlp.up_proj"]
    assert inputs["mlp.gate_proj"] is not inputs["self_attn.q_proj"]


def test_the_model_is_whole_between_two_blocks(tiny: MakeTiny, tiny_t5: MakeTiny) -> None:
    for folder, sources in ((tiny("llama"), None), (tiny_t5("t5"), texts((12,), seed=1))):
        windows = texts((10,))
        model = load_eager(folder)
        before = inputs_of_the_whole(load_eager(folder), windows, sources)
        for _block in walk(model, windows, sources):
            pass
        after = inputs_of_the_whole(model, windows, sources)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
