"""Wanda's masks against torchao's."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torchao.sparsity import WandaSparsifier

from skipstone.exporters.compress.sparsify.masks import Pattern
from skipstone.exporters.compress.sparsify.wanda import prune
from tests.exporters.compress.sparsify.layers import Layer, random_layer


def _by_torchao(layer: Layer, **options: object) -> Tensor:
    """The mask that torchao's pruner gives a Linear of this weight.

    torchao weighs with the squares of the inputs' norms, the paper with the norms: it is given inputs whose squares are
    the norms of the layer's.
    """
    out, width = layer.weight.shape
    model = nn.Sequential(nn.Linear(width, out, bias=False)).double()
    model[0].weight = nn.Parameter(layer.weight.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that 2:4 is 50 %, and that torch.ao is to move
        sparsifier = WandaSparsifier(**options)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        model(layer.moment.diagonal().pow(0.25)[None])
        sparsifier.step()
        sparsifier.squash_mask()
    return model[0].weight.detach() != 0


@pytest.mark.parametrize("group", [4, 8])
def test_grouped_masks_are_torchaos(group: int) -> None:
    layer = random_layer(24, 64)
    expected = _by_torchao(layer, semi_structured_block_size=group)
    _, mask = prune(layer.weight, layer.moment, Pattern.parse(f"{group // 2}:{group}"))
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_every_rows_mask_is_torchaos_of_that_row_alone(share: float) -> None:
    """torchao compares all weights of a matrix, the paper those of one output: of a single row that is the same."""
    layer = random_layer(8, 64)
    expected = torch.cat(
        [_by_torchao(Layer(row[None], layer.inputs), sparsity_level=share) for row in layer.weight]
    )
    _, mask = prune(layer.weight, layer.moment, Pattern(share))
    assert torch.equal(mask, expected)


def test_inputs_decide_where_weights_are_equal() -> None:
    weight, moment = torch.ones(1, 4), torch.diag(torch.tensor([4.0, 1.0, 9.0, 2.0]))
    assert prune(weight, moment, Pattern(0.5))[1].tolist() == [[True, False, True, False]]
