"""Models with pairs in the place of linear layers: what they compute, what is written, and what formats carry."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import skipstone
from skipstone.bundle import Bundle
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.low_rank.sensitivity import sensitivities
from skipstone.exporters.compress.low_rank.step import LowRank
from skipstone.exporters.compress.recipe import make_step, parse_steps
from skipstone.exporters.compress.recover.step import Recover
from skipstone.exporters.compress.run import compress
from skipstone.exporters.compress.steps import Shape, Target
from skipstone.exporters.compress.work import silent
from skipstone.exporters.factors import FactoredLinear, factored, load_factored
from skipstone.exporters.facts import FACTORS_FILE, factored_away, hash_checkpoint, num_weights
from skipstone.exporters.pipeline import export_checkpoint
from tests.exporters.compress.models import logits, open_work
from tests.exporters.compress.test_export import assert_strategies_agree
from tests.exporters.conftest import MakeTiny

_SHAPE = Shape("LlamaForCausalLM", 4, 0, 64, 2, 1, 32, 96)
_BUDGET = LowRank(budget=0.6, multiple=4)
_STEP = parse_steps(["low_rank:budget=0.4,multiple=4"])


@pytest.fixture
def small(tiny: MakeTiny, text: Path, tmp_path: Path) -> Path:
    """A factored checkpoint."""
    compress(tiny("gentle"), tmp_path / "small", _STEP, calibration=text)
    return tmp_path / "small"


def test_the_budget_is_kept_and_the_better_the_larger_it_is(tiny: MakeTiny) -> None:
    before = logits(load_eager(tiny("gentle")))
    distances = []
    for budget in (0.4, 0.7, 0.95):
        model, work = open_work(tiny("gentle"))
        blocks = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
        details = LowRank(budget=budget, multiple=4).apply(model, work)
        after = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
        assert budget - 0.05 < after / blocks <= budget
        assert details["kept"] == pytest.approx(after / blocks)
        ranks = {name: pair.rank for name, pair in factored(model).items()}
        assert ranks == {name: rank for name, rank in details["ranks"].items() if rank is not None}
        distances.append(float((logits(model) - before).square().mean()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


def test_ranks_that_go_where_they_count_lose_less_than_one_rank_for_all(tiny: MakeTiny) -> None:
    before, distances = logits(load_eager(tiny("gentle"))), []
    model, work = open_work(tiny("gentle"))
    kept = LowRank(rank=12).apply(model, work)["kept"]
    distances.append(float((logits(model) - before).square().mean()))
    model, work = open_work(tiny("gentle"))
    assert LowRank(budget=kept, multiple=4).apply(model, work)["kept"] <= kept
    distances.append(float((logits(model) - before).square().mean()))
    assert distances[1] < 0.8 * distances[0]


def test_a_rank_that_saves_nothing_leaves_the_model_as_it_is(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("llama-biases"))
    before = logits(model)
    assert set(LowRank(rank=64).apply(model, work)["ranks"].values()) == {None}
    assert torch.equal(logits(model), before)


def test_sensitivities_are_the_divergence_that_noise_in_the_outputs_brings(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("gentle"))
    names = ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.o_proj")
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    found = sensitivities(model, linears, work.calibration, silent)
    inputs = next(work.calibration.inputs())
    with torch.no_grad():
        dense = model(**inputs).logits[0, :-1].log_softmax(-1)
        for name, linear in linears.items():
            generator, total = torch.Generator().manual_seed(0), 0.0

            def noisy(_m: nn.Module, _x: Any, out: Tensor, g: torch.Generator = generator) -> Tensor:
                return out + 0.03 * torch.randn(out.shape, generator=g)

            handle = linear.register_forward_hook(noisy)
            for _ in range(30):
                moved = model(**inputs).logits[0, :-1].log_softmax(-1)
                total += float((dense.exp() * (dense - moved)).sum(-1).mean()) / 30
            handle.remove()
            assert total == pytest.approx(found[name] * 0.03**2 * linear.out_features, rel=0.5)


def test_places_that_were_named_are_factored_alone_on_either_side(tiny_t5: MakeTiny) -> None:
    model, work = open_work(tiny_t5("t5"))
    LowRank(rank=8, places=("encoder.0-1", "0.wo")).apply(model, work)
    names = list(factored(model))
    assert all(
        name.startswith(("encoder.block.0.", "encoder.block.1.", "decoder.block.0.")) for name in names
    )
    assert [name for name in names if name.startswith("decoder")] == [
        "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    ]
    assert torch.isfinite(logits(model)).all()


def test_the_folder_loads_in_transformers_as_the_product_and_here_as_the_pairs(small: Path) -> None:
    dense, pairs = load_eager(small), load_factored(small)
    assert not factored(dense)
    assert factored(pairs)
    assert torch.allclose(logits(dense), logits(pairs), atol=1e-4)
    checkpoint = open_checkpoint(small)
    saved = num_weights(checkpoint) - sum(weight.numel() for weight in pairs.parameters())
    assert factored_away(checkpoint) == saved > 0
    whole = hash_checkpoint(checkpoint)
    (small / FACTORS_FILE).unlink()
    assert hash_checkpoint(open_checkpoint(small)) != whole
    assert factored_away(open_checkpoint(small)) == 0


def test_factors_of_other_weights_are_refused(small: Path) -> None:
    stored = load_file(small / FACTORS_FILE)
    name = next(key for key in stored if key.endswith(":up"))
    save_file({**stored, name: stored[name] * 1.01}, small / FACTORS_FILE)
    with pytest.raises(CheckpointError, match="differs from their product by") as refused:
        load_factored(small)
    assert FACTORS_FILE in str(refused.value.hint)
    save_file({key: value for key, value in stored.items() if key != name}, small / FACTORS_FILE)
    with pytest.raises(CheckpointError, match="has not two matrices"):
        load_factored(small)
    save_file(
        {"model.norm.weight:up": stored[name], "model.norm.weight:down": stored[name].T.contiguous()},
        small / FACTORS_FILE,
    )
    with pytest.raises(CheckpointError, match=r"no linear layer model\.norm"):
        load_factored(small)


def test_training_keeps_the_pairs_and_a_run_goes_on_from_them(
    tiny: MakeTiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [*_STEP, *parse_steps(["recover:steps=20,batch=2,learning_rate=2e-4"])]
    with monkeypatch.context() as patch:
        patch.setattr(Recover, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("gentle"), tmp_path / "out", steps, calibration=text)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "apply", lambda *_: pytest.fail("was taken again"))
        record = compress(tiny("gentle"), tmp_path / "out", steps, calibration=text)
    first, trained = record.steps
    assert first.size.parameters == trained.size.parameters < 0.6 * record.before.parameters
    assert first.fidelity is not None
    assert trained.fidelity is not None
    assert trained.fidelity.kl_divergence < first.fidelity.kl_divergence
    for name, pair in factored(load_factored(tmp_path / "out")).items():
        weight = load_eager(tmp_path / "out").get_parameter(name).double()
        assert int(torch.linalg.matrix_rank(weight, rtol=1e-5)) <= pair.rank == first.details["ranks"][name]


def test_a_gguf_is_given_the_product_and_the_record_says_that_nothing_is_gained(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("gentle"))
    details = _BUDGET.apply(model, replace(work, target=Target(format="gguf")))
    assert details["gain"].startswith("no gain on this device: a GGUF has one matrix")
    assert not factored(model)
    other, work = open_work(tiny("gentle"))
    assert _BUDGET.apply(other, work)["gain"].startswith("fewer weights in executorch, onnx")
    assert torch.allclose(logits(model), logits(other), atol=1e-4)
    assert not _BUDGET.check(_SHAPE, Target(format="gguf")).factored


def _greedy(folder: Path, prompt: str, count: int) -> list[int]:
    """What transformers' own model of the folder continues a prompt with."""
    from tokenizers import Tokenizer

    model, ids = load_eager(folder), Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def _assert_smaller_and_right(folder: Path, bundle: Bundle, small: Path, tiny: Path) -> None:
    """The bundle has fewer bytes than the weights alone of the model that was factored, and says what torch says."""
    parity = bundle.manifest.parity
    assert parity.reference is not None
    assert max(parity.reference, parity.split, parity.draft_verify) <= 1e-4
    assert sum(entry.size for entry in bundle.manifest.files) < 4 * num_weights(open_checkpoint(tiny))
    with skipstone.load(folder, threads=1) as model:
        found = model.generate("A river is", max_new_tokens=12, strategy="plain", ignore_eos=True)
    assert list(found.tokens) == _greedy(small, "A river is", 12)
    assert_strategies_agree(folder, ["A river is never"])


@pytest.mark.slow
@pytest.mark.engine
def test_executorch_carries_both_matrices(small: Path, tiny: MakeTiny, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"format": "executorch", "quantize": "none", "exits": (1,), "context_length": 64}
    bundle = export_checkpoint(small, tmp_path / "out", **flags)
    _assert_smaller_and_right(tmp_path / "out", bundle, small, tiny("gentle"))


@pytest.mark.slow
@pytest.mark.engine
def test_onnx_carries_both_matrices(small: Path, tiny: MakeTiny, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"format": "onnx", "quantize": "none", "exits": (1,), "context_length": 64}
    bundle = export_checkpoint(small, tmp_path / "out", **flags)
    _assert_smaller_and_right(tmp_path / "out", bundle, small, tiny("gentle"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "rank": 8}, "either budget or rank"),
        ({"budget": 1.0}, "budget"),
        ({"places": ["head"]}, "head is no linear layer of a block"),
        ({"places": ["0..1"]}, "low_rank: places: '0..1' names no place"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_step({"kind": "low_rank", **options}, "recipe")


@pytest.mark.parametrize(
    "step", ["quantize:scheme=8da4w", "sparsify:sparsity=0.5", "prune_heads:count=1", "low_rank:rank=8"]
)
def test_steps_that_know_whole_matrices_alone_come_before(step: str) -> None:
    shape = LowRank().check(_SHAPE, Target())
    (later,) = parse_steps([step])
    with pytest.raises(UsageError, match="pairs of narrow ones already"):
        later.check(shape, Target())


def test_a_model_without_the_places_is_refused(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("gentle"))
    with pytest.raises(UsageError, match=r"places=9: the model has no such linear layers"):
        LowRank(places=("9",)).apply(model, work)


def test_a_pair_computes_what_its_product_does_with_its_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, bias, x = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (5, 3), (5,), (4, 8)))
    pair = FactoredLinear(down, up, bias)
    assert torch.allclose(pair(x), nn.functional.linear(x, pair.product(), bias), atol=1e-5)
