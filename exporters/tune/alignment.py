"""Showing one cross-attention head of every decoder layer where in the source the next target comes from.

Where output resembles input, a decoder has to find its place in the source. T5's cross-attention knows no positions,
so that is learned late; told the place, a head learns it early. After Garg et al. (arXiv 1909.02074), who supervise
one head with alignments of words; here they follow from comparing the two texts.

    source   Their  is  a   eror  .  </s>
    target   There  is  an  error .  </s>
    place      0     1  2    3    4   5
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NOWHERE = -1


def align(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """For every token of the target its place in the source, NOWHERE for what was put in.

    Tokens that replace others are aligned with them in order, the last of them with all that are left.
    """
    places: list[int] = []
    for kind, begin, end, first, last in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        count = last - first
        if kind == "insert":
            places += [NOWHERE] * count
        elif kind != "delete":
            places += [min(begin + index, end - 1) for index in range(count)]
    return places


def alignment_loss(cross: Any, states: Tensor, source: Tensor, padding: Tensor, alignment: Tensor) -> Tensor:
    """Cross-entropy in nats of a layer's first head to the places, averaged over the targets that have one.

    Args:
        cross: the decoder layer's cross-attention sublayer (T5LayerCrossAttention).
        states: [batch, length, width], what enters it.
        source: [batch, source length, width], the encoder's output.
        padding: [batch, 1, 1, source length], added to the scores.
        alignment: int64 [batch, length], of the targets; negative where there is none.
    """
    attention = cross.EncDecAttention
    size = attention.key_value_proj_dim
    queries = functional.linear(cross.layer_norm(states), attention.q.weight[:size])
    keys = functional.linear(source, attention.k.weight[:size])
    scores = (queries @ keys.transpose(1, 2)).float() + padding[:, 0]
    losses = functional.cross_entropy(
        scores.flatten(0, 1), alignment.clamp(min=NOWHERE).flatten(), ignore_index=NOWHERE, reduction="sum"
    )
    return losses / torch.clamp((alignment >= 0).sum(), min=1)
