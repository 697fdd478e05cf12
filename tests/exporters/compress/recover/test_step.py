"""Recovery on tiny models: what it learns, what it leaves alone, and that it can be cut off."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.cache import step_keys
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.fidelity import exit_logits
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.recover import step as recover
from skipstone.exporters.compress.recover.step import Recover
from skipstone.exporters.compress.run import compress
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.compress.steps import Shape, Target
from skipstone.exporters.compress.work import Windows, Work
from tests.exporters.compress.test_activations import texts
from tests.exporters.conftest import MakeTiny

_SHAPE = Shape("LlamaForCausalLM", 4, 0, 64, 2, 1, 32, 96)
_SHORT = Recover(steps=6, batch=2, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def work_for(folder: Path, *, sources: bool = False, exits: tuple[int, ...] | None = None) -> Work:
    lengths = (60, 50, 60, 40)
    windows = Windows(tuple(texts(lengths)), tuple(texts(lengths, 1)) if sources else None, "")
    if sources:
        windows = replace(windows, windows=tuple(torch.cat((w.new_zeros(1), w)) for w in windows.windows))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Work(source=folder, target=Target(), tokenizer=tokenizer, text=windows, exits=exits, threads=1)


def pruned(folder: Path, work: Work, layer: int = 2) -> Any:
    model = load_eager(folder)
    DropLayers(layers=(layer,)).apply(model, work)
    return model


@torch.no_grad()
def divergences(model: Any, work: Work) -> list[float]:
    """Mean KL per token of every exit, then of the last layer, from the dense model's last layer."""
    exits = work.exits or ()
    sums, tokens = [0.0] * (len(exits) + 1), 0
    for given, window in zip(work.calibration.inputs(), work.calibration.windows, strict=True):
        expected = work.dense(**given).logits[0, :-1].log_softmax(-1)
        for place, logits in enumerate(exit_logits(model, exits, given)):
            found = logits[:-1].log_softmax(-1)
            sums[place] += float((expected.exp() * (expected - found)).sum())
        tokens += len(window) - 1
    return [total / tokens for total in sums]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_decoder_without_a_layer_comes_back_towards_the_dense_one_at_every_exit(
    dtype: str, tiny: MakeTiny
) -> None:
    work = work_for(tiny("llama"), exits=(1, 3))
    model = pruned(tiny("llama"), work)
    before, dense = divergences(model, work), {n: t.clone() for n, t in work.dense.state_dict().items()}
    details = parse_steps([f"recover:steps=60,batch=4,learning_rate=3e-3,dtype={dtype}"])[0].apply(
        model, work
    )
    after = divergences(model, work)
    assert work.exits == (1, 2)
    assert after[-1] < before[-1] / 4
    assert all(late < early / 2 for late, early in zip(after[:-1], before[:-1], strict=True))
    assert details["kl_divergence"]["before"] == pytest.approx(before[-1], rel=1e-3)
    assert details["kl_divergence"]["after"] == pytest.approx(after[-1], rel=1e-3)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert equal(work.dense.state_dict(), dense)
    assert not all(torch.equal(weight, weight.to(torch.bfloat16)) for weight in dense.values())
    rounded = [torch.equal(weight, weight.to(torch.bfloat16)) for weight in model.parameters()]
    assert all(rounded) if dtype == "bfloat16" else not any(rounded)


def test_an_encoder_decoder_without_layers_comes_back_too(tiny_t5: MakeTiny) -> None:
    work = work_for(tiny_t5("t5"), sources=True)
    model = load_eager(tiny_t5("t5"))
    DropLayers(layers=(1,)).apply(model, work)
    DropLayers(layers=(1,), stack="encoder").apply(model, work)
    before = divergences(model, work)
    Recover(steps=60, batch=4, learning_rate=3e-3).apply(model, work)
    assert divergences(model, work)[-1] < before[-1] / 2


def test_no_steps_change_nothing(tiny: MakeTiny) -> None:
    work = work_for(tiny("llama"))
    model = pruned(tiny("llama"), work)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Recover(steps=0).apply(model, work)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not Recover(steps=0).needs_calibration


def trained(folder: Path, options: Recover, work: Work | None = None) -> dict[str, torch.Tensor]:
    work = work_for(folder, exits=(1, 3)) if work is None else work
    model = pruned(folder, work)
    options.apply(model, work)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: MakeTiny) -> None:
    first, again = (trained(tiny("llama"), _SHORT) for _ in range(2))
    assert equal(first, again)
    assert not equal(first, trained(tiny("llama"), _SHORT.model_copy(update={"seed": 1})))


def test_a_training_that_was_cut_off_goes_on_to_the_same_weights(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    whole = trained(tiny("llama"), _SHORT)
    monkeypatch.setattr(recover, "_SAVE_MINUTES", 0.0)
    seen: list[int] = []

    def stop_at_four(what: str, done: int, total: int) -> None:
        if what.startswith("recover"):
            seen.append(done)
            if done == 4 and seen.count(4) == 1:
                raise KeyboardInterrupt

    for _ in range(2):
        work = replace(work_for(tiny("llama"), exits=(1, 3)), progress=stop_at_four)
        try:
            resumed = trained(tiny("llama"), _SHORT, work)
        except KeyboardInterrupt:
            assert list((own_cache / "recoveries").iterdir())
    assert seen == [1, 2, 3, 4, 4, 5, 6]
    assert equal(whole, resumed)
    assert not list((own_cache / "recoveries").iterdir())


@pytest.mark.parametrize("matrix_learning_rate", [0.0, 3e-3], ids=["AdamW", "Muon"])
def test_weights_that_were_pruned_stay_zero(matrix_learning_rate: float, tiny: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    Sparsify(pattern="2:4").apply(model, work)
    before = divergences(model, work)
    gone = {name: weight == 0 for name, weight in model.named_parameters()}
    Recover(steps=30, learning_rate=3e-3, matrix_learning_rate=matrix_learning_rate).apply(model, work)
    for name, weight in model.named_parameters():
        assert torch.equal(weight == 0, gone[name])
    assert divergences(model, work)[-1] < before[-1] / 2


def test_a_recipe_trains_on_its_own_text_and_notices_when_that_changes(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(self, other):\n    return self + other\n" * 30, encoding="utf-8")
    steps = parse_steps(["drop_layers:layers=1", f"recover:steps=8,batch=2,text={text},tokens=300"])
    keys = step_keys(steps)
    record = compress(tiny("llama"), tmp_path / "out", steps, held_out=text)
    dropped, recovered = record.steps
    assert recovered.details["trained_tokens"] > 0
    assert recovered.fidelity is not None
    assert dropped.fidelity is not None
    assert recovered.fidelity.kl_divergence < dropped.fidelity.kl_divergence
    text.write_text("another text", encoding="utf-8")
    assert step_keys(steps)[0] == keys[0]
    assert step_keys(steps)[1] != keys[1]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the weights are quantised already") as refused:
        Recover().check(replace(_SHAPE, quantized="q4_0"), Target())
    assert "before quantize" in str(refused.value.hint)
    with pytest.raises(UsageError, match="no such file"):
        Recover(text=tmp_path / "none.txt").check(_SHAPE, Target())
    assert Recover().needs_calibration
    assert not Recover(text=tmp_path / "none.txt").needs_calibration
