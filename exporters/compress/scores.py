"""How much heads and neurons matter: scorers by name.

    >>> scores = open_scorer("activation")(model, work)
    >>> scores.neurons["model.layers.0.mlp"].shape
    torch.Size([768])

A scorer is a function (see `Scorer`) and one line in `SCORERS`.

- `magnitude`: the norm of all weights of the head or neuron.
- `activation`: the energy that it adds to the residual stream on the calibration text, E ‖W x‖² over its own columns
  of the output matrix, with what the matrix is given before anything is taken out.
- `optin`: what the later layers and the logits would notice if it were gone (`skipstone.exporters.compress.optin`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import walk
from skipstone.exporters.compress.parts import Attention, FeedForward, attentions, feed_forwards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from skipstone.exporters.compress.work import Work


@dataclass(frozen=True)
class Scores:
    """The more, the more it matters; comparable within a layer and between layers.

    Attributes:
        heads: by attention module, float [groups].
        neurons: by feed-forward network, float [neurons].
    """

    heads: dict[str, Tensor]
    neurons: dict[str, Tensor]


Scorer = Callable[[nn.Module, "Work"], Scores]

SCORERS = {
    "magnitude": "skipstone.exporters.compress.scores:magnitude",
    "activation": "skipstone.exporters.compress.scores:activation",
    "optin": "skipstone.exporters.compress.optin:score",
}
WITHOUT_TEXT = ("magnitude",)


def open_scorer(name: str) -> Scorer:
    """A scorer by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SCORERS:
        raise UsageError(f"by={name}: no such way to score", hint=f"one of {', '.join(SCORERS)}")
    module, function = SCORERS[name].split(":")
    return cast("Scorer", getattr(importlib.import_module(module), function))


def magnitude(model: nn.Module, work: Work) -> Scores:
    """The norm of all weights that would go."""
    heads = {}
    for attention in attentions(model):
        squares = _grouped(attention.query.weight.square().sum(1), attention.groups)
        for projection in (attention.key, attention.value):
            squares = squares + _grouped(projection.weight.square().sum(1), attention.groups)
        squares = squares + _grouped(attention.output.weight.square().sum(0), attention.groups)
        heads[attention.name] = squares.sqrt()
    neurons = {}
    for network in feed_forwards(model):
        rows = [projection.weight.square().sum(1) for projection in network.inputs]
        neurons[network.name] = (torch.stack(rows).sum(0) + network.output.weight.square().sum(0)).sqrt()
    return Scores(heads, neurons)


def activation(model: nn.Module, work: Work) -> Scores:
    """The energy that a head or neuron adds to the residual stream, E ‖W x‖² over its columns of W."""
    heads, neurons = {}, {}
    for part, moment in output_moments(model, work):
        gram = part.output.weight.double().T @ part.output.weight.double()
        energy = gram * moment
        if isinstance(part, Attention):
            width = part.heads * part.size
            blocks = energy.reshape(part.groups, width, part.groups, width)
            heads[part.name] = torch.einsum("gigj->g", blocks)
        else:
            neurons[part.name] = energy.diagonal().clone()
    return Scores(heads, neurons)


def output_moments(model: Any, work: Work) -> Iterator[tuple[Attention | FeedForward, Tensor]]:
    """Every attention module and network in turn, with the mean of x xᵀ over what its output matrix is given, float64.

    The model must not change meanwhile.
    """
    parts: dict[int, Attention | FeedForward] = {id(part.output): part for part in attentions(model)}
    parts |= {id(network.output): network for network in feed_forwards(model)}
    text = work.calibration
    done, total = 0, len(parts)
    for block in walk(model, text.windows, text.sources):
        for name, linear in block.linears.items():
            if id(linear) in parts:
                work.progress("inputs", done, total)
                done += 1
                yield parts[id(linear)], block.inputs[name].second_moment


def _grouped(values: Tensor, groups: int) -> Tensor:
    return values.reshape(groups, -1).sum(1)
