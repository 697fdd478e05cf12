"""What every linear layer of a model is given on a calibration text, block by block, as compression changes the weights.

    for block in walk(model, windows):
        for name, linear in block.linears.items():
            change(linear, block.inputs[name])

A block's inputs come from the blocks before it as they are by then: what one of them got wrong, the next can allow for
(GPTQ, https://arxiv.org/abs/2210.17323; SparseGPT, https://arxiv.org/abs/2301.00774). One block's statistics are held
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.exporters.encoder_decoder_modules import self_attention

_NORMS = ("norm", "final_layernorm")


@dataclass(frozen=True)
class Inputs:
    """What a linear layer was given.

    Attributes:
        count: rows, one per token.
        second_moment: mean of x xᵀ over them, float64 [inputs, inputs].
        mean_abs: mean of |x|, float32 [inputs].
        max_abs: largest |x|, float32 [inputs].
    """

    count: int
    second_moment: Tensor
    mean_abs: Tensor
    max_abs: Tensor

    @cached_property
    def mean_square(self) -> Tensor:
        """Mean of x² by input, float32 [inputs]: what llama.cpp calls importance."""
        return self.second_moment.diagonal().float()

    @cached_property
    def norms(self) -> Tensor:
        """Euclidean norm by input over all rows, float32 [inputs], as Wanda weighs weights."""
        return (self.second_moment.diagonal() * self.count).sqrt().float()


@dataclass(frozen=True)
class Block:
    """One block, its inputs taken, its weights open to change.

    Attributes:
        name: in the model, say `model.layers.3`.
        module: the block itself.
        linears: its linear layers by their names within it.
        inputs: theirs; layers fed by one tensor share one.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    inputs: dict[str, Inputs]


@dataclass(frozen=True)
class Stack:
    """A run of blocks between an embedding and a norm.

    Attributes:
        module: transformers' model of it.
        name: of its list of blocks in the whole model, say `model.layers`.
        norm: name of the norm's attribute.
    """

    module: Any
    name: str
    norm: str

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        found: nn.ModuleList = getattr(self.module, self._attribute)
        return found

    @property
    def _attribute(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @torch.no_grad()
    def run(self, index: int, hidden: Sequence[Tensor], **given: Sequence[Tensor]) -> list[Tensor]:
        """One block over windows: hidden states [1, n, hidden_size] each → the same.

        Args:
            index: of the block.
            hidden: by window.
            given: what else the stack takes, by window.
        """
        with self._alone(index):
            return [
                self.module(
                    inputs_embeds=states,
                    use_cache=False,
                    **{name: values[window] for name, values in given.items()},
                ).last_hidden_state
                for window, states in enumerate(hidden)
            ]

    @contextmanager
    def _alone(self, index: int) -> Iterator[None]:
        """The stack with one block and without its norm, so that transformers itself makes masks and positions.

        T5 keeps the biases of relative positions in its first block, for all: they are lent.
        """
        every, norm = self.blocks, getattr(self.module, self.norm)
        lent = self._attribute == "block" and index > 0
        if lent:
            attention = self_attention(every[index])
            attention.relative_attention_bias = self_attention(every[0]).relative_attention_bias
            attention.has_relative_attention_bias = True
        setattr(self.module, self._attribute, nn.ModuleList([every[index]]))
        setattr(self.module, self.norm, nn.Identity())
        try:
            yield
        finally:
            setattr(self.module, self._attribute, every)
            setattr(self.module, self.norm, norm)
            if lent:
                del attention.relative_attention_bias
                attention.has_relative_attention_bias = False


def stacks_of(model: Any) -> tuple[Stack, ...]:
    """A decoder's one stack, or an encoder-decoder's two, in the order of computation."""
    if model.config.is_encoder_decoder:
        return tuple(
            Stack(getattr(model, side), f"{side}.block", "final_layer_norm")
            for side in ("encoder", "decoder")
        )
    norm = next(name for name in _NORMS if hasattr(model.model, name))
    return (Stack(model.model, "model.layers", norm),)


def walk(model: Any, windows: Sequence[Tensor], sources: Sequence[Tensor] | None = None) -> Iterator[Block]:
    """Every block in turn, with its linear layers' inputs; what the caller changes in it shapes the inputs of the next.

    Args:
        model: from `skipstone.exporters.checkpoint.load_eager`, a decoder or a T5.
        windows: token ids, int64 [n] each; of an encoder-decoder, the decoder's.
        sources: token ids that the encoder reads, one per window; None for a decoder alone.
    """
    source_states: dict[str, Sequence[Tensor]] = {}
    for stack in stacks_of(model):
        texts = sources if sources is not None and stack.name.startswith("encoder") else windows
        with torch.no_grad():
            hidden = [stack.module.embed_tokens(tokens[None]) for tokens in texts]
        given = source_states if stack.name.startswith("decoder") else {}
        for index, module in enumerate(stack.blocks):
            linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
            with _watching(linears) as watch:
                stack.run(index, hidden, **given)
            yield Block(f"{stack.name}.{index}", module, linears, watch.inputs())
            hidden = stack.run(index, hidden, **given)
        if stack.name.startswith("encoder"):
            norm = getattr(stack.module, stack.norm)
            with torch.no_grad():
                source_states["encoder_hidden_states"] = [norm(states) for states in hidden]


class _Sums:
    """Sums over the rows of one tensor that feeds linear layers."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.second_moment = torch.zeros(size, size, dtype=torch.float64)
        self.abs = torch.zeros(size, dtype=torch.float64)
        self.max_abs = torch.zeros(size)

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        self.count += len(rows)
        self.second_moment += (rows.T @ rows).double()
        self.abs += rows.abs().sum(0, dtype=torch.float64)
        self.max_abs = torch.maximum(self.max_abs, rows.abs().amax(0))

    def inputs(self) -> Inputs:
        mean_abs = (self.abs / self.count).float()
        return Inputs(self.count, self.second_moment.div_(self.count), mean_abs, self.max_abs)


class _Watch:
    """Sums by linear layer; layers fed by the same tensor share one."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self._leader: dict[str, str] = {}
        self._fed: tuple[Tensor, str] | None = None

    def take(self, name: str, x: Tensor) -> None:
        """Take in what a layer is about to be given."""
        if self._fed is not None and self._fed[0] is x:
            self._leader[name] = self._leader[self._fed[1]]
            return
        self._leader[name] = name
        self._fed = x, name
        self._sums.setdefault(name, _Sums(x.shape[-1])).add(x)

    def inputs(self) -> dict[str, Inputs]:
        found = {name: sums.inputs() for name, sums in self._sums.items()}
        return {name: found[leader] for name, leader in self._leader.items()}


@contextmanager
def _watching(linears: dict[str, nn.Linear]) -> Iterator[_Watch]:
    watch = _Watch()

    def hook(name: str) -> Any:
        return lambda _module, arguments: watch.take(name, arguments[0])

    handles = [part.register_forward_pre_hook(hook(name)) for name, part in linears.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
