"""The step that sparsifies a model, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.recipe import make_step, parse_steps
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.compress.steps import Shape, Target
from skipstone.exporters.compress.work import Windows, Work
from tests.exporters.compress.test_activations import texts
from tests.exporters.conftest import MakeTiny

_SHAPE = Shape("LlamaForCausalLM", 4, 0, 64, 2, 1, 32, 96)


def _work(folder: Path, *, sources: bool = False, format: str | None = None) -> Work:
    lengths = (40, 30, 50)
    windows = Windows(tuple(texts(lengths)), tuple(texts(lengths, 1)) if sources else None, "")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Work(source=folder, target=Target(format=format), tokenizer=tokenizer, text=windows, threads=1)


def _linears(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: part.weight
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "head" not in name
    }


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_linear_layers_lose_half_of_their_weights_and_nothing_else_changes(
    method: str, tiny: MakeTiny
) -> None:
    dense, model = load_eager(tiny("llama-untied")), load_eager(tiny("llama-untied"))
    details = Sparsify(method=method).apply(model, _work(tiny("llama-untied")))
    linears = _linears(model)
    assert len(linears) == 4 * 7
    for weight in linears.values():
        assert float((weight == 0).float().mean()) == 0.5
    untouched = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in linears}
    for name in untouched:
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    assert set(details["removed"].values()) == {0.5}
    assert all(0.0 < error < 1.0 for error in details["relative_error"].values())


@pytest.mark.parametrize("name", ["llama", "qwen-3"])
def test_what_earlier_layers_got_wrong_is_known_when_later_ones_are_pruned(name: str, tiny: MakeTiny) -> None:
    """SparseGPT on the block walk must beat Wanda, and both magnitude, in the logits of the whole model."""
    work = _work(tiny(name))
    distances = {}
    for options in ({"method": "magnitude"}, {"method": "wanda"}, {"method": "sparsegpt"}):
        dense, model = load_eager(tiny(name)), load_eager(tiny(name))
        Sparsify(sparsity=0.4, **options).apply(model, work)
        with torch.no_grad():
            distances[options["method"]] = sum(
                float(((model(**given).logits - dense(**given).logits) ** 2).mean())
                for given in work.calibration.inputs()
            )
    assert distances["sparsegpt"] < distances["wanda"] < distances["magnitude"]


def test_refining_lowers_the_error_of_every_blocks_outputs(tiny: MakeTiny) -> None:
    errors = {}
    for refine in (None, "dsnot"):
        model = load_eager(tiny("llama"))
        details = Sparsify(pattern="2:4", refine=refine).apply(model, _work(tiny("llama")))
        errors[refine] = list(details["relative_error"].values())
        for weight in _linears(model).values():
            assert ((weight.reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert errors["dsnot"][0] < errors[None][0]  # later blocks are given other inputs
    assert sum(errors["dsnot"]) < sum(errors[None])


def test_layers_are_given_their_own_share_on_either_side_of_an_encoder_decoder(tiny_t5: MakeTiny) -> None:
    model = load_eager(tiny_t5("t5"))
    step = Sparsify(sparsity=0.25, layers={"encoder.1-2": "2:4", "0": "0.75"})
    details = step.apply(model, _work(tiny_t5("t5"), sources=True))
    expected = {f"encoder.block.{index}": 0.5 if index in (1, 2) else 0.25 for index in range(4)}
    expected |= {f"decoder.block.{index}": 0.75 if index == 0 else 0.25 for index in range(3)}
    assert details["removed"] == expected


def test_the_record_says_that_zeros_gain_nothing_in_a_gguf(tiny: MakeTiny) -> None:
    details = Sparsify(method="magnitude").apply(
        load_eager(tiny("llama")), _work(tiny("llama"), format="gguf")
    )
    assert details["gain"].startswith("no gain on this device: llama.cpp")


def test_magnitude_alone_needs_no_calibration_text(tiny: MakeTiny) -> None:
    assert not Sparsify(method="magnitude").needs_calibration
    assert Sparsify(method="magnitude", refine="dsnot").needs_calibration
    assert Sparsify().needs_calibration


def test_a_flag_gives_the_step(tiny: MakeTiny) -> None:
    (step,) = parse_steps(["sparsify:method=sparsegpt,pattern=4:8,layers=0-1:0.3+encoder.2:2:4"])
    assert step == Sparsify(method="sparsegpt", pattern="4:8", layers={"0-1": "0.3", "encoder.2": "2:4"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lottery"}, "'lottery' is not known"),
        ({"sparsity": 1.5}, "'1.5' is no sparsity"),
        ({"pattern": "4:2"}, "'4:2' is no sparsity"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "either sparsity or pattern"),
        ({"layers": {"head": "0.3"}}, "'head' names no layers"),
        ({"refine": "luck"}, "refine"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_step({"kind": "sparsify", **options}, "recipe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"3-4": "0.3"}}, "layers '3-4': the model has no such layers"),
        ({"layers": {"encoder.0": "0.3"}}, "layers 'encoder.0': the model has no such layers"),
        ({"pattern": "5:10"}, "hidden_size is 64, which 5:10 does not divide"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sparsify(**options).check(_SHAPE, Target())


def test_quantised_weights_are_not_pruned() -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match="put the step before quantize"):
        Sparsify().check(replace(_SHAPE, quantized="q4_0"), Target())
