"""The attention modules and feed-forward networks of a model under one name each, and what is left of them.

Rows and columns that belong together go together: a group of query heads with the key-value head that it shares, and
all matrices of a gated network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.exporters.compress.activations import Stack, stacks_of
from skipstone.exporters.encoder_decoder_modules import self_attention, source_attention


@dataclass(frozen=True)
class Attention:
    """One attention module.

    Attributes:
        name: in the model.
        module: transformers'.
        query: projection to queries, of all heads; likewise
        key: …
        value: …
        output: projection of all heads' outputs into the residual stream.
        groups: key-value heads; each serves `heads` query heads.
        heads: see there.
        size: channels of a head.
        shares_biases: whether its heads have biases of relative positions, which a T5 has once per stack: the same heads
            must then go from all its layers.
    """

    name: str
    module: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    groups: int
    heads: int
    size: int
    shares_biases: bool = False

    def columns(self, groups: Sequence[int]) -> Tensor:
        """Inputs of `output`, and rows of `query`, that belong to these groups: int64."""
        return _places(groups, self.heads * self.size)

    def rows(self, groups: Sequence[int]) -> Tensor:
        """Rows of `key` and `value` that belong to these groups: int64."""
        return _places(groups, self.size)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network.

    Attributes:
        name: in the model.
        inputs: matrices whose rows are neurons; two of a gated network.
        output: the matrix whose columns are neurons.
    """

    name: str
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.output.in_features


def attentions(model: Any) -> tuple[Attention, ...]:
    """A model's attention modules, in the order of computation."""
    found = []
    for stack, name, layer in _layers(model):
        if not model.config.is_encoder_decoder:
            found.append(_of_decoder(f"{name}.self_attn", layer.self_attn))
            continue
        found.append(_of_t5(f"{name}.layer.0.SelfAttention", self_attention(layer), shares_biases=True))
        if stack.name.startswith("decoder"):
            module = source_attention(layer)
            found.append(_of_t5(f"{name}.layer.1.EncDecAttention", module, shares_biases=False))
    return tuple(found)


def feed_forwards(model: Any) -> tuple[FeedForward, ...]:
    """A model's feed-forward networks, in the order of computation."""
    found = []
    for _, name, layer in _layers(model):
        if not model.config.is_encoder_decoder:
            mlp = layer.mlp
            found.append(FeedForward(f"{name}.mlp", (mlp.gate_proj, mlp.up_proj), mlp.down_proj))
            continue
        last = len(layer.layer) - 1
        network = layer.layer[last].DenseReluDense
        names = ("wi_0", "wi_1") if hasattr(network, "wi_0") else ("wi",)
        inputs = tuple(getattr(network, key) for key in names)
        found.append(FeedForward(f"{name}.layer.{last}.DenseReluDense", inputs, network.wo))
    return tuple(found)


def _layers(model: Any) -> Iterator[tuple[Stack, str, Any]]:
    """Every layer with its stack and its name in the model."""
    for stack in stacks_of(model):
        for index, layer in enumerate(stack.blocks):
            yield stack, f"{stack.name}.{index}", layer


def keep_heads(model: Any, kept: Mapping[str, Sequence[int]], outputs: dict[str, Tensor]) -> None:
    """Take all other groups of heads out of every attention module, the configuration included.

    Args:
        model: changed in place.
        kept: by attention module, ascending numbers of groups, as many for each.
        outputs: by attention module, the matrix to put in place of what is left of `output`, if another.
    """
    biases: set[int] = set()
    for attention in attentions(model):
        groups = kept[attention.name]
        columns, rows = attention.columns(groups), attention.rows(groups)
        keep_rows(attention.query, columns)
        for projection in (attention.key, attention.value):
            keep_rows(projection, rows)
        keep_columns(attention.output, columns, outputs.get(attention.name))
        if model.config.is_encoder_decoder:
            attention.module.n_heads = len(groups)
            attention.module.inner_dim = len(columns)
            table = getattr(attention.module, "relative_attention_bias", None)
            if table is not None and id(table) not in biases:
                biases.add(id(table))
                table.weight = _parameter(table.weight[:, torch.tensor(groups)])
                table.embedding_dim = len(groups)
    _adapt_config(model, len(next(iter(kept.values()))))


def keep_neurons(model: Any, kept: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    """Take all other neurons out of every feed-forward network, the configuration included.

    Args:
        model: changed in place.
        kept: by network, ascending numbers of neurons, int64, as many for each.
        outputs: by network, the matrix to put in place of what is left of `output`, if another.
    """
    for network in feed_forwards(model):
        for projection in network.inputs:
            keep_rows(projection, kept[network.name])
        keep_columns(network.output, kept[network.name], outputs.get(network.name))
    size = len(next(iter(kept.values())))
    for config in _configs(model):
        setattr(config, "d_ff" if config.is_encoder_decoder else "intermediate_size", size)


def keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    """Leave a linear layer these outputs."""
    linear.weight = _parameter(linear.weight[rows])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[rows])
    linear.out_features = len(rows)


def keep_columns(linear: nn.Linear, columns: Tensor, weight: Tensor | None = None) -> None:
    """Leave a linear layer these inputs; `weight` [outputs, columns left] takes the place of those left, if given."""
    linear.weight = _parameter(linear.weight[:, columns] if weight is None else weight)
    linear.in_features = len(columns)


def _of_decoder(name: str, module: Any) -> Attention:
    size = module.head_dim
    groups = module.k_proj.out_features // size
    return Attention(
        name=name,
        module=module,
        query=module.q_proj,
        key=module.k_proj,
        value=module.v_proj,
        output=module.o_proj,
        groups=groups,
        heads=module.q_proj.out_features // size // groups,
        size=size,
    )


def _of_t5(name: str, module: Any, *, shares_biases: bool) -> Attention:
    size = module.key_value_proj_dim
    groups = module.k.out_features // size
    return Attention(name, module, module.q, module.k, module.v, module.o, groups, 1, size, shares_biases)


def _adapt_config(model: Any, groups: int) -> None:
    for config in _configs(model):
        if model.config.is_encoder_decoder:
            config.num_heads = groups
            continue
        heads = config.num_attention_heads
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_attention_heads = groups * (heads // config.num_key_value_heads)
        config.num_key_value_heads = groups


def _configs(model: Any) -> list[Any]:
    """The model's configuration, and the copies that a T5's stacks have."""
    found = [model.config, *(stack.module.config for stack in stacks_of(model))]
    return list({id(config): config for config in found}.values())


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _places(groups: Sequence[int], width: int) -> Tensor:
    return (torch.tensor(list(groups))[:, None] * width + torch.arange(width)).flatten()
