"""Training to ternary weights, and what becomes of them as GGUF."""

from __future__ import annotations

import copy
import io
import json
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from skipstone.bundle import Bundle
from skipstone.errors import SkipstoneError, UsageError
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.tune.recipe import Ternary, parse_recipe
from skipstone.exporters.tune.run import TuneOptions, tune
from skipstone.exporters.tune.ternary import TernaryLinear, settle, ternarise
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.jitter import gap_jitter
from skipstone.runtimes.session import Session
from tests.exporters.tune.conftest import TINY
from tests.runtimes.greedy import generated

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
PROMPT = [*range(40, 70)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A model with rows of 256 weights after 40 steps, and its last layer's loss after 1 and 40 of them."""
    folder = tmp_path_factory.mktemp("ternary")
    config, recipe, texts = folder / "config.json", folder / "ternary.toml", folder / "texts"
    config.write_text(json.dumps({**TINY, **WIDE, "model_type": "llama"}))
    recipe.write_text(
        """
[corpus]
held_out_modulus = 4
[layerskip]
rotation = [[1], [2]]
[training]
sequence_length = 32
batch_size = 8
learning_rate = 3e-3
warmup_steps = 5
[ternary]
scale = "mean"
"""
    )
    texts.mkdir()
    for number in range(20):
        lines = [f"def f{number}_{i}(x):\n    return x + {i % 7}\n" for i in range(40)]
        (texts / f"{number:02}.py").write_text("\n".join(lines))
    losses = []
    for steps in (1, 40):
        options = TuneOptions(
            output=folder / f"after-{steps}", from_config=config, recipe=str(recipe), data=(texts,),
            max_steps=steps, compile=False, cpu=True, evaluate_windows=8,
        )  # fmt: skip
        losses.append(tune(options, Console(file=io.StringIO())).exits[-1].loss)
    return folder / "after-40", losses


@pytest.fixture(scope="module")
def bundle(tuned: tuple[Path, list[float]], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("tq2_0") / "out"
    return export_checkpoint(tuned[0], output, quantize="tq2_0", exits=(1,), draft_vocab_size=0)


def magnitudes(model: nn.Module) -> dict[str, set[float]]:
    """The different magnitudes of every linear layer's weights."""
    layers = model.model.layers.named_modules()
    found = {name: module.weight for name, module in layers if isinstance(module, nn.Linear)}
    return {name: set(weight.abs().unique().tolist()) for name, weight in found.items()}


@pytest.mark.parametrize("scale", ["mean", "median"])
def test_weights_are_rounded_to_a_scale_and_learn_as_if_they_were_not(
    tiny_model: LlamaForCausalLM, scale: str
) -> None:
    plain = copy.deepcopy(tiny_model)
    ternarise(tiny_model, Ternary(scale, activation_bits=0))
    layer, before = tiny_model.model.layers[1].mlp.up_proj, plain.model.layers[1].mlp.up_proj.weight
    assert isinstance(layer, TernaryLinear)
    assert type(tiny_model.lm_head) is nn.Linear
    gamma = (
        before.abs().mean()
        if scale == "mean"
        else before.abs().flatten().sort()[0][(before.numel() - 1) // 2]
    )
    gamma = gamma.bfloat16().float()
    expected = torch.where(before.abs() > gamma / 2, before.sign() * gamma, 0.0)
    inputs = torch.randn(5, 32)
    out = layer(inputs)
    torch.testing.assert_close(out, inputs @ expected.T)
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, inputs.sum(0).expand(64, -1))
    assert torch.equal(layer.weight, before), "what is trained stays as it is"
    settle(tiny_model)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, expected)


def test_inputs_are_rounded_token_by_token(tiny_model: LlamaForCausalLM) -> None:
    ternarise(tiny_model, Ternary("mean"))
    layer = tiny_model.model.layers[0].mlp.gate_proj
    inputs = torch.randn(4, 32, requires_grad=True)
    step = inputs.detach().abs().amax(1, keepdim=True) / 127
    rounded = (inputs.detach() / step).round() * step
    torch.testing.assert_close(layer(inputs), rounded @ layer.ternary().T)
    assert not torch.allclose(rounded, inputs, atol=1e-4)


def test_a_tuned_checkpoint_is_ternary_and_has_learned(tuned: tuple[Path, list[float]]) -> None:
    folder, (first, last) = tuned
    assert last < 0.8 * first
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = magnitudes(model)
    assert len(found) == 3 * 7
    assert all(len(values) == 2 and min(values) == 0.0 for values in found.values())
    assert len(model.model.embed_tokens.weight.abs().unique()) > 1000
    assert '[ternary]\nscale = "mean"' in (folder / "README.md").read_text()


@pytest.mark.engine
@pytest.mark.parametrize("scheme", ["tq2_0", "tq1_0"])
def test_blocks_hold_the_very_weights(
    tuned: tuple[Path, list[float]], bundle: Bundle, tmp_path: Path, scheme: str
) -> None:
    """Read by gguf-py: llama.cpp orders rows of Q and K otherwise, so of these only the values are compared."""
    if scheme != "tq2_0":
        bundle = export_checkpoint(tuned[0], tmp_path / scheme, quantize=scheme, exits=(1,))
    weights = AutoModelForCausalLM.from_pretrained(tuned[0]).model.layers[0]
    names = {
        "ffn_up": weights.mlp.up_proj,
        "ffn_down": weights.mlp.down_proj,
        "attn_v": weights.self_attn.v_proj,
    }
    file = bundle.file(bundle.manifest.segments[0].file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    types = {
        tensor.tensor_type.name.lower()
        for name, tensor in stored.items()
        if name.startswith("blk.0.") and "norm" not in name
    }
    assert types == {scheme}
    for name, module in names.items():
        tensor = stored[f"blk.0.{name}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, module.weight.detach().float().numpy())
    last = GgufModel(bundle.file(bundle.manifest.segments[-1].file))
    assert last.parts["token_embd.weight"].type.name == "Q8_0"


@pytest.mark.engine
def test_llama_cpp_computes_what_torch_does_and_drafts_change_nothing(
    tuned: tuple[Path, list[float]], bundle: Bundle
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tuned[0], dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    with closing(open_engine(bundle, EngineOptions(threads=1))) as engine:
        with Session(engine, 64) as session:
            rows = session.push(PROMPT)
            found = np.stack(session.advance(rows, session.exits[-1]))
        # inputs are rounded to 8 bits there, and so are the tables
        assert np.sqrt(((found - expected) ** 2).mean()) < 0.02 * expected.std()
        plain, _ = generated(engine, "plain", PROMPT, 24)
        drafted, accepted = generated(engine, "layerskip", PROMPT, 24)
        assert accepted > 0
        at = next((i for i, pair in enumerate(zip(plain, drafted, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            with Session(engine, 64) as session:
                logits = session.prefill([*PROMPT, *plain[:at]])
            assert logits[plain[at]] - logits[drafted[at]] <= gap_jitter(engine, [*PROMPT, *plain[:at]])


def test_other_weights_and_narrow_rows_are_refused(
    coder_checkpoint: Path, tmp_path: Path, config_file: Path, texts: Path, recipe_file: Path
) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0\.\S+ is not ternary"):
        export_checkpoint(coder_checkpoint, tmp_path / "out", quantize="tq2_0")
    options = TuneOptions(
        output=tmp_path / "narrow", from_config=config_file, recipe=str(recipe_file), data=(texts,),
        max_steps=1, compile=False, cpu=True, evaluate_windows=2,
    )  # fmt: skip
    tune(options, Console(file=io.StringIO()))
    with pytest.raises(UsageError, match="rows of 32 weights, expected a multiple of 256"):
        export_checkpoint(options.output, tmp_path / "out", quantize="tq1_0")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(SkipstoneError, match=r"ternary\.scale: decoders alone"):
        parse_recipe({"task": "seq2seq", "ternary": {"scale": "median"}}, name="recipe.toml")
