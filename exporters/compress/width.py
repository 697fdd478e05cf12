"""Width pruning: groups of heads and neurons go, as many from every layer, so that every format carries the result.

The output matrix is then refitted to what stays: with S = E x xᵀ over what it was given, W' = W S[:, K] S[K, K]⁻¹ is
the matrix over the kept inputs K whose outputs are closest to the old ones (least squares).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.parts import attentions, feed_forwards, keep_heads, keep_neurons
from skipstone.exporters.compress.scores import WITHOUT_TEXT, Scores, open_scorer, output_moments
from skipstone.exporters.compress.steps import (
    Details,
    Shape,
    Step,
    Target,
    refuse_after_codes,
    refuse_after_factors,
)
from skipstone.exporters.compress.work import Work

_DAMPING = 1e-4
_DIVIDES = "LlamaForCausalLM"  # whose configuration is valid only if its heads divide its channels
_BLOCK = 32  # weights that quantised formats keep together: narrower rows cost more bits


class _Prune(Step):
    """What both ways to prune share.

    Attributes:
        by: how to judge heads and neurons (`skipstone.exporters.compress.scores`).
        refit: whether to fit the output matrices to what stays; needs a calibration text.
        widths: `uniform`, as many in every layer.
    """

    by: str = "activation"
    refit: bool = True
    widths: Literal["uniform", "per-layer"] = "uniform"

    @property
    def needs_calibration(self) -> bool:
        """Whether the text is read for scores or for refitting."""
        return self.refit or self.by not in WITHOUT_TEXT

    def check(self, shape: Shape, target: Target) -> Shape:
        open_scorer(self.by)
        refuse_after_codes(shape, self.kind)
        refuse_after_factors(shape, self.kind)
        if self.widths == "per-layer":
            carrier = f"a GGUF of {shape.architecture}" if target.format == "gguf" else "its checkpoint"
            raise UsageError(
                f"{self.kind}: widths that differ between layers cannot be written: {carrier} has one width for all",
                hint="leave out widths=per-layer; drop_layers takes whole layers where others are needed more",
            )
        return self._check_width(shape)

    def _check_width(self, shape: Shape) -> Shape:
        raise NotImplementedError

    def _refitted(self, model: nn.Module, work: Work, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """By part, its output matrix over the inputs that stay."""
        if not self.refit:
            return {}
        return {
            part.name: refit(part.output.weight, moment, kept[part.name])
            for part, moment in output_moments(model, work)
            if part.name in kept
        }


class PruneHeads(_Prune):
    """Take groups of heads out of every attention module: key-value heads with the query heads that share them.

    Attributes:
        count: groups to take from each.
    """

    kind: ClassVar[str] = "prune_heads"
    count: Annotated[int, Field(gt=0)]

    def _check_width(self, shape: Shape) -> Shape:
        left = shape.key_value_heads - self.count
        if left < 1:
            raise UsageError(
                f"prune_heads: {self.count} of {shape.key_value_heads} groups of heads cannot go",
                hint="at least one must stay; prune_width takes neurons, drop_layers whole layers",
            )
        heads = left * (shape.heads // shape.key_value_heads)
        if shape.architecture == _DIVIDES and shape.hidden_size % heads:
            raise UsageError(
                f"prune_heads: transformers takes no {shape.architecture} of {heads} heads, which do not divide its "
                f"{shape.hidden_size} channels",
                hint=f"take more groups or fewer; now there are {shape.key_value_heads} of "
                f"{shape.heads // shape.key_value_heads} heads each",
            )
        return replace(shape, heads=heads, key_value_heads=left)

    def apply(self, model: nn.Module, work: Work) -> Details:
        scores = open_scorer(self.by)(model, work)
        kept = choose_groups(model, scores, self.count)
        columns = {part.name: part.columns(kept[part.name]) for part in attentions(model)}
        keep_heads(model, kept, self._refitted(model, work, columns))
        return {"kept": kept}


class PruneWidth(_Prune):
    """Take neurons out of every feed-forward network.

    Attributes:
        share: of the neurons that goes, at most: what stays is rounded up to a multiple of 32; or
        keep: how many stay.
    """

    kind: ClassVar[str] = "prune_width"
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        if (self.share is None) == (self.keep is None):
            raise ValueError("either share or keep was expected")
        return self

    def left(self, size: int) -> int:
        """How many of so many neurons stay."""
        if self.keep is not None:
            return self.keep
        exact = size * (1 - (self.share or 0.0))
        return min(-int(-exact // _BLOCK) * _BLOCK, size)

    def _check_width(self, shape: Shape) -> Shape:
        left = self.left(shape.ffn_size)
        if left >= shape.ffn_size:
            asked = f"share {self.share}" if self.keep is None else f"keep {self.keep}"
            raise UsageError(
                f"prune_width: {asked} takes none of {shape.ffn_size} neurons",
                hint=f"widths come in multiples of {_BLOCK}; ask for more",
            )
        return replace(shape, ffn_size=left)

    def apply(self, model: nn.Module, work: Work) -> Details:
        scores = open_scorer(self.by)(model, work)
        kept = {}
        for network in feed_forwards(model):
            best = scores.neurons[network.name].topk(self.left(network.size)).indices
            kept[network.name] = best.sort().values
        keep_neurons(model, kept, self._refitted(model, work, kept))
        return {"left": len(next(iter(kept.values())))}


def choose_groups(model: Any, scores: Scores, count: int) -> dict[str, list[int]]:
    """By attention module, the groups of heads that stay: all but the `count` of least score.

    Modules that share biases of relative positions lose the same ones, those of least total score.
    """
    judged = dict(scores.heads)
    parts = attentions(model)
    for side in ("encoder", "decoder"):
        shared = [part.name for part in parts if part.shares_biases and part.name.startswith(side)]
        if shared:
            total = torch.stack([scores.heads[name] for name in shared]).sum(0)
            judged |= dict.fromkeys(shared, total)
    return {part.name: sorted(judged[part.name].topk(part.groups - count).indices.tolist()) for part in parts}


def refit(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The matrix over some inputs whose outputs are closest to those of the whole one.

    Args:
        weight: W, float32 [outputs, inputs].
        moment: S = E x xᵀ over its inputs x, float64 [inputs, inputs].
        kept: K, int64, ascending.

    Returns:
        W S[:, K] (S[K, K] + λI)⁻¹, float32 [outputs, kept]; λ is a ten-thousandth of the mean diagonal.
    """
    inner = moment[kept][:, kept]
    damped = inner + _DAMPING * inner.diagonal().mean().clamp(min=1e-12) * torch.eye(
        len(kept), dtype=torch.float64
    )
    # W = W[:, K] + the part that the others leave to K: solved for that alone, so that inputs never seen keep theirs.
    others = torch.ones(len(moment), dtype=torch.bool)
    others[kept] = False
    moved = weight.double()[:, others] @ moment[others][:, kept]
    fitted: Tensor = weight.double()[:, kept] + torch.linalg.solve(damped, moved.T).T
    return fitted.float()
