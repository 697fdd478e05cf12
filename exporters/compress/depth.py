"""Depth pruning: whole layers go.

A residual network still works with a layer left out, as far as the layer added little. Which to take is chosen by
place, by what a layer changes, or by what the model loses without it:

- `top`: the last ones, so that the first exits stay as they are; `bottom`: the first ones; `alternate`: evenly spread,
  every other one for half of them (the rule of LayerDrop, https://arxiv.org/abs/1909.11556, section 4.2); `symmetric`:
  the middle ones, as many of the first layers staying as of the last.
- `cosine`: the layers whose output is most like their input, by the mean of 1 − cos over the calibration tokens
  (block influence of ShortGPT, https://arxiv.org/abs/2403.03853, section 3.1).
- `contribution`: the layers without which the loss on the calibration text is least, one after the other, each judged
  with those before it gone (after https://arxiv.org/abs/2004.03844, section 3; `iterative = false` judges all by
  themselves).

Models trained with layer dropout stand any depth; others want `recover` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import Stack, stacks_of
from skipstone.exporters.compress.layers import keep_layers, side_of, without
from skipstone.exporters.compress.steps import Details, Shape, Step, Target
from skipstone.exporters.compress.work import Windows, Work, mean_loss

Rule = Literal["top", "bottom", "alternate", "symmetric", "cosine", "contribution"]
_MEASURED = ("cosine", "contribution")


class DropLayers(Step):
    """Take layers out.

    Attributes:
        count: how many; or
        layers: which, by their numbers from 0.
        by: how to choose them.
        stack: whose layers, of an encoder-decoder.
        iterative: whether `contribution` judges every layer anew once another is gone.
    """

    kind: ClassVar[str] = "drop_layers"
    count: Annotated[int, Field(gt=0)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    by: Rule = "cosine"
    stack: Literal["decoder", "encoder"] = "decoder"
    iterative: bool = True

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        if (self.count is None) == (not self.layers):
            raise ValueError("either count or layers was expected")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)}: one is named twice")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether layers are chosen by what they do."""
        return not self.layers and self.by in _MEASURED

    def check(self, shape: Shape, target: Target) -> Shape:
        encoder = self.stack == "encoder"
        total = shape.encoder_layers if encoder else shape.layers
        if not total:
            raise UsageError(
                f"drop_layers: {shape.architecture} is a decoder alone", hint="leave out stack=encoder"
            )
        dropped = self.count or len(self.layers)
        if dropped >= total or max(self.layers, default=0) >= total:
            found = f"layers {list(self.layers)}" if self.layers else f"{dropped} layers"
            raise UsageError(
                f"drop_layers: {found} cannot go from a {self.stack} of {total}",
                hint=f"they are numbered from 0 to {total - 1}, and at least one must stay",
            )
        if target.format == "gguf" and shape.period > 1:
            self._check_period(shape)
        left = total - dropped
        return replace(shape, encoder_layers=left) if encoder else replace(shape, layers=left)

    def apply(self, model: nn.Module, work: Work) -> Details:
        stack = next(stack for stack in stacks_of(model) if side_of(stack) == self.stack)
        scores: dict[int, float] = {}
        dropped: Sequence[int] = self.layers
        if not dropped:
            dropped, scores = self._choose(model, stack, work)
        kept = [index for index in range(len(stack.blocks)) if index not in dropped]
        keep_layers(model, stack, kept, work)
        named = {str(index): score for index, score in scores.items()}
        return {"dropped": sorted(dropped), **({"scores": named} if named else {})}

    def _choose(self, model: Any, stack: Stack, work: Work) -> tuple[tuple[int, ...], dict[int, float]]:
        """The layers to take, and by layer what it was judged by."""
        count, total = self.count or 0, len(stack.blocks)
        if self.by == "contribution":
            return least_missed(model, stack, count, work, iterative=self.iterative)
        if self.by == "cosine":
            scores = dict(enumerate(influences(model, stack, work.calibration)))
            return tuple(sorted(scores, key=lambda index: scores[index])[:count]), scores
        return by_place(self.by, count, total), {}

    def _check_period(self, shape: Shape) -> None:
        """Refuse to break a pattern that a GGUF knows by place alone."""
        kept = [index for index in range(shape.layers) if index not in self.layers]
        places = [(index + 1) % shape.period for index in kept]
        expected = [(number + 1) % shape.period for number in range(len(kept))]
        if not self.layers or [place == 0 for place in places] != [place == 0 for place in expected]:
            raise UsageError(
                f"drop_layers: in a GGUF, every {shape.period}th layer of {shape.architecture} must be one without "
                "rotary embedding",
                hint=f"name layers in whole groups of {shape.period}, say layers=4+5+6+7, or use --format executorch",
            )


def by_place(rule: str, count: int, total: int) -> tuple[int, ...]:
    """Layers to drop by where they are.

    >>> by_place("alternate", 3, 6)
    (1, 3, 5)
    """
    if rule == "top":
        return tuple(range(total - count, total))
    if rule == "bottom":
        return tuple(range(count))
    if rule == "symmetric":
        first = (total - count + 1) // 2
        return tuple(range(first, first + count))
    return tuple((index + 1) * total // count - 1 for index in range(count))


@torch.no_grad()
def influences(model: Any, stack: Stack, text: Windows) -> list[float]:
    """By layer, 1 − the mean cosine between its input and its output over the tokens of a text."""
    sums = torch.zeros(len(stack.blocks), dtype=torch.float64)
    count = 0

    def watch(index: int) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            sums[index] += torch.cosine_similarity(given[0], hidden, dim=-1).double().sum()

        return hook

    handles = [block.register_forward_hook(watch(index)) for index, block in enumerate(stack.blocks)]
    try:
        for inputs in text.inputs():
            model(**inputs)
            read = "decoder_input_ids" if side_of(stack) == "decoder" and text.sources else "input_ids"
            count += inputs[read].shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return [float(value) for value in 1.0 - sums / count]


def least_missed(
    model: Any, stack: Stack, count: int, work: Work, *, iterative: bool
) -> tuple[tuple[int, ...], dict[int, float]]:
    """The `count` layers without which the loss is least, one after the other.

    Returns:
        The layers in the order in which they went, and by layer the loss without it, in nats per token, when it was last
        judged.
    """
    text, total = work.calibration, len(stack.blocks)
    dropped: list[int] = []
    losses: dict[int, float] = {}
    for turn in range(count):
        if turn == 0 or iterative:
            for index in set(range(total)) - set(dropped):
                work.progress(f"without layer {index}", turn * total + index, count * total)
                with without(stack, (*dropped, index)):
                    losses[index] = mean_loss(model, text)
        left = sorted(set(losses) - set(dropped))
        dropped.append(min(left, key=lambda index: losses[index]))
    return tuple(dropped), losses
