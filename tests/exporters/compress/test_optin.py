"""Scores by what is noticed downstream, against masking every head and a sample of neurons by themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.parts import attentions, feed_forwards
from skipstone.exporters.compress.scores import open_scorer
from skipstone.exporters.compress.work import Work
from tests.exporters.compress.models import open_work
from tests.exporters.conftest import MakeTiny

_STEP = 11  # every so many neurons is masked


@torch.no_grad()
def outputs(model: Any, work: Work) -> tuple[list[Tensor], Tensor]:
    """What leaves each layer, [n, hidden_size] over all windows, and log-probabilities."""
    features: dict[str, list[Tensor]] = {}
    handles = [
        block.register_forward_hook(
            lambda _m, _i, out, name=f"{stack.name}.{index}": features.setdefault(name, []).append(
                (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
            )
        )
        for stack in stacks_of(model)
        for index, block in enumerate(stack.blocks)
    ]
    logits = torch.cat([model(**inputs).logits[0] for inputs in work.calibration.inputs()])
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in features.values()], functional.log_softmax(logits.double(), -1)


def distance(model: Any, work: Work, dense: tuple[list[Tensor], Tensor]) -> float:
    """What OPTIN measures of a masked model: later layers' features, and divergence."""
    features, log_p = outputs(model, work)
    moved = [
        float((found - expected).square().sum() / expected.square().sum())
        * len(expected) / len(log_p)
        for found, expected in zip(features, dense[0], strict=True)
    ]  # fmt: skip
    return sum(moved) / len(moved) + float((dense[1].exp() * (dense[1] - log_p)).sum(-1).mean())


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([part.argsort().argsort().double() for part in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_neurons_and_heads_are_judged_as_masking_them_one_by_one_judges_them(
    name: str, tiny: MakeTiny, tiny_t5: MakeTiny
) -> None:
    model, work = open_work((tiny_t5 if name == "t5" else tiny)(name))
    scores, dense = open_scorer("optin")(model, work), outputs(model, work)
    found, expected = {"neurons": [], "heads": []}, {"neurons": [], "heads": []}

    def mask(part: Any, columns: Any) -> float:
        kept = part.output.weight.clone()
        part.output.weight[:, columns] = 0.0
        measured = distance(model, work, dense)
        part.output.weight.copy_(kept)
        return measured

    with torch.no_grad():
        for network in feed_forwards(model):
            for neuron in range(0, network.size, _STEP):
                found["neurons"].append(scores.neurons[network.name][neuron])
                expected["neurons"].append(mask(network, neuron))
        for attention in attentions(model):
            for group in range(attention.groups):
                found["heads"].append(scores.heads[attention.name][group])
                expected["heads"].append(mask(attention, attention.columns([group])))
    for kind in found:
        judged, measured = torch.tensor(found[kind]), torch.tensor(expected[kind])
        assert rank_correlation(judged, measured) > 0.9
        assert float((judged / measured).median()) == pytest.approx(1.0, rel=0.25)
