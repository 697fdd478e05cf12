"""How much the model's predictions move when a layer's outputs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.work import Progress, Windows


def sensitivities(
    model: Any, linears: Mapping[str, nn.Linear], text: Windows, progress: Progress
) -> dict[str, float]:
    """By layer, the divergence that a mean squared error of its outputs (the sum over them) brings, in nats per token.

    To second order a change δ of a layer's outputs moves the distribution by ½ E (gᵀδ)², with g the gradient of the
    log-probability of a token drawn from it (Fisher's information). Errors are taken to be spread over the outputs as
    if at random: ½ E‖g‖² E‖δ‖² / outputs.

    Args:
        model: from `load_eager`; takes no gradients, and needs none.
        linears: by name.
        text: whose tokens, but the first of every window, are predicted.
        progress: told of every window.
    """
    squares = dict.fromkeys(linears, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            squares[name] += float(gradient.square().sum())

        def hook(_module: nn.Module, _given: Any, out: Tensor) -> None:
            out.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    tables = {stack.module.embed_tokens for stack in stacks_of(model)}
    handles = [
        table.register_forward_hook(lambda _module, _given, out: out.requires_grad_()) for table in tables
    ]
    handles += [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    generator = torch.Generator().manual_seed(0)
    try:
        for done, inputs in enumerate(text.inputs()):
            progress("sensitivities", done, len(text.windows))
            with torch.enable_grad():
                logits = model(**inputs).logits[0, :-1].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: squares[name] / (2 * max(text.tokens, 1) * linear.out_features)
        for name, linear in linears.items()
    }
