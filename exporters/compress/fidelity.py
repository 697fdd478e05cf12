"""How far a compressed model has moved from the dense one, its exits included; in float32, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skipstone.bundle import ExitAgreement, Fidelity
from skipstone.exporters.compress.activations import Stack, stacks_of
from skipstone.exporters.compress.work import Windows, Work

_MOST_TOKENS = 4096


@torch.no_grad()
def measure_fidelity(model: Any, work: Work, text: Windows) -> Fidelity:
    """Hold a model against the one that the run began with.

    Args:
        model: of the run, in whatever state.
        work: of the run; its recorded exits are measured.
        text: its first 4,096 tokens count.
    """
    exits = work.exits or ()
    kept = work.kept.get("decoder", tuple(range(len(stacks_of(model)[-1].blocks))))
    dense_exits = [kept[exit_layer - 1] + 1 for exit_layer in exits]
    counted = text.first(_MOST_TOKENS)
    loss = divergence = 0.0
    agreed, own, same = 0, [0] * len(exits), [0] * len(exits)
    for inputs, window in zip(counted.inputs(), counted.windows, strict=True):
        *early, last = exit_logits(model, exits, inputs)
        *dense_early, dense = exit_logits(work.dense, dense_exits, inputs)
        found, expected = (functional.log_softmax(part[:-1].double(), -1) for part in (last, dense))
        loss -= float(found.gather(1, window[1:, None]).sum())
        divergence += float((expected.exp() * (expected - found)).sum())
        agreed += _matches(last, dense)
        for index, (logits, dense_logits) in enumerate(zip(early, dense_early, strict=True)):
            own[index] += _matches(logits, last)
            same[index] += _matches(logits, dense_logits)
    tokens = counted.tokens
    return Fidelity(
        tokens=tokens,
        perplexity=float(torch.tensor(loss / tokens, dtype=torch.float64).exp()),
        kl_divergence=max(divergence / tokens, 0.0),
        agreement=agreed / tokens,
        exits=tuple(
            ExitAgreement(exit=exit_layer, own_last=a / tokens, dense_exit=dense_exit, dense=b / tokens)
            for exit_layer, dense_exit, a, b in zip(exits, dense_exits, own, same, strict=True)
        ),
    )


@torch.no_grad()
def exit_logits(model: Any, exits: Sequence[int], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits [n, vocab_size] after each of `exits` layers (of an encoder-decoder, the decoder's), then of the model.

    Args:
        model: from `load_eager`.
        exits: layer counts.
        inputs: of one window, as `Windows.inputs` gives them.
    """
    stack = stacks_of(model)[-1]
    with _states_after(stack, exits) as states:
        last = model(**inputs).logits[0]
    return [*(head(model, stack, states[exit_layer])[0] for exit_layer in exits), last]


def head(model: Any, stack: Stack, hidden: Tensor) -> Tensor:
    """Logits of hidden states of the last stack, at any of its exits: final norm, LM head, and a T5's scale."""
    normed = getattr(stack.module, stack.norm)(hidden)
    if getattr(model.config, "scale_decoder_outputs", False):
        normed = normed * model.model_dim**-0.5
    logits: Tensor = model.lm_head(normed)
    return logits


@contextmanager
def _states_after(stack: Stack, exits: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What leaves the layers before the exits, by exit, once the model has been run."""
    states: dict[int, Tensor] = {}

    def watch(exit_layer: int) -> Any:
        def hook(_module: Any, _given: Any, output: Any) -> None:
            states[exit_layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [stack.blocks[exit_layer - 1].register_forward_hook(watch(exit_layer)) for exit_layer in exits]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _matches(logits: Tensor, others: Tensor) -> int:
    """At how many positions, the last one apart, the best tokens are the same."""
    return int((logits[:-1].argmax(-1) == others[:-1].argmax(-1)).sum())
