"""Which layers can be stored in fewer bits: rankings of a decoder's layers by how much they count.

- `cosine`: by what a layer changes, 1 − cos between its input and its output, mean over the calibration tokens (LIM of
  Layer-wise quantization, https://arxiv.org/abs/2406.17415, section 3).
- `outliers`: by the share of its weights that lie more than one standard deviation above their mean (ZD, likewise).
- `sensitivity`: by the divergence from the dense model when the layer alone is lowered (Kullback–Leibler).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.quantize.grid import Grid
from skipstone.exporters.compress.work import Windows, Work

Ranking = Literal["cosine", "outliers", "sensitivity"]
_TOKENS = 2048  # of the calibration text that sensitivity is measured on


def lowest(
    model: nn.Module, work: Work, by: Ranking, count: int, lowered: Callable[[int], Mapping[str, Grid]]
) -> tuple[int, ...]:
    """The layers that count least, ascending.

    Args:
        model: a decoder or a T5, whose decoder is ranked.
        work: of the run.
        by: the ranking.
        count: how many.
        lowered: by the number of a layer, the layouts of its weights when it alone is lowered.
    """
    if by == "cosine":
        scores = changes(model, work.calibration)
    elif by == "outliers":
        scores = outliers(model)
    else:
        scores = sensitivities(model, work.calibration.first(_TOKENS), lowered)
    return tuple(sorted(torch.tensor(scores).argsort(stable=True)[:count].tolist()))


@torch.no_grad()
def changes(model: Any, text: Windows) -> list[float]:
    """By layer, mean of 1 − cos between input and output."""
    stack, sums = stacks_of(model)[-1], torch.zeros(len(stacks_of(model)[-1].blocks), dtype=torch.float64)

    def watch(layer: int) -> Any:
        def hook(_module: Any, given: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            sums[layer] += (1 - functional.cosine_similarity(given[0], after, dim=-1)).double().sum()

        return hook

    handles = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(stack.blocks)]
    try:
        for inputs in text.inputs():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: list[float] = (sums / sum(map(len, text.windows))).tolist()
    return found


def outliers(model: nn.Module) -> list[float]:
    """By layer, share of weights whose z-score is above 1."""
    found = []
    for block in stacks_of(model)[-1].blocks:
        linears = (part for part in block.modules() if isinstance(part, nn.Linear))
        weights = torch.cat([part.weight.detach().flatten() for part in linears])
        found.append(float(((weights - weights.mean()) / weights.std() > 1.0).float().mean()))
    return found


@torch.no_grad()
def sensitivities(model: Any, text: Windows, lowered: Callable[[int], Mapping[str, Grid]]) -> list[float]:
    """By layer, mean divergence from the model as it is when the layer alone is rounded, nats per token."""
    expected = [_log_probabilities(model, inputs) for inputs in text.inputs()]
    weights, found = dict(model.named_parameters()), []
    for layer in range(len(stacks_of(model)[-1].blocks)):
        grids = lowered(layer)
        before = {name: weights[name].clone() for name in grids}
        for name, grid in grids.items():
            parts = grid.fit(weights[name], None)
            weights[name].copy_(grid.levels(parts).values(grid.codes(parts)))
        total = sum(
            float((p.exp() * (p - _log_probabilities(model, inputs))).sum())
            for p, inputs in zip(expected, text.inputs(), strict=True)
        )
        found.append(total / sum(map(len, expected)))
        for name, weight in before.items():
            weights[name].copy_(weight)
    return found


def _log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """float32 [n, vocab_size]."""
    logits: Tensor = model(**inputs).logits[0]
    return functional.log_softmax(logits, -1)
