"""Causal attention in query blocks, for training on CPUs.

PyTorch's fused CPU attention is slow backwards. Plain matrix products over blocks of queries, each against
the keys it can see, are about twice as fast for head dimensions and lengths of small models, and compile
into the layer's graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

NAME = "skipstone_blocked_causal"
_BLOCK = 128


def blocked_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [B, H, T, D], key and value [B, G, T, D], output [B, T, H,
    D].

    Always causal over T positions without padding; `attention_mask` is not looked at. Scores are in the
    inputs' dtype and their softmax in float32.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    shared = heads // groups  # query heads that read one key head are stacked into one matrix product
    scaled = (query * (width**-0.5 if scaling is None else scaling)).reshape(
        batch * groups, shared, length, width
    )
    keys = key.reshape(batch * groups, length, width)
    values = value.reshape(batch * groups, length, width)
    outputs = []
    for begin in range(0, length, _BLOCK):
        end = min(begin + _BLOCK, length)
        rows = end - begin
        scores = torch.bmm(
            scaled[:, :, begin:end].reshape(-1, shared * rows, width), keys[:, :end].transpose(1, 2)
        )
        visible = _visible(begin, end, sliding_window, query.device)
        masked = torch.where(visible, scores.view(-1, shared, rows, end).float(), float("-inf"))
        weights = torch.softmax(masked, dim=-1).to(query.dtype)
        weights = torch.nn.functional.dropout(weights, dropout, training=module.training)
        outputs.append(
            torch.bmm(weights.view(-1, shared * rows, end), values[:, :end]).view(-1, shared, rows, width)
        )
    output = torch.cat(outputs, dim=2).view(batch, heads, length, width)
    return output.transpose(1, 2), None


def use_for_training(model: PreTrainedModel) -> None:
    """Let `model` attend with `blocked_causal_attention`; only for runs without padding, cache or mask."""
    AttentionInterface.register(NAME, blocked_causal_attention)
    model.config._attn_implementation = NAME


def _visible(begin: int, end: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which of keys 0 … end-1 queries begin … end-1 see: bool [end - begin, end]."""
    queries = torch.arange(begin, end, device=device).unsqueeze(1)
    keys = torch.arange(end, device=device).unsqueeze(0)
    causal = keys <= queries
    return causal if sliding_window is None else causal & (queries - keys < sliding_window)
