"""What the layers after a head or neuron, and the logits, would notice if it were gone
(after OPTIN, [2403.17921](https://arxiv.org/abs/2403.17921)).

A head that adds much may add what nobody downstream reads. OPTIN masks one after the other and measures the distance of
all later features, and the divergence of the predictions, from the dense model's: a run for each. Both distances are
zero with their slopes where nothing is masked, so that their second order tells what masking does,

    D(m) ≈ Σ_l E ‖J_l δ‖² / E ‖F_l‖² / L + KL,    KL ≈ ½ E (δ · ∇ log p(y))²,  y drawn from p,

and a squared Jacobian is the mean of squared gradients of random projections, E_v (∇ v·F)². One pass back thus judges
all heads and neurons of all layers at once. What masking at one token does to another's features counts as if the two
were independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.parts import Attention, FeedForward, attentions, feed_forwards
from skipstone.exporters.compress.scores import Scores
from skipstone.exporters.compress.work import Work

_TOKENS = 2048  # of the calibration text
_PROJECTIONS = 4  # of every window
_SEED = 0


def score(model: nn.Module, work: Work) -> Scores:
    """See `skipstone.exporters.compress.scores.Scorer`: what masking a head or neuron does downstream, D of the module's
    docstring, mean per token.
    """
    parts: list[Attention | FeedForward] = [*attentions(model), *feed_forwards(model)]
    sums = {part.name: torch.zeros(_units(part), dtype=torch.float64) for part in parts}
    random = torch.Generator().manual_seed(_SEED)
    text = work.calibration.first(_TOKENS)
    for done, inputs in enumerate(text.inputs()):
        work.progress("downstream", done, len(text.windows))
        for name, squares in _noticed(model, parts, inputs, random):
            sums[name] += squares
    tokens = sum(map(len, text.windows)) * _PROJECTIONS
    found = {name: (total / tokens).float() for name, total in sums.items()}
    heads = {part.name: found[part.name] for part in parts if isinstance(part, Attention)}
    return Scores(heads, {name: found[name] for name in found if name not in heads})


def _noticed(
    model: Any, parts: list[Attention | FeedForward], inputs: dict[str, Tensor], random: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """By part, once for every projection, squared slopes of its units' masks, summed over tokens: float64 [units]."""
    with _watching(model, parts) as (masks, features), torch.enable_grad():
        logits = model(**inputs).logits[0]
        ordered = [masks[part.name] for part in parts]
        for turn in range(_PROJECTIONS):
            noticed = _projected(features, random) + _likelihood(logits, random)
            slopes = torch.autograd.grad(noticed, ordered, retain_graph=turn + 1 < _PROJECTIONS)
            for part, slope in zip(parts, slopes, strict=True):
                # The slope of a mask that all channels of a head share is the sum of theirs.
                by_unit = slope[0].double().reshape(len(slope[0]), _units(part), -1).sum(-1)
                yield part.name, by_unit.square().sum(0)


def _projected(features: list[Tensor], random: torch.Generator) -> Tensor:
    """Σ_l v_l · F_l with signs v_l, scaled so that the squared slopes are Σ_l ‖J_l‖² / E ‖F_l‖² / L."""
    total = torch.zeros(())
    for states in features:
        signs = torch.randint(0, 2, states.shape, generator=random) * 2.0 - 1.0
        scale = (states.detach().square().sum(-1).mean() * len(features)).sqrt()
        total = total + (signs * states).sum() / scale
    return total


def _likelihood(logits: Tensor, random: torch.Generator) -> Tensor:
    """Σ log p(y) / √2 over positions, y drawn from p: its squared slopes are half of Fisher's information on average."""
    log_p = functional.log_softmax(logits, -1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
    return log_p.gather(1, drawn).sum() / 2**0.5


@contextmanager
def _watching(
    model: Any, parts: list[Attention | FeedForward]
) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """While the model runs, masks of ones on what every part's output matrix is given, by part, and what leaves each
    layer, in order of computation.
    """
    masks: dict[str, Tensor] = {}
    features: list[Tensor] = []

    def mask(name: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            masks[name] = torch.ones_like(given[0], requires_grad=True)
            return (given[0] * masks[name],)

        return hook

    def watch(_module: nn.Module, _given: Any, output: Any) -> None:
        features.append(output[0] if isinstance(output, tuple) else output)

    handles = [part.output.register_forward_pre_hook(mask(part.name)) for part in parts]
    blocks = [block for stack in stacks_of(model) for block in stack.blocks]
    handles += [block.register_forward_hook(watch) for block in blocks]
    try:
        yield masks, features
    finally:
        for handle in handles:
            handle.remove()


def _units(part: Attention | FeedForward) -> int:
    return part.groups if isinstance(part, Attention) else part.size
