"""Adapters: what they change, that only that changes, and that what was pruned stays zero."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.low_rank.step import LowRank
from skipstone.exporters.compress.recipe import make_step
from skipstone.exporters.compress.recover import step as recover
from skipstone.exporters.compress.recover.lora import Adapted
from skipstone.exporters.compress.recover.step import Recover
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.factors import factored
from tests.exporters.compress.recover.test_step import divergences, own_cache, pruned, work_for
from tests.exporters.conftest import MakeTiny

__all__ = ["own_cache"]  # the fixture
_RANK = 3
_LORA = Recover(steps=12, batch=4, learning_rate=1e-2, lora=_RANK)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_linear_layers_alone_change_by_no_more_than_the_rank_and_training_resumes_to_the_same(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_for(tiny("llama"), exits=(1, 3))
    model = pruned(tiny("llama"), work)
    before, first = state_of(model), divergences(model, work)
    _LORA.apply(model, work)
    after = state_of(model)
    assert divergences(model, work)[-1] < 0.8 * first[-1]
    assert after.keys() == before.keys()
    matrices = {
        f"{name}.weight"
        for name, part in model.model.named_modules(prefix="model")
        if isinstance(part, nn.Linear)
    }
    for name, tensor in after.items():
        change = (tensor - before[name]).double()
        rank = int(torch.linalg.matrix_rank(change, rtol=1e-4)) if tensor.dim() == 2 else 0
        assert rank == (_RANK if name in matrices else 0)
        assert bool(change.any()) == (name in matrices)
    assert not any(weight.requires_grad for weight in model.parameters())

    monkeypatch.setattr(recover, "_SAVE_MINUTES", 0.0)
    cut: list[int] = []

    def stop_at_six(what: str, done: int, total: int) -> None:
        if what.startswith("recover") and done == 6 and not cut:
            cut.append(done)
            raise KeyboardInterrupt

    other = replace(work_for(tiny("llama"), exits=(1, 3)), progress=stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        _LORA.apply(pruned(tiny("llama"), other), other)
    other = replace(work_for(tiny("llama"), exits=(1, 3)), progress=stop_at_six)
    resumed = pruned(tiny("llama"), other)
    _LORA.apply(resumed, other)
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("options", [{"lora": 0}, {"lora": 4, "steps": 0}])
def test_no_rank_and_no_steps_change_nothing(options: dict[str, int], tiny: MakeTiny) -> None:
    model, work = load_eager(tiny("llama")), replace(work_for(tiny("llama")), text=None)
    before = state_of(model)
    step = Recover(**options)  # type: ignore[arg-type]
    step.apply(model, work)
    assert not step.needs_calibration
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_were_pruned_stay_zero(tiny: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    Sparsify(pattern="2:4").apply(model, work)
    before, gone = divergences(model, work), {name: w == 0 for name, w in model.named_parameters()}
    _LORA.apply(model, work)
    for name, weight in model.named_parameters():
        assert torch.equal(weight == 0, gone[name])
    assert divergences(model, work)[-1] < 0.9 * before[-1]


def test_pairs_and_encoder_decoders_are_adapted_too(tiny: MakeTiny, tiny_t5: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    LowRank(rank=8).apply(model, work)
    before, ranks = divergences(model, work), {name: pair.rank for name, pair in factored(model).items()}
    _LORA.apply(model, work)
    assert {name: pair.rank for name, pair in factored(model).items()} == ranks
    assert divergences(model, work)[-1] < 0.9 * before[-1]
    work, model = work_for(tiny_t5("t5"), sources=True), load_eager(tiny_t5("t5"))
    DropLayers(layers=(1,)).apply(model, work)
    before = divergences(model, work)
    _LORA.apply(model, work)
    assert divergences(model, work)[-1] < 0.9 * before[-1]


@pytest.mark.parametrize("zeros", [False, True])
def test_an_adapter_is_its_merged_layer_and_begins_as_what_it_was(zeros: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base, x = nn.Linear(8, 6), torch.randn(5, 8, generator=generator)
    base.weight.data = torch.randn(6, 8, generator=generator)
    if zeros:
        base.weight.data[:, ::2] = 0.0
    layer = Adapted(base, 2, 6.0, generator)
    assert torch.allclose(layer(x), base(x), atol=1e-6)
    layer.b.data = torch.randn(6, 2, generator=generator)
    expected = 6.0 / 2 * layer.b @ layer.a
    if zeros:
        expected[:, ::2] = 0.0
    assert torch.allclose(layer.merged() - base.weight, expected, atol=1e-5)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.merged(), base.bias), atol=1e-5)


def test_alpha_without_adapters_is_refused() -> None:
    with pytest.raises(UsageError, match="alpha scales the adapters of lora"):
        make_step({"kind": "recover", "alpha": 8.0}, "recipe")
