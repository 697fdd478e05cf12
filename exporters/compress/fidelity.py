"""How far a compressed model has moved from the dense one, its exits included; in float32, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipstone.bundle import Fidelity
from skipstone.exporters.compress.activations import Stack, stacks_of
from skipstone.exporters.compress.work import Windows, Work
from skipstone.exporters.evaluation.readers import Reading
from skipstone.exporters.evaluation.sums import Sums

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
    counted, sums = text.first(_MOST_TOKENS), Sums(exits, dense_exits)
    for inputs, window in zip(counted.inputs(), counted.windows, strict=True):
        dense = read_window(work.dense, dense_exits, inputs)
        sums.add(window.tolist(), read_window(model, exits, inputs), dense)
    found = sums.prediction()
    return Fidelity(
        tokens=found.tokens,
        perplexity=found.perplexity,
        kl_divergence=max(found.kl_divergence or 0.0, 0.0),
        agreement=found.agreement or 0.0,
        exits=found.exits,
    )


def read_window(model: Any, exits: Sequence[int], inputs: dict[str, Tensor]) -> Reading:
    """What a model says after every token of a window; see `exit_logits`."""
    *early, last = exit_logits(model, exits, inputs)
    best = {exit_layer: part.argmax(-1).numpy() for exit_layer, part in zip(exits, early, strict=True)}
    return Reading(np.asarray(last.numpy(), np.float32), best)


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
