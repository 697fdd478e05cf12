"""Channels scaled on one side of a product and unscaled on the other, so that the model stays the same and its weights
are easier to round.

What is multiplied into a matrix's columns is divided out of whatever gives it its inputs: a norm's gain, or the rows of
the matrix before it, so that the result is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.exporters.compress.activations import Block, Inputs


@dataclass(frozen=True)
class Fold:
    """A place where channels can be scaled.

    Attributes:
        giver: name within the block of the norm or linear layer that gives the inputs.
        takers: names of the linear layers that take them.
        repeat: channels that share one of the giver's rows, as query heads share a key-value head, in runs of `run`.
        run: see there.
    """

    giver: str
    takers: tuple[str, ...]
    repeat: int = 1
    run: int = 1


def folds_of(block: Block) -> tuple[Fold, ...]:
    """The places in one block of a decoder or a T5."""
    return _t5_folds(block) if hasattr(block.module, "layer") else _decoder_folds(block)


def shared(fold: Fold, scales: Tensor) -> Tensor:
    """Scales [channels] made equal, by their geometric mean, for channels that share one of the giver's rows."""
    if fold.repeat == 1:
        return scales
    apart = scales.log().reshape(-1, fold.repeat, fold.run).mean(1, keepdim=True)
    return apart.exp().expand(-1, fold.repeat, -1).reshape(-1)


@torch.no_grad()
def apply_fold(block: Block, fold: Fold, scales: Tensor, inputs: Mapping[str, Inputs]) -> dict[str, Inputs]:
    """Scale a block's weights in place.

    Args:
        block: holds the weights.
        fold: where.
        scales: positive, float32 [channels]; the takers' columns are multiplied by them.
        inputs: of the block's linear layers before.

    Returns:
        The inputs after.
    """
    rows = scales if fold.repeat == 1 else scales.reshape(-1, fold.repeat, fold.run)[:, 0].reshape(-1)
    giver: Any = block.module.get_submodule(fold.giver)
    if isinstance(giver, nn.Linear):
        giver.weight.div_(rows[:, None])
        if giver.bias is not None:
            giver.bias.div_(rows)
    else:
        giver.weight.div_(rows)
    changed = dict(inputs)
    for name in fold.takers:
        block.linears[name].weight.mul_(scales)
        changed[name] = scaled(inputs[name], 1.0 / scales)
    return changed


def scaled(inputs: Inputs, factors: Tensor) -> Inputs:
    """What inputs become when every channel is multiplied by its factor, float32 [inputs]."""
    both = factors.double()[:, None] * factors.double()
    return replace(
        inputs,
        second_moment=inputs.second_moment * both,
        mean_abs=inputs.mean_abs * factors,
        max_abs=inputs.max_abs * factors,
    )


def _decoder_folds(block: Block) -> tuple[Fold, ...]:
    attention: Any = block.module.get_submodule("self_attn")
    heads = block.linears["self_attn.o_proj"].in_features // attention.head_dim
    groups = block.linears["self_attn.v_proj"].out_features // attention.head_dim
    into_attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    return (
        Fold("input_layernorm", into_attention),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), heads // groups, attention.head_dim),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    )


def _t5_folds(block: Block) -> tuple[Fold, ...]:
    """Of cross-attention, K and V stay: their inputs come from the encoder's one norm, and feed every layer."""
    whole: Any = block.module
    *attentions, last = range(len(whole.layer))
    found = []
    for index in attentions:
        kind = "SelfAttention" if index == 0 else "EncDecAttention"
        name = f"layer.{index}.{kind}"
        takers = "qkv" if index == 0 else "q"
        found.append(Fold(f"layer.{index}.layer_norm", tuple(f"{name}.{taker}" for taker in takers)))
        found.append(Fold(f"{name}.v", (f"{name}.o",)))
    dense = f"layer.{last}.DenseReluDense"
    inward = tuple(
        name for name in (f"{dense}.wi", f"{dense}.wi_0", f"{dense}.wi_1") if name in block.linears
    )
    found.append(Fold(f"layer.{last}.layer_norm", inward))
    # The last of them meets `wo` linearly: a gate's other side, or through a ReLU, which positive scales pass.
    found.append(Fold(inward[-1], (f"{dense}.wo",)))
    return tuple(found)
