"""Layers that go, against a model that steps over them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.depth import DropLayers, by_place, influences, least_missed
from skipstone.exporters.compress.layers import renumbered, without
from skipstone.exporters.compress.shapes import shape_of
from skipstone.exporters.compress.steps import Target
from skipstone.exporters.compress.work import Codes, mean_loss
from tests.exporters.compress.models import logits, open_work, windows
from tests.exporters.conftest import MakeTiny


def step_over(model: Any, stack: int, layers: tuple[int, ...]) -> None:
    """Have a stack's layers hand on what they are given, by hooks: nothing is taken out."""

    def hand_on(_module: Any, given: tuple[Any, ...], output: Any) -> Any:
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    for layer in layers:
        stacks_of(model)[stack].blocks[layer].register_forward_hook(hand_on)


@pytest.mark.parametrize("name", ["llama", "qwen-2", "qwen-3", "smollm-3"])
@pytest.mark.parametrize("layers", [(0,), (1, 2), (3,)])
def test_a_decoder_without_layers_computes_what_stepping_over_them_gives(
    name: str, layers: tuple[int, ...], tiny: MakeTiny, tmp_path: Path
) -> None:
    model, work = open_work(tiny(name))
    DropLayers(layers=layers).apply(model, work)
    expected = load_eager(tiny(name))
    step_over(expected, 0, layers)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_eager(tmp_path / "saved")), logits(expected))


@pytest.mark.parametrize("name", ["t5", "deep-decoder", "flan-t5"])
@pytest.mark.parametrize(("side", "stack"), [("encoder", 0), ("decoder", 1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_encoder_decoder_keeps_its_position_biases_whichever_layer_goes(
    name: str, side: Any, stack: int, layer: int, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    model, work = open_work(tiny_t5(name))
    DropLayers(layers=(layer,), stack=side).apply(model, work)
    expected = load_eager(tiny_t5(name))
    step_over(expected, stack, (layer,))
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_eager(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_is_whole_again_after_a_look_at_it_without_some_layers(
    name: str, tiny: MakeTiny, tiny_t5: MakeTiny
) -> None:
    model, _ = open_work((tiny_t5 if name == "t5" else tiny)(name))
    before, stack = logits(model), stacks_of(model)[-1]
    with without(stack, (0, 1)):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("rule", "count", "expected"),
    [
        ("top", 3, (9, 10, 11)),
        ("bottom", 2, (0, 1)),
        ("alternate", 6, (1, 3, 5, 7, 9, 11)),
        ("alternate", 3, (3, 7, 11)),
        ("symmetric", 4, (4, 5, 6, 7)),
        ("symmetric", 3, (5, 6, 7)),
    ],
)
def test_layers_are_chosen_by_place(rule: str, count: int, expected: tuple[int, ...]) -> None:
    assert by_place(rule, count, 12) == expected


def test_influence_is_what_the_hidden_states_turn_by(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("llama"))
    found = influences(model, stacks_of(model)[0], work.calibration)
    sums, count = torch.zeros(3), 0
    for inputs in work.calibration.inputs():
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for layer in range(3):  # transformers gives the last one behind the final norm
            sums[layer] += torch.cosine_similarity(states[layer], states[layer + 1], dim=-1).sum()
        count += inputs["input_ids"].shape[1]
    torch.testing.assert_close(torch.tensor(found[:3]), 1 - sums / count, atol=1e-5, rtol=0)


def test_contribution_takes_the_layer_whose_absence_costs_least(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("llama"))
    (first, second), losses = least_missed(model, stacks_of(model)[0], 2, work, iterative=True)

    def loss_without(*layers: int) -> float:
        other = load_eager(tiny("llama"))
        step_over(other, 0, layers)
        return mean_loss(other, windows())

    alone = {layer: loss_without(layer) for layer in range(4)}
    assert first == min(alone, key=lambda layer: alone[layer])
    assert losses[first] == pytest.approx(alone[first], abs=1e-5)
    behind = {layer: loss_without(first, layer) for layer in range(4) if layer != first}
    assert second == min(behind, key=lambda layer: behind[layer])


def test_exits_codes_and_kept_layers_are_renumbered(tiny: MakeTiny) -> None:
    codes = {
        f"model.layers.{layer}.mlp.up_proj.weight": Codes("q8_0", {"codes": torch.tensor([layer])}, 1)
        for layer in range(4)
    } | {"model.embed_tokens.weight": Codes("q8_0", {"codes": torch.tensor([9])}, 1)}
    model, work = open_work(tiny("llama"), exits=(1, 2, 3), codes=codes)
    DropLayers(layers=(1,)).apply(model, work)
    assert work.exits == (1, 2)
    assert {name: int(entry.parts["codes"]) for name, entry in work.codes.items()} == {
        "model.layers.0.mlp.up_proj.weight": 0,
        "model.layers.1.mlp.up_proj.weight": 2,
        "model.layers.2.mlp.up_proj.weight": 3,
        "model.embed_tokens.weight": 9,
    }
    DropLayers(layers=(0,)).apply(model, work)
    assert work.kept == {"decoder": (2, 3)}


def test_an_exit_before_all_that_stays_or_behind_it_is_none() -> None:
    assert renumbered((2, 4, 8), (0, 2, 3, 8, 9)) == (1, 3)
    assert renumbered((1, 3), (1, 2)) == ()
    assert renumbered(None, (1,)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4}, "4 layers cannot go from a decoder of 4"),
        ({"layers": (1, 4)}, r"layers \[1, 4\] cannot go"),
        ({"count": 1, "stack": "encoder"}, "a decoder alone"),
    ],
)
def test_layers_that_cannot_go_are_refused(options: dict[str, Any], message: str, tiny: MakeTiny) -> None:
    with pytest.raises(UsageError, match=message):
        DropLayers(**options).check(shape_of(open_checkpoint(tiny("llama"))), Target())


@pytest.mark.parametrize("options", [{}, {"count": 1, "layers": (1,)}, {"layers": (1, 1)}, {"count": 0}])
def test_a_step_that_does_not_say_what_goes_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DropLayers(**options)


def test_a_gguf_whose_layers_differ_by_place_loses_them_in_whole_groups(tiny: MakeTiny) -> None:
    shape = shape_of(open_checkpoint(tiny("smollm-3")))
    for step in (DropLayers(count=4), DropLayers(layers=(0, 1, 2, 4)), DropLayers(layers=(2,))):
        with pytest.raises(UsageError, match=r"every 4th layer.*whole groups"):
            step.check(shape, Target(format="gguf"))
        assert step.check(shape, Target(format="executorch")).layers == 8 - len(step.layers or range(4))
    assert DropLayers(layers=(0, 1, 2, 3)).check(shape, Target(format="gguf")).layers == 4
