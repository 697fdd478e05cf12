"""Heads and neurons that go, against the dense model with their columns zeroed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.parts import attentions, feed_forwards
from skipstone.exporters.compress.scores import Scores, open_scorer
from skipstone.exporters.compress.shapes import shape_of
from skipstone.exporters.compress.steps import Shape, Target
from skipstone.exporters.compress.width import PruneHeads, PruneWidth, choose_groups, refit
from tests.exporters.compress.models import logits, open_work
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import Case, make_checkpoint

GROUPED = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}


@pytest.fixture(scope="module", params=["llama", "qwen-2", "qwen-3", "llama-biases"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with three groups of two heads."""
    from tests.exporters.tiny import CASES

    case = CASES[request.param]
    wide = Case(case.architecture, {**case.config, **GROUPED}, case.pre)
    return make_checkpoint(tmp_path_factory.mktemp("grouped") / request.param, wide)


def test_pruned_heads_are_those_that_add_nothing_any_more(grouped: Path, tmp_path: Path) -> None:
    model, work = open_work(grouped)
    kept = PruneHeads(count=1, by="magnitude", refit=False).apply(model, work)["kept"]
    expected = load_eager(grouped)
    for part in attentions(expected):
        gone = [group for group in range(3) if group not in kept[part.name]]
        part.output.weight[:, part.columns(gone)] = 0.0
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_eager(tmp_path / "saved")), logits(model))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize("name", ["t5", "flan-t5", "codet5"])
def test_a_t5_loses_the_same_heads_wherever_biases_are_shared(
    name: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    model, work = open_work(tiny_t5(name))
    kept = PruneHeads(count=1, by="magnitude", refit=False).apply(model, work)["kept"]
    expected = load_eager(tiny_t5(name))
    for part in attentions(expected):
        gone = [group for group in range(part.groups) if group not in kept[part.name]]
        assert len(gone) == 1
        part.output.weight[:, part.columns(gone)] = 0.0
    for side in ("encoder", "decoder"):
        shared = {tuple(kept[p.name]) for p in attentions(expected) if p.shares_biases and side in p.name[:7]}
        assert len(shared) == 1
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_eager(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen-3", "t5", "flan-t5"])
def test_pruned_neurons_are_those_that_add_nothing_any_more(
    name: str, tiny: MakeTiny, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    folder = (tiny_t5 if "t5" in name else tiny)(name)
    model, work = open_work(folder)
    scores = open_scorer("magnitude")(model, work)
    PruneWidth(share=0.5, by="magnitude", refit=False).apply(model, work)
    expected = load_eager(folder)
    for before, after in zip(feed_forwards(expected), feed_forwards(model), strict=True):
        kept = scores.neurons[before.name].topk(after.size).indices
        gone = torch.ones(before.size, dtype=torch.bool)
        gone[kept] = False
        before.output.weight[:, gone] = 0.0
        assert after.size < before.size
        assert after.size % 32 == 0
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_eager(tmp_path / "saved")), logits(model))


def test_a_refitted_matrix_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    weight, kept = torch.randn(5, 8), torch.tensor([0, 2, 3, 6])
    moment = x.T @ x / len(x)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    torch.testing.assert_close(refit(weight, moment, kept).double(), expected, rtol=1e-2, atol=1e-2)
    error = (x[:, kept] @ refit(weight, moment, kept).double().T - x @ weight.double().T).square().mean()
    cut = (x[:, kept] @ weight[:, kept].double().T - x @ weight.double().T).square().mean()
    assert error < 0.8 * cut


def test_inputs_that_were_never_seen_keep_their_weights() -> None:
    moment = torch.zeros(4, 4, dtype=torch.float64)
    moment[0, 0] = 1.0
    weight = torch.arange(8.0).reshape(2, 4)
    assert torch.equal(refit(weight, moment, torch.tensor([0, 2])), weight[:, [0, 2]])


def test_the_activation_score_is_the_energy_of_what_is_added(tiny: MakeTiny) -> None:
    model, work = open_work(tiny("llama"))
    scores = open_scorer("activation")(model, work)
    network, given = feed_forwards(model)[1], []
    handle = network.output.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0][0]))
    for inputs in work.calibration.inputs():
        with torch.no_grad():
            model(**inputs)
    handle.remove()
    x = torch.cat(given)
    added = x[:, 5, None] * network.output.weight[:, 5]
    torch.testing.assert_close(
        scores.neurons[network.name][5].float(), added.square().sum(1).mean(), rtol=1e-4, atol=0
    )


def test_refitting_loses_less_than_cutting(tiny: MakeTiny) -> None:
    errors = []
    for refitted in (True, False):
        model, work = open_work(tiny("gentle"))
        before = logits(model)
        PruneWidth(share=0.6, refit=refitted).apply(model, work)
        errors.append(float((logits(model) - before).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_modules_that_share_nothing_choose_for_themselves(tiny_t5: MakeTiny) -> None:
    model, _ = open_work(tiny_t5("t5"))
    parts = attentions(model)
    heads = {part.name: torch.ones(6) for part in parts}
    first, cross = parts[4].name, next(part.name for part in parts if "EncDec" in part.name)
    heads[first] = torch.tensor([0.0, 1, 1, 1, 1, 1])
    heads[cross] = torch.tensor([1.0, 1, 0, 1, 1, 1])
    kept = choose_groups(model, Scores(heads, {}), 1)
    assert kept[first] == kept["decoder.block.1.layer.0.SelfAttention"] == [1, 2, 3, 4, 5]
    assert kept[cross] == [0, 1, 3, 4, 5]


SHAPE = Shape("LlamaForCausalLM", 4, 0, 64, 2, 1, 32, 96)


@pytest.mark.parametrize(
    ("step", "target", "message"),
    [
        (PruneHeads(count=1), Target(), "1 of 1 groups.*drop_layers"),
        (PruneWidth(share=0.1), Target(), "takes none of 96 neurons"),
        (PruneWidth(keep=96), Target(), "keep 96 takes none"),
        (
            PruneWidth(share=0.5, widths="per-layer"),
            Target("gguf"),
            "a GGUF of LlamaForCausalLM.*drop_layers",
        ),
        (PruneWidth(share=0.5, widths="per-layer"), Target(), "one width for all"),
        (PruneWidth(share=0.5, by="taste"), Target(), "by=taste.*magnitude, activation"),
    ],
)
def test_what_cannot_be_pruned_is_refused(step: Any, target: Target, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        step.check(SHAPE, target)


def test_the_shape_is_foretold(grouped: Path) -> None:
    model, work = open_work(grouped)
    shape = shape_of(open_checkpoint(grouped))
    for step in (PruneHeads(count=2), PruneWidth(share=0.5)):
        shape = step.check(shape, Target())
        step.apply(model, work)
    assert (shape.heads, shape.key_value_heads, shape.ffn_size) == (2, 1, 64)
    found = model.config
    assert (found.num_attention_heads, found.num_key_value_heads, found.intermediate_size) == (2, 1, 64)


def test_heads_that_transformers_would_not_load_are_refused() -> None:
    wide = Shape("LlamaForCausalLM", 4, 0, 64, 8, 4, 8, 96)
    with pytest.raises(UsageError, match="6 heads, which do not divide its 64 channels"):
        PruneHeads(count=1).check(wide, Target())
    assert PruneHeads(count=2).check(wide, Target()).heads == 4
