"""The search on tiny models: what it judges, what it keeps to, and what it leaves."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.layers import keep_layers
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.recipe import make_step, parse_steps
from skipstone.exporters.compress.search import trial
from skipstone.exporters.compress.search.executors import open_executor
from skipstone.exporters.compress.search.levels import Bench
from skipstone.exporters.compress.search.step import Search
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.compress.steps import Shape, Target
from skipstone.exporters.compress.work import Windows, Work
from tests.exporters.compress.test_activations import texts
from tests.exporters.conftest import MakeTiny

_SHORT: dict[str, Any] = {"generations": 6, "offspring": 6}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    yield
    trial.close()


def work_for(folder: Path, *, sources: bool = False) -> Work:
    lengths = (60, 50, 60, 40)
    windows = Windows(tuple(texts(lengths)), tuple(texts(lengths, 1)) if sources else None, "")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Work(source=folder, target=Target(), tokenizer=tokenizer, text=windows, threads=1)


@torch.no_grad()
def divergence(model: Any, work: Work) -> float:
    """Mean KL per token from the dense model, by torch's own function."""
    total, tokens = 0.0, 0
    for given in work.calibration.inputs():
        found, expected = (m(**given).logits[0].log_softmax(-1) for m in (model, work.dense))
        total += float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum"))
        tokens += len(found)
    return total / tokens


def _without(folder: Path, dropped: set[str]) -> Any:
    """The model with some layers taken out for good."""
    model = load_eager(folder)
    for stack in stacks_of(model):
        kept = [index for index in range(len(stack.blocks)) if f"{stack.name}.{index}" not in dropped]
        keep_layers(model, stack, kept, work_for(folder))
    return model


def test_half_of_the_size_is_kept_by_the_two_layers_that_are_missed_least(tiny: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    blocks = sum(weight.numel() for weight in model.model.layers.parameters())
    whole = sum(weight.numel() for weight in model.parameters())
    size = f"{100 * (whole - blocks / 2) / whole:.3f}%"
    details = Search(over="drop", target_size=size, **_SHORT).apply(model, work)
    every = {
        pair: divergence(_without(tiny("llama"), {f"model.layers.{index}" for index in pair}), work)
        for pair in itertools.combinations(range(4), 2)
    }
    best = min(every, key=lambda pair: every[pair])
    assert details["chosen"][0]["layers"] == list(best)
    assert details["kl_divergence"] == pytest.approx(every[best], rel=1e-4)
    assert model.config.num_hidden_layers == 2
    assert divergence(model, work) == pytest.approx(every[best], rel=1e-4)


def test_candidates_of_an_encoder_decoder_are_judged_as_the_models_they_become(tiny_t5: MakeTiny) -> None:
    """The first layer of a T5 lends the others its table of positions; it may go all the same."""
    work, folder = work_for(tiny_t5("t5"), sources=True), tiny_t5("t5")
    model = load_eager(folder)
    details = Search(over="drop", target_size="70%", **_SHORT).apply(model, work)
    assert details["kl_divergence"] == pytest.approx(divergence(model, work), rel=1e-4)
    assert len(model.encoder.block) + len(model.decoder.block) < 7
    assert details["cost"] <= details["budget"]


def test_a_speed_counts_the_decoder_and_its_head(tiny: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    speed = (4 * layer + head) / (3 * layer + head)
    details = Search(over="drop", target_speed=f"{speed - 1e-4:.4f}x", **_SHORT).apply(model, work)
    assert model.config.num_hidden_layers == 3
    assert details["cost"] == pytest.approx(3 * layer + head)


def test_layers_share_a_sparsity_unevenly_and_better_than_evenly(tiny: MakeTiny) -> None:
    work, model, even = work_for(tiny("llama")), load_eager(tiny("llama")), load_eager(tiny("llama"))
    step = Search(over="sparsity", sparsity=0.5, method="magnitude", generations=12, offspring=8)
    details = step.apply(model, work)
    Sparsify(method="magnitude", sparsity=0.5).apply(even, work)
    zeros = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in model.model.layers]
    total = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    kept = sum(int(weight.count_nonzero()) for name, weight in model.named_parameters() if "proj" in name)
    assert kept == pytest.approx(total / 2, rel=0.01)
    assert max(zeros) - min(zeros) > 0.05
    assert divergence(model, work) < divergence(even, work)
    # a magnitude's mask does not depend on other layers: what was judged is what came out
    assert details["kl_divergence"] == pytest.approx(divergence(model, work), rel=1e-4)


def test_the_sparsest_model_within_a_divergence_is_found(tiny: MakeTiny) -> None:
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    bound = 0.05
    step = Search(over="sparsity", max_kl=bound, method="magnitude", **_SHORT)
    details = step.apply(model, work)
    assert divergence(model, work) <= bound * (1 + 1e-4)
    whole = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    assert details["cost"] < 0.95 * whole


def test_layers_share_bytes_better_than_any_other_way_of_storing_them(tiny: MakeTiny) -> None:
    """Two layouts for each of four layers, half the layers in either: all six ways are tried by hand."""
    work, model, folder = work_for(tiny("llama")), load_eager(tiny("llama")), tiny("llama")
    every = {}
    for larger in itertools.combinations(range(4), 2):
        own, candidate = work_for(folder), load_eager(folder)
        mix = {str(layer): "q8_0" if layer in larger else "q4_0" for layer in range(4)}
        Quantize(scheme="q4_0", mix=mix).apply(candidate, own)
        every[larger] = divergence(candidate, work), measure_size(candidate, own).num_bytes
    size = max(size for _, size in every.values())
    step = Search(
        over="bits", scheme="q4_0", levels=("q8_0", "q4_0"), target_size=f"{size / 1e3:.3f}kB", **_SHORT
    )
    details = step.apply(model, work)
    best = min(every, key=lambda larger: every[larger][0])
    mix = details["chosen"][0]["mix"]
    assert tuple(layer for layer in range(4) if mix[str(layer)] == "q8_0") == best
    assert details["kl_divergence"] == pytest.approx(every[best][0], rel=1e-4)
    assert divergence(model, work) == pytest.approx(every[best][0], rel=1e-4)
    assert details["cost"] == measure_size(model, work).num_bytes <= size
    assert {codes.grid for codes in work.codes.values()} >= {"q8_0", "q4_0"}


def test_an_encoder_decoder_is_stored_as_it_was_judged(tiny_t5: MakeTiny) -> None:
    work, model = work_for(tiny_t5("t5"), sources=True), load_eager(tiny_t5("t5"))
    options = {"scheme": "8da4w", "target_size": "20%", "generations": 3, "offspring": 4}
    details = Search(over="bits", **options).apply(model, work)
    assert set(details["chosen"][0]["mix"].values()) == {"8da4w", "8da8w"}
    assert details["kl_divergence"] == pytest.approx(divergence(model, work), rel=1e-4)
    assert details["cost"] == measure_size(model, work).num_bytes <= details["budget"]


def test_a_size_holds_for_a_source_in_two_bytes_whose_norms_take_four_beside_codes(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    model = load_eager(tiny("llama"))
    model.bfloat16().save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").write_bytes((tiny("llama") / "tokenizer.json").read_bytes())
    work, model = work_for(tmp_path / "half"), load_eager(tmp_path / "half")
    options = {"scheme": "q4_0", "target_size": "33%", "generations": 2, "offspring": 2}
    details = Search(over="bits", **options).apply(model, work)
    assert details["cost"] == measure_size(model, work).num_bytes <= details["budget"]


@pytest.mark.slow
def test_two_processes_find_what_one_process_finds_and_write_nothing(
    tiny: MakeTiny, capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    for processes in (1, 2):
        work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
        options = _SHORT | {"over": "sparsity", "sparsity": 0.5, "method": "magnitude"}
        details = Search(processes=processes, **options).apply(model, work)
        found.append((details, model.state_dict()))
    (details, weights), (other_details, other_weights) = found
    assert other_details == details
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    assert "torchao" not in capfd.readouterr().err


def test_a_cluster_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="ray is not installed"), open_executor(2, "local"):
        pass


def _where(_: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_calls_run_in_other_processes_if_there_are_to_be_some() -> None:
    with open_executor(1) as executor:
        assert set(executor.map(_where, range(4))) == {os.getpid()}
    with open_executor(2) as executor:
        assert os.getpid() not in set(executor.map(_where, range(4)))


def _warmed() -> None:
    Path(os.environ["WARMED"], str(os.getpid())).touch()


@pytest.mark.slow
def test_every_process_warms_up_before_anything_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMED", str(tmp_path))
    with open_executor(2, warm_up=_warmed):
        pass
    warmed = {int(file.name) for file in tmp_path.iterdir()}
    assert len(warmed) == 2
    assert os.getpid() not in warmed


def test_an_error_in_a_call_comes_out_of_the_executor() -> None:
    with open_executor(1) as executor, pytest.raises(ZeroDivisionError):
        list(executor.map(lambda number: 1 // number, [0]))


def test_the_model_is_as_it_was_while_it_is_being_judged(tiny: MakeTiny, tmp_path: Path) -> None:
    """Levels that were tried must leave no trace in the candidates after them."""
    work, model = work_for(tiny("llama")), load_eager(tiny("llama"))
    step = Search(over="sparsity", sparsity=0.5, method="magnitude", levels=("0.9", "0"))
    folder = tmp_path / "bench"
    folder.mkdir()
    bench = step._prepare(model, work, folder)
    assert isinstance(bench, Bench)
    every = range(bench.samples)
    assert trial.divergence(str(folder), (1, 1, 1, 1), every) == pytest.approx(0.0, abs=1e-6)
    first = trial.divergence(str(folder), (0, 1, 1, 0), every)
    assert trial.divergence(str(folder), (0, 0, 0, 1), every) != first
    assert trial.divergence(str(folder), (0, 1, 1, 0), every) == first
    assert trial.divergence(str(folder), (1, 1, 1, 1), every) == pytest.approx(0.0, abs=1e-6)
    dense = load_eager(tiny("llama")).state_dict()
    assert all(torch.equal(weight, dense[name]) for name, weight in model.state_dict().items())


def test_nothing_is_left_in_the_cache(tiny: MakeTiny, tmp_path: Path) -> None:
    Search(over="drop", target_size="80%", **_SHORT).apply(load_eager(tiny("llama")), work_for(tiny("llama")))
    assert list((tmp_path / "cache" / "searches").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "drop"}, "exactly one of target_size"),
        ({"over": "drop", "target_size": "6MB", "max_kl": 0.1}, "exactly one of target_size"),
        ({"over": "drop", "target_size": "6 bananas"}, "a size such as 6MB or 50%"),
        ({"over": "drop", "target_speed": "fast"}, "a factor such as 2x"),
        ({"over": "drop", "sparsity": 0.5}, "sparsity is no target of over = 'drop'"),
        ({"over": "drop", "target_size": "6MB", "curve": "cost.json"}, "a curve counts time"),
        ({"over": "bits", "target_size": "6MB"}, "scheme belongs to over = 'bits'"),
        ({"over": "luck", "target_size": "6MB"}, "over"),
        ({"over": "drop", "target_size": "6MB", "generations": 0}, "generations"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_step({"kind": "search", **options}, "recipe")


def test_what_no_format_gains_from_is_refused_before_any_work() -> None:
    shape = Shape("LlamaForCausalLM", 4, 0, 64, 2, 1, 32, 96)
    with pytest.raises(UsageError, match="zeros make a model neither smaller nor faster"):
        Search(over="sparsity", target_size="50%").check(shape, Target())
    with pytest.raises(UsageError, match="no cost model here says how fast layouts are"):
        Search(over="bits", scheme="q4_0", target_speed="2x").check(shape, Target())
    with pytest.raises(UsageError, match="changes weights of several layers at once"):
        Search(over="bits", scheme="q4_0", target_size="5MB", method="awq").check(shape, Target())
    with pytest.raises(UsageError, match="is a scheme of --format gguf"):
        Search(over="bits", scheme="q4_0", target_size="5MB").check(shape, Target(format="executorch"))
    patterned = Shape("SmolLM3ForCausalLM", 8, 0, 64, 2, 1, 32, 96, period=4)
    with pytest.raises(UsageError, match="in groups of 4 alone"):
        Search(over="drop", target_size="50%").check(patterned, Target(format="gguf"))


def test_a_size_that_cannot_be_reached_is_refused(tiny: MakeTiny) -> None:
    with pytest.raises(UsageError, match="the smallest there is costs"):
        Search(over="drop", target_size="1%", **_SHORT).apply(
            load_eager(tiny("llama")), work_for(tiny("llama"))
        )


def test_a_flag_gives_the_step() -> None:
    (step,) = parse_steps(["search:over=sparsity,sparsity=0.5,levels=0.4+0.6,processes=2"])
    assert step == Search(over="sparsity", sparsity=0.5, levels=("0.4", "0.6"), processes=2)
